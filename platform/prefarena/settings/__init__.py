"""What groups of settings are built from, and what off-policy methods share; `prefarena.config` is built upon it."""
