"""Text next to points, without overlap: a greedy search over positions around each point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

_RADII = (9.0, 14.0, 22.0, 34.0, 50.0, 70.0)  # points from the mark to the nearest edge of its text
_ANGLES = np.deg2rad(np.arange(0, 360, 15))
_LEADER_FROM = 20.0  # further away than this, a thin line ties the text to its mark


@dataclass(frozen=True)
class Label:
    """A text that belongs at (x, y), in data coordinates."""

    x: float
    y: float
    text: str
    colour: str


def place_labels(axes: Axes, labels: list[Label], obstacles: np.ndarray) -> None:
    """Write every label near its point, clear of other texts, of `obstacles` [N, 2] (data) and of the frame.

    Axis limits and the layout must be final.
    """
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    marks = np.array([[label.x, label.y] for label in labels] + list(obstacles), dtype=np.float64).reshape(-1, 2)
    pixels = axes.transData.transform(marks)
    frame, scale = axes.get_window_extent(renderer), figure.dpi / 72
    taken: list[Bbox] = []
    for index, label in enumerate(labels):
        text = axes.annotate(
            label.text,
            (label.x, label.y),
            (0, 0),
            textcoords="offset points",
            color=label.colour,
            fontsize=9,
            ha="center",
            va="center",
            zorder=6,
        )
        size = text.get_window_extent(renderer)
        offset, radius = _best_offset(pixels[index], size.width, size.height, pixels, taken, frame, scale)
        text.set_position((offset[0] / scale, offset[1] / scale))
        taken.append(_box(pixels[index] + offset, size.width, size.height))
        if radius > _LEADER_FROM:
            axes.annotate(
                "",
                (label.x, label.y),
                (_to_edge(offset, size) / scale).tolist(),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
            )


def _best_offset(
    mark: np.ndarray, width: float, height: float, marks: np.ndarray, taken: list[Bbox], frame: Bbox, scale: float
) -> tuple[np.ndarray, float]:
    """Offset in pixels of the text's centre with the least cost, and its distance in points."""
    best: tuple[float, np.ndarray, float] | None = None
    for radius in _RADII:
        for angle in _ANGLES:
            way = np.array([np.cos(angle), np.sin(angle)])
            offset = way * (radius * scale + np.array([width, height]) / 2 * np.abs(way) ** 0.5)
            box = _box(mark + offset, width, height)
            cost = radius / 10 + _penalty(box, marks, taken, frame, scale)
            if best is None or cost < best[0] - 1e-9:
                best = (cost, offset, radius)
    assert best is not None
    return best[1], best[2]


def _penalty(box: Bbox, marks: np.ndarray, taken: list[Bbox], frame: Bbox, scale: float) -> float:
    """Costs of lying over other texts (worst), outside the frame, and over marks."""
    margin = 3 * scale
    near = (
        (marks[:, 0] > box.x0 - margin)
        & (marks[:, 0] < box.x1 + margin)
        & (marks[:, 1] > box.y0 - margin)
        & (marks[:, 1] < box.y1 + margin)
    )
    outside = not (frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1)
    over_text = sum(_padded(other, margin).overlaps(box) for other in taken)
    return 40.0 * over_text + 30.0 * outside + 3.0 * float(near.sum())


def _padded(box: Bbox, margin: float) -> Bbox:
    return Bbox.from_extents(box.x0 - margin, box.y0 - margin / 3, box.x1 + margin, box.y1 + margin / 3)


def _box(centre: np.ndarray, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(centre[0] - width / 2, centre[1] - height / 2, width, height)


def _to_edge(offset: np.ndarray, size: Bbox) -> np.ndarray:
    """The point on the text box's edge that faces the mark, as an offset from the mark."""
    with np.errstate(divide="ignore"):
        shares = np.array([size.width, size.height]) / 2 / np.maximum(np.abs(offset), 1e-9)
    return offset * max(0.0, 1 - float(shares.min()))
