"""micro_batch_tokens: auto is the largest pass that is predicted to fit, and the same one every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tiny_policy
from torch import nn

from prefarena.cluster.needs import Training, chosen_size
from prefarena.config import LoRA, Optimisation, parse_config
from prefarena.data.plan import LARGEST_PASS, BatchPlan
from prefarena.modeling.memory import MemoryNeed
from prefarena.modeling.room import total_mib
from prefarena.objectives.output import Mean, ObjectiveOutput
from prefarena.stage_files import MEMORY
from prefarena.training import prediction, process_memory
from prefarena.training.learner import Learner, Pass
from prefarena.training.terms import Shares
from prefarena.training.worker import Worker

MIB = 2**20


class _Term:
    """Stands for a term: only its plan counts here."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan

    def num_models_beside(self) -> int:
        return 0


def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, training: Optimisation) -> dict[str, Any]:
    """memory.json, where a token of the largest pass takes one MiB."""
    sizes = np.full(64, 256)
    terms: list[Any] = [_Term(Shares(training, 1, 0).plan(sizes, sizes))]
    worker = Worker(str(tmp_path / "job"))
    monkeypatch.setattr(worker, "memory_share_mib", lambda: share)

    def need(module: nn.Module, losses: list[Any], **_: object) -> MemoryNeed:
        tokens = int(terms[0].plan.sizes[terms[0].plan.largest_micro_batch()].sum())
        return MemoryNeed(0, 0, 0, tokens * MIB)

    monkeypatch.setattr(prediction, "training_memory", need)
    predicted = prediction.predict_memory(nn.Linear(1, 1), terms, training, worker)
    found = json.loads((tmp_path / "job" / MEMORY).read_text(encoding="utf-8"))
    assert predicted == pytest.approx(found["predicted_mib"], abs=0.1)
    return found | {"plan": terms[0].plan.micro_batch_tokens}


@pytest.mark.parametrize(
    ("share", "tokens"), [(20_000.0, 8192), (11_000.0, 4096), (5_000.0, 2048), (1_500.0, 512), (10.0, 512)]
)
def test_the_largest_pass_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, tokens: int) -> None:
    found = chosen(tmp_path, monkeypatch, share, Optimisation())
    assert found["micro_batch_tokens"] == found["plan"] == tokens and found["share_mib"] == share


def test_a_number_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(tmp_path, monkeypatch, 10.0, Optimisation(micro_batch_tokens=3000))
    assert found["plan"] == 3000 and "micro_batch_tokens" not in found


def test_settings() -> None:
    assert Optimisation().micro_batch_tokens == "auto"
    for wrong in (0, "most"):
        with pytest.raises(ValueError, match="micro_batch_tokens"):
            Optimisation(micro_batch_tokens=wrong)  # type: ignore[arg-type]


def test_a_share_is_of_what_there_is_in_all(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    whole = total_mib([limit])
    assert whole > 100
    for text, mib in (("max\n", whole), (f"{64 * MIB}\n", 64.0), (f"{2**63 - 4096}\n", whole)):
        limit.write_text(text, encoding="ascii")
        assert total_mib([limit]) == mib
    worker = Worker(str(tmp_path / "job"))
    alone = worker.memory_share_mib()
    worker.num_side_by_side = 4
    assert worker.memory_share_mib() == alone / 4 == Worker(str(tmp_path / "job")).memory_share_mib() / 4


def test_the_embedded_default_keeps_its_passes(tmp_path: Path) -> None:
    """A model of its size, with the largest pass that there is, takes a small part of 2 GiB."""
    from prefarena.modeling.load import load_policy
    from prefarena.modeling.logprobs import LogProbs, sequence_logps
    from prefarena.modeling.memory import training_memory

    save_tiny_policy(tmp_path / "policy")
    module = LogProbs(load_policy(tmp_path / "policy"))
    number = LARGEST_PASS // 12

    def loss(one: nn.Module) -> torch.Tensor:
        return sequence_logps(one, [[1, 3, 4, 5]] * number, [[[3, 4, 5, 2], [4, 4, 4, 2]]] * number)[0].sum()

    need = training_memory(module, [loss])
    assert need is not None and need.total / MIB < 700


def on_policy_job(folder: Path, **training: Any) -> Any:
    """A PPO job whose reward is a learned model."""
    from prefarena.config import Generation, PPOTraining, RewardModel
    from prefarena.judges.spec import JudgeSpec
    from prefarena.training.jobs import OnPolicyJob

    reward = JudgeSpec(RewardModel(), str(folder), str(folder))
    return OnPolicyJob(
        str(folder / "job"), "ppo", str(folder), 0, training=PPOTraining(**training), reward=reward, prompts="",
        covered_only=False, generators=(), generation=Generation(), response_limit=24,
    )  # fmt: skip


def passes_of(folder: Path, monkeypatch: pytest.MonkeyPatch, share: float, **training: Any) -> tuple[int, Any]:
    from prefarena.modeling.heads import ValueHead
    from prefarena.modeling.load import load_policy, new_reward_model
    from prefarena.modeling.logprobs import LogProbs
    from prefarena.training.on_policy_memory import fitting_micro_batch
    from prefarena.training.on_policy_models import OnPolicyModels

    policy = save_tiny_policy(folder)
    models = OnPolicyModels(
        LogProbs(load_policy(policy), 64),
        LogProbs(load_policy(policy), 64),
        ValueHead(new_reward_model(policy, 0), 64),
    )
    worker = Worker(str(folder / "job"))
    monkeypatch.setattr(worker, "memory_share_mib", lambda: share)
    size, predicted = fitting_micro_batch(on_policy_job(folder, **training), models, 40, worker)
    assert predicted is not None
    return size, json.loads((folder / "job" / MEMORY).read_text(encoding="utf-8"))


def test_rollouts_in_a_pass_are_halved_until_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, there = passes_of(tmp_path / "a", monkeypatch, 1e6)
    assert free == 64 == there["micro_batch_size"]
    activations = there["activations_mib"]
    assert activations > 1
    # Room for what is held and three quarters of the activations of 64: half of them fit.
    held = sum(there[f"{part}_mib"] for part in ("weights", "gradients", "optimizer"))
    room = 800.0 + 1.3 * (held + 0.75 * activations)
    half, there = passes_of(tmp_path / "b", monkeypatch, room)
    assert half == 32 == there["micro_batch_size"] and there["activations_mib"] < 0.75 * activations
    least, there = passes_of(tmp_path / "c", monkeypatch, 1.0)
    assert least == 1 and there["activations_mib"] < 0.05 * activations
    own, there = passes_of(tmp_path / "d", monkeypatch, 1.0, micro_batch_size=48)
    assert own == 48 and "micro_batch_size" not in there


def test_a_ppo_worker_holds_two_learned_models_two_frozen_ones_and_the_weights_it_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, there = passes_of(tmp_path, monkeypatch, 1e6)
    from prefarena.modeling.load import load_policy

    policy = sum(weight.numel() for weight in load_policy(tmp_path).parameters()) * 4 / MIB
    assert 4 * policy < there["weights_mib"] < 5 * policy + 0.1
    assert there["gradients_mib"] == pytest.approx(there["optimizer_mib"] / 2, abs=0.1)
    assert there["gradients_mib"] < 2 * policy


@pytest.mark.parametrize(("training", "number"), [(Optimisation(lora=LoRA(rank=2)), 2), (Optimisation(), 0)])
def test_freed_memory_goes_back_before_every_pass_where_memory_counts_for_more_than_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: Optimisation, number: int
) -> None:
    module = nn.Linear(2, 1)
    learner = Learner("model", module, training, Worker(str(tmp_path)))
    given_back: list[None] = []
    monkeypatch.setattr(process_memory, "give_back_freed", lambda: given_back.append(None))

    def loss(called: nn.Module) -> ObjectiveOutput:
        return ObjectiveOutput(Mean(called(torch.ones(1, 2)).sum(), torch.ones(())), {})

    learner.accumulate([Pass(loss, 1.0), Pass(loss, 1.0)])
    assert len(given_back) == number


@pytest.mark.parametrize("sizes", [(64,), (64, 32), (64, 32, 16), (64, 32, 16, 8, 4)])
def test_the_size_before_a_run_is_the_largest_that_fits_and_the_largest_of_all_is_tried_first(
    sizes: tuple[int, ...],
) -> None:
    config = parse_config({"entries": [{"name": "dpo", "method": {"kind": "dpo"}}]})
    training = Training("dpo", "micro_batch_tokens", Optimisation(), sizes, lambda *_: None)

    def found(room: int | None, mib_each: int | None = 1024) -> tuple[int, list[int]]:
        tried: list[int] = []

        def need(size: int) -> MemoryNeed | None:
            tried.append(size)
            return None if mib_each is None else MemoryNeed(0, 0, 0, size * mib_each * MIB)

        return chosen_size(training, need, room, config), tried

    def required(size: int) -> int:
        return int(prediction.required_mib(MemoryNeed(0, 0, 0, size * 1024 * MIB), on_cpu=True, spares=False) * MIB) + 1

    for size in sizes:  # rooms that this size just fits into, as a search through all of them finds it
        assert found(required(size))[0] == max(one for one in sizes if required(one) <= required(size))
    assert found(required(64)) == (64, [64] if len(sizes) > 1 else [])
    assert found(0)[0] == found(0, None)[0] == min(sizes)  # nothing fits, or nobody knows what it takes
    assert found(None) == (64, [])
