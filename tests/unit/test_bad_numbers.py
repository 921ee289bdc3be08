"""Steps that are not numbers change nothing and are counted; too many end the method, and only that one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from on_policy import LocalGenerator, make_job, metric_rows
from test_training import QUICK, inputs, off_policy_job, weights
from test_training import metric_rows as rows_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from prefarena.config import DPO, PPOTraining
from prefarena.modeling.load import load_policy
from prefarena.objectives.output import Mean, ObjectiveOutput
from prefarena.stages import failure_of, is_finished, is_settled, read_manifest
from prefarena.training.guard import GuardedOptimizer
from prefarena.training.run_job import run_job
from prefarena.training.terms import PreferenceTerm
from prefarena.training.worker import Worker

__all__ = ["inputs"]  # a fixture


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_not_a_number_changes_nothing_and_others_are_as_without_the_guard(fused: bool) -> None:
    def steps(guarded: bool, bad: Iterable[int]) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(7, 5)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
        guard = GuardedOptimizer(optimizer, Worker("/tmp"))
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            loss = layer(torch.randn(3, 7, generator=generator)).square().sum()
            optimizer.zero_grad()
            (loss * float("nan") if step in bad else loss).backward()
            norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            if guarded:
                skipped = guard.step(loss, norm)
                assert bool(skipped) == (step in bad)
            elif step not in bad:
                optimizer.step()
        state = optimizer.state_dict()["state"]
        assert not guarded or guard.num_skipped == len(list(bad))
        return [*layer.parameters(), *(value for values in state.values() for value in values.values())]

    for bad in ((), (0, 3, 4)):
        plain, guarded = steps(False, bad), steps(True, bad)
        assert all(torch.equal(one, other) for one, other in zip(plain, guarded, strict=True))


def test_streaks_are_counted_across_a_checkpoint() -> None:
    layer = nn.Linear(2, 1)
    guards = [GuardedOptimizer(torch.optim.AdamW(layer.parameters()), Worker("/tmp")) for _ in range(2)]
    good, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    for loss in (bad, good, bad, bad):
        guards[0].step(loss, good)
    guards[1].restore(json.loads(json.dumps(guards[0].state())))
    guards[1].step(good, bad)
    assert guards[1].num_skipped == 4 and guards[1].longest_streak() == 3
    guards[1].step(good, good)
    assert guards[1].longest_streak() == 3  # it had not ended when it was asked for
    assert guards[1].longest_streak() == 0


class Three(Worker):
    """One of three workers to all of whom the same happens."""

    def sum(self, tensor: Tensor) -> Tensor:
        return 3 * tensor


def test_a_step_that_is_bad_on_several_workers_is_one_step() -> None:
    guard = GuardedOptimizer(torch.optim.AdamW(nn.Linear(2, 1).parameters()), Three("/tmp"))
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    assert [bool(guard.step(loss, good)) for loss in (bad, good, bad, bad)] == [True, False, True, True]
    assert guard.num_skipped == 3 and guard.longest_streak() == 2


class OnDevice(torch.optim.SGD):
    """An optimizer that says that it is fused, and notes the flags that a fused one heeds."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters)
        self.param_groups[0]["fused"] = True
        self.flags: list[torch.device] = []

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.flags.append(self.found_inf.device)  # type: ignore[attr-defined]


def test_a_fused_step_is_decided_on_the_device() -> None:
    """On the meta device, from which nothing can be copied to the host."""
    optimizer = OnDevice(nn.Linear(2, 1, device="meta").parameters())
    guard = GuardedOptimizer(optimizer, Worker("/tmp", device="meta"))
    assert {value.device.type for value in (guard._skipped, guard._streak, guard._longest)} == {"meta"}
    skipped = guard.step(torch.ones((), device="meta"), torch.ones((), device="meta"))
    assert skipped.device.type == "meta" and [device.type for device in optimizer.flags] == ["meta"]


class PoisonedTerm(PreferenceTerm):
    """Losses that are not numbers, at calls that are listed."""

    bad: frozenset[int] = frozenset()
    calls = 0

    def __call__(self, *arguments: object) -> ObjectiveOutput:
        output = super().__call__(*arguments)  # type: ignore[arg-type]
        if isinstance(output.loss.total, FakeTensor):  # memory is being predicted, nothing trained
            return output
        type(self).calls += 1
        if self.calls not in self.bad:
            return output
        spoilt = {name: Mean(mean.total * float("nan"), mean.count) for name, mean in output.metrics.items()}
        return ObjectiveOutput(Mean(output.loss.total * float("nan"), output.loss.count), spoilt)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> type[PoisonedTerm]:
    monkeypatch.setattr("prefarena.training.run_job.PreferenceTerm", PoisonedTerm)
    PoisonedTerm.calls = 0
    return PoisonedTerm


def test_an_off_policy_method_passes_over_bad_steps(
    inputs: Path, tmp_path: Path, poison: type[PoisonedTerm], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poison, "bad", frozenset({2, 3, 6}))
    job = off_policy_job(inputs, tmp_path / "dpo", DPO(training=QUICK.model_copy(update={"max_bad_steps": 2})))
    run_job(job, Worker(job.stage_dir))
    rows = rows_of(tmp_path / "dpo")
    assert [row["steps_skipped"] for row in rows] == [0, 1, 2, 2, 2, 3, 3, 3]
    assert "loss" in rows[0] and "loss" not in rows[1] and "grad_norm" not in rows[1]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "dpo").values())
    assert is_finished(job.stage_dir)


def test_a_row_over_many_steps_is_of_the_good_ones(
    inputs: Path, tmp_path: Path, poison: type[PoisonedTerm], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poison, "bad", frozenset({2, 5}))
    for name, log_every in (("each", 1), ("four", 4)):
        poison.calls = 0
        training = QUICK.model_copy(update={"log_every": log_every})
        job = off_policy_job(inputs, tmp_path / name, DPO(training=training))
        run_job(job, Worker(job.stage_dir))
    each, four = rows_of(tmp_path / "each"), rows_of(tmp_path / "four")
    assert [row["step"] for row in four] == [1, 4, 8]
    assert four[1]["loss"] == pytest.approx(np.mean([row["loss"] for row in each[1:4] if "loss" in row]))
    assert [row["steps_skipped"] for row in four] == [0, 1, 2]


def test_too_many_in_a_row_fail_the_method_and_keep_its_last_checkpoint(
    inputs: Path, tmp_path: Path, poison: type[PoisonedTerm], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poison, "bad", frozenset(range(4, 100)))
    training = QUICK.model_copy(update={"max_bad_steps": 2, "checkpoint_every": 3})
    job = off_policy_job(inputs, tmp_path / "dpo", DPO(training=training))
    run_job(job, Worker(job.stage_dir))  # returns: the jobs after it go on
    assert not is_finished(job.stage_dir) and is_settled(job.stage_dir)
    reason = failure_of(job.stage_dir)
    assert reason is not None and "not finite in 3 steps up to step 6 in a row, but only 2" in reason
    kept = Worker(job.stage_dir).restore()
    assert (kept is not None and kept.step == 6) or (kept is not None and kept.step == 3)
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())


class Judge:
    """A reward that is not a number from the third batch on, or in the second alone."""

    def __init__(self, bad: set[int]) -> None:
        self._bad, self._batch = bad, 0

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        self._batch += 1
        scores = np.array([float(len(response)) for response in responses])
        return scores * np.nan if self._batch in self._bad else scores


def test_an_on_policy_method_passes_over_a_bad_batch_and_fails_after_too_many(
    tmp_path: Path, tiny_policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PPOTraining(
        num_iterations=7, rollouts_per_iteration=16, num_minibatches=2, num_epochs=1, micro_batch_size=16,
        target_kl=0.5, checkpoint_every=2, max_bad_iterations=1,
    )  # fmt: skip
    job = make_job(tmp_path, tiny_policy, settings)
    monkeypatch.setattr("prefarena.training.on_policy._connect", lambda job: LocalGenerator(job.policy))
    for name, bad in (("once", {2}), ("always", set(range(4, 100)))):
        judge = Judge(bad)
        monkeypatch.setattr("prefarena.training.loading.load_judge", lambda *_, judge=judge: judge)
        run_job(replace(job, stage_dir=str(tmp_path / name)), Worker(str(tmp_path / name)))
    rows = metric_rows(replace(job, stage_dir=str(tmp_path / "once")))
    assert [row["steps_skipped"] for row in rows] == [0, 4, 4, 4, 4, 4, 4]  # two steps of each model
    assert "reward/mean" not in rows[1] and "policy/loss" not in rows[1] and "kl/k1" in rows[1]
    assert read_manifest(tmp_path / "once")["costs"]["num_steps"] == 7
    trained = load_policy(str(tmp_path / "once" / "model")).state_dict()
    assert all(tensor.isfinite().all() for tensor in trained.values())
    reason = failure_of(tmp_path / "always")
    assert reason is not None and "2 iterations up to iteration 5 in a row, but only 1" in reason
    kept = Worker(str(tmp_path / "always")).restore()
    assert kept is not None and kept.step == 4 and kept.state["bad_iterations"] == 1
