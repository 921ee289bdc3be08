"""What `prefarena tune` will cost: the trials of every entry, and then the comparison of the winners.

What the first batch proposes is known before anything runs; what later batches will propose is not, so they are assumed
to do the same work as the first one, trial by trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.trials import Proposal, selection, spaces_of
from prefarena.config import Comparison, Entry, RewardModel, reward_of
from prefarena.estimate.interval import Interval, total
from prefarena.estimate.result import OF_TRIALS, Estimated
from prefarena.estimate.stages import planned
from prefarena.estimate.trainings import Workload
from prefarena.tuning.study import Sampling, Study, check_installed

#: The stages of a learned reward, which trials share unless its own settings are searched.
_OF_REWARD = ("reward model", "evaluation (scores of all responses)")


@dataclass(frozen=True)
class Trials:
    """The first batch of an entry's trials: one for each kind of work that they do, and how many do the same work."""

    entry: Entry
    like: dict[str, int]
    entries: tuple[Entry, ...]
    shares_reward: bool

    def of(self, stages: Sequence[Estimated], stage: str) -> Estimated:
        """A stage of the mean trial."""
        own = {one.entry: one for one in stages if one.stage == stage and one.entry in self.like}
        whole = sum(self.like[str(name)] for name in own)
        weights = {name: self.like[str(name)] / whole for name in own}
        held = [one.memory for one in own.values() if one.memory is not None]
        return replace(
            next(iter(own.values())),
            entry=self.entry.name,
            stage=OF_TRIALS + stage,
            seconds=total(one.seconds.times(weights[name]) for name, one in own.items()),
            flops=sum(one.flops * weights[name] for name, one in own.items()),
            trained=sum(one.trained * weights[name] for name, one in own.items()),
            generated=sum(one.generated * weights[name] for name, one in own.items()),
            memory=max(held, key=lambda one: one.mib or 0.0, default=None),
        )


def first_trials(config: Comparison, workload: Workload) -> list[Trials]:
    """The first proposals for every entry with something to search. workload: that of the comparison.

    Raises the UserErrors that `prefarena tune` raises before it starts.
    """
    check_installed()
    tuning, found = config.tuning, []
    for name, space in spaces_of(config).items():
        [entry] = [one for one in config.entries if one.name == name]
        study = Study(name, space, Sampling(tuning.sampler, tuning.seed, tuning.batch_size))
        asked = study.ask(min(tuning.batch_size, tuning.num_trials))
        trials = [Proposal(entry, number, settings).as_entry() for number, settings in enumerate(asked)]
        rewards = {keyed[1] for one in trials if (keyed := reward_of(one.method)) is not None}
        kinds = _by_work(workload, trials)
        like = {same[0].name: len(same) for same in kinds}
        learned = all(isinstance(reward, RewardModel) for reward in rewards)
        found.append(Trials(entry, like, tuple(same[0] for same in kinds), len(rewards) == 1 and learned))
    return found


def _by_work(workload: Workload, trials: Sequence[Entry]) -> list[list[Entry]]:
    """Groups of trials that do the same work, such as those that differ only in their learning rates."""
    kinds: list[tuple[list[object], list[Entry]]] = []
    for trial in trials:
        alone = replace(workload, config=workload.config.model_copy(update={"entries": (trial,)}))
        work = [(one.stage, replace(one.work, memory=None)) for one in planned(alone) if one.entry is not None]
        same = next((entries for known, entries in kinds if known == work), None)
        if same is None:
            kinds.append(([*work], [trial]))
        else:
            same.append(trial)
    return [entries for _, entries in kinds]


def of_trials(config: Comparison, trials: Sequence[Trials]) -> Comparison:
    """The comparison of the trials that are estimated, on the prompts that trials are measured on."""
    return selection(config, [entry for one in trials for entry in one.entries], config.tuning.seeds)


def with_trials(
    config: Comparison, trials: Sequence[Trials], tried: Sequence[Estimated], winners: Sequence[Estimated]
) -> list[Estimated]:
    """All stages of tuning. tried: the stages of `of_trials`, each run once; winners: those of the comparison."""
    shared = [replace(one, stage=OF_TRIALS + one.stage) for one in tried if one.entry is None]
    own: list[Estimated] = []
    for one in trials:
        stages = {other.stage: None for other in tried if other.entry in one.like}
        mean = {stage: one.of(tried, stage) for stage in stages}
        number = num_trainings(config, mean["training"].device_seconds if "training" in mean else Interval.exactly(0.0))
        for stage, found in mean.items():
            once = stage in _OF_REWARD and one.shares_reward
            own.append(replace(found, times=len(config.tuning.seeds) if once else number))
    return [*shared, *own, *winners]


def num_trainings(config: Comparison, once: Interval) -> int:
    """How many training runs an entry's trials make, over all seeds. once: the device-seconds of one of them."""
    tuning = config.tuning
    seeds, left, number, spent = len(tuning.seeds), tuning.num_trials, 0, 0.0
    while left > 0 and (tuning.device_seconds is None or spent < tuning.device_seconds):
        batch = min(tuning.batch_size, left)
        done = batch + math.ceil(tuning.kept_share * batch) * (seeds - 1)
        left, number, spent = left - batch, number + done, spent + done * once.middle
    return number
