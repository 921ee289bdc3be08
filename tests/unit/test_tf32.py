"""TF32 is asked for by a setting, is in the address, and is on exactly while that setting's products are computed.

Whether a GPU rounds is torch's affair; what is tested here is what torch is told at the moment of each product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from off_policy import off_policy_job, write_inputs
from on_policy import LocalGenerator, make_job
from test_scoring_arithmetic import PROMPTS, RESPONSES, config, evaluated, keys
from test_training import reward_model_job
from tiny import save_tiny_policy
from torch import Tensor, nn

from pipelines.reference import ReferenceLogps
from prefarena.cluster.attention import why_not
from prefarena.cluster.needs import precisions
from prefarena.config import PPOTraining, RewardModel
from prefarena.config.devices import Arithmetic as OfConfig
from prefarena.errors import UserError
from prefarena.judges.models import RewardModelJudge
from prefarena.judges.spec import JudgeSpec
from prefarena.methods.dpo import DPO
from prefarena.modeling import logprobs
from prefarena.modeling.arithmetic import Arithmetic, products_of
from prefarena.modeling.attention_trial import Heads
from prefarena.modeling.load import load_policy, load_tokenizer, new_reward_model, save_policy
from prefarena.modeling.logprobs import LogProbs
from prefarena.settings.optimisation import LearnerSettings, Optimisation
from prefarena.training.jobs import Job, ReferenceJob
from prefarena.training.on_policy import train_on_policy
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

TF32, EXACT = "high", "highest"  # in torch's words
QUICK = Optimisation(num_steps=2, batch_size=8, precision="tf32")


@dataclass
class Seen:
    """What torch was told when embeddings were read in forward passes, and when their gradients arrived."""

    forward: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found, plain = Seen(), nn.Embedding.forward

    def watched(module: nn.Embedding, ids: Tensor) -> Tensor:
        out = plain(module, ids)
        found.forward.append(torch.get_float32_matmul_precision())
        if out.requires_grad:
            out.register_hook(lambda _: found.backward.append(torch.get_float32_matmul_precision()))
        return out

    monkeypatch.setattr(nn.Embedding, "forward", watched)
    monkeypatch.setattr(logprobs, "why_not_packed", lambda *_: "what is tried before a model runs is none of this")
    monkeypatch.setattr(logprobs, "has_plain_head", lambda *_: True)
    return found


def test_what_a_model_can_do_is_tried_in_full_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, plain = list[str](), nn.Embedding.forward

    def watched(module: nn.Embedding, ids: Tensor) -> Tensor:
        told.append(torch.get_float32_matmul_precision())
        return plain(module, ids)

    monkeypatch.setattr(nn.Embedding, "forward", watched)
    policy = load_policy(save_tiny_policy(tmp_path / "policy"))
    with products_of("tf32"):
        assert LogProbs(policy, 8).packed
        assert set(told) == {EXACT} and torch.get_float32_matmul_precision() == TF32


def supervised(inputs: Path, folder: Path) -> Job:
    return ReferenceJob(str(folder), "sft", str(inputs / "model"), 0, QUICK, str(inputs / "demonstrations"))


def preferred(inputs: Path, folder: Path) -> Job:
    return off_policy_job(inputs, folder, DPO(training=QUICK))


@pytest.mark.parametrize("make", [supervised, preferred])
def test_a_training_in_tf32_computes_all_its_passes_so_and_leaves_no_trace(
    tmp_path: Path, seen: Seen, make: Callable[[Path, Path], Job]
) -> None:
    job = make(write_inputs(tmp_path), tmp_path / "stage")
    seen.forward.clear()
    run_job(job, Worker(job.stage_dir))
    assert set(seen.forward) == set(seen.backward) == {TF32}
    assert torch.get_float32_matmul_precision() == EXACT


def test_a_reward_model_is_trained_in_one_and_measured_in_the_other(tmp_path: Path, seen: Seen) -> None:
    job = reward_model_job(write_inputs(tmp_path), tmp_path / "stage")
    for training, scoring in ((TF32, EXACT), (EXACT, TF32)):
        names = {TF32: "tf32", EXACT: "float32"}
        settings = RewardModel(training=QUICK.model_copy(update={"precision": names[training]}))
        folder = str(tmp_path / names[training])
        changed = {"settings": settings, "scored_in": names[scoring], "stage_dir": folder}
        seen.forward.clear()
        seen.backward.clear()
        run_job(type(job)(**(vars(job) | changed)), Worker(folder))
        assert set(seen.backward) == {training}
        assert seen.forward[0] == training and seen.forward[-1] == scoring
        assert set(seen.forward) == {training, scoring}


def test_the_judge_of_an_on_policy_training_computes_in_its_own(tmp_path: Path, seen: Seen) -> None:
    training = PPOTraining(
        num_iterations=1, rollouts_per_iteration=6, num_minibatches=1, micro_batch_size=6, precision="tf32"
    )
    job = make_job(tmp_path, save_tiny_policy(tmp_path / "policy"), training)
    seen.forward.clear()
    with products_of(job.arithmetic):  # as `run_job` calls it
        train_on_policy(job, Worker(job.stage_dir), LocalGenerator(job.policy))
    assert set(seen.backward) == {TF32}
    assert set(seen.forward) == {TF32, EXACT}  # the judge's are exact


def test_what_measures_computes_in_the_arithmetic_it_is_told(tmp_path: Path, seen: Seen) -> None:
    expected: dict[Arithmetic, str] = {"tf32": TF32, "float32": EXACT}
    for arithmetic, told in expected.items():
        folder = tmp_path / arithmetic
        folder.mkdir()
        policy = save_tiny_policy(folder / "policy-of-the-judge")
        save_policy(new_reward_model(policy, 0), load_tokenizer(policy), folder / "judge")
        seen.forward.clear()
        evaluated(folder, arithmetic, JudgeSpec(RewardModel(), str(folder / "judge"), policy, arithmetic=arithmetic))
        assert set(seen.forward) == {told}
        seen.forward.clear()
        num_threads = torch.get_num_threads()
        scorer = ReferenceLogps(policy, 8, "cpu", 1, arithmetic)
        torch.set_num_threads(num_threads)
        seen.forward.clear()  # whether it can be packed was tried before
        scorer.score({"prompt_ids": PROMPTS[:4], "chosen_ids": RESPONSES[1:5], "rejected_ids": RESPONSES[5:9]})
        assert set(seen.forward) == {told}


def test_a_judge_within_a_training_is_not_changed_by_it(tmp_path: Path, seen: Seen) -> None:
    policy = save_tiny_policy(tmp_path / "policy")
    save_policy(new_reward_model(policy, 0), load_tokenizer(policy), tmp_path / "judge")
    judge = RewardModelJudge(tmp_path / "judge", arithmetic="float32")
    seen.forward.clear()
    with products_of("tf32"):
        judge.score(PROMPTS, RESPONSES)
        assert set(seen.forward) == {EXACT} and torch.get_float32_matmul_precision() == TF32


def test_an_error_does_not_leave_tf32_on() -> None:
    with pytest.raises(RuntimeError, match="stop"), products_of("tf32"):
        raise RuntimeError("stop")
    assert torch.get_float32_matmul_precision() == EXACT


# ------------------------------------------------------------------------------------- the setting


def in_tf32(tmp_path: Path, use_gpu: bool, **scoring: Any) -> Any:
    entries = [
        {"name": "dpo", "method": {"kind": "dpo", "training": {"precision": "tf32"}}},
        {"name": "mpo", "method": {"kind": "mpo"}},
    ]
    return config(tmp_path, entries=entries, resources={"use_gpu": use_gpu, "scoring": scoring})


def test_it_has_addresses_of_its_own_and_pairs_are_scored_as_training_computes(tmp_path: Path) -> None:
    entries = [{"name": name, "method": {"kind": name}} for name in ("dpo", "mpo")]
    exact = {"use_gpu": True, "scoring": {"dtype": "float32"}}
    plain = keys(config(tmp_path, entries=entries, resources=exact))
    found = keys(in_tf32(tmp_path, use_gpu=True, dtype="float32"))
    assert found["dpo-dpo-s0"] != plain["dpo-dpo-s0"] and found["mpo-mpo-s0"] == plain["mpo-mpo-s0"]
    assert precisions(in_tf32(tmp_path, use_gpu=True, dtype="tf32")) == ["float32", "tf32"]
    assert keys(in_tf32(tmp_path, use_gpu=True, dtype="tf32")) != found


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({}, "entries.dpo.method.training.precision"),
        ({"entries": [{"name": "a", "method": {"kind": "dpo"}}]}, None),
        (
            {
                "entries": [{"name": "a", "method": {"kind": "dpo"}}],
                "judge": {"kind": "learned", "training": {"precision": "tf32"}},
            },
            "judge.training.precision",
        ),
        (
            {
                "entries": [{"name": "a", "method": {"kind": "dpo"}}],
                "resources": {"scoring": {"dtype": "tf32"}},
            },
            "resources.scoring.dtype",
        ),
    ],
)
def test_without_gpus_it_is_refused_wherever_it_is_set(
    tmp_path: Path, changed: dict[str, Any], where: str | None
) -> None:
    if where is None:
        config(tmp_path, **changed)
        return
    if not changed:
        with pytest.raises(UserError, match=f"{where}: tf32 is a precision of GPUs"):
            in_tf32(tmp_path, use_gpu=False)
        return
    with pytest.raises(UserError, match=f"{where}: tf32 is a precision of GPUs"):
        config(tmp_path, **changed)


def test_the_doctor_tries_attention_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told, plain = list[str](), torch.Tensor.backward

    def watched(tensor: Tensor, *others: Any, **named: Any) -> None:
        told.append(torch.get_float32_matmul_precision())
        plain(tensor, *others, **named)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    assert why_not(Heads(32, 4, 2), ["tf32", "float32"], "cpu") is None
    assert told == [TF32, TF32, EXACT, EXACT]  # each on the device and on the CPU


def test_settings_and_code_name_the_same_arithmetics() -> None:
    assert get_args(Arithmetic) == get_args(OfConfig)
    assert get_args(LearnerSettings.model_fields["precision"].annotation) == get_args(Arithmetic)
