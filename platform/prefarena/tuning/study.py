"""An entry's trials: Optuna proposes them in batches (ask and tell), and is told what came out in their order.

Optuna rather than Ray Tune: a trial here is a stage, which resumes and is shared, so nothing is wanted of a library but
what to try next. Optuna's samplers give that alone, by `ask` and `tell`; Ray Tune's searchers wrap these samplers and
bring an executor, a storage and a checkpoint format of their own beside ours. A study needs no storage either: with a
seed, what is proposed depends on nothing but what was told, so a run that was killed proposes the same again.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefarena.errors import UserError
from prefarena.settings.search import Dimension, OneOf, Space, Value
from prefarena.tuning.ranking import Outcome

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial


@dataclass(frozen=True)
class Sampling:
    """How trials are proposed: `tpe` or `random`, the seed, and how many are proposed at once."""

    sampler: str
    seed: int
    batch_size: int


def check_installed() -> None:
    """Raise UserError where Optuna is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("prefarena tune needs Optuna; install it with: pip install 'prefarena[tune]'") from None


class Study:
    """The trials of one entry, numbered from 0. What is proposed depends on the seed, the entry's name and the past."""

    def __init__(self, entry: str, space: Space, sampling: Sampling) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # trials are reported by whoever runs them
        self._study = optuna.create_study(direction="maximize", sampler=_sampler(entry, sampling))
        self._space = {name: _distribution(space[name]) for name in sorted(space)}
        self._open: list[Trial] = []

    def ask(self, number: int) -> list[dict[str, Value]]:
        """The settings of the next trials. All that were asked for before must have been told."""
        if self._open:
            raise RuntimeError("the last batch has not been told")
        self._open = [self._study.ask(self._space) for _ in range(number)]
        return [dict(trial.params) for trial in self._open]

    def tell(self, outcomes: list[Outcome]) -> None:
        """Report the outcomes of the last batch, in its order.

        A trial that was stopped counts less than any that was not, and a failed one least, by Optuna's rule for pruned
        trials.
        """
        from optuna.trial import TrialState

        for trial, outcome in zip(self._open, outcomes, strict=True):
            if outcome.state == "complete":
                self._study.tell(trial, outcome.value)
                continue
            if outcome.value is not None:
                trial.report(outcome.value, step=1)
            self._study.tell(trial, state=TrialState.PRUNED)
        self._open = []


def _sampler(entry: str, sampling: Sampling) -> BaseSampler:
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import RandomSampler, TPESampler

    # Entries differ in what is proposed for settings of the same name, and an entry's trials depend on no other entry.
    seed = int.from_bytes(hashlib.sha256(f"{sampling.seed}:{entry}".encode()).digest()[:4])
    if sampling.sampler == "random":
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # Settings are modelled together, and those of a batch that is under way are kept apart from each other.
        return TPESampler(seed=seed, n_startup_trials=sampling.batch_size, multivariate=True, constant_liar=True)


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, OneOf):
        return CategoricalDistribution(dimension.values)
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
