"""The EAGLE-3 core: conversations, templates, target model, draft model, loss, trainer, decoding.

Independent of Prefect and of the store's file format: hidden states enter through `SampleSource`
and leave as plain arrays (`eagle_core.samples`).
"""
