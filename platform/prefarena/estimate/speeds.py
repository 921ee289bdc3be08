"""Seconds of a stage's parts: by what was timed on this machine, or by a card's peaks and the share of them that is
reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from prefarena.config import Comparison, EvaluationJudge
from prefarena.estimate.hardware import Cards
from prefarena.estimate.interval import NOTHING, Interval, total
from prefarena.estimate.work import (
    Files,
    Judging,
    Listing,
    Manner,
    Part,
    Passes,
    Raw,
    Sampling,
    Sending,
    StageWork,
    Start,
    Steps,
    Writing,
)

_FLOAT, _HALF = 4, 2  # bytes
#: Bytes that AdamW reads and writes of each number: weight, gradient and both moments, and all but the gradient again.
_ADAM = 28
#: An all-gather before each pass; in a training's, one more before the backward pass, and a reduction of the gradient.
_GATHERS, _GATHERS_IN_TRAINING = 1, 3
#: Kernels that a pass launches in each layer, and in one with its gradient (counted for Llama, roughly); and a launch.
_KERNELS, _KERNELS_IN_TRAINING, _LAUNCH = 30, 100, Interval(3e-6, 6e-6, 12e-6)
#: Guesses, not measurements: bytes/s of a disk, and of weights that go through host memory; starting a pool of actors,
#: and engines; a row of a table.
_DISK, _HOST = Interval(0.3e9, 1e9, 3e9), Interval(1e9, 3e9, 10e9)
_START = {"pool": Interval(2.0, 5.0, 15.0), "engine": Interval(15.0, 40.0, 120.0)}
_ROW = Interval(1e-5, 3e-5, 1e-4)


class Speeds(Protocol):
    """Knows how long a part takes."""

    def seconds(self, part: Part, work: StageWork) -> Interval: ...


def stage_seconds(work: StageWork, speeds: Speeds) -> Interval:
    """The seconds of one stage, from its start to its manifest."""
    own = total(speeds.seconds(part, work) for _, part in work.parts)
    return own.at_least(total(speeds.seconds(part, work) for _, part in work.alongside))


# ------------------------------------------------------------------------------------------------ this machine


@dataclass(frozen=True)
class Curve:
    """Seconds that were measured, by the size of what was done; in between, and beyond, along straight lines."""

    points: tuple[tuple[float, float], ...]

    def times(self, factor: float) -> Curve:
        """Multiply all seconds."""
        return Curve(tuple((size, factor * seconds) for size, seconds in self.points))

    def at(self, size: float) -> float:
        if len(self.points) == 1:
            [(known, seconds)] = self.points
            return seconds * size / known
        ordered = sorted(self.points)
        place = next((at for at in range(1, len(ordered) - 1) if size <= ordered[at][0]), len(ordered) - 1)
        (low, before), (high, after) = ordered[place - 1], ordered[place]
        slope = max(0.0, after - before) / (high - low)
        return max(before + slope * (size - low), 0.0)


@dataclass(frozen=True)
class Measured:
    """The measurements of a short run here, in seconds.

    training, forward: a pass with its gradient, and one without, by its FLOPs. steps: one of the optimizer. sampling:
    a call of an actor, by the tokens of prompts and responses. listing: one prompt of the language. judging: a response
    that a judge scores. row: one that is written. starts: of a pool of actors, and of engines. margin: the share by
    which all of it may be wrong.
    """

    training: Mapping[Manner, Curve]
    forward: Mapping[Manner, Curve]
    steps: Mapping[Manner, float]
    sampling: Curve | None
    sending: float
    loading: float
    listing: Mapping[str, float]
    reading: float
    writing: float
    judging: Mapping[EvaluationJudge, float]
    row: float
    starts: Mapping[str, float]
    margin: float


@dataclass(frozen=True)
class ThisMachine:
    """Speeds of this machine, from what was `Measured`."""

    measured: Measured
    num_actors: int

    def seconds(self, part: Part, work: StageWork) -> Interval:
        value, margin = self._seconds(part, work), self.measured.margin
        return Interval(value / (1 + margin), value, value * (1 + margin))

    def _seconds(self, part: Part, work: StageWork) -> float:
        measured = self.measured
        match part:
            case Passes():
                curve = (measured.training if part.backward else measured.forward)[part.manner]
                return part.number * curve.at(part.flops / part.number / work.workers) if part.number else 0.0
            case Steps():
                return part.number * measured.steps[part.manner]
            case Sampling():
                if measured.sampling is None:
                    raise TypeError("generation was not timed")
                tokens = part.sequences * (part.prompt + part.response) / self.num_actors
                return part.calls * measured.sampling.at(tokens)
            case Sending():
                return part.number * (measured.loading if part.read else measured.sending)
            case Listing():
                return part.prompts * measured.listing[part.what]
            case Files():
                return part.read * measured.reading + part.written * measured.writing
            case Raw():
                return part.seconds / part.actors
            case Judging():
                return part.responses / part.processes * measured.judging[part.judge]
            case Writing():
                return part.rows * measured.row
            case Start():
                return measured.starts[part.what]


# ----------------------------------------------------------------------------------------------- named hardware


@dataclass(frozen=True)
class OnCards:
    """The comparison as it is laid out, on named cards."""

    cards: Cards
    config: Comparison

    def seconds(self, part: Part, work: StageWork) -> Interval:
        match part:
            case Passes():
                return self._passes(part, work.workers)
            case Steps():
                return self._steps(part, work.workers)
            case Sampling():
                return self._sampling(part)
            case Sending():
                speed = _DISK if part.read else _HOST
                if self.config.generation.weight_sync != "host" and not part.read:
                    wire = self.cards.wire(self.cards.number)
                    speed = Interval(0.3 * wire, 0.6 * wire, 0.9 * wire)
                return speed.under(part.number * part.parameters * _FLOAT)
            case Listing():
                return NOTHING
            case Files():
                return _DISK.under((part.read + part.written) * part.parameters * _FLOAT)
            case Raw():
                return Interval.exactly(part.seconds / part.actors)
            case Judging():
                return NOTHING  # a program or a model that nothing is known of
            case Writing():
                return _ROW.times(part.rows)
            case Start():
                return _START[part.what]

    def _passes(self, part: Passes, workers: int) -> Interval:
        launches = part.number * part.layers * (_KERNELS_IN_TRAINING if part.backward else _KERNELS)
        computing = self.cards.card.products(part.manner.precision).under(part.flops / workers)
        computing = computing.at_least(_LAUNCH.times(launches))
        if not part.weights or workers == 1:
            return computing
        size = _HALF if part.manner.precision == "bfloat16" else _FLOAT
        gathers = _GATHERS_IN_TRAINING if part.backward else _GATHERS
        moved = part.number * gathers * part.weights * size * (workers - 1) / workers
        return computing.at_least(self._wire(workers).under(moved))

    def _wire(self, workers: int) -> Interval:
        wire = self.cards.wire(workers)
        return Interval(0.4 * wire, 0.7 * wire, 0.9 * wire)

    def _steps(self, part: Steps, workers: int) -> Interval:
        spread = self.config.resources.sharding == "fsdp"
        own = part.trained / workers if spread else part.trained
        moving = self._memory().under(part.number * _ADAM * own)
        if spread or workers == 1:
            return moving
        reduced = 2 * _FLOAT * part.trained * (workers - 1) / workers
        return total([moving, self._wire(workers).under(part.number * reduced)])

    def _memory(self) -> Interval:
        return self.cards.card.bandwidth.times(self.cards.card.memory)

    def _sampling(self, part: Sampling) -> Interval:
        """Seconds of sampling: prefill at the speed of products, then steps that each read weights and cache once."""
        generation = self.config.generation
        arithmetic = generation.dtype_on(True)
        size, own = (_HALF if arithmetic == "bfloat16" else _FLOAT), part.sequences / generation.num_actors
        computing = self.cards.card.products(arithmetic).under(
            part.flops / (generation.num_actors * generation.tensor_parallel)
        )
        steps = max(float(part.limit), own * part.response / generation.max_num_seqs)
        context = part.prompt + part.response / 2
        read = steps * part.parameters + own * part.response * context * part.cached
        moving = self._memory().under(part.calls * read * size / generation.tensor_parallel)
        return total([computing, moving])
