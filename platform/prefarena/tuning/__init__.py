"""Which settings to try next, and which trials are worth continuing. No training here, and no Ray."""
