"""Which settings to try next, and which trials are worth going on with. No training here, and no Ray."""
