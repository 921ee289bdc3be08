"""Checks of the weights sent to an engine, and of those that it then holds. No Ray, no vLLM."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefarena.generation.checksums import ColumnSample
from prefarena.generation.interface import WeightMismatchError, WeightUpdateError


def check_complete(sent: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightUpdateError unless exactly the expected tensors are sent.

    A partial update is not harmless: vLLM fuses layers (q, k, v), and fills what was not sent of a fused one with
    whatever its buffer held.
    """
    missing = sorted(expected.keys() - sent.keys())
    if missing:
        raise WeightUpdateError(f"a weight update must hold every tensor of the model; missing: {_listed(missing)}")
    check_known(sent, expected)


def check_known(sent: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightUpdateError unless what is sent is among the expected tensors, with their shapes."""
    unknown = sorted(sent.keys() - expected.keys())
    if unknown:
        raise WeightUpdateError(f"a weight update holds tensors that the model does not have: {_listed(unknown)}")
    for name, shape in sent.items():
        if tuple(shape) != expected[name]:
            raise WeightUpdateError(f"{name} was sent with shape {tuple(shape)}, but the engine's is {expected[name]}")


def check_layers(sent: Collection[str], layers: Sequence[frozenset[str]]) -> None:
    """Raise WeightUpdateError unless what is sent makes up whole layers, for the reason given in `check_complete`."""
    touched = [layer for layer in layers if not layer.isdisjoint(sent)]
    missing = sorted(frozenset[str]().union(*touched) - set(sent))
    unknown = sorted(set(sent) - frozenset[str]().union(*touched))
    if missing or unknown:
        wrong = f"missing: {_listed(missing)}" if missing else f"not of any known layer: {_listed(unknown)}"
        raise WeightUpdateError(f"a part of a weight update must hold every tensor of a layer; {wrong}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@dataclass(frozen=True)
class Sums:
    """Checksums of what was sent, by name; with a sample, of some columns of wide tensors."""

    of: dict[str, int]
    sample: ColumnSample | None = None


@dataclass(frozen=True)
class Verified:
    """How much of a model was read back from an engine and equals what was sent; `skipped`: what was not read."""

    num_tensors: int
    num_parameters: int
    num_tensors_sent: int
    num_parameters_sent: int
    skipped: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share of the parameters that was compared, between 0 and 1."""
        return self.num_parameters / self.num_parameters_sent

    def __str__(self) -> str:
        told = (
            f"{self.num_tensors} of {self.num_tensors_sent} tensors ({100 * self.share:.1f} % of the parameters) were "
            f"read back from the engine and match what was sent"
        )
        if not self.skipped:
            return told
        return f"{told}; the layout of the others is unknown: {_listed(list(self.skipped))}"

    def summary(self) -> dict[str, Any]:
        """The summary for a manifest."""
        return {
            "num_tensors": self.num_tensors,
            "num_tensors_sent": self.num_tensors_sent,
            "share_of_parameters": self.share,
            "skipped": list(self.skipped),
        }


def check_held(held: Mapping[str, int], sent: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Verified:
    """Raise WeightMismatchError, naming the tensors, unless what is held is what was sent; say how much was compared.

    A tensor that the engine cannot show, as it keeps it in a layout that is not known here, is skipped and named.
    """
    wrong = [name for name in sent if name in held and held[name] != sent[name]]
    if wrong:
        raise WeightMismatchError(
            f"the engine's weights are not those that were sent: {_listed(wrong)} differ (if vLLM keeps this model's "
            f"weights in another layout, the check cannot work; turn it off with generation.verify_weights: false)"
        )
    sizes = {name: math.prod(shapes[name]) for name in sent}
    shown = [name for name in sent if name in held]
    return Verified(
        num_tensors=len(shown),
        num_parameters=sum(sizes[name] for name in shown),
        num_tensors_sent=len(sizes),
        num_parameters_sent=sum(sizes.values()),
        skipped=tuple(sorted(sizes.keys() - held.keys())),
    )
