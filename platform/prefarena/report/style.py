"""How figures look, and how they are written: the same numbers give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

#: Colours that people with any colour vision can tell apart (Okabe and Ito, 2008); yellow is too light for text.
_KINDS = {
    "mpo": "#0072B2",
    "dpo": "#D55E00",
    "ipo": "#008060",
    "rlhf": "#B03A80",
    "grpo": "#5B4BB7",
    "rloo": "#2F8F9D",
    "best_of_n": "#8C4A3C",
    "sft": "#9A6A00",
    "dpo+eta": "#E69F00",
    "ipo+eta": "#56B4E9",
}
_OTHERS = ("#7A7A00", "#A0522D", "#6B8E23", "#4A6FA5", "#8E4585", "#55705A")
_MARKERS = ("o", "s", "^", "D", "v", "p", "<", ">", "h", "8")
GREY, BLACK = "#767676", "#222222"

_SETTINGS: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "svg.hashsalt": "prefarena",
}


class Look(NamedTuple):
    """Colour and marker of a method: either alone tells it from the others."""

    colour: str
    marker: str


def looks(names: list[str], kinds: list[str]) -> dict[str, Look]:
    """A look for every name: the first of a known kind has the kind's colour, others the free colours in turn."""
    found: dict[str, Look] = {}
    free = [*_OTHERS, *(colour for kind, colour in _KINDS.items() if kind not in kinds)]
    used: set[str] = set()
    num_others = 0
    for index, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        if kind in ("reference", "optimum"):
            found[name] = Look(GREY if kind == "reference" else BLACK, "X" if kind == "reference" else "*")
            continue
        colour = _KINDS.get(kind)
        if colour is None or colour in used:
            colour = free[num_others % len(free)]
            num_others += 1
        used.add(colour)
        found[name] = Look(colour, _MARKERS[index % len(_MARKERS)])
    return found


def on_ground(colour: str, ground: str, ratio: float = 3.2) -> str:
    """Move `colour` towards white or black as far as a contrast of `ratio` on `ground` requires.

    WCAG 2.2 asks for a contrast of 3 of what is needed to understand a figure.
    """
    end = (255, 255, 255) if _luminance(ground) < 0.18 else (0, 0, 0)
    start = _channels(colour)
    for percent in range(101):
        mixed = tuple(round(a + (b - a) * percent / 100) for a, b in zip(start, end, strict=True))
        found = "#{:02x}{:02x}{:02x}".format(*mixed)
        if contrast(found, ground) >= ratio:
            return found
    raise ValueError(f"no mixture of {colour} has a contrast of {ratio} on {ground}")


def contrast(first: str, second: str) -> float:
    """The contrast of two colours as WCAG 2.2 defines it, from 1 to 21."""
    darker, lighter = sorted((_luminance(first), _luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    shares = [channel / 255 for channel in _channels(colour)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib settings of all figures; figures must be made and written inside."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def write_figure(figure: Figure, folder: Path, name: str) -> Path:
    """Write `name`.svg and `name`.png under `folder`; returns the PNG's path."""
    folder.mkdir(parents=True, exist_ok=True)
    with house_style():
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", dpi=150)
    return folder / f"{name}.png"
