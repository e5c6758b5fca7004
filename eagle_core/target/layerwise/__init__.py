"""Targets whose decoder layers are on the device one at a time, or only some of them."""
