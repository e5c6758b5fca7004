"""Prefect flows: wiring, retries, concurrency, artifacts. No tensor math and no file formats."""
