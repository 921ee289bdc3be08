"""What measures computes in `resources.scoring.dtype`: policy and reference alike, judges all but their heads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from off_policy import write_inputs
from test_training import reward_model_job
from tiny import EOS, save_tiny_policy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pipelines import policy_scores, reference
from pipelines.evaluate import sampled_job
from pipelines.jobs import reward_model_job as job_of
from pipelines.plan import make_plan
from pipelines.reference import Part, ReferenceLogps, add_reference_logps, write_scores
from pipelines.sampled import score_samples
from pipelines.sampled_values import SampledJob
from prefarena.config import Comparison, Evaluation, Resources, RewardModel, parse_config
from prefarena.data.tables import read_rows, write_rows
from prefarena.errors import UserError
from prefarena.judges.models import RewardModelJudge
from prefarena.judges.spec import JudgeSpec, load_judge
from prefarena.modeling import logprobs
from prefarena.modeling.arithmetic import Arithmetic, body_in_weights
from prefarena.modeling.load import load_tokenizer, new_reward_model, save_policy
from prefarena.records import PAIRS, Rollout
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 1,
    "pad_token_id": 0,
}
PROMPTS = [[1, 3 + i % 7] for i in range(40)]
RESPONSES = [[*[4 + (i + j) % 9 for j in range(i % 6)], EOS] for i in range(40)]
ROLLOUTS = [Rollout(x, y, [-1.0] * len(y), True, "0") for x, y in zip(PROMPTS, RESPONSES, strict=True)]


def are_halves(numbers: np.ndarray) -> bool:
    """Whether bfloat16 can hold all of them."""
    exact = torch.from_numpy(numbers)
    return torch.equal(exact.bfloat16().double(), exact)


def evaluated(tmp_path: Path, arithmetic: Arithmetic, judge: JudgeSpec | None = None) -> dict[str, float]:
    """The row of a policy that is the reference, on pairs whose stored log-probs are of another pass."""
    sides = {"chosen_ids": RESPONSES[1:6], "rejected_ids": RESPONSES[5:10]}
    pairs = {"id": list("abcde"), "prompt_ids": PROMPTS[:5], **sides}
    stored = {"ref_chosen_logp": [-1.0] * 5, "ref_rejected_logp": [-2.0] * 5}
    folder = tmp_path / f"evaluation-{arithmetic}"
    for name in (folder, folder / "test_pairs"):
        name.mkdir()
    pq.write_table(pa.table(pairs | stored), folder / "test_pairs" / "part-0.parquet")
    policy, same = (save_tiny_policy(tmp_path / name, seed=3) for name in ("policy", "same"))
    job = SampledJob(policy, same, judge, folder, folder, arithmetic=arithmetic)
    score_samples(ROLLOUTS, job, Evaluation(batch_size=7), 0.0)
    row: dict[str, float] = json.loads((folder / "row.json").read_text(encoding="utf-8"))
    return row


@pytest.mark.parametrize("path", ["packed", "padded"])
def test_a_policy_that_is_its_reference_has_log_ratios_of_exactly_0_in_bfloat16(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "padded":
        monkeypatch.setattr(logprobs, "why_not_packed", lambda *_: "this test pads")
    plain, computed = policy_scores.response_logps, list[tuple[torch.dtype, np.ndarray]]()

    def watched(model: PreTrainedModel, *others: Any) -> np.ndarray:
        found = plain(model, *others)
        computed.append((model.dtype, found))
        return found

    monkeypatch.setattr(policy_scores, "response_logps", watched)
    row = evaluated(tmp_path, "bfloat16")
    assert row["kl"] == row["kl_k3"] == row["kl_stderr"] == 0.0
    assert row["preference_accuracy"] == 0.5  # of five pairs: all are ties
    halved = list(computed)
    assert {kind for kind, _ in halved} == {torch.bfloat16} and len(halved) == 2  # the policy, and its reference
    computed.clear()
    assert evaluated(tmp_path, "float32")["kl"] == 0.0
    assert {kind for kind, _ in computed} == {torch.float32} and len(computed) == 1  # and the table's
    difference = np.abs(halved[0][1] - computed[0][1]).max()
    assert 1e-3 < difference < 0.5


@pytest.mark.parametrize(
    "model",
    [
        LlamaForSequenceClassification(LlamaConfig(**SIZES)),
        BertForSequenceClassification(BertConfig(**SIZES)),
        RobertaForSequenceClassification(RobertaConfig(**SIZES)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_head_stays_in_float32_whatever_model_it_is_of(model: PreTrainedModel) -> None:
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        halved = body_in_weights(model, "bfloat16")
        found = halved(input_ids=ids).logits
    assert {weight.dtype for weight in halved.base_model.parameters()} == {torch.bfloat16}
    body = {id(weight) for weight in halved.base_model.parameters()}
    assert {weight.dtype for weight in halved.parameters() if id(weight) not in body} == {torch.float32}
    assert found.dtype == torch.float32 and not are_halves(found.double().numpy())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert not torch.equal(found, expected)


def test_a_learned_judge_scores_in_the_arithmetic_that_its_spec_names(tmp_path: Path) -> None:
    policy = save_tiny_policy(tmp_path / "policy")
    model = new_reward_model(policy, 0)
    model.config.reward_mean, model.config.reward_scale = 0.25, 2.0
    save_policy(model, load_tokenizer(policy), tmp_path / "judge")
    spec = JudgeSpec(RewardModel(), str(tmp_path / "judge"), policy)
    whole, halved = load_judge(spec), load_judge(replace(spec, arithmetic="bfloat16"))
    expected, found = whole.score(PROMPTS, RESPONSES), halved.score(PROMPTS, RESPONSES)
    assert 1e-4 < np.abs(found - expected).max() < 0.05 and not are_halves(found)
    assert len(set(found.tolist())) == len(set(expected.tolist()))  # no ties that float32 does not have
    row = evaluated(tmp_path, "bfloat16", replace(spec, arithmetic="bfloat16"))
    assert row["judge_score"] == pytest.approx(found.mean(), abs=0.01)


def test_a_reward_model_is_normalised_and_measured_as_it_will_score(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    folders: dict[Arithmetic, Path] = {"float32": tmp_path / "whole", "bfloat16": tmp_path / "halved"}
    for arithmetic, folder in folders.items():
        job = reward_model_job(inputs, folder)
        run_job(type(job)(**(vars(job) | {"scored_in": arithmetic})), Worker(job.stage_dir))
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in folders.values()]
    assert weights[0] == weights[1]  # it is trained in float32 and saved so
    samples = read_rows(inputs / "demonstrations").to_pydict()
    for arithmetic, folder in folders.items():
        judge = RewardModelJudge(folder / "model", arithmetic=arithmetic)
        scores = judge.score(samples["prompt_ids"], samples["response_ids"])
        assert abs(scores.mean()) < 1e-6 and scores.std() == pytest.approx(1, abs=1e-6)
    other = RewardModelJudge(folders["bfloat16"] / "model").score(samples["prompt_ids"], samples["response_ids"])
    assert abs(other.mean()) > 1e-5


def test_test_pairs_are_scored_as_evaluations_score_and_training_pairs_as_training_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, num_threads = write_inputs(tmp_path), torch.get_num_threads()
    for split in reference.SPLITS:
        write_rows(read_rows(inputs / "pairs").select(PAIRS.names), tmp_path / split / "part.parquet", PAIRS)
    path = str(inputs / "model")

    def compute(parts: list[Part], model: str, _: Resources, longest: int | None, arithmetic: Arithmetic) -> None:
        for part in parts:
            write_scores(part, ReferenceLogps(model, longest, "cpu", 1, arithmetic).score(part.read().to_pydict()))

    monkeypatch.setattr(reference, "_compute", compute)  # without Ray
    add_reference_logps(
        tmp_path, path, tmp_path / "out", cache=tmp_path / "cache", resources=Resources(), max_length=8,
        arithmetic="bfloat16", scored_in="float32",
    )  # fmt: skip
    rows = read_rows(inputs / "pairs").to_pydict()
    arithmetics: tuple[Arithmetic, ...] = ("bfloat16", "float32")
    for split, arithmetic in zip(reference.SPLITS, arithmetics, strict=True):
        expected = ReferenceLogps(path, 8, "cpu", 1, arithmetic).score(rows).chosen.tolist()
        assert read_rows(tmp_path / "out" / split)["ref_chosen_logp"].to_pylist() == expected
    torch.set_num_threads(num_threads)


# ------------------------------------------------------------------------------------- the setting


def config(tmp_path: Path, **changed: Any) -> Comparison:
    data = tmp_path / "pairs.jsonl"
    if not data.exists():
        data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    tree: dict[str, Any] = {
        "task": {"kind": "text", "data": str(data)},
        "output": str(tmp_path / "runs"),
        "model": {"kind": "scratch", "vocab_size": 300},
        "entries": [{"name": kind, "method": {"kind": kind}} for kind in ("dpo", "rlhf", "best_of_n")],
    }
    return parse_config(tree | changed)


def keys(config: Comparison) -> dict[str, str]:
    (plan,) = make_plan(config)
    stages = [*plan.shared(), plan.evaluation, *(stage for trained in plan.trained for stage in trained.stages())]
    return {f"{stage.kind}-{stage.label}": stage.key for stage in stages}


def test_it_is_bfloat16_on_gpus_unless_it_is_set_and_float32_on_cpus(tmp_path: Path) -> None:
    for use_gpu, dtype, expected in (
        (False, "auto", "float32"),
        (True, "auto", "bfloat16"),
        (True, "float32", "float32"),
        (False, "bfloat16", "bfloat16"),
    ):
        asked = config(tmp_path, resources={"use_gpu": use_gpu, "scoring": {"dtype": dtype}})
        (plan,) = make_plan(asked)
        assert asked.scored_in == plan.scored_in == expected
        _, rlhf, best_of_n = plan.trained
        job = sampled_job(asked, plan, best_of_n, tmp_path)
        assert job.arithmetic == expected and job.judge is not None and job.reward is not None
        assert (job.judge.arithmetic, job.reward.arithmetic) == (expected, expected)
        assert job_of(plan, rlhf).scored_in == expected


def test_what_measures_has_an_address_of_its_own_in_each_and_off_policy_trainings_keep_theirs(tmp_path: Path) -> None:
    def keys_of(dtype: str, use_gpu: bool) -> dict[str, str]:
        return keys(config(tmp_path, resources={"use_gpu": use_gpu, "scoring": {"dtype": dtype}}))

    assert keys_of("auto", False) == keys_of("float32", False)
    assert keys_of("auto", True) == keys_of("bfloat16", True)
    whole, halved = keys_of("float32", True), keys_of("bfloat16", True)
    same = {name for name in whole if whole[name] == halved[name]}
    assert same == {"data-text", "base-text", "reference-text", "reference_samples-text", "dpo-dpo-s0"}


def test_the_enumerable_language_is_measured_in_float32(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"task": {"kind": "language"}, "model": {"kind": "scratch"}}
    assert config(tmp_path, **tree, resources={"use_gpu": True}).scored_in == "float32"
    with pytest.raises(UserError, match=r"resources\.scoring\.dtype: bfloat16 is for text tasks"):
        config(tmp_path, **tree, resources={"scoring": {"dtype": "bfloat16"}})
