"""Prefarena: RLHF and off-policy preference optimisation, compared on one footing."""

__version__ = "0.1.0"
