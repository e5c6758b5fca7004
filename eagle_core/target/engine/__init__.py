"""Engines that run a target in a process of their own."""
