"""The off-policy loop on a real tiny Llama: accumulation, workers and interruptions change nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from off_policy import metric_rows, off_policy_job, weights, write_inputs
from transformers import AutoModelForSequenceClassification
from workers import KilledError

from prefarena.config import (
    DPO,
    IPO,
    MPO,
    SFT,
    OffPolicyMethod,
    Optimisation,
    Resources,
    RewardModel,
)
from prefarena.data.tables import read_rows
from prefarena.errors import WaitTimeoutError
from prefarena.modeling import logprobs
from prefarena.modeling.heads import ScalarHead
from prefarena.modeling.load import load_policy
from prefarena.stages import read_manifest
from prefarena.training.jobs import Job, ReferenceJob, RewardModelJob
from prefarena.training.reward_model import held_out_scores
from prefarena.training.run_job import run_job
from prefarena.training.schedule import warmed_up
from prefarena.training.worker import Worker

QUICK = Optimisation(num_steps=8, batch_size=16, log_every=1, warmup_steps=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("mean", ["sequences", "tokens"])
def test_gradient_accumulation_changes_nothing(inputs: Path, tmp_path: Path, mean: Any) -> None:
    for micro in (8192, 60):
        training = QUICK.model_copy(update={"micro_batch_tokens": micro})
        method = MPO(demonstration_weight=0.3, demonstration_mean=mean, training=training)
        run_job(off_policy_job(inputs, tmp_path / str(micro), method), Worker(str(tmp_path / str(micro))))
    whole, parts = metric_rows(tmp_path / "8192"), metric_rows(tmp_path / "60")
    for key in ("loss", "grad_norm", "preference/margin", "demonstration/nll"):
        np.testing.assert_allclose([r[key] for r in whole], [r[key] for r in parts], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("method", [MPO(demonstration_weight=0.1), DPO(), IPO()], ids=lambda method: method.kind)
def test_packed_pairs_train_as_padded_sequences_do(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: OffPolicyMethod
) -> None:
    method = method.model_copy(update={"training": QUICK.model_copy(update={"num_steps": 30})})
    run_job(off_policy_job(inputs, tmp_path / "packed", method), Worker(str(tmp_path / "packed")))
    monkeypatch.setattr(logprobs, "why_not_packed", lambda *_: "it is not wanted here")
    run_job(off_policy_job(inputs, tmp_path / "padded", method), Worker(str(tmp_path / "padded")))
    packed, padded = metric_rows(tmp_path / "packed"), metric_rows(tmp_path / "padded")
    for key in ("loss", "grad_norm", "preference/margin", "logps/chosen"):
        np.testing.assert_allclose([r[key] for r in packed], [r[key] for r in padded], rtol=1e-4, atol=1e-5)
    num_tokens = [read_manifest(tmp_path / name)["costs"]["num_tokens_trained"] for name in ("packed", "padded")]
    assert num_tokens[0] < num_tokens[1]  # the prompt counts once


class DyingWorker(Worker):
    """Dies at a step, after its checkpoint."""

    def log(self, row: dict[str, Any]) -> None:
        super().log(row)
        if row["step"] == 7:
            raise KilledError


def test_an_interrupted_run_ends_in_the_same_weights_bit_for_bit(inputs: Path, tmp_path: Path) -> None:
    method = MPO(demonstration_weight=0.1, training=QUICK.model_copy(update={"checkpoint_every": 3}))
    run_job(off_policy_job(inputs, tmp_path / "straight", method), Worker(str(tmp_path / "straight")))
    broken = off_policy_job(inputs, tmp_path / "broken", method)
    with pytest.raises(KilledError):
        run_job(broken, DyingWorker(broken.stage_dir))
    run_job(broken, Worker(broken.stage_dir))
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "broken")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    losses = [[row["loss"] for row in metric_rows(tmp_path / name)] for name in ("straight", "broken")]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_one_and_two_ray_train_workers_give_the_same_losses(ray_session: None, inputs: Path, tmp_path: Path) -> None:
    """And the same command twice the same bits. Three methods and a reward model share each worker group."""
    from prefarena.training.launch import run_jobs

    methods: dict[str, OffPolicyMethod] = {
        "mpo": MPO(demonstration_weight=0.1, training=QUICK),
        "ipo": IPO(training=QUICK),
    }
    for num_workers in (1, 2):
        root = tmp_path / str(num_workers)
        jobs: list[Job] = [off_policy_job(inputs, root / name, method) for name, method in methods.items()]
        jobs.append(reward_model_job(inputs, root / "rm"))
        run_jobs(jobs, Resources(num_workers=num_workers), str(tmp_path / "ray"))
        run_jobs(jobs, Resources(num_workers=num_workers), str(tmp_path / "ray"))  # finished: nothing to do
    for name in ("mpo", "ipo", "rm"):
        one, two = (metric_rows(tmp_path / n / name) for n in ("1", "2"))
        assert len(one) == len(two) == 8
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose([r[key] for r in one], [r[key] for r in two], rtol=1e-5, atol=1e-5)
    run_job(off_policy_job(inputs, tmp_path / "again", methods["mpo"]), Worker(str(tmp_path / "again")))
    again, first = weights(tmp_path / "again"), weights(tmp_path / "1" / "mpo")
    assert all(torch.equal(again[name], first[name]) for name in again)


def test_workers_that_cannot_be_placed_are_waited_for_no_longer_than_the_limit(
    ray_session: None, tmp_path: Path
) -> None:
    from prefarena.training.launch import run_jobs

    job = reward_model_job(tmp_path, tmp_path / "rm")
    resources = Resources(num_workers=64, cpus_per_worker=2, start_timeout_s=2)
    started = time.monotonic()
    with pytest.raises(WaitTimeoutError) as caught:
        run_jobs([job], resources, str(tmp_path / "ray"))
    assert time.monotonic() - started < 115  # Ray Train's own limit would be 60 s, twice
    message = str(caught.value)
    assert "waited 2 s for a group of 64 training workers (2 CPU each)" in message
    assert "resources.start_timeout_s" in message and not Path(job.stage_dir).exists()


def reward_model_job(inputs: Path, folder: Path) -> RewardModelJob:
    return RewardModelJob(
        stage_dir=str(folder), name="rm", policy=str(inputs / "model"), seed=0, settings=RewardModel(training=QUICK),
        pairs=str(inputs / "pairs"), test_pairs=str(inputs / "pairs"), samples=str(inputs / "demonstrations"),
    )  # fmt: skip


def test_a_reward_model_learns_and_its_scores_are_normalised(inputs: Path, tmp_path: Path) -> None:
    job = reward_model_job(inputs, tmp_path / "rm")
    training = QUICK.model_copy(update={"num_steps": 150, "learning_rate": 3e-3})
    job = RewardModelJob(**(vars(job) | {"settings": RewardModel(training=training)}))
    run_job(job, Worker(job.stage_dir))
    assert read_manifest(job.stage_dir)["reward_model"]["accuracy"] > 0.9  # its own training pairs
    from prefarena.judges.models import RewardModelJudge

    judge, model = RewardModelJudge(job.model_dir), AutoModelForSequenceClassification.from_pretrained(job.model_dir)
    assert model.config.num_labels == 1
    samples, table = read_rows(job.samples).to_pydict(), read_rows(job.pairs).to_pydict()
    normalised_on = judge.score(samples["prompt_ids"], samples["response_ids"])
    assert np.mean(normalised_on) == pytest.approx(0, abs=1e-4) and np.std(normalised_on) == pytest.approx(1, abs=1e-3)
    scores = judge.score(table["prompt_ids"] * 2, table["chosen_ids"] + table["rejected_ids"])
    raw = np.concatenate(held_out_scores(ScalarHead(model.eval()), job.pairs, 0, Worker(str(tmp_path / "measured"))))
    expected = (raw - model.config.reward_mean) / model.config.reward_scale
    np.testing.assert_allclose(scores, expected, atol=1e-4)  # the same mean and scale on other rows
    alone = judge.score(table["prompt_ids"][:1], table["chosen_ids"][:1])
    assert alone[0] == pytest.approx(scores[0], abs=1e-4)  # neither batch nor padding counts


@pytest.mark.parametrize(
    "method", [DPO(beta=0.5), IPO(tau=0.5), MPO(demonstration_weight=0.0), SFT()], ids=lambda method: method.kind
)
def test_every_method_learns_its_pairs_and_ends_in_a_plain_checkpoint(
    inputs: Path, tmp_path: Path, method: OffPolicyMethod
) -> None:
    training = QUICK.model_copy(update={"num_steps": 40, "learning_rate": 3e-3})
    job = off_policy_job(inputs, tmp_path / method.kind, method.model_copy(update={"training": training}))
    run_job(job, Worker(job.stage_dir))
    rows = metric_rows(Path(job.stage_dir))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert rows[-1]["logratio/chosen"] - rows[-1]["logratio/rejected"] > 0.3
    assert load_policy(job.model_dir).num_parameters() == load_policy(inputs / "model").num_parameters()
    costs = read_manifest(job.stage_dir)["costs"]
    assert costs["num_tokens_trained"] > 0 and costs["wall_seconds"] > 0 and costs["peak_memory_mib"] > 50


def test_the_reference_learns_demonstrations_and_can_learn_prompts_too(inputs: Path, tmp_path: Path) -> None:
    first: list[float] = []
    training = QUICK.model_copy(update={"num_steps": 30, "learning_rate": 3e-3})
    demonstrations = str(inputs / "demonstrations")
    choices: tuple[Literal["response", "all"], ...] = ("response", "all")
    for loss_on in choices:
        folder = tmp_path / loss_on
        job = ReferenceJob(str(folder), "ref", str(inputs / "model"), 0, training, demonstrations, loss_on)
        run_job(job, Worker(str(folder)))
        rows = metric_rows(folder)
        assert rows[-1]["loss"] < rows[0]["loss"] - 1
        first.append(rows[0]["demonstration/nll"])
    assert first[1] > first[0] + 1  # two more letters to predict


def test_schedules() -> None:
    rates = [warmed_up(1.0, "cosine", step, 20, warmup=4) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0 and rates[12] == pytest.approx(0.5) and 0 < rates[19] < 0.02
    assert [warmed_up(2.0, "linear", step, 4, warmup=0) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert [warmed_up(3.0, "constant", step, 4, warmup=1) for step in range(3)] == [1.5, 3.0, 3.0]
