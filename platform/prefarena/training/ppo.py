"""PPO on training workers: rollouts from a generator with versioned weights, a critic, and a frozen reward model.

Nothing here draws from a global random state: prompts, samples and minibatches are pure functions of the job's seed and
the iteration, so a checkpoint's iteration number is the whole state of the data and of the randomness.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefarena.config import PPOTraining
from prefarena.data.tables import read_rows
from prefarena.errors import UserError
from prefarena.generation.interface import RolloutSource, Sampling, StaleWeightsError
from prefarena.judges.spec import Judge, load_judge
from prefarena.modeling.heads import ScalarHead
from prefarena.modeling.load import load_policy, load_reward_model, load_tokenizer, new_reward_model, save_policy
from prefarena.modeling.logprobs import Sequences, token_logps
from prefarena.objectives.kl import KLController
from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.ppo import importance_weights, policy_loss, value_loss
from prefarena.records import Rollout
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.off_policy import TrainingDivergedError, Window
from prefarena.training.ppo_batch import Batch, experience_metrics, learnable
from prefarena.training.rollouts import (
    Experience,
    Scorers,
    assemble,
    collate_rollouts,
    gather,
    minibatches,
    prompt_indices,
    share,
)
from prefarena.training.worker import Worker, load_optimizer_tensors, optimizer_tensors

Reward = Callable[[Sequences], Tensor]


def train_ppo(
    job: OnPolicyJob, worker: Worker, source: RolloutSource | None = None, reward: Reward | None = None
) -> dict[str, Any]:
    """Run all iterations from the last checkpoint on, save the policy at `job.model_dir`, return the costs.

    `source` defaults to the generation actor that the job names, `reward` (sequences to [B]) to its reward model.
    The job's policy is both the start and the reference. Raises UserError where the batch is too small to share,
    TrainingDivergedError when a loss is not finite, and what the generator raises.
    """
    trainer = _Trainer(job, worker, source or _connect(job), reward)
    trainer.restore()
    for iteration in range(trainer.iteration, job.training.num_iterations):
        worker.log(trainer.run(iteration))
        if trainer.iteration % job.training.checkpoint_every == 0 and trainer.iteration < job.training.num_iterations:
            worker.save(trainer.iteration, trainer.tensors(), trainer.state())
    if worker.rank == 0:
        save_policy(trainer.policy, trainer.tokenizer, job.model_dir)
    costs = worker.costs(num_steps=job.training.num_iterations, **trainer.counts)
    costs["device_seconds"] += costs["wall_seconds"]  # the generation actor's device is held all the while
    return {"costs": costs}


def _connect(job: OnPolicyJob) -> RolloutSource:
    from prefarena.generation.actor import Generator

    return Generator.connect(job.generators[0], job.generation)


@dataclass
class _Learner:
    """A trained module with its own optimizer. `wrapped` runs forward in training (DDP with several workers)."""

    module: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.AdamW
    learning_rate: float


@dataclass
class _Phases:
    """Seconds per phase of an iteration."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[f"time/{name}"] = time.perf_counter() - started


class _Trainer:
    def __init__(self, job: OnPolicyJob, worker: Worker, source: RolloutSource, reward: Reward | None) -> None:
        self.job, self.worker, self.source = job, worker, source
        if not isinstance(job.training, PPOTraining):
            raise NotImplementedError(type(job.training).__name__)
        self.settings = job.training
        _check_sizes(self.settings, worker.world_size)
        self.tokenizer = load_tokenizer(job.policy)
        self.policy = load_policy(job.policy)
        critic = load_reward_model(job.critic) if job.critic else new_reward_model(job.policy, job.seed)
        self._policy = self._learner(self.policy, job.training.learning_rate)
        self._critic = self._learner(ScalarHead(critic), self.settings.critic_learning_rate)
        reference = load_policy(job.policy)
        _freeze(reference, worker.device)
        if reward is None:
            reward = _judged(load_judge(job.reward, job.training.micro_batch_size, worker.device))
        self._scorers = Scorers(
            policy=self.policy,
            reference=reference,
            values=partial(_values, self._critic.module, critic),
            reward=reward,
            temperature=job.training.temperature,
            micro_batch_size=job.training.micro_batch_size,
            autocast=self._autocast,
        )
        self._train_values = partial(_values, self._critic.wrapped, critic)
        self.prompts = _read_prompts(job)
        self.controller = KLController(job.training.kl_coef, job.training.target_kl, job.training.kl_horizon)
        self.counts = {"num_tokens_generated": 0, "num_tokens_trained": 0}
        self.iteration = 0

    def _learner(self, module: nn.Module, learning_rate: float) -> _Learner:
        wrapped = self.worker.wrap(module)
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=learning_rate, betas=self.settings.betas, weight_decay=0.0
        )
        return _Learner(module, wrapped, optimizer, learning_rate)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.worker.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    # --------------------------------------------------------------------------------------- checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Everything learnt: both models and both optimizers."""
        named: dict[str, Tensor] = {}
        for prefix, learner in (("policy", self._policy), ("critic", self._critic)):
            named |= {f"{prefix}.{name}": value for name, value in learner.module.named_parameters()}
            named |= optimizer_tensors(learner.optimizer, f"{prefix}_optimizer")
        return named

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.controller.coef, "weight_version": self._version(self.iteration), **self.counts}

    def restore(self) -> None:
        """Load the job's last checkpoint, if there is one, and give the generator the policy that results."""
        checkpoint = self.worker.restore()
        self.worker.forget_rows_after(checkpoint.step if checkpoint else 0)
        if checkpoint is not None:
            for prefix, learner in (("policy", self._policy), ("critic", self._critic)):
                with torch.no_grad():
                    for name, parameter in learner.module.named_parameters():
                        parameter.copy_(checkpoint.tensors[f"{prefix}.{name}"])
                load_optimizer_tensors(learner.optimizer, checkpoint.tensors, f"{prefix}_optimizer")
            state = checkpoint.state
            self.controller = KLController(state["kl_coef"], self.settings.target_kl, self.settings.kl_horizon)
            self.counts = {name: state[name] for name in self.counts}
            self.iteration = checkpoint.step
        self._push()

    # ---------------------------------------------------------------------------------------- iterations

    def run(self, iteration: int) -> dict[str, Any]:
        """One rollout batch: generate, judge, learn, push the new weights. Returns the row of metrics."""
        phases = _Phases()
        self.iteration = iteration
        experience = self._make_experience(phases)
        coef = self.controller.coef
        batch = learnable(experience, self.settings, coef)
        row: dict[str, Any] = {"step": iteration + 1, "num_steps": self.settings.num_iterations}
        row |= experience_metrics(experience, batch) | {"kl/coef": coef}
        self.controller = self.controller.update(row["kl/k1"], len(experience))
        with phases("update"):
            row |= self._update(batch)
        num_tokens = int(experience.mask.sum())
        self.counts["num_tokens_generated"] += num_tokens
        self.counts["num_tokens_trained"] += experience.num_sequence_tokens * self.settings.num_epochs
        self.iteration = iteration + 1
        with phases("sync"):
            self._push()
        return row | self.counts | phases.seconds

    def _make_experience(self, phases: _Phases) -> Experience:
        settings, worker = self.settings, self.worker
        indices = prompt_indices(len(self.prompts), settings.rollouts_per_iteration, self.iteration, self.job.seed)
        mine = share(len(indices), worker.rank, worker.world_size)
        sampling = Sampling(
            max_tokens=self.job.response_limit,
            temperature=settings.temperature,
            seed=self.job.seed * 1_000_003 + self.iteration,
            first_index=mine.start,
        )
        with phases("generate"):
            rollouts = self._generate([self.prompts[index] for index in indices[mine]], sampling)
        sequences = collate_rollouts(rollouts, self.tokenizer.pad_token_id, worker.device)
        with phases("score"):
            scores = self._scorers.score(sequences)
        with phases("logprobs"):
            local = assemble(rollouts, self._scorers, sequences, scores)
            return gather(local, len(indices), worker)

    def _generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Rollout]:
        version = self._version(self.iteration)
        try:
            return self.source.generate(prompts, sampling, version)
        except StaleWeightsError:  # a restarted generator holds no weights; every worker has the same ones
            self.source.sync(self.policy.state_dict().items(), version)
            return self.source.generate(prompts, sampling, version)

    def _version(self, iteration: int) -> str:
        return f"{self.job.name}@{iteration}"

    def _push(self) -> None:
        """Give the generator the policy of the iteration to come; no worker goes on before it has it."""
        if self.worker.rank == 0:
            self.source.sync(self.policy.state_dict().items(), self._version(self.iteration))
        self.worker.sum(torch.zeros((), device=self.worker.device))

    def _update(self, batch: Batch) -> dict[str, float]:
        settings, window = self.settings, Window()
        warmup = min(1.0, (self.iteration + 1) / max(1, settings.warmup_iterations))
        norms: dict[str, list[Tensor]] = {"grad_norm": [], "critic_grad_norm": []}
        for epoch in range(settings.num_epochs):
            for rows in minibatches(
                len(batch.advantages), settings.num_minibatches, self.job.seed, self.iteration, epoch
            ):
                norms["grad_norm"].append(self._step(self._policy, self._policy_term, batch, rows, warmup, window))
                norms["critic_grad_norm"].append(
                    self._step(self._critic, self._value_term, batch, rows, warmup, window)
                )
        row = window.reduce(self.worker) | {name: float(torch.stack(parts).mean()) for name, parts in norms.items()}
        bad = {name: value for name, value in row.items() if not math.isfinite(value)}
        if bad:
            raise TrainingDivergedError(f"not finite at iteration {self.iteration}: {bad}")
        return row | {"learning_rate": settings.learning_rate * warmup}

    def _step(
        self,
        learner: _Learner,
        term: Callable[[Batch], ObjectiveOutput],
        batch: Batch,
        rows: Tensor,
        warmup: float,
        window: Window,
    ) -> Tensor:
        """One optimizer step on a minibatch. Returns the gradient's norm before clipping, []."""
        for group in learner.optimizer.param_groups:
            group["lr"] = learner.learning_rate * warmup
        learner.optimizer.zero_grad(set_to_none=True)
        count = batch.mask[rows].sum()  # of all micro-batches and workers
        mine = rows[share(len(rows), self.worker.rank, self.worker.world_size)]
        parts = mine.split(self.settings.micro_batch_size)
        for position, part in enumerate(parts):
            with self.worker.no_sync(learner.wrapped, enabled=position < len(parts) - 1):
                with self._autocast():
                    output = term(batch.select(part))
                # DDP averages gradients over workers; the step's loss is their sum.
                (output.loss.total * self.worker.world_size / count).backward()
            for name, mean in output.metrics.items():
                window.add(name, mean)
        norm = nn.utils.clip_grad_norm_(learner.module.parameters(), self.settings.max_grad_norm)
        learner.optimizer.step()
        return norm

    def _policy_term(self, batch: Batch) -> ObjectiveOutput:
        logps = token_logps(self._policy.wrapped, batch.sequences, self.settings.temperature)
        weights = importance_weights(batch.old_logps, batch.generator_logps, self.settings.importance_cap)
        return policy_loss(
            logps, batch.old_logps, batch.advantages, batch.mask, clip=self.settings.clip, weights=weights
        )

    def _value_term(self, batch: Batch) -> ObjectiveOutput:
        values = self._train_values(batch.sequences)
        return value_loss(values, batch.values, batch.returns, batch.mask, clip=self.settings.value_clip)


def _judged(judge: Judge) -> Reward:
    """A judge as a function of sequences [B] to scores [B]."""

    def reward(sequences: Sequences) -> Tensor:
        prompts, responses = sequences.ids()
        return torch.from_numpy(judge.score(prompts, responses)).float().to(sequences.input_ids.device)

    return reward


def _freeze(module: nn.Module, device: torch.device) -> None:
    module.to(device).requires_grad_(False)


def _values(head: nn.Module, critic: PreTrainedModel, sequences: Sequences) -> Tensor:
    """Critic values [B, T-1], normalised like the reward model it starts from; `head` may be wrapped."""
    mean, scale = getattr(critic.config, "reward_mean", 0.0), getattr(critic.config, "reward_scale", 1.0)
    return (head(sequences)[:, :-1] - mean) / scale


def _read_prompts(job: OnPolicyJob) -> list[list[int]]:
    """The training prompts, or those of them with pairs."""
    rows = read_rows(job.prompts, ["prompt_ids", "covered", "split"]).to_pylist()
    prompts = [
        row["prompt_ids"] for row in rows if row["split"] == "train" and (row["covered"] or not job.covered_only)
    ]
    if not prompts:
        raise UserError(f"{job.prompts}: no training prompt for PPO to sample on")
    return prompts


def _check_sizes(settings: PPOTraining, world_size: int) -> None:
    if settings.rollouts_per_iteration < settings.num_minibatches * world_size:
        raise UserError(
            f"rollouts_per_iteration {settings.rollouts_per_iteration} is fewer than one rollout for each of "
            f"{settings.num_minibatches} minibatches on {world_size} workers; raise ppo.rollouts_per_iteration"
        )
