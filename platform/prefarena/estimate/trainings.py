"""The work of trainings, by the plans that cut their batches: off-policy and reward models, and on-policy methods."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from transformers import PretrainedConfig

from prefarena.cluster.capacity import Node, generating_at_once
from prefarena.cluster.needs import Lengths, Training
from prefarena.config import (
    Comparison,
    GoldJudge,
    JudgeSettings,
    OffPolicyMethod,
    OnPolicyMethod,
    OnPolicyTraining,
    Optimisation,
    RewardModel,
    draws_responses,
    reward_of,
)
from prefarena.data.plan import LARGEST_PASS, BatchPlan, largest_scored, scored_at_once
from prefarena.estimate.lengths import Data, Rows
from prefarena.estimate.work import Files, Judging, Manner, Part, Passes, Sampling, Sending, StageWork, Steps
from prefarena.modeling.arithmetic import Arithmetic
from prefarena.modeling.flops import Counts, count_model
from prefarena.modeling.passes import Pass, passed
from prefarena.modeling.room import LARGEST_MICRO_BATCH
from prefarena.settings.judges import ClassifierJudge, EvaluationJudge, FunctionJudge
from prefarena.settings.off_policy import Pairwise
from prefarena.settings.on_policy import CriticTraining
from prefarena.settings.online import Online
from prefarena.settings.optimisation import LoRA
from prefarena.settings.unpaired import Unpaired
from prefarena.training.terms import Shares

#: Steps of a training that are looked at, evenly spread; the others are taken to be like them.
_LOOKED_AT = 48

Named = tuple[str, Part]


@dataclass(frozen=True)
class Terms:
    """The terms of a training: passes that each worker makes in a step, and the work of all workers' passes."""

    passes: float
    passed: Pass


@dataclass(frozen=True)
class Workload:
    """Counts a comparison's work. sizes: tokens or rollouts in a pass, by the key of the training, where it is auto."""

    config: Comparison
    settings: PretrainedConfig
    data: Data
    sizes: Mapping[str, int]
    response_limit: int

    @cached_property
    def plain(self) -> Counts:
        """The counts of the model without adapters."""
        return count_model(self.settings)

    @cached_property
    def _adapted(self) -> dict[LoRA, Counts]:
        return {}

    def counts(self, lora: LoRA | None) -> Counts:
        if lora is None:
            return self.plain
        if lora not in self._adapted:
            self._adapted[lora] = count_model(self.settings, lora)
        return self._adapted[lora]

    @property
    def workers(self) -> int:
        return self.config.resources.num_workers

    @cached_property
    def num_cpus(self) -> int:
        return len(os.sched_getaffinity(0))

    def processes(self, trainings: int) -> int:
        """The processes that train at the same time on this machine's CPUs, if so many trainings are to be done."""
        resources = self.config.resources
        if resources.use_gpu:  # each has a device of its own
            return 1
        room = max(1, int(self.num_cpus // (self.workers * resources.cpus_per_worker)))
        return self.workers * min(resources.num_groups or room, room, trainings)

    @cached_property
    def _side_by_side(self) -> int:
        """Trainings of entries that need no engines, which run in groups: reward models are among them."""
        methods = [entry.method for entry in self.config.entries]
        found = sum(isinstance(one, OffPolicyMethod) and not draws_responses(one) for one in methods)
        rewards = {keyed[1] for one in methods if (keyed := reward_of(one)) and isinstance(keyed[1], RewardModel)}
        return max(1, (found + len(rewards)) * len(self.config.seeds))

    @cached_property
    def _beside_engines(self) -> int:
        """Trainings whose policies respond, of those that run at the same time: each has engines of its own."""
        drawing = sum(draws_responses(entry.method) for entry in self.config.entries) * len(self.config.seeds)
        here = Node("this machine", {"CPU": float(self.num_cpus)})
        return max(1, min(drawing, generating_at_once(self.config, [here])))

    @property
    def spread(self) -> bool:
        return self.config.resources.sharding == "fsdp" and self.workers > 1

    # ------------------------------------------------------------------------------------------- from a table

    def terms(self, rows: Rows, training: Optimisation, size: int) -> Terms:
        """The terms of the mean step over a table whose rows are a prompt with its responses."""
        plan, steps = self._plan(rows, training, size), self.steps(rows, training)
        looked_at = np.unique(np.linspace(0, steps - 1, min(steps, _LOOKED_AT)).astype(int))
        number = sum(len(plan.micro_batches(int(step), 0)) for step in looked_at)
        # Every epoch goes over all rows once, so the mean row is that of the table.
        prompts, responses = rows.filled()
        mean = passed(prompts, responses).times(training.batch_size / len(prompts))
        return Terms(number / len(looked_at), mean)

    def _plan(self, rows: Rows, training: Optimisation, size: int) -> BatchPlan:
        """How the training will cut its batches of these rows."""
        prompts, responses = rows.filled()
        sizes = prompts + responses.sum(1)
        lengths = sizes + prompts * (responses.shape[1] - 1)  # by which rows are sorted
        training = training.model_copy(update={"micro_batch_tokens": size})
        return Shares(training, self.workers, seed=0).plan(lengths, sizes)

    def in_passes(self, training: Training, size: int) -> Lengths:
        """Mean tokens of the rows in the largest pass of a training, where passes have this size."""
        settings = training.settings
        if isinstance(settings, OnPolicyTraining):
            return self.longest_rollouts(settings, size)
        if not isinstance(settings, Optimisation):
            raise TypeError(f"{training.where} is of no kind that is known")
        rows = {"reference.training": self.data.demonstrations, "judge.training": self.data.judge}
        return self.longest_pass(rows.get(training.where, self.data.pairs), settings, size)

    def longest_pass(self, rows: Rows, training: Optimisation, size: int) -> Lengths:
        """Mean lengths within the pass with the most tokens that a worker makes; few steps meet some of the rows."""
        plan, steps = self._plan(rows, training, size), self.steps(rows, training)
        if steps * training.batch_size >= rows.number:
            return _mean_lengths(rows, plan.largest_micro_batch())
        looked_at = np.unique(np.linspace(0, steps - 1, min(steps, _LOOKED_AT)).astype(int))
        made = [
            one for step in looked_at for rank in range(self.workers) for one in plan.micro_batches(int(step), rank)
        ]
        return _mean_lengths(rows, max(made, key=lambda one: int(plan.sizes[one].sum())))

    def in_one_pass(self, training: Training, size: int) -> int:
        """The number that a pass holds if it may hold so many: no more rollouts than a worker has of a minibatch."""
        settings = training.settings
        if not isinstance(settings, OnPolicyTraining):
            return size
        return min(size, math.ceil(settings.rollouts_per_iteration / settings.num_minibatches / self.workers))

    def longest_rollouts(self, training: OnPolicyTraining, size: int) -> Lengths:
        """The lengths of the longest rollouts of a minibatch, which share a pass."""
        rows = self.data.prompts.single()
        order = np.argsort(rows.prompts + rows.responses.sum(1))
        share = min(1.0, size * training.num_minibatches * self.workers / training.rollouts_per_iteration)
        return _mean_lengths(rows, order[-max(1, round(share * len(order))) :])

    def steps(self, rows: Rows, training: Optimisation) -> int:
        return training.num_steps or max(1, round(rows.number * training.num_epochs / training.batch_size))

    def size(self, where: str, given: int | str, otherwise: int) -> int:
        return self.sizes.get(where, otherwise) if given == "auto" else int(given)

    def on_table(
        self, tables: list[tuple[str, Rows]], training: Optimisation, where: str, *, scores: bool = False,
        first: Rows | None = None, at_once: int = 1,
    ) -> StageWork:  # fmt: skip
        """A training whose step is a sum of terms, each over a table; `first`: one that is gone over before them.

        where: the key of its settings. scores: a scalar head takes the place of the language model's. at_once: the
        trainings, this one among them, that may run at the same time.
        """
        processes = self.processes(at_once)
        manner, counts = Manner.of(training, processes), self.counts(training.lora)
        size = self.size(where, training.micro_batch_tokens, LARGEST_PASS)
        steps, tokens = self.steps(tables[0][1], training), 0.0
        parts: list[Named] = [("files", Files(1, 1 + training.num_snapshots, self.plain.parameters))]
        if first is not None:
            terms = self.terms(first, training, size)
            flops = steps * counts.forward(terms.passed)
            parts.append(("baseline", self.passes(steps * terms.passes, flops, steps * terms.passed.tokens, manner)))
            tokens += steps * terms.passed.tokens
        for name, rows in tables:
            terms = self.terms(rows, training, size)
            flops = steps * counts.training(terms.passed, head=not scores, recomputed=manner.recomputes)
            tokens += steps * terms.passed.tokens
            parts.append((name, self.passes(steps * terms.passes, flops, steps * terms.passed.tokens, manner, True)))
        parts.append(("optimizer", Steps(steps, counts.trained, manner)))
        return StageWork(tuple(parts), self.workers, memory=where, trained=tokens)

    def passes(self, number: float, flops: float, tokens: float, manner: Manner, backward: bool = False) -> Passes:
        gathered = self.plain.parameters if self.spread else 0
        return Passes(number, flops, tokens, manner, backward, self.plain.layers, gathered)

    def off_policy(self, method: OffPolicyMethod, where: str) -> StageWork:
        training, data = method.training, self.data
        pairs = data.pairs if method.num_pairs is None else data.pairs.taking(method.num_pairs)
        rows = pairs.apart() if isinstance(method, Unpaired) else pairs
        tables = [("responses" if isinstance(method, Unpaired) else "pairs", rows)]
        if method.demonstration_weight > 0:
            tables.append(("demonstrations", data.demonstrations))
        if method.pretraining_weight > 0:  # texts are taken to be as long as demonstrations
            tables.append(("pretraining", data.demonstrations))
        first = rows if isinstance(method, Unpaired) else None
        at_once = self._beside_engines if draws_responses(method) else self._side_by_side
        work = self.on_table(tables, training, where, first=first, at_once=at_once)
        online = method.online if isinstance(method, Pairwise) else None
        return work if online is None else self._with_drawing(work, online, training, self.steps(pairs, training))

    def _with_drawing(self, work: StageWork, online: Online, training: Optimisation, steps: int) -> StageWork:
        """A training whose pairs are drawn on the way, once to each prompt of the steps after the first `every`."""
        generation = self.config.generation
        calls, number = (steps - 1) // online.every, max(0, steps - online.every) * training.batch_size
        if not calls:
            return work
        # On prompts as they are in training; responses as long as the data's.
        drawn = self.data.prompts.single().taking(2 * number).passed()
        parts: list[Named] = [("generate", self.sampling(calls, 2 * number / calls))]
        parts.append(("sync", Sending(calls, self.plain.parameters)))
        parts += [("score", part) for part in self.judging(online.reward, drawn, 2 * number, self.workers)]
        parts.append(("logprobs", self.scored(drawn)))
        held = generation.tensor_parallel if self.config.resources.use_gpu else 1
        beside = float(generation.num_actors * held)
        return replace(work, parts=(*work.parts, *parts), beside=beside, generated=drawn.scored)

    def reward_model(
        self, settings: RewardModel, rows: Rows, where: str, num_samples: int, *, shared: bool = False
    ) -> StageWork:
        """A reward model, trained on these pairs, then measured on the reference's samples and on held-out pairs.

        shared: it is there before any entry's training, so nothing else trains at the same time.
        """
        rows = rows if settings.num_pairs is None else rows.taking(settings.num_pairs)
        at_once = 1 if shared else self._side_by_side
        work = self.on_table([("pairs", rows)], settings.training, where, scores=True, at_once=at_once)
        test = self.data.test_pairs.passed()
        samples = self.data.prompts.taking(num_samples).passed()
        measured = self.scored(test.plus(samples), head=False)
        return StageWork((*work.parts, ("measuring", measured)), self.workers, memory=where, trained=work.trained)

    def scored(
        self, passed: Pass, *, head: bool = True, size: float = math.inf, arithmetic: Arithmetic | None = None
    ) -> Passes:
        """Passes without gradients by one process, of at most `size` tokens and as many as suit the device.

        arithmetic: none means that of evaluations.
        """
        size = min(size, largest_scored(self.config.resources.device))
        manner = Manner(arithmetic or self.config.scored_in)
        number = max(1.0, passed.tokens / size)
        flops = self.plain.forward(passed, head=head)
        return Passes(number, flops, passed.tokens, manner, False, self.plain.layers)

    def judging(self, judge: EvaluationJudge, responses: Pass, number: float, processes: int = 1) -> list[Part]:
        """The work of a judge that scores so many responses; empty for the gold reward, and where it is not known."""
        if isinstance(judge, RewardModel):
            return [self.scored(responses, head=False)]
        return [Judging(judge, number, processes)] if isinstance(judge, FunctionJudge | ClassifierJudge) else []

    # --------------------------------------------------------------------------------------------- on policy

    def on_policy(self, method: OnPolicyMethod, where: str) -> StageWork:
        training, generation = method.training, self.config.generation
        rollouts = self.data.prompts.single().taking(training.rollouts_per_iteration).passed()
        iterations, workers = training.num_iterations, self.workers
        size = self.size(where, training.micro_batch_size, LARGEST_MICRO_BATCH)
        manner, counts = Manner.of(training, self.processes(self._beside_engines)), self.counts(training.lora)
        share = math.ceil(training.rollouts_per_iteration / workers)
        longest = int(self.data.prompts.prompts.max()) + self.response_limit
        forwards = iterations * math.ceil(share / scored_at_once(size, longest, self.config.resources.device))
        each = iterations * math.ceil(share / training.num_minibatches / size) * training.num_minibatches
        frozen = training.critic_warmup_iterations if isinstance(training, CriticTraining) else 0

        def forward(times: int, head: bool, manner: Manner = manner) -> Passes:
            flops = times * iterations * (counts if manner.lora else self.plain).forward(rollouts, head=head)
            return self.passes(times * forwards, flops, times * iterations * rollouts.tokens, manner)

        def learning(iterations_of: int, head: bool) -> list[Part]:
            part = training.num_epochs * iterations_of / iterations
            flops = part * iterations * counts.training(rollouts, head=head, recomputed=manner.recomputes)
            tokens = part * iterations * rollouts.tokens
            steps = part * iterations * training.num_minibatches
            return [self.passes(part * each, flops, tokens, manner, True), Steps(steps, counts.trained, manner)]

        has_critic = isinstance(training, CriticTraining)
        parts: list[Named] = [("sync", Sending(iterations, self.plain.parameters))]
        every = (method.reward, self._monitor(method.reward))
        judges, scoring = [one for one in every if isinstance(one, RewardModel)], Manner(self.config.scored_in)
        parts += [("score", forward(1, False, scoring)) for _ in judges]
        if isinstance(method.reward, FunctionJudge | ClassifierJudge):
            parts.append(("score", Judging(method.reward, iterations * training.rollouts_per_iteration, workers)))
        parts += [("logprobs", forward(2, True))]
        parts += [("values", forward(1, False))] if has_critic else []
        parts += [("update", part) for part in learning(iterations - frozen, True)]
        parts += [("update", part) for part in (learning(iterations, False) if has_critic else [])]
        # Terms beside the rollouts draw as many rows; texts are taken to be as long as demonstrations.
        num_terms = (method.demonstration_weight > 0) + (method.pretraining_weight > 0)
        rows = self.data.demonstrations.taking(training.rollouts_per_iteration).passed().times(num_terms)
        beside = rows.times(training.num_epochs * (iterations - frozen))
        if num_terms:
            passes = num_terms * training.num_epochs * (iterations - frozen) / iterations * each
            flops = counts.training(beside, recomputed=manner.recomputes)
            parts.append(("update", self.passes(passes, flops, beside.tokens, manner, True)))
        models = 2 + has_critic + len(judges)
        parts.append(("files", Files(models, 1 + training.num_snapshots, self.plain.parameters)))
        sampling = ("generate", self.sampling(iterations, training.rollouts_per_iteration))
        ahead = training.mode == "asynchronous"
        held = generation.tensor_parallel if self.config.resources.use_gpu else 1
        return StageWork(
            tuple(parts) if ahead else (sampling, *parts),
            workers,
            beside=float(generation.num_actors * held),
            alongside=(sampling,) if ahead else (),
            memory=where,
            trained=iterations * training.num_epochs * rollouts.tokens + beside.tokens,
            generated=iterations * rollouts.scored,
        )

    def sampling(self, calls: float, sequences: float) -> Sampling:
        """Sampling on prompts as long as in training, with responses as long as the data's."""
        return self.answering(self.data.prompts, self.response_limit, calls, sequences)

    def answering(self, prompts: Rows, limit: int, calls: float, sequences: float) -> Sampling:
        """Sampling on prompts and with responses as long as these, up to a limit."""
        one = prompts.single().taking(1).passed()
        flops = calls * sequences * self.plain.forward(one)
        response = min(prompts.mean_response, limit)
        return Sampling(
            calls, sequences, prompts.mean_prompt, response, limit, flops, self.plain.parameters, self.plain.cached
        )

    def _monitor(self, reward: JudgeSettings) -> EvaluationJudge | None:
        """The judge that is logged besides the reward; the gold reward is a table, and costs nothing."""
        return None if isinstance(reward, GoldJudge) else self.config.trained_judge


def _mean_lengths(rows: Rows, chosen: np.ndarray) -> Lengths:
    prompts, responses = rows.filled() if rows.number else (rows.prompts, rows.responses)
    at = chosen % len(prompts)
    return Lengths(math.ceil(prompts[at].mean()), math.ceil(responses[at].mean()))
