"""The record of the tuning by which a comparison's settings were chosen: the file that `tuned` names."""

from __future__ import annotations

from prefarena import stores
from prefarena.config import Comparison
from prefarena.errors import UserError
from prefarena.report.tuning_results import TuningResults, load_tuning, parse_tuning


def tuning_of(config: Comparison) -> TuningResults | None:
    """What the tuning found; None where the config names none.

    Raises UserError where it cannot be read, is something else, or is of none of the comparison's entries.
    """
    if config.tuned is None:
        return None
    found = _read(config.tuned)
    tuned, compared = [entry.name for entry in found.entries], [entry.name for entry in config.entries]
    if not set(tuned) & set(compared):
        raise UserError(
            f"tuned: {config.tuned} is of {', '.join(tuned) or 'no entries'}, but the comparison has none of them; "
            f"its entries are "
            f"{', '.join(compared)}; name the tuning of these entries, or leave `tuned` out"
        )
    return found


def _read(path: str) -> TuningResults:
    if not stores.is_url(path):
        return load_tuning(path)
    text = stores.read(path)
    if text is None:
        raise UserError(f"{path}: there is no such file; `prefarena tune` writes it")
    return parse_tuning(text, path)
