"""Numbers of labelled pairs: what a configuration may say, which stages it makes, and which rows are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from off_policy import off_policy_job, write_inputs, write_responses
from safetensors.torch import load_file

from pipelines.jobs import entry_job, reward_model_job
from pipelines.memory import model_settings
from pipelines.plan import make_plan
from pipelines.train import check_numbers_of_pairs
from prefarena.config import Comparison, Optimisation, RewardModel, dump_config, load_config, parse_config
from prefarena.config.label_budgets import num_pairs_of
from prefarena.data.responses import mismatch, of_pairs, taken_apart
from prefarena.data.tables import read_rows, write_rows
from prefarena.errors import UserError
from prefarena.estimate.lengths import Data, Rows
from prefarena.estimate.trainings import Workload
from prefarena.methods.aot import AOT
from prefarena.methods.dpo import DPO
from prefarena.methods.kto import KTO
from prefarena.records import PAIRS, REFERENCED_PAIRS, REFERENCED_RESPONSES, SHARED_PAIRS, content_id
from prefarena.stages import read_manifest, write_manifest
from prefarena.training.jobs import Job, OffPolicyJob, RewardModelJob
from prefarena.training.ranked import RankedTerm
from prefarena.training.run_job import run_job
from prefarena.training.terms import Pairs, PreferenceTerm, RewardModelTerm, Shares
from prefarena.training.unpaired import UnpairedTerm
from prefarena.training.worker import Worker

NUM_PAIRS = 40


def config_of(*methods: dict[str, Any], **more: Any) -> Comparison:
    return parse_config({"entries": [{"name": one["kind"], "method": one} for one in methods], **more})


# ------------------------------------------------------------------------------------------- what is configured


def test_every_entry_that_learns_from_labels_is_there_at_every_number() -> None:
    gold = {"kind": "grpo", "reward": {"kind": "gold"}}
    limited = {"kind": "ipo", "num_pairs": 7}
    config = config_of({"kind": "dpo"}, {"kind": "rlhf"}, {"kind": "best_of_n"}, gold, limited, label_budgets=[30, 10])
    names = ["dpo-30", "dpo-10", "rlhf-30", "rlhf-10", "best_of_n-30", "best_of_n-10", "grpo", "ipo"]
    assert [entry.name for entry in config.entries] == names
    assert [entry.group for entry in config.entries[:4]] == ["dpo", "dpo", "rlhf", "rlhf"]
    assert [num_pairs_of(entry.method) for entry in config.entries] == [30, 10, 30, 10, 30, 10, None, 7]
    assert (
        config.entries[6].group is None
        and config.entries[6].method == parse_config({"entries": [{"name": "grpo", "method": gold}]}).entries[0].method
    )


def test_a_written_configuration_gives_the_same_entries_again() -> None:
    config = config_of({"kind": "dpo"}, {"kind": "rlhf"}, label_budgets=[30, 10])
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("methods", "more", "says"),
    [
        (({"kind": "dpo"},), {"label_budgets": [10, 10]}, "label_budgets: a number of pairs is listed twice"),
        (({"kind": "dpo"},), {"label_budgets": [0]}, "label_budgets.0"),
        (({"kind": "dpo"},), {"label_budgets": [20000]}, "entry 'dpo-20000' asks for 20,000 pairs"),
        (({"kind": "rlhf", "reward": {"kind": "learned", "num_pairs": 20000}},), {}, "task.num_pairs is 16,384"),
        (
            ({"kind": "dpo", "online": {"every": 4}},),
            {"label_budgets": [10]},
            "entry 'dpo' learns from pairs drawn online",
        ),
        (({"kind": "dpo", "num_pairs": 0},), {}, "num_pairs"),
        (
            ({"kind": "kto", "num_pairs": 5},),
            {"task": {"kind": "text", "data": "x.jsonl", "unpaired_data": "y.jsonl"}},
            "single responses",
        ),
        (
            ({"kind": "dpo"},),
            {"task": {"kind": "text", "data": "x.jsonl"}, "judge": {"kind": "learned", "num_pairs": 5}},
            "judge.num_pairs",
        ),
    ],
)
def test_what_cannot_be_is_said(methods: tuple[dict[str, Any], ...], more: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(*methods, **more)
    assert says in str(caught.value)


def test_more_pairs_than_a_text_task_has_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    text = {"task": {"kind": "text", "data": "x.jsonl"}, "output": str(tmp_path)}
    for number in (9, 10):
        plans = make_plan(config_of({"kind": "dpo"}, **text, label_budgets=[3, number]))
        write_manifest(plans[0].pairs.begin(), {"data": {"num_train_pairs": 9}})
        if number == 9:
            check_numbers_of_pairs(plans)
            continue
        with pytest.raises(UserError, match=r"entry 'dpo-10' asks for 10 pairs .*, but there are only 9 to train on"):
            check_numbers_of_pairs(plans)


# ------------------------------------------------------------------------------------------- stages and jobs


def test_all_pairs_is_no_setting_of_a_stage() -> None:
    """So stages keep the addresses that they had before there was the setting."""
    assert "num_pairs" not in DPO().address() and "num_pairs" not in RewardModel().model_dump(mode="json")
    assert "num_pairs" not in dump_config(load_config(overrides=["task.num_pairs=2"])).replace("  num_pairs: 2\n", "")


def test_numbers_of_pairs_share_everything_but_what_is_trained_on_them() -> None:
    alone, together = (
        make_plan(config_of({"kind": "dpo"}, {"kind": "rlhf"}, **more))[0] for more in ({}, {"label_budgets": [10, 30]})
    )
    assert together.shared() == alone.shared() and together.evaluation == alone.evaluation
    training = {one.training for one in (*alone.trained, *together.trained)}
    assert len(training) == 6
    assert len({one.reward_model for one in (*alone.trained, *together.trained)} - {None}) == 3


def test_jobs_are_told_their_number() -> None:
    config = config_of({"kind": "dpo"}, {"kind": "rlhf"}, label_budgets=[10])
    plan = make_plan(config)[0]
    dpo, rlhf = plan.trained
    job = entry_job(config, plan, dpo)
    assert isinstance(job, OffPolicyJob) and job.method.num_pairs == 10
    assert reward_model_job(plan, rlhf).settings.num_pairs == 10


def test_a_replay_has_the_pairs_of_its_source() -> None:
    source = {"kind": "dpo", "num_pairs": 10, "online": {"every": 4}}
    config = config_of(source, {"kind": "ipo", "replay": "dpo"})
    plan = make_plan(config)[0]
    job = entry_job(config, plan, plan.trained[1])
    assert isinstance(job, OffPolicyJob) and job.replayed is not None and job.replayed.num_pairs == 10
    with pytest.raises(UserError, match="cannot be combined with num_pairs"):
        config_of(source, {"kind": "ipo", "replay": "dpo", "num_pairs": 5})


# ------------------------------------------------------------------------------------------- which rows


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Forty pairs of ten prompts in two files, with first tokens' log-probs beside the others."""
    rows: list[dict[str, Any]] = []
    for place in range(NUM_PAIRS):
        row: dict[str, Any] = {
            "id": content_id("pair", place),
            "prompt_ids": [1, place % 10],
            "label": 1.0,
            "source": "x",
        }
        row |= {"chosen_ids": [place, 3], "rejected_ids": [place, 4, 5]}
        row |= {f"ref_{side}{kind}": -1.0 for side in ("chosen", "rejected") for kind in ("_logp", "_shared_logp")}
        rows.append(row)
    for name, part in (("0", rows[:25]), ("1", rows[25:])):
        write_rows(pa.Table.from_pylist(part, SHARED_PAIRS), tmp_path / "shared" / f"{name}.parquet", SHARED_PAIRS)
        write_rows(pa.Table.from_pylist(part, SHARED_PAIRS), tmp_path / "pairs" / f"{name}.parquet", REFERENCED_PAIRS)
    return tmp_path / "pairs"


def firsts(pairs: Path, number: int | None) -> list[list[int]]:
    return read_rows(pairs, first=number)["chosen_ids"].to_pylist()


def test_fewer_pairs_are_among_more_of_them(pairs: Path) -> None:
    few, more, every = (firsts(pairs, number) for number in (5, 20, None))
    assert (len(few), len(more), len(every)) == (5, 20, NUM_PAIRS)
    assert more[:5] == few and every[:20] == more
    assert {row[0] for row in more} != set(range(20))  # by a hash, not in the order in which they were written


def test_every_term_on_pairs_has_the_same_rows(pairs: Path) -> None:
    shares, wanted = Shares(Optimisation(batch_size=4), 1, 0), firsts(pairs, 5)
    terms: list[PreferenceTerm | RankedTerm | RewardModelTerm] = [
        PreferenceTerm(str(pairs), DPO(num_pairs=5), shares, 0),
        PreferenceTerm(str(pairs.parent / "shared"), DPO(num_pairs=5, tail_weight=0.5), shares, 0),
        RankedTerm(str(pairs), AOT(num_pairs=5), shares, 0),
        RewardModelTerm(str(pairs), shares, 0, centre_weight=0.0, num_pairs=5),
    ]
    for term in terms:
        assert [ids.tolist() for ids in term.pairs.chosen.take(np.arange(5))] == wanted
        assert len(term.plan.lengths) == 5 and term.plan.num_steps(8) == 10
        assert set(term.plan.rows(0)) <= set(range(5))
    assert isinstance(terms[0], PreferenceTerm) and terms[0].origin(10)["num_data_labels"] == 5
    assert len(Pairs(str(pairs)).chosen.lengths) == NUM_PAIRS


def test_single_responses_are_those_of_the_same_pairs(pairs: Path) -> None:
    rows = taken_apart(read_rows(pairs).select(PAIRS.names))
    table = rows.append_column("mismatched_ids", rows["response_ids"].take(pa.array(mismatch(rows))))
    for name in ("ref_logp", "ref_mismatched_logp"):
        table = table.append_column(name, pa.array(np.full(len(rows), -1.0), pa.float32()))
    path = pairs.parent / "responses"
    write_rows(table, path / "part.parquet", REFERENCED_RESPONSES)
    shares = Shares(Optimisation(batch_size=4), 1, 0)
    term = UnpairedTerm(str(path), KTO(num_pairs=5), shares, 0, pairs=str(pairs))
    found = [ids.tolist() for ids in term._responses["response"].take(np.arange(10))]
    first = read_rows(pairs, first=5)
    assert sorted(found) == sorted(first["chosen_ids"].to_pylist() + first["rejected_ids"].to_pylist())
    assert len(term.plan.lengths) == 10
    assert len(UnpairedTerm(str(path), KTO(), shares, 0, pairs=str(pairs)).plan.lengths) == 2 * NUM_PAIRS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, its demonstrations, 48 pairs, and these taken apart."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_responses(folder)
    return folder


def weights_of(inputs: Path, kind: str, number: int | None, folder: Path) -> dict[str, torch.Tensor]:
    """What a method, or a reward model, that is limited to so many pairs has learned."""
    training = Optimisation(batch_size=4, num_steps=5, warmup_steps=0)
    job: Job = off_policy_job(inputs, folder, (DPO if kind == "dpo" else KTO)(training=training, num_pairs=number))
    if kind == "reward model":
        settings, pairs = RewardModel(training=training, num_pairs=number), str(inputs / "pairs")
        job = RewardModelJob(
            stage_dir=str(folder), name="rm", policy=str(inputs / "model"), seed=3, settings=settings, pairs=pairs,
            test_pairs=pairs, samples=str(inputs / "demonstrations"),
        )  # fmt: skip
    run_job(job, Worker(job.stage_dir))
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("kind", ["dpo", "kto", "reward model"])
def test_a_training_on_some_pairs_is_that_on_a_table_of_them(inputs: Path, tmp_path: Path, kind: str) -> None:
    """Bit for bit."""
    few = read_rows(inputs / "pairs", first=12)
    responses = of_pairs(read_rows(inputs / "responses"), few["id"].to_pylist())
    for name, table, schema in (("pairs", few, REFERENCED_PAIRS), ("responses", responses, REFERENCED_RESPONSES)):
        write_rows(table, tmp_path / name / "part.parquet", schema)
    for name in ("model", "demonstrations"):
        (tmp_path / name).symlink_to(inputs / name)
    some = weights_of(inputs, kind, 12, tmp_path / "some")
    alone = weights_of(tmp_path, kind, None, tmp_path / "alone")
    assert some.keys() == alone.keys() and all(torch.equal(some[name], alone[name]) for name in alone)
    if kind == "dpo":
        assert read_manifest(tmp_path / "some")["pairs"]["num_data_labels"] == 12


def test_an_estimate_counts_the_pairs_that_are_trained_on() -> None:
    table = Rows(6400, np.full(4, 3), np.full((4, 2), 4))
    data = Data(table, table, table.single(), table.taking(0), table.single())
    config = config_of({"kind": "dpo"})
    settings = model_settings(config)
    assert settings is not None
    workload = Workload(config, settings, data, {}, 4)
    whole, half = (workload.off_policy(DPO(num_pairs=n), "x").trained for n in (None, 3200))
    assert half == pytest.approx(whole / 2)
    whole, half = (workload.reward_model(RewardModel(num_pairs=n), table, "x", 2).trained for n in (None, 3200))
    assert half == pytest.approx(whole / 2)
