"""EAGLE-3 itself: conversations, templates, target model, draft model, loss, trainer, decoding.

Knows neither Prefect nor any file format of the store: hidden states reach it through
`SampleSource` and leave it as plain arrays (`eagle_core.samples`).
"""
