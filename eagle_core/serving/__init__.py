"""Engines that serve a target with a draft: one interface, one module for each engine."""
