"""A short timed run on this machine: a few real micro-batches of the real model, by the code that trains.

Tokens are random and lengths are those of the data. Learning rates are zero, so the weights stay as they are.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedModel

from prefarena.config import DPO, Optimisation
from prefarena.data.tables import write_rows
from prefarena.estimate.company import Flag
from prefarena.estimate.lengths import Rows, ids_like
from prefarena.estimate.speeds import Curve
from prefarena.estimate.work import Manner
from prefarena.evaluation.enumeration import enumerate_responses, enumerate_scores
from prefarena.evaluation.exact import exact_metrics, frontiers, win_rates
from prefarena.modeling.arithmetic import attends_in, in_weights, products_of
from prefarena.modeling.checks import quietly
from prefarena.modeling.flops import Counts
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs, sequence_logps
from prefarena.modeling.lora import add_adapters
from prefarena.modeling.passes import Pass, passed
from prefarena.records import REFERENCED_PAIRS
from prefarena.tasks.language import EOS_ID, Language
from prefarena.training.learner import Learner, prepare
from prefarena.training.off_policy import optimizer_step
from prefarena.training.terms import PreferenceTerm, Shares
from prefarena.training.window import Window
from prefarena.training.worker import Worker

_ROWS = 256  # pairs that are made
_PROMPTS = 4  # of the language, whose responses are listed
_FACTOR = 4  # from one size of a pass to the next
_TIMES, _LONG_S = 5, 0.5  # what takes longer is done twice
_UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Timed:
    """Seconds of passes with and without gradients and of an optimizer step, and how far repetitions spread.

    had: the thread's CPU time as a share of the clock's; 1 where the clock's time is used.
    """

    training: Curve
    forward: Curve
    step: float
    spread: float
    had: float

    def on(self, cores: float, processes: int) -> Timed:
        """The same for each of so many processes that share so many cores, which may be fewer than they are."""
        longer = max(1.0, processes / cores)
        training, forward = self.training.times(longer), self.forward.times(longer)
        return Timed(training, forward, self.step * longer, self.spread, min(1.0, self.had * longer))


@dataclass(frozen=True)
class Bench:
    """What passes are timed with, and on which device. budget_s: sizes that would take longer are not tried."""

    rows: Rows
    vocab_size: int
    max_length: int
    folder: Path
    device: str
    threads: int
    budget_s: float

    @property
    def counts_own_time(self) -> bool:
        """Whether the thread's own CPU time is measured, as the machine may do other work, too; not the clock's."""
        return self.device == "cpu" and self.threads == 1

    @property
    def clock(self) -> Callable[[], float]:
        """A clock in seconds."""
        return time.thread_time if self.counts_own_time else time.perf_counter

    def pairs(self) -> list[tuple[list[int], list[int], list[int]]]:
        """Prompt, chosen and rejected: random tokens."""
        prompts, responses = self.rows.taking(_ROWS).filled()
        random = np.random.default_rng(0)
        order = random.permutation(len(prompts))
        columns = (prompts[order], responses[order, 0], responses[order, 1])
        return list(zip(*(ids_like(column.tolist(), self.vocab_size, random) for column in columns), strict=True))

    def write(self) -> tuple[Path, Rows]:
        """The pairs as a table, and their lengths in its order."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        pairs, path = self.pairs(), self.folder / "pairs" / "part.parquet"
        rows = [
            {"id": f"{at:06}", "label": 1.0, "source": "", "ref_chosen_logp": 0.0, "ref_rejected_logp": 0.0}
            | dict(zip(names, pair, strict=True))
            for at, pair in enumerate(pairs)
        ]
        write_rows(pa.Table.from_pylist(rows, REFERENCED_PAIRS), path, REFERENCED_PAIRS)
        lengths = np.array([[len(ids) for ids in pair] for pair in pairs], np.int64)
        return path.parent, Rows(len(pairs), lengths[:, 0], lengths[:, 1:])


def time_training(model: PreTrainedModel, training: Optimisation, counts: Counts, most: int, bench: Bench) -> Timed:
    """Time passes of 1 up to `most` pairs the way `training` computes them; adapters, if any, are added to the model.

    counts: those of the model with its adapters.
    """
    steps, recomputed = Steps(model, training, bench), training.activation_checkpointing
    with products_of(training.precision), threads(bench.threads):
        steps.of(1)[1](0)  # the gradient stays until the next step
        applying = _timed(lambda _: steps.learner.apply(0.0), bench).seconds
        found, repeated = time_sizes(steps.of, most, bench)
        points = [(counts.training(one, recomputed=recomputed), max(took - applying, 1e-6)) for one, took in found]
        forward = time_forward(steps.module, counts, most, bench)
    spread, had = max(one.spread for one in repeated), statistics.median(one.had for one in repeated)
    return Timed(Curve(tuple(points)), forward, applying, spread, had)


class Steps:
    """A model that is trained on the bench's pairs, at a learning rate of zero, in steps of one pass."""

    def __init__(self, model: PreTrainedModel, training: Optimisation, bench: Bench) -> None:
        if training.lora is not None:
            add_adapters(model, training.lora, seed=0)
        self._training, self._bench = training, bench
        self.module = LogProbs(model, bench.max_length, torch.device(bench.device), attends_in(training.precision))
        self._worker = Worker(str(bench.folder / "stage"), bench.device)
        self._path, self._rows = bench.write()
        prepare(self.module, training, self._worker)
        self.learner = Learner("model", self.module, training, self._worker)

    def of(self, number: int) -> tuple[Pass, Callable[[int], object]]:
        """For steps of `number` pairs: the mean pass of a step, and a function that makes a step.

        Neighbours in length share a batch, so batches may differ many times in length. Those nearest to the mean are
        trained on, for one that is timed must have the size that its time is taken to be of.
        """
        own = self._training.model_copy(update={"batch_size": number, "micro_batch_tokens": _UNLIMITED})
        term = PreferenceTerm(str(self._path), DPO(training=own), Shares(own, 1, 0, self.module.packed), 0)
        mean = number * term.plan.sizes.mean()
        steps = sorted(range(term.plan.num_steps(1)), key=lambda at: abs(term.num_tokens(at) - mean))[:_TIMES]
        batches = [term.plan.rows(at) for at in steps]
        every = [_numbers(passed(self._rows.prompts[rows], self._rows.responses[rows])) for rows in batches]
        one = Pass(*(statistics.fmean(values) for values in zip(*every, strict=True)))
        return one, lambda at: optimizer_step(self.learner, [term], steps[at % len(steps)], 0.0, self._worker, Window())


def keep_training(folder: str, training: Optimisation, number: int, bench: Bench, ready: Flag, stop: Flag) -> None:
    """Train the model in `folder` in steps of `number` pairs until `stop` is set. Runs in its own process."""
    with quietly(), products_of(training.precision), threads(bench.threads):
        own = replace(bench, folder=bench.folder / f"beside-{os.getpid()}")
        _, step = Steps(load_policy(folder), training, own).of(number)
        while not stop.is_set():
            step(0)
            ready.set()


def time_scoring(model: PreTrainedModel, manner: Manner, counts: Counts, most: int, bench: Bench) -> Curve:
    """Time passes without gradients in the arithmetic of evaluations; the model's weights are converted to it."""
    with products_of(manner.precision), threads(bench.threads):
        nn.Module.to(model, bench.device)
        module = LogProbs(in_weights(model, manner.precision), bench.max_length)
        return time_forward(module, counts, most, bench)


@torch.no_grad()
def time_forward(module: nn.Module, counts: Counts, most: int, bench: Bench) -> Curve:
    """The seconds of a pass without gradients as a function of its FLOPs."""
    pairs = bench.pairs()

    def score(number: int) -> tuple[Pass, Callable[[int], object]]:
        some = pairs[:number]
        prompts, responses = [pair[0] for pair in some], [list(pair[1:]) for pair in some]
        lengths = np.array([[len(ids) for ids in pair] for pair in some], np.int64)

        def run(_: int) -> object:
            return sequence_logps(module, prompts, responses, device=bench.device)[0].cpu()

        return passed(lengths[:, 0], lengths[:, 1:]), run

    found, _ = time_sizes(score, min(_ROWS, _FACTOR * most), bench)
    return Curve(tuple((counts.forward(one), took) for one, took in found))


def time_sizes(
    make: Callable[[int], tuple[Pass, Callable[[int], object]]], most: int, bench: Bench
) -> tuple[list[tuple[Pass, float]], list[_Repeated]]:
    """Seconds by what was passed, of 1, 4, 16, … and `most` rows, until one takes too long; and all of each."""
    found, repeated, number = list[tuple[Pass, float]](), list[_Repeated](), 1
    while True:
        one, run = make(number)
        if not found:
            run(0)  # what is done but once
        repeated.append(_timed(run, bench))
        found.append((one, repeated[-1].seconds))
        larger = min(_FACTOR * number, most)
        if larger <= number or larger / number * repeated[-1].seconds > bench.budget_s:
            return found, repeated
        number = larger


class _Repeated(NamedTuple):
    """The seconds of a repetition, the share by which the median one is longer than the shortest, and this thread's CPU
    time as a share of the clock's.
    """

    seconds: float
    spread: float
    had: float


def _timed(work: Callable[[int], object], bench: Bench) -> _Repeated:
    took: list[float] = []
    began = time.perf_counter()
    for at in range(_TIMES):
        _wait(bench.device)
        started = bench.clock()
        work(at)
        _wait(bench.device)
        took.append(bench.clock() - started)
        if len(took) > 1 and took[0] > _LONG_S:
            break
    had = min(1.0, sum(took) / (time.perf_counter() - began))
    median = statistics.median(took)
    # Other work makes some repetitions longer by the clock. What makes the thread's own seconds longer is there in a
    # run, too: a machine whose speed varies, and processes that share its memory and caches.
    return _Repeated(median if bench.counts_own_time else min(took), median / min(took) - 1, had)


def time_listing(model: PreTrainedModel, reward: PreTrainedModel | None, language: Language) -> dict[str, float]:
    """Seconds of a prompt of the language: its responses, those with a policy's measures, and their scores."""
    limit, prompts, clock = language.task.response_limit, language.prompt_ids[:_PROMPTS], time.thread_time
    with threads(1):  # as the tasks have that list
        started = clock()
        found = enumerate_responses(model, prompts, limit, EOS_ID)
        listed = clock() - started
        _measure(found.logps, found.lengths)
        measured = clock() - started
        started = clock()
        if reward is not None:
            enumerate_scores(reward, prompts, limit, EOS_ID)
        scored = clock() - started
    return {"reference": listed / len(prompts), "policy": measured / len(prompts), "scores": scored / len(prompts)}


def _measure(logps: np.ndarray, lengths: np.ndarray) -> None:
    """What an exact evaluation computes of a table of log-probs [P, N]."""
    rewards = np.random.default_rng(0).normal(size=logps.shape)
    covered = np.arange(len(logps)) % 2 == 0
    limits = frontiers(logps, rewards, covered)
    exact_metrics(logps, logps, rewards, covered, lengths, limits)
    win_rates([logps, logps], rewards)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _numbers(one: Pass) -> tuple[float, float, float]:
    return one.tokens, one.visible, one.scored


@contextmanager
def threads(number: int) -> Iterator[None]:
    """While this is open, torch has as many threads as a worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
