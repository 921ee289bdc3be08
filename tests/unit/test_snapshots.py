"""Policies on the way of off-policy trainings, and those of text: what is kept, what is measured, what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from off_policy import off_policy_job, weights, write_inputs
from workers import KilledError

from pipelines.exact import exact_job
from pipelines.on_the_way import measured_on_the_way, sampled_trajectory
from pipelines.plan import SeedPlan, make_plan
from prefarena.config import DPO, Comparison, LoRA, Optimisation, parse_config
from prefarena.errors import UserError
from prefarena.modeling.load import load_policy
from prefarena.report.html import write_page
from prefarena.report.overoptimisation import fit_law, fits
from prefarena.report.page import write_report
from prefarena.report.proxies import TITLE, proxy_figure, proxy_table
from prefarena.report.proxy_charts import proxy_charts
from prefarena.report.results import EntryResult, Results
from prefarena.report.trajectories import prompts_of
from prefarena.stages import Stage, write_json, write_manifest
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

STEPS = Optimisation(num_steps=6, batch_size=16, log_every=1, warmup_steps=0, schedule="constant", checkpoint_every=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


class DyingAtFive(Worker):
    """Dies behind a snapshot and a checkpoint."""

    def log(self, row: dict[str, Any]) -> None:
        super().log(row)
        if row["step"] == 5:
            raise KilledError


def trained(inputs: Path, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    job = off_policy_job(inputs, folder, DPO(beta=1.0, training=STEPS.model_copy(update=settings)))
    run_job(job, Worker(job.stage_dir))
    return weights(folder)


@pytest.mark.parametrize(
    "how",
    [{}, {"lora": LoRA(rank=4)}, {"precision": "bfloat16", "activation_checkpointing": True}],
    ids=["whole", "adapters", "halves and recomputed"],
)
def test_a_snapshot_is_the_policy_after_that_many_steps_and_changes_nothing(
    inputs: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    plain, kept = trained(inputs, tmp_path / "plain", **how), trained(inputs, tmp_path / "kept", num_snapshots=2, **how)
    assert all(torch.equal(kept[name], plain[name]) for name in plain)
    folders = sorted((tmp_path / "kept" / "snapshots").iterdir())
    assert [folder.name for folder in folders] == ["00002", "00004"]
    short = trained(inputs, tmp_path / "short", num_steps=4, **how)
    snapshot = load_policy(folders[1]).state_dict()
    assert snapshot.keys() == short.keys()
    assert all(torch.allclose(snapshot[name], short[name], rtol=0, atol=1e-7) for name in short)
    assert any(not torch.equal(snapshot[name], plain[name]) for name in short)
    assert (folders[1] / "model.safetensors").exists() != ("lora" in how)  # adapters alone, without their base
    assert not (tmp_path / "plain" / "snapshots").exists()


def test_a_run_that_was_killed_has_the_snapshots_of_one_that_was_not(inputs: Path, tmp_path: Path) -> None:
    straight = trained(inputs, tmp_path / "straight", num_snapshots=2)
    job = off_policy_job(
        inputs, tmp_path / "broken", DPO(beta=1.0, training=STEPS.model_copy(update={"num_snapshots": 2}))
    )
    with pytest.raises(KilledError):
        run_job(job, DyingAtFive(job.stage_dir))
    run_job(job, Worker(job.stage_dir))
    assert all(torch.equal(one, straight[name]) for name, one in weights(tmp_path / "broken").items())
    for name in ("00002", "00004"):
        found, expected = (load_policy(tmp_path / run / "snapshots" / name) for run in ("broken", "straight"))
        wanted = expected.state_dict()
        assert all(torch.equal(one, wanted[key]) for key, one in found.state_dict().items())


# ------------------------------------------------------------------------------------------------- the plan


def planned(tmp_path: Path, task: dict[str, Any], number: int, **config: Any) -> tuple[Comparison, SeedPlan]:
    training = {"num_snapshots": number} if number else {}
    entries = [
        {"name": "dpo", "method": {"kind": "dpo", "training": training}},
        {"name": "grpo", "method": {"kind": "grpo", "reward": {"kind": "function", "function": "json:dumps"}}},
    ]
    found = parse_config({"output": str(tmp_path), "task": task, "entries": entries, **config})
    return found, make_plan(found)[0]


TEXT = {"kind": "text", "data": "pairs.jsonl"}


@pytest.mark.parametrize("task", [{"kind": "language"}, TEXT], ids=["language", "text"])
def test_nothing_else_has_another_address(tmp_path: Path, task: dict[str, Any]) -> None:
    (_, without), (_, with_three) = planned(tmp_path, task, 0), planned(tmp_path, task, 3)
    before, after = ({stage.key for one in plan.trained for stage in one.stages()} for plan in (without, with_three))
    own, other = with_three.trained
    assert own.training is not None and own.training.key not in before
    assert len(own.on_the_way) == (3 if task == TEXT else 0) and not other.on_the_way
    assert {stage.key for stage in other.stages()} <= before & after
    assert without.shared() == with_three.shared()
    explicit = planned(tmp_path, task, 0)[0].entries[0].method
    assert "num_snapshots" not in explicit.model_dump()["training"]


def test_a_pairwise_judge_measures_no_policy_on_the_way(tmp_path: Path) -> None:
    judge = {"kind": "pairwise", "base_url": "http://localhost:1/v1", "model": "x"}
    _, plan = planned(tmp_path, TEXT, 3, judge=judge)
    assert not plan.trained[0].on_the_way


def test_what_is_no_entrys_policy_keeps_none() -> None:
    kept = {"training": {"num_snapshots": 2}}
    dpo, rlhf = {"kind": "dpo"}, {"kind": "rlhf", "reward": {"kind": "learned", **kept}}
    for method, settings, what in ((dpo, {"reference": kept}, "the reference"), (rlhf, {}, "a reward model")):
        with pytest.raises(UserError, match=f"num_snapshots is for the policies of entries, and {what} keeps none"):
            parse_config({"entries": [{"name": "one", "method": method}], **settings})


def test_on_the_language_they_are_measured_on_the_prompts_with_pairs(tmp_path: Path) -> None:
    config, plan = planned(tmp_path, {"kind": "language"}, 3)
    training = plan.trained[0].training
    assert training is not None
    write_manifest(training.begin(), {"costs": {"num_steps": 12}})
    job = exact_job(config, plan, plan.trained[0], tmp_path)
    assert (job.snapshots, job.num_steps, job.group) == (training.folder / "snapshots", 12, "covered")
    config, plan = planned(tmp_path, {"kind": "language"}, 0)
    assert exact_job(config, plan, plan.trained[0], tmp_path).snapshots is None


def finished(stage: Stage, row: dict[str, float]) -> None:
    write_json(stage.begin() / "row.json", row)
    write_manifest(stage.folder, {"costs": {}})


@pytest.mark.parametrize("steps", [[2, 4, 6], [1]], ids=["as many as asked for", "fewer"])
def test_from_samples_each_has_an_evaluation_and_the_trajectory_has_all_in_order(
    tmp_path: Path, steps: list[int]
) -> None:
    _, plan = planned(tmp_path, TEXT, 3)
    one, last = plan.trained[0], steps[-1] + 2
    assert one.training is not None and sampled_trajectory(plan, one) == []
    folder = one.training.begin()
    for step in steps:
        (folder / f"snapshots/{step:05d}").mkdir(parents=True)
    write_manifest(folder, {"costs": {"num_steps": last}})
    finished(plan.evaluation, {"judge_score": 0.1, "judge_score_stderr": 0.01, "kl": 0.0})
    for place, stage in enumerate(one.on_the_way):
        found = measured_on_the_way(one, stage)
        step = steps[min(place, len(steps) - 1)]
        assert found == (step, folder / f"snapshots/{step:05d}")
        finished(stage, {"judge_score": step / 10, "kl": 9.0, "kl_vocabulary": step / 2, "kl_vocabulary_stderr": 0.1})
    finished(one.evaluation, {"judge_score": 0.9, "kl": 3.0})
    rows = sampled_trajectory(plan, one)
    assert [row["step"] for row in rows] == [0, *steps, last]
    assert rows[0] == {"step": 0, "kl": 0.0, "reward": 0.1, "reward_stderr": 0.01}
    assert rows[1] == {"step": steps[0], "kl": steps[0] / 2, "kl_stderr": 0.1, "reward": steps[0] / 10}
    assert rows[-1] == {"step": last, "kl": 3.0, "reward": 0.9}
    assert measured_on_the_way(one, one.evaluation) is None


def test_gains_by_judge_and_proxy_are_in_standard_deviations_of_the_reference(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, TEXT, 1)
    one = plan.trained[0]
    assert one.training is not None
    (one.training.begin() / "snapshots/00002").mkdir(parents=True)
    write_manifest(one.training.folder, {"costs": {"num_steps": 4}})
    finished(plan.evaluation, {"judge_score": 3.0, "kl": 0.0})
    np.savez(plan.evaluation.folder / "scores.npz", scores=[1.0, 5.0, np.nan], clusters=[0, 1, 2])  # sd 2
    row = {"judge_score": 4.0, "kl_vocabulary": 1.0, "proxy_reward": 0.6, "proxy_reward_stderr": 0.1}
    finished(one.on_the_way[0], row)
    reference = {"reference_proxy_reward": 0.1, "reference_proxy_reward_sd": 0.5, "reference_proxy_reward_stderr": 0.2}
    finished(one.evaluation, {"judge_score": 2.0, "kl_vocabulary": 4.0, "proxy_reward": 2.1} | reference)
    start, snapshot, end = sampled_trajectory(plan, one)
    assert (start["proxy_reward"], start["proxy_reward_stderr"]) == (0.1, 0.2)
    assert (start["standard_gain"], start["standard_proxy_gain"]) == (0.0, 0.0)
    assert (snapshot["proxy_reward"], snapshot["proxy_reward_stderr"], end["proxy_reward"]) == (0.6, 0.1, 2.1)
    assert (snapshot["standard_gain"], snapshot["standard_proxy_gain"]) == pytest.approx((0.5, 1.0))
    assert (end["standard_gain"], end["standard_proxy_gain"]) == pytest.approx((-0.5, 4.0))
    write_json(one.evaluation.folder / "row.json", one.evaluation.row() | {"reference_proxy_reward_sd": 0.0})
    assert not any("standard_gain" in row for row in sampled_trajectory(plan, one))  # a proxy of one value has no unit


# ----------------------------------------------------------------------------------------------- the report


def of_text() -> Results:
    rows = [{"step": s, "kl": s / 4, "reward": 0.1 + 0.2 * s - 0.01 * s * s} for s in (0, 2, 4, 6, 8, 10)]
    entry = EntryResult(
        name="dpo",
        kind="dpo",
        settings={"kind": "dpo"},
        seeds={"0": {"kl": 2.5, "kl_stderr": 0.1, "judge_score": 1.1, "judge_score_stderr": 0.1, "win_rate": 0.6}},
    )
    reference = EntryResult(name="reference", kind="reference", seeds={"0": {"judge_score": 0.1, "kl": 0.0}})
    return Results(
        name="text",
        task=TEXT,
        seeds=[0],
        exact=False,
        entries=[reference, entry],
        trajectories={"dpo": {"0": rows}},
    )


def test_the_report_of_text_has_curve_law_and_table_of_an_off_policy_method(tmp_path: Path) -> None:
    results = of_text()
    assert fits(results)["dpo"].law == "learning" and fits(results)["dpo"].num_points == 5
    write_report(results, tmp_path)
    write_page(results, tmp_path)
    text, page = ((tmp_path / name).read_text() for name in ("report.md", "report.html"))
    for shown in (text, page):
        assert "From samples on held-out prompts, scored by the judge of the evaluation" in shown
        assert "peak gold reward" in shown
    assert "## Policies on the way" in text and (tmp_path / "figures/on_the_way.png").is_file()
    assert "dpo, seed 0: gold reward" in page and "dpo: the law fitted to it" in page
    assert json.dumps("reward learned from")[1:-1] not in page


def test_the_report_shows_gold_and_proxy_over_the_root_of_the_kl(tmp_path: Path) -> None:
    """Two seeds of an entry with a proxy: peak of gold, both there and at the end, the law, and what is too much."""
    results = of_text()
    steps = [(0, 0.0, 0.0), (2, 0.4, 0.5), (4, 0.6, 1.0), (6, 0.5, 1.6), (8, 0.2, 2.0)]

    def rows(more: float) -> list[dict[str, float]]:
        gains = [(step, step**2 / 16, gold + more * (step > 0), proxy) for step, gold, proxy in steps]
        return [
            {"step": step, "kl": kl, "reward": 7 * gold, "proxy_reward": 9 * proxy, "standard_gain": gold}
            | {"standard_proxy_gain": proxy}
            for step, kl, gold, proxy in gains
        ]

    entry = EntryResult(
        name="rlhf", kind="rlhf", settings={"reward": {"kind": "learned"}}, seeds=results.entries[1].seeds
    )
    results.entries.append(entry)
    assert proxy_table(results) is None and proxy_figure(results) is None and proxy_charts(results) == []
    results.trajectories["rlhf"] = {"0": rows(0.0), "1": rows(0.1)}
    table = proxy_table(results)
    assert table is not None and [row[0] for row in table.rows] == ["rlhf"]
    assert table.rows[0][1:] == (
        *("learned", "0.650 ± 0.050", "1.000 ± 0.000", "4 / 4", "1.000 ± 0.000"),
        *("0.250 ± 0.050", "2.000 ± 0.000", "4.000 ± 0.000", "1.750 ± 0.050"),
    )
    (chart,) = proxy_charts(results)
    assert [line["role"] for line in chart["lines"]] == ["steps", "dashed"] * 2 + ["law"]
    assert all(line["x"] == [0, 0.5, 1, 1.5, 2] for line in chart["lines"][:4])
    assert chart["lines"][1]["y"] == [proxy for _, _, proxy in steps]
    law = chart["lines"][-1]
    fit = fit_law("learning", [[{"kl": r["kl"], "reward": r["standard_gain"]} for r in rows(m)] for m in (0.0, 0.1)])
    assert fit is not None and law["x"][-1] == 2 and law["y"][-1] == pytest.approx(fit.at(4.0), rel=1e-5)
    write_report(results, tmp_path)
    write_page(results, tmp_path)
    text, page = ((tmp_path / name).read_text() for name in ("report.md", "report.html"))
    assert f"## {TITLE}" in text and (tmp_path / "figures/proxies.png").is_file()
    for shown in (text, page):
        assert "proxy − gold at the end" in shown and "Gains over the reference" in shown
    assert "rlhf, seed 1: reward learned from" in page and '"id": "proxies"' in page.replace('"id":"', '"id": "')
    # The best of ever more samples is shown the same way, with the law of its own.
    results.trajectories["rlhf"], results.best_of_curves["rlhf"] = {}, {"0": rows(0.0), "1": rows(0.1)}
    assert proxy_table(results) == table
    (chart,) = proxy_charts(results)
    fit = fit_law("best of n", [[{"kl": r["kl"], "reward": r["standard_gain"]} for r in rows(m)] for m in (0.0, 0.1)])
    assert fit is not None and chart["lines"][-1]["y"][-1] == pytest.approx(fit.at(4.0), rel=1e-5)
    assert "best of 8" in chart["lines"][0]["text"][-1] and "updates" not in json.dumps(chart)


def test_off_policy_methods_are_measured_where_they_have_pairs() -> None:
    on_policy: list[dict[str, Any]] = [{"reward": {}, "prompts": name} for name in ("all", "covered")]
    found = [
        prompts_of(EntryResult(name="x", kind="x", settings=one, seeds={})) for one in ({"kind": "dpo"}, *on_policy)
    ]
    assert found == ["covered", "all", "covered"]
