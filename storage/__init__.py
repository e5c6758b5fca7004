"""Bytes: the hidden-state store's format, commit records, snapshots and verification.

Knows neither torch nor Prefect nor EAGLE-3: it keeps named arrays of whole samples, and refuses to
return anything that is not exactly what was committed.
"""
