"""What a method cost as a whole, and what it reached for it."""

from __future__ import annotations

from typing import Any

import pytest

from prefarena.report.cost_charts import against_cost_charts
from prefarena.report.results import Cost, EntryResult, Results
from prefarena.report.whole_costs import against_costs, whole_cost_table


def entry(name: str, reward: float, **more: float) -> EntryResult:
    rows = {seed: {"reward/covered": reward + int(seed), "data_labels": 64.0, **more} for seed in "01"}
    return EntryResult(name=name, kind=name, seeds=rows)


def results(*costs: Cost, **fields: Any) -> Results:
    entries = [EntryResult(name="reference", kind="reference", seeds={"0": {"reward/covered": 0.0}})]
    entries += [entry("dpo", 1.0), entry("rlhf", 2.0), entry("online", 3.0, own_labels=36.0, responses_judged=80.0)]
    return Results(
        name="r", task={"kind": "language"}, seeds=[0, 1], exact=True, entries=entries, costs=list(costs), **fields
    )


COSTS = [
    Cost(stage="reference", num_flops=9e12, device_seconds=99.0),
    Cost(stage="training", entry="dpo", seed=0, num_flops=1e12, device_seconds=10.0, peak_memory_mib=600.0),
    Cost(stage="training", entry="dpo", seed=1, num_flops=3e12, device_seconds=30.0, peak_memory_mib=700.0),
    Cost(stage="reward model", entry="rlhf", num_flops=1e12, device_seconds=5.0, num_tokens_trained=1000),
    *(
        Cost(stage="training", entry="rlhf", seed=seed, num_flops=6e12, device_seconds=50.0, num_rewards=512,
             num_tokens_generated=4096)
        for seed in (0, 1)
    ),
    Cost(stage="training", entry="online", seed=0, num_flops=4e12, device_seconds=20.0),
    Cost(stage="evaluation", entry="rlhf", seed=0, num_flops=7e12, device_seconds=1000.0),
]  # fmt: skip


def test_a_row_adds_up_own_stages_as_means_over_seeds_without_evaluation() -> None:
    table = whole_cost_table(results(*COSTS))
    assert table is not None
    assert table.header[1:] == (
        "labels", "responses judged", "tokens trained", "tokens generated", "FLOPs", "device, s", "peak memory, MiB",
    )  # fmt: skip
    assert table.rows == (
        ("dpo", "64", "–", "–", "–", "2.00e12", "20", "700"),
        ("rlhf", "64", "512", "1,000", "4,096", "7.00e12", "55", "–"),
        ("online", "100", "80", "–", "–", "4.00e12", "20", "–"),
    )


def test_without_costs_there_is_no_table() -> None:
    assert whole_cost_table(results()) is None
    assert against_cost_charts(results()) == [] or against_costs(results())[1]


def test_reward_stands_against_every_cost_in_which_methods_differ() -> None:
    charts = {chart["x"]: chart for chart in against_cost_charts(results(*COSTS))}
    assert set(charts) == {"labelled pairs", "FLOPs", "device-seconds"}  # one peak of memory alone is known
    lines = {line["key"]: line for line in charts["FLOPs"]["lines"]}
    assert {name: (line["x"], line["y"]) for name, line in lines.items()} == {
        "dpo": ([2e12], [1.5]), "rlhf": ([7e12], [2.5]), "online": ([4e12], [3.5]),
    }  # fmt: skip
    assert all(line["ey"][0] == pytest.approx(0.5) for line in lines.values())
