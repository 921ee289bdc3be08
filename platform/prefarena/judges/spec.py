"""Judges: what scores a response to a prompt, in an evaluation and as the reward of on-policy training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from prefarena.config import (
    ClassifierJudge,
    EndpointJudge,
    EvaluationJudge,
    FunctionJudge,
    GoldJudge,
    PairwiseJudge,
    RewardModel,
)
from prefarena.judges.silence import CountedJudge
from prefarena.judges.usage import Usage
from prefarena.modeling.arithmetic import Arithmetic

if TYPE_CHECKING:
    from prefarena.judges.pairwise import PairwiseComparer


@dataclass(frozen=True)
class JudgeSpec:
    """A judge as it is sent to a worker: its settings, and the paths that a run knows.

    path: the trained reward model's folder (`learned`) or the gold reward's JSON (`gold`); none for the others.
    tokenizer: the folder of the policy's tokenizer, with which judges of text decode. calls: the folder in which
    answers of an endpoint are kept; None means that they are not. arithmetic: in which a model's body computes.
    may_be_silent: a value of a function or a classifier that is no finite number is a row without a score (nan), not an
    error.
    """

    settings: EvaluationJudge
    path: str | None
    tokenizer: str
    calls: str | None = None
    arithmetic: Arithmetic = "float32"
    may_be_silent: bool = False


class Judge(Protocol):
    """Anything that scores responses; higher is better."""

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """Scores float64 [N] of N responses to N prompts, all as token ids (eos kept where it was produced).

        nan: the judge is silent about this response, which its settings allow (`max_silent_share`).
        """
        ...


def usage_of(judge: Judge) -> Usage | None:
    """The calls that have been made to an endpoint; None for other judges."""
    found = getattr(judge, "usage", None)
    return found if isinstance(found, Usage) else None


def may_be_silent(judge: Judge) -> bool:
    """Whether nan means a row without a verdict rather than a fault."""
    return usage_of(judge) is not None or isinstance(judge, CountedJudge)


def load_judge(spec: JudgeSpec, batch_size: int = 64, device: str | torch.device = "cpu") -> Judge:
    """Load the judge, ready to score on this worker. Raises UserError where it cannot be made."""
    match spec.settings:  # imported where needed: a worker that has no use for an endpoint never loads its client
        case RewardModel():
            from prefarena.judges.models import RewardModelJudge

            return RewardModelJudge(_path(spec), batch_size, device, spec.arithmetic)
        case GoldJudge():
            from prefarena.judges.models import GoldRewardJudge

            return GoldRewardJudge(_path(spec))
        case FunctionJudge():
            from prefarena.judges.function import FunctionScorer

            return FunctionScorer(spec.settings, spec.tokenizer, spec.may_be_silent)
        case EndpointJudge():
            from prefarena.judges.endpoint import EndpointScorer

            return EndpointScorer(spec.settings, spec.tokenizer, spec.calls)
        case ClassifierJudge():
            from prefarena.judges.classifier import ClassifierScorer

            return ClassifierScorer(spec.settings, spec.tokenizer, batch_size, device, spec.arithmetic)
        case PairwiseJudge():
            raise TypeError("a pairwise judge compares responses and does not score them")


def load_comparer(spec: JudgeSpec) -> PairwiseComparer:
    """Load the judge that compares pairs, ready on this worker. Raises UserError where it cannot be made."""
    from prefarena.judges.pairwise import PairwiseComparer

    if not isinstance(spec.settings, PairwiseJudge):
        raise TypeError(f"a {spec.settings.kind} judge scores responses and does not compare them")
    return PairwiseComparer(spec.settings, spec.tokenizer, spec.calls)


def check_judge(settings: EvaluationJudge) -> None:
    """Raise UserError for whatever can be found wrong with a judge before any work."""
    match settings:
        case FunctionJudge():
            from prefarena.judges.function import load_scorer

            load_scorer(settings.function)
        case EndpointJudge():
            from prefarena.judges.endpoint import check_endpoint

            check_endpoint(settings)
        case ClassifierJudge():
            from prefarena.judges.classifier import check_classifier

            check_classifier(settings)
        case PairwiseJudge():
            from prefarena.judges.pairwise import check_pairwise

            check_pairwise(settings)
        case RewardModel() | GoldJudge():
            pass


def _path(spec: JudgeSpec) -> str:
    if spec.path is None:
        raise TypeError(f"a {spec.settings.kind} judge needs a path")
    return spec.path
