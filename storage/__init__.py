"""The hidden-state store: file format, commit records, snapshots and verification.

Knows neither torch nor Prefect nor EAGLE-3. It stores named arrays of whole samples, and never
returns data that differs from what was committed.
"""
