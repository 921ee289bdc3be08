"""The on-policy methods, one file each: settings with defaults, advantages and losses.

Nothing lists them. Every file of this package is one, so that a new one is in configurations, their hints, the training
loop and `prefarena methods` as soon as it is there.
"""

from __future__ import annotations

from prefarena.settings.discovery import found_in
from prefarena.settings.on_policy import OnPolicy, OnPolicyTraining


def discover() -> dict[str, type[OnPolicy]]:
    """Every method by its kind, sorted. Raises TypeError where a file of the package does not hold exactly one."""
    found = found_in(__path__, __name__, OnPolicy, "one class that is an OnPolicy, with its `training`, is wanted")
    for kind, method in found.items():
        training = method.model_fields.get("training")
        if training is None or not isinstance(training.default, OnPolicyTraining):
            raise TypeError(f"{kind}: {method.__name__} needs `training`, an OnPolicyTraining with its defaults")
    return found
