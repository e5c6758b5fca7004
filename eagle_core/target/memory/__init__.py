"""How much memory a target takes, and how much is free."""
