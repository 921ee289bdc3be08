"""One optimizer step's gradient, whatever the micro-batches, the number of workers and the padding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from on_policy import Done, LikedCount, make_job
from tiny import BOS, EOS, FIRST_LETTER, VOCABULARY
from torch import Tensor, nn

from prefarena.config import GRPOTraining, PPOTraining, RLOOTraining
from prefarena.data.tables import write_rows
from prefarena.generation.interface import Sampling
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs, Sequences, token_logps
from prefarena.records import PROMPTS, Rollout
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.learner import Pass
from prefarena.training.on_policy import OnPolicyTrainer, Phases
from prefarena.training.on_policy_batch import learnable
from prefarena.training.rollouts import minibatches
from prefarena.training.worker import Worker

SIZES = {"num_iterations": 1, "rollouts_per_iteration": 24, "num_minibatches": 2, "kl_coef": 0.3}
METHODS: dict[str, PPOTraining | GRPOTraining | RLOOTraining] = {
    "ppo": PPOTraining(**SIZES),
    "grpo": GRPOTraining(**SIZES, group_size=4),
    "grpo-sequences": GRPOTraining(**SIZES, group_size=4, loss_mean="sequences"),
    "grpo-limit": GRPOTraining(**SIZES, group_size=4, loss_mean="limit", normalise_std=False, clip_high=0.3),
    "rloo": RLOOTraining(**SIZES, group_size=4),
}


class Double(Worker):
    """A worker that trains in float64, so that a wrong divisor cannot hide behind rounding."""

    def __init__(self, stage_dir: str, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        super().__init__(stage_dir)

    def wrap(self, module: nn.Module) -> nn.Module:
        return super().wrap(module.double())


class Recorded:
    """Responses of lengths 1 to 6 to whatever is asked, with log-probs that are off by up to a nat."""

    def __init__(self, policy: str) -> None:
        self._policy = load_policy(policy)

    def sync(self, named_tensors: object, version: str) -> None:
        pass

    def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> Done:
        return Done([self._rollout(sampling.first_index + i, prompt, version) for i, prompt in enumerate(prompts)])

    def generate(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        return self.submit(prompts, sampling, version).result()

    def _rollout(self, row: int, prompt: list[int], version: str) -> Rollout:
        random = torch.Generator().manual_seed(row)
        length = 1 + row % 6
        response = torch.randint(FIRST_LETTER, len(VOCABULARY), (length,), generator=random).tolist()
        finished = row % 3 > 0
        response = [*response[:-1], EOS] if finished else response
        sequences = Sequences.of([prompt], [response])
        with torch.no_grad():
            logps = token_logps(LogProbs(self._policy), sequences)[sequences.response_mask]
        noise = torch.rand(length, generator=random) * 2 - 1
        return Rollout(prompt, response, (logps + noise).tolist(), finished, version)


@pytest.fixture
def job(tmp_path: Path, tiny_policy: str) -> OnPolicyJob:
    job = make_job(tmp_path, tiny_policy, METHODS["ppo"])
    prompts = {
        "id": [f"{i:02d}" for i in range(7)],
        "prompt_ids": [[BOS] + [FIRST_LETTER + (i + j) % 9 for j in range(1 + i)] for i in range(7)],
        "covered": [True] * 7,
        "split": ["train"] * 7,
    }
    write_rows(pa.table(prompts), tmp_path / "prompts.parquet", PROMPTS)
    return job


def gradients(job: OnPolicyJob, worker: Worker) -> dict[str, Tensor]:
    """Of each learner, on the first minibatch, after a move away from the policy that the rollouts were scored with."""
    trainer = OnPolicyTrainer(job, worker, Recorded(job.policy), reward=LikedCount())
    trainer.scorers.reference.double()
    targets = learnable(trainer.make_experience(Phases()), job.training, kl_coef=0.3)
    random = torch.Generator().manual_seed(0)
    for learner in trainer.learners.values():
        for parameter in learner.module.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=random)
    rows = minibatches(24, 2, seed=0, iteration=0, epoch=0)[0]
    found = {}
    for learner, term in trainer.terms(kl_coef=0.3):
        parts, scale = trainer.parts(targets.batch, rows), 1 / trainer.count(targets.batch, rows)
        learner.accumulate(Pass(partial(term, part), scale) for part in parts)
        flat = [p.grad.flatten() for p in learner.module.parameters() if p.grad is not None]
        found[learner.name] = torch.cat(flat)
    return found


def with_method(job: OnPolicyJob, method: str, micro_batch_size: int) -> OnPolicyJob:
    return replace(job, training=METHODS[method].model_copy(update={"micro_batch_size": micro_batch_size}))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-2
        assert (found[name] - gradient).abs().max() < 1e-6 * gradient.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_leave_the_gradient_as_it_is(job: OnPolicyJob, method: str) -> None:
    whole = gradients(with_method(job, method, 24), Double(job.stage_dir))
    assert set(whole) == ({"policy", "critic"} if method == "ppo" else {"policy"})
    for size in (1, 3, 7):
        assert_same(gradients(with_method(job, method, size), Double(job.stage_dir)), whole)


def run_as_one_of_many(rank: int, world_size: int, job: OnPolicyJob, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous-{world_size}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    found = {
        method: gradients(with_method(job, method, 3), Double(job.stage_dir, rank, world_size)) for method in METHODS
    }
    if rank == 0:
        torch.save(found, f"{folder}/{world_size}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_leave_the_gradient_as_it_is(job: OnPolicyJob, tmp_path: Path, num_workers: int) -> None:
    torch.multiprocessing.spawn(run_as_one_of_many, args=(num_workers, job, str(tmp_path)), nprocs=num_workers)
    shared = torch.load(tmp_path / f"{num_workers}.pt")
    for method in METHODS:
        assert_same(shared[method], gradients(with_method(job, method, 24), Double(job.stage_dir)))


def test_by_the_limit_a_gradient_is_that_over_tokens_times_their_share(job: OnPolicyJob) -> None:
    """Dr. GRPO divides by a constant, so a response's weight does not depend on how long the others are."""
    by_tokens = GRPOTraining(**SIZES, group_size=4, normalise_std=False, clip_high=0.3)
    trainer = OnPolicyTrainer(
        replace(job, training=by_tokens), Double(job.stage_dir), Recorded(job.policy), LikedCount()
    )
    batch = learnable(trainer.make_experience(Phases()), by_tokens, kl_coef=0.3).batch
    rows = minibatches(24, 2, seed=0, iteration=0, epoch=0)[0]
    share = float(batch.mask[rows].sum()) / (len(rows) * job.response_limit)
    assert 0 < share < 1
    tokens = gradients(replace(job, training=by_tokens), Double(job.stage_dir))["policy"]
    limit = gradients(with_method(job, "grpo-limit", 24), Double(job.stage_dir))["policy"]
    assert_same({"policy": limit}, {"policy": tokens * share})


def test_padding_changes_neither_log_probs_nor_values(job: OnPolicyJob) -> None:
    together = OnPolicyTrainer(with_method(job, "ppo", 24), Worker(job.stage_dir), Recorded(job.policy), LikedCount())
    alone = OnPolicyTrainer(with_method(job, "ppo", 1), Worker(job.stage_dir), Recorded(job.policy), LikedCount())
    alone.scorers = replace(alone.scorers, batch_size=1)  # no row sees any padding
    padded, bare = together.make_experience(Phases()), alone.make_experience(Phases())
    lengths = padded.sequences.lengths
    assert lengths.min() < lengths.max() - 5
    for name in ("old_logps", "reference_logps", "entropy", "values"):
        assert getattr(padded, name).abs().max() > 0.1
        assert torch.allclose(getattr(padded, name), getattr(bare, name), rtol=0, atol=2e-6)
