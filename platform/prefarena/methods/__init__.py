"""The off-policy methods, one file each: settings with defaults, formula, and what it needs of the reference.

Nothing lists them. Every file of this package is one, so that a new one is in configurations, their hints and
`prefarena methods` as soon as it is there. On-policy methods are files of `prefarena.methods.on_policy` likewise.
"""

from __future__ import annotations

from prefarena.settings.discovery import found_in
from prefarena.settings.off_policy import OffPolicy


def discover() -> dict[str, type[OffPolicy]]:
    """Every method by its kind, sorted. Raises TypeError where a file of the package does not hold exactly one."""
    return found_in(__path__, __name__, OffPolicy, "one class that is an OffPolicy and has a loss is wanted")
