"""The loop of all on-policy methods: rollouts from generators with versioned weights, a judge, a policy update.

A method's advantages and losses are in its own file of `methods/on_policy`. Nothing here draws from a global random
state: prompts, samples and minibatches are pure functions of the job's seed and the iteration, so a checkpoint's
iteration number is the whole state of the data and of the randomness.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefarena.config import OnPolicyTraining
from prefarena.data.plan import scored_at_once
from prefarena.errors import UserError
from prefarena.generation.interface import RolloutSource
from prefarena.judges.models import RewardModelJudge
from prefarena.judges.spec import Judge, JudgeSpec
from prefarena.modeling.heads import token_values
from prefarena.modeling.load import load_tokenizer
from prefarena.modeling.logprobs import token_logps
from prefarena.modeling.transfer import rows_on
from prefarena.objectives.kl import KLController
from prefarena.objectives.output import Mean, ObjectiveOutput
from prefarena.settings.on_policy import CriticTraining
from prefarena.training.beside_rollouts import BesideRollouts
from prefarena.training.experience import Experience, Scorers, as_many_as_others, by_length, gather
from prefarena.training.guard import stop_if_diverged
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.learner import Learner, Pass, prepare
from prefarena.training.loading import Loader
from prefarena.training.moving_reference import MovingReference
from prefarena.training.on_policy_batch import Batch, experience_metrics, learnable
from prefarena.training.on_policy_memory import fitting_micro_batch
from prefarena.training.on_policy_models import POLICY, load_models, save_adapters, save_as_it_is, save_models
from prefarena.training.rollout_counts import RolloutCounts
from prefarena.training.rollouts import RolloutStream, minibatches, share
from prefarena.training.saving import keep_snapshot, snapshot_steps
from prefarena.training.schedule import warmed_up
from prefarena.training.window import Window
from prefarena.training.worker import Worker

#: Of each learner's gradient, among the metrics.
_NORM_NAMES = {"policy": "grad_norm", "critic": "critic_grad_norm"}
#: A micro-batch and the module in training, to a sum of losses.
Term = Callable[[Batch, nn.Module], ObjectiveOutput]


def train_on_policy(
    job: OnPolicyJob,
    worker: Worker,
    source: RolloutSource | None = None,
    reward: Judge | None = None,
    monitor: Judge | None = None,
) -> dict[str, Any]:
    """Run all iterations from the last checkpoint on, save the policy at `job.model_dir`, return the costs.

    `source`, `reward` and `monitor` default to those that the job names. The job's policy is both the start and the
    reference, which may move. Raises UserError where the batch is too small to share, TrainingDivergedError when more
    than `max_bad_iterations` in a row had no step whose loss and gradient are numbers, StalenessError when a rollout is
    older than the mode allows, and what generator and judge raise.
    """
    source = source or _connect(job)
    try:
        return _train(OnPolicyTrainer(job, worker, source, reward, monitor))
    finally:
        _leave(source)


def _train(trainer: OnPolicyTrainer) -> dict[str, Any]:
    job, worker = trainer.job, trainer.worker
    trainer.restore()
    num_iterations = job.training.num_iterations
    snapshots = snapshot_steps(num_iterations, job.training.num_snapshots)
    for iteration in range(trainer.iteration, num_iterations):
        worker.log(trainer.run(iteration))
        stop_if_diverged(
            trainer.bad_iterations, job.training.max_bad_iterations, f"iterations up to iteration {iteration + 1}"
        )
        if trainer.iteration in snapshots:
            trainer.save_snapshot()
        if trainer.iteration % job.training.checkpoint_every == 0 and trainer.iteration < num_iterations:
            worker.save(trainer.iteration, trainer.tensors(), trainer.state())
    save_models(trainer.models, job, worker, trainer.tokenizer, job.model_dir)
    save_adapters(trainer.models, job, worker)
    counts: dict[str, float] = {
        **trainer.counts.totals,
        **trainer.judge_calls(),
        "micro_batch_size": trainer.micro_batch_size,
    }
    if trainer.predicted_mib is not None:
        counts["predicted_memory_mib"] = trainer.predicted_mib
    # The generators' devices are held all the while.
    costs = worker.costs(num_beside=len(job.generators), num_steps=num_iterations, **counts)
    return {"costs": costs} | _verified(trainer.stream.source)


def _leave(source: RolloutSource) -> None:
    """Release what the connection to the engines' devices holds; the next job makes its own."""
    from prefarena.generation.fleet import Generators

    if isinstance(source, Generators):
        source.leave()


def _verified(source: RolloutSource) -> dict[str, Any]:
    """What the engines read back of the last weights, for the manifest; empty where the source has no engines."""
    from prefarena.generation.fleet import Generators

    verified = source.verified if isinstance(source, Generators) else None
    return {} if verified is None else {"weights_verified": verified.summary()}


def _connect(job: OnPolicyJob) -> RolloutSource:
    from prefarena.generation.fleet import Generators

    return Generators.connect(job.generators, job.generation)


@dataclass
class Phases:
    """Seconds per phase of an iteration."""

    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        key = f"time/{name}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started

    def throughput(self, num_tokens: int) -> float:
        """Tokens per second since the iteration began."""
        return num_tokens / (time.perf_counter() - self.started)


class OnPolicyTrainer:
    """The policy, its critic where the method has one, and one iteration of learning."""

    def __init__(
        self,
        job: OnPolicyJob,
        worker: Worker,
        source: RolloutSource,
        reward: Judge | None = None,
        monitor: Judge | None = None,
    ) -> None:
        self.job, self.worker, self.settings = job, worker, job.training
        _check_sizes(self.settings, worker.world_size)
        self.tokenizer = load_tokenizer(job.policy)
        self.models = load_models(job, worker)
        worker.note_padding(self.models.policy.notes)
        self.stream = RolloutStream(job, worker, source, self.models)
        for module in self.models.to_prepare():
            prepare(module, self.settings, worker)
        self.micro_batch_size, self.predicted_mib = fitting_micro_batch(
            job, self.models, self.stream.longest_prompt, worker
        )
        self.models.place_frozen(worker, self.settings.precision)
        self.learners = {
            name: Learner(name, module, self.settings, worker) for name, module in self.models.learned.items()
        }
        self.moving = MovingReference(self.models, self.learners[POLICY], job.training) if self.models.moves else None
        self.scorers = self._make_scorers(reward, monitor)
        self.controller = KLController(job.training.kl_coef, job.training.target_kl, job.training.kl_horizon)
        self.beside = BesideRollouts(
            job,
            worker,
            self.tokenizer.pad_token_id,
            packed=self.models.policy.packed,
            pass_tokens=self.micro_batch_size * (self.stream.longest_prompt + job.response_limit),
        )
        self.counts = RolloutCounts(self.models, self.scorers, self.settings, worker)
        self.iteration = 0
        self.bad_iterations = 0  # in a row, up to now

    def _make_scorers(self, reward: Judge | None, monitor: Judge | None) -> Scorers:
        job, worker = self.job, self.worker
        longest = self.stream.longest_prompt + job.response_limit
        batch_size = scored_at_once(self.micro_batch_size, longest, worker.device.type)
        reward = reward or self._load_judge(job.reward, batch_size)
        if monitor is None and job.monitor is not None:
            # What is not learned from ends no training by its silence.
            same = job.monitor == job.reward
            monitor = reward if same else Loader(worker).judge(job.monitor, batch_size, limited=False)
        return Scorers(
            policy=self.models.policy,
            reference=self.models.reference,
            critic=self.models.critic,
            reward=reward,
            monitor=monitor,
            temperature=self.settings.temperature,
            batch_size=batch_size,
            device=worker.device,
        )

    def _load_judge(self, spec: JudgeSpec, batch_size: int) -> Judge:
        """A judge on this worker: a role on the policy's body where it can be one, and spread where models are."""
        if self.models.reward is not None and spec == self.job.reward:
            return RewardModelJudge.of(self.models.reward, batch_size, device=self.worker.device)
        return Loader(self.worker).judge(spec, batch_size)

    def judge_calls(self) -> dict[str, int]:
        """Calls that all workers of this attempt made to an endpoint as the reward; empty for other rewards."""
        return Loader(self.worker).calls_of(self.scorers.reward)

    # --------------------------------------------------------------------------------- checkpoints, snapshots

    def tensors(self) -> dict[str, Tensor]:
        """Everything learnt: the models and their optimizers, and the reference where it moves."""
        found = {name: tensor for learner in self.learners.values() for name, tensor in learner.tensors().items()}
        return found if self.moving is None else found | self.moving.tensors()

    def state(self) -> dict[str, Any]:
        version = self.stream.version(self.iteration)
        guards = {name: learner.guard.state() for name, learner in self.learners.items()}
        return {
            "kl_coef": self.controller.coef,
            "weight_version": version,
            "bad_iterations": self.bad_iterations,
            "guards": guards,
            **self.counts.totals,
        }

    def restore(self) -> None:
        """Load the job's last checkpoint, if there is one."""
        checkpoint = self.worker.restore()
        self.worker.stage_log.forget_rows_after(checkpoint.step if checkpoint else 0)
        if checkpoint is None:
            return
        state, settings = checkpoint.state, self.settings
        for name, learner in self.learners.items():
            learner.restore(checkpoint.tensors)
            learner.guard.restore(state["guards"][name])
        if self.moving is not None:
            self.moving.restore(checkpoint.tensors)
        self.bad_iterations = state["bad_iterations"]
        self.controller = KLController(state["kl_coef"], settings.target_kl, settings.kl_horizon)
        self.counts.restore(state)
        self.iteration = checkpoint.step

    def save_snapshot(self) -> None:
        """Keep the policy as it is. Every worker calls it."""
        save = partial(save_as_it_is, self.models, self.job, self.worker, self.tokenizer)
        keep_snapshot(self.job.stage_dir, self.iteration, self.worker, save)

    # ---------------------------------------------------------------------------------------- iterations

    def run(self, iteration: int) -> dict[str, Any]:
        """One rollout batch: generate, judge, learn. Returns the row of metrics."""
        phases = Phases()
        self.iteration = iteration
        experience = self.make_experience(phases)
        coef = self.controller.coef
        targets = learnable(experience, self.settings, coef, self.job.response_limit)
        row: dict[str, Any] = {"step": iteration + 1, "num_steps": self.settings.num_iterations}
        kl = "kl" if self.moving is None else "kl_moving"
        row |= experience_metrics(experience, targets, self.settings.importance_cap, kl) | {"kl/coef": coef}
        if not self.policy_frozen() and math.isfinite(row[f"{kl}/k1"]):
            self.controller = self.controller.update(row[f"{kl}/k1"], len(experience))
        with phases("update"):
            row |= self._update(targets.batch, coef)
        beside = 0 if self.policy_frozen() else self.beside.num_tokens(iteration)
        self.counts.add(experience.sequences, num_beside=beside)
        self.iteration = iteration + 1
        if self.moving is not None:
            self.moving.after(self.iteration)
        row["tokens_per_second"] = phases.throughput(experience.num_sequence_tokens)
        return row | self.counts.totals | phases.seconds

    def make_experience(self, phases: Phases) -> Experience:
        """The rollouts of this iteration, scored, of all workers; in asynchronous mode the next ones are asked for."""
        stream = self.stream
        with phases("generate"):
            rollouts = stream.take_ahead(self.iteration)
        with phases("sync"):
            self._make_room()
            stream.push(self.iteration)
        with phases("generate"):
            rollouts = rollouts or stream.take(self.iteration)
            stream.ask_ahead(self.iteration)
        num_rows = self.settings.rollouts_per_iteration
        rollouts = as_many_as_others(rollouts, num_rows, self.worker)
        staleness = stream.staleness(rollouts, self.iteration)
        return gather(self.scorers.experience(rollouts, staleness, phases), num_rows, self.worker)

    def _make_room(self) -> None:
        """Free the temporary memory of an update, for weights under way and engines on the workers' devices."""
        self.worker.give_back_freed(self.settings)
        if self.job.generation.sleep_mode != "none":
            for learner in self.learners.values():
                learner.drop_gradients()
            self.worker.give_back_cache()

    def policy_frozen(self) -> bool:
        """Whether this iteration trains only the critic."""
        return self.iteration < _critic_warmup(self.settings)

    def learning_rates(self) -> dict[str, float]:
        """Each learner's rate in this iteration; the policy's schedule begins when the critic's warm-up is over."""
        settings, frozen = self.settings, _critic_warmup(self.settings)

        def rate(base: float, after: int) -> float:
            length = settings.num_iterations - after
            return warmed_up(base, settings.schedule, self.iteration - after, length, settings.warmup_iterations)

        rates = {"policy": 0.0 if self.policy_frozen() else rate(settings.learning_rate, frozen)}
        if isinstance(settings, CriticTraining):
            rates["critic"] = rate(settings.critic_learning_rate, 0)
        return rates

    def _update(self, batch: Batch, kl_coef: float) -> dict[str, float]:
        settings, window, rates = self.settings, Window(), self.learning_rates()
        terms = self.terms(kl_coef)
        num_steps, one = settings.num_epochs * settings.num_minibatches, torch.ones((), device=self.worker.device)
        before = {learner.name: learner.guard.num_skipped for learner, _ in terms}
        for epoch in range(settings.num_epochs):
            cut = minibatches(len(batch), settings.num_minibatches, self.job.seed, self.iteration, epoch)
            for number, rows in enumerate(cut):
                parts, scale = self.parts(batch, rows), 1 / self.count(batch, rows)
                for learner, term in terms:
                    passes = [Pass(partial(term, part), scale) for part in parts]
                    if learner.name == POLICY:
                        passes += self.beside.passes(self.iteration, epoch, number)
                    for output in learner.accumulate(passes):
                        for name, mean in output.metrics.items():
                            window.add(name, mean)
                    norm, skipped = learner.apply(rates[learner.name])
                    window.add(_NORM_NAMES[learner.name], Mean(norm, one))
                    window.close(skipped)
        lost = {learner.name: learner.guard.num_skipped - before[learner.name] for learner, _ in terms}
        self.bad_iterations = self.bad_iterations + 1 if num_steps in lost.values() else 0
        num_skipped = sum(learner.guard.num_skipped for learner in self.learners.values())
        return window.reduce(self.worker) | {"learning_rate": rates["policy"], "steps_skipped": num_skipped}

    def terms(self, kl_coef: float) -> list[tuple[Learner, Term]]:
        """The models that learn in this iteration, and their losses."""
        terms: list[tuple[Learner, Term]] = []
        if not self.policy_frozen():
            terms.append((self.learners["policy"], partial(self._policy_term, kl_coef=kl_coef)))
        if "critic" in self.learners:
            terms.append((self.learners["critic"], self._value_term))
        return terms

    def parts(self, batch: Batch, rows: Tensor) -> list[Batch]:
        """This worker's micro-batches of a minibatch, whose rows are shared out to the workers."""
        mine = rows[share(len(rows), self.worker.rank, self.worker.world_size)]
        parts = [batch.select(part) for part in by_length(batch.sequences, mine, self.micro_batch_size)]
        if self.worker.shards:  # every pass gathers layers, which takes all workers: those with fewer pass in vain
            most = -(-len(rows) // self.worker.world_size)
            empty = replace(parts[0], mask=torch.zeros_like(parts[0].mask))
            parts += [empty] * (-(-most // self.micro_batch_size) - len(parts))
        return parts

    def count(self, batch: Batch, rows: Tensor) -> Tensor:
        """The count that a loss's sum over a minibatch, on all workers, is divided by."""
        mask = batch.mask[rows_on(batch.mask.device, rows)]
        return self.settings.loss_count(mask, self.job.response_limit)

    def _policy_term(self, batch: Batch, module: nn.Module, *, kl_coef: float) -> ObjectiveOutput:
        """The method's sum over a micro-batch, and its metrics."""
        return self.settings.policy_loss(
            token_logps(module, batch.sequences, self.settings.temperature), batch, kl_coef
        )

    def _value_term(self, batch: Batch, module: nn.Module) -> ObjectiveOutput:
        """The critic's loss summed over a micro-batch, and its metrics."""
        if not isinstance(self.settings, CriticTraining):
            raise TypeError("there is no critic")
        return self.settings.value_loss(token_values(module, batch.sequences), batch)


def _critic_warmup(settings: OnPolicyTraining) -> int:
    return settings.critic_warmup_iterations if isinstance(settings, CriticTraining) else 0


def _check_sizes(settings: OnPolicyTraining, world_size: int) -> None:
    if settings.rollouts_per_iteration < settings.num_minibatches * world_size:
        raise UserError(
            f"rollouts_per_iteration {settings.rollouts_per_iteration} is fewer than one rollout for each of "
            f"{settings.num_minibatches} minibatches on {world_size} workers; raise training.rollouts_per_iteration"
        )
