"""A draft's first weights, solved from the target's states instead of drawn (docs/closed-form.md).

The sums that the solve needs run over a sample of the training data. Nothing here trains.
"""
