"""The work of a stage in countable parts: passes over models, steps of optimizers, samples, weights that are sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefarena.modeling.arithmetic import Arithmetic
from prefarena.settings.judges import ClassifierJudge, FunctionJudge
from prefarena.settings.optimisation import LearnerSettings, LoRA


@dataclass(frozen=True)
class Manner:
    """How a model computes and what of it is trained, as far as the time of a pass depends on it.

    processes: that train at the same time on the same CPUs.
    """

    precision: Arithmetic
    lora: LoRA | None = None
    recomputes: bool = False
    processes: int = 1

    @classmethod
    def of(cls, training: LearnerSettings, processes: int = 1) -> Manner:
        return cls(training.precision, training.lora, training.activation_checkpointing, processes)


@dataclass(frozen=True)
class Passes:
    """Passes over a model.

    number: how many each worker makes. flops, tokens: of all of them, on all workers. backward: whether the gradient is
    computed as well. layers: of the model. weights: numbers that are gathered from other workers in each pass, where
    models are spread.
    """

    number: float
    flops: float
    tokens: float
    manner: Manner
    backward: bool
    layers: int
    weights: int = 0


@dataclass(frozen=True)
class Steps:
    """Steps of an optimizer over so many trained numbers."""

    number: float
    trained: int
    manner: Manner


@dataclass(frozen=True)
class Sampling:
    """Calls of the generation actors, which share `sequences` prompts in each of them.

    prompt, response: mean tokens of one; limit: the most of a response. per_token, per_visible: FLOPs, parameters and
    cached: numbers of the model, and of each token in its cache.
    """

    calls: float
    sequences: float
    prompt: float
    response: float
    limit: int
    flops: float
    parameters: int
    cached: int


@dataclass(frozen=True)
class Sending:
    """Weights to the generation actors; read: from a stage's folder, else from the trainer."""

    number: float
    parameters: int
    read: bool = False


@dataclass(frozen=True)
class Listing:
    """Every response of the enumerable language to so many prompts: its log-prob and the measures of a policy from
    them, its log-prob alone, or its score by a reward model.
    """

    what: Literal["policy", "reference", "scores"]
    prompts: int


@dataclass(frozen=True)
class Files:
    """Models that are read and written, of so many numbers."""

    read: float
    written: float
    parameters: int


@dataclass(frozen=True)
class Raw:
    """Rows that are read and tokenised by `actors` at the same time, at what one takes on this machine."""

    seconds: float
    actors: int


@dataclass(frozen=True)
class Judging:
    """Responses that a judge scores which is none of the comparison's own models, by `processes` at a time."""

    judge: FunctionJudge | ClassifierJudge
    responses: float
    processes: int = 1


@dataclass(frozen=True)
class Writing:
    """Rows of pairs that are written as a table."""

    rows: int


@dataclass(frozen=True)
class Start:
    """Processes that are started: a pool of Ray Data's actors, or engines."""

    what: Literal["pool", "engine"] = "pool"


Part = Passes | Steps | Sampling | Sending | Listing | Files | Raw | Judging | Writing | Start


@dataclass(frozen=True)
class StageWork:
    """A stage's parts, by what they are called where they are told apart.

    workers: that share its passes; beside: devices that are held beside theirs. alongside: parts that run while the
    others do. memory: the key of the training whose memory it is. trained, generated: tokens.
    """

    parts: tuple[tuple[str, Part], ...]
    workers: int = 1
    beside: float = 0.0
    alongside: tuple[tuple[str, Part], ...] = ()
    memory: str | None = None
    trained: float = 0.0
    generated: float = 0.0

    @property
    def flops(self) -> float:
        every = [part for _, part in (*self.parts, *self.alongside)]
        return sum(part.flops for part in every if isinstance(part, Passes | Sampling))
