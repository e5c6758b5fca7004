"""Checking, repairing and cleaning up a store."""

OLDER_THAN_HOURS = 24.0
"""Garbage is at least this old: longer than any process takes from writing an object to referring
to it, clock skew included."""
