"""Whole comparisons in miniature, by the command: real Ray Data, Ray Train, vLLM and transformers."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefarena
from pipelines import evaluate
from pipelines.cli import main
from prefarena.data.tables import read_rows
from prefarena.generation.fleet import Generators
from prefarena.report.html import embedded
from prefarena.report.results import Results, load_results
from prefarena.report.samples import load_samples
from prefarena.stage_files import METRICS, read_log
from prefarena.stages import Stage, read_manifest
from prefarena.tasks.gold import GoldReward

QUICK = {"num_steps": 12, "batch_size": 16, "log_every": 4}
LEARNED = {"kind": "learned", "training": QUICK}
PPO = {
    "num_iterations": 3,
    "num_snapshots": 1,
    "rollouts_per_iteration": 32,
    "micro_batch_size": 16,
    "num_minibatches": 2,
}
ENTRIES = [
    {"name": "sft", "method": {"kind": "sft", "training": QUICK}},
    {"name": "mpo", "method": {"kind": "mpo", "demonstration_source": "samples", "training": QUICK}},
    {"name": "dpo", "method": {"kind": "dpo", "training": {**QUICK, "num_snapshots": 1}}},
    {"name": "ipo", "method": {"kind": "ipo", "training": QUICK}},
    {"name": "rlhf", "method": {"kind": "rlhf", "demonstration_weight": 0.01, "reward": LEARNED, "training": PPO}},
    {"name": "best-of-4", "method": {"kind": "best_of_n", "reward": LEARNED}},
    {"name": "kto", "method": {"kind": "kto", "training": {**QUICK, "num_steps": 24}}},
]
LANGUAGE = {
    "name": "mini",
    "task": {
        "kind": "language", "num_letters": 4, "num_prompts": 6, "prompt_letters": 2, "response_limit": 3,
        "num_demonstrations": 512, "num_pairs": 128, "num_test_pairs": 64,
    },
    "reference": {"training": {**QUICK, "num_steps": 60, "learning_rate": 3e-3}},
    "entries": ENTRIES,
}  # fmt: skip


def run(tree: dict, folder: Path, *arguments: str) -> Results:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**tree, "output": str(folder / "runs")}), encoding="utf-8")
    before = {report.parent for report in (folder / "runs").glob("*/results.json")}
    assert main(["compare", str(path), *arguments]) == 0
    found = {report.parent for report in (folder / "runs").glob("*/results.json")} - before
    return load_results((found or before).pop())


@pytest.fixture(scope="module")
def language_run(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("language")
    return folder, run(LANGUAGE, folder)


def test_the_table_holds_every_policy(language_run: tuple[Path, Results]) -> None:
    _, results = language_run
    names = [entry.name for entry in results.entries]
    assert names[:8] == ["reference", "sft", "mpo", "dpo", "ipo", "rlhf", "best-of-4", "kto"]
    assert results.entries[8].kind == "optimum"
    for entry in results.entries:
        row = entry.seeds["0"]
        assert row["regret/covered"] >= -1e-9 and row["kl/all"] >= -1e-12
    reference = results.entry("reference").seeds["0"]
    assert reference["kl/all"] == pytest.approx(0, abs=1e-9) and reference["reward/all"] == pytest.approx(0, abs=1e-9)
    assert reference["preference_accuracy"] == 0.5
    assert results.entry("dpo").seeds["0"]["preference_accuracy"] > 0.55
    assert results.entry("kto").seeds["0"]["preference_accuracy"] > 0.55  # of pairs taken apart


def test_policies_on_the_way_are_measured(language_run: tuple[Path, Results]) -> None:
    """Start, one snapshot and the end; the exact KL of start and snapshot meets what their rollouts told."""
    _, results = language_run
    assert set(results.trajectories) == {"dpo", "rlhf"}
    start, snapshot, end = results.trajectories["dpo"]["0"]
    assert start["kl"] == 0 < snapshot["kl"] and (snapshot["step"], end["step"]) == (6, 12)
    assert end["reward"] == results.entry("dpo").seeds["0"]["reward/covered"] != snapshot["reward"]
    start, snapshot, end = results.trajectories["rlhf"]["0"]
    row = results.entry("rlhf").seeds["0"]
    assert start["kl"] == 0 < snapshot["step"] < end["step"] == 3
    assert end["proxy_reward"] == row["proxy_reward/covered"] and end["reward"] == row["reward/covered"]
    (compared,) = results.kl_agreement["rlhf"]["0"]
    assert compared["step"] == snapshot["step"] and compared["exact"] == snapshot["kl"] > 0
    assert abs(compared["k1_z"]) < 4


def test_best_of_n_trains_nothing(language_run: tuple[Path, Results]) -> None:
    folder, results = language_run
    row = results.entry("best-of-4").seeds["0"]
    assert 0 < row["kl"] <= row["kl_bound"] and row["proxy_reward/all"] > 0.5
    assert row["preference_accuracy"] == pytest.approx(row["reward_model_accuracy"], abs=1e-9)
    stages = {cost.stage for cost in results.costs if cost.entry == "best-of-4"}
    assert stages == {"reward model", "evaluation (scores of all responses)", "evaluation"}
    assert "best-of-4" not in results.curves and not list((folder / "runs").glob("*/checkpoints/best-of-4*"))
    assert any("best-of-4 trains no policy" in note for note in results.notes)


def test_the_run_folder_is_complete(language_run: tuple[Path, Results]) -> None:
    folder, _ = language_run
    (run_folder,) = (path.parent for path in (folder / "runs").glob("*/results.json"))
    for name in ("config.yaml", "report.md", "report.html", "figures/reward_kl.png", "figures/reward_kl.svg"):
        assert (run_folder / name).stat().st_size > 200, name
    for name in ("reference", "sft-s0", "mpo-s0", "dpo-s0", "ipo-s0", "rlhf-s0", "kto-s0"):
        AutoModelForCausalLM.from_pretrained(str(run_folder / "checkpoints" / name))
        AutoTokenizer.from_pretrained(str(run_folder / "checkpoints" / name))
    costs = json.loads((run_folder / "results.json").read_text(encoding="utf-8"))["costs"]
    ppo = next(cost for cost in costs if cost["entry"] == "rlhf" and cost["stage"] == "training")
    assert ppo["num_tokens_generated"] > 0 and ppo["num_tokens_trained"] > 0 and ppo["peak_memory_mib"] > 50


def test_plain_transformers_reproduces_the_exact_numbers(language_run: tuple[Path, Results]) -> None:
    """Every response of every prompt by itertools, a forward pass each, float64: reward and KL to 1e-4."""
    folder, results = language_run
    (run_folder,) = (path.parent for path in (folder / "runs").glob("*/results.json"))
    (pairs,) = (folder / "runs" / "stages").glob("pairs-*")
    (data,) = (folder / "runs" / "stages").glob("data-*")
    prompts = read_rows(data / "prompts").to_pylist()
    gold = GoldReward.load(pairs / "gold.json")
    tokens = [token for token in range(7) if token != 2]
    responses = [[*body, 2] for n in range(3) for body in itertools.product(tokens, repeat=n)]
    responses += [list(body) for body in itertools.product(tokens, repeat=3)]
    for name in ("dpo-s0", "rlhf-s0"):
        kl, reward = [], []
        for row in prompts:
            logps = {}
            for model_name in (name, "reference"):
                model = AutoModelForCausalLM.from_pretrained(
                    str(run_folder / "checkpoints" / model_name), dtype=torch.float64
                )
                totals = []
                for length in (1, 2, 3):
                    batch = [response for response in responses if len(response) == length]
                    ids = torch.tensor([[*row["prompt_ids"], *response] for response in batch])
                    with torch.no_grad():
                        steps = model(ids).logits.log_softmax(-1)[:, len(row["prompt_ids"]) - 1 : -1]
                    totals.append(steps.gather(-1, ids[:, len(row["prompt_ids"]) :, None])[..., 0].sum(1))
                logps[model_name] = torch.cat(totals).numpy()
            ordered = [response for length in (1, 2, 3) for response in responses if len(response) == length]
            p = np.exp(logps[name])
            assert p.sum() == pytest.approx(1, abs=1e-6)
            kl.append((p * (logps[name] - logps["reference"])).sum())
            reward.append((p * gold.score([row["prompt_ids"]] * len(ordered), ordered)).sum())
        found = results.entry(name.removesuffix("-s0")).seeds["0"]
        assert np.mean(kl) == pytest.approx(found["kl/all"], abs=1e-4)
        assert np.mean(reward) == pytest.approx(found["reward/all"], abs=1e-4)


def test_finished_stages_are_reused_and_a_changed_setting_reruns_what_depends_on_it(
    language_run: tuple[Path, Results], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, first = language_run
    again = run(LANGUAGE, folder)
    assert "0 to do" in capsys.readouterr().out
    assert all(cost.reused for cost in again.costs)
    assert [entry.seeds for entry in again.entries] == [entry.seeds for entry in first.entries]
    changed = run(LANGUAGE, folder, "--set", "entries.ipo.method.tau=0.5")
    assert "2 to do" in capsys.readouterr().out  # its training and its evaluation
    fresh = {(cost.entry, cost.stage) for cost in changed.costs if not cost.reused}
    assert fresh == {("ipo", "training"), ("ipo", "evaluation")}
    assert changed.entry("ipo").seeds != first.entry("ipo").seeds
    assert changed.entry("dpo").seeds == first.entry("dpo").seeds
    assert len(list((folder / "runs").glob("mini-*/results.json"))) == 2  # nothing was overwritten


def test_python_gives_what_the_command_found(language_run: tuple[Path, Results]) -> None:
    folder, results = language_run
    found = prefarena.compare({**LANGUAGE, "output": str(folder / "runs")}, quiet=True)
    assert found.folder.parent == folder / "runs" and all(found.costs["reused"])
    assert [entry.seeds for entry in found.results.entries] == [entry.seeds for entry in results.entries]
    assert found.models.keys() == {"reference", "sft-s0", "mpo-s0", "dpo-s0", "ipo-s0", "rlhf-s0", "kto-s0"}
    AutoModelForCausalLM.from_pretrained(found.models["dpo-s0"])
    assert len(found.figures) == 4 and found.page.is_file()


def test_trackers_show_every_training_of_a_comparison_and_its_final_numbers(
    language_run: tuple[Path, Results],
) -> None:
    """Those of reused stages too."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, results = language_run
    run({**LANGUAGE, "tracking": [{"kind": "tensorboard"}]}, folder)
    (comparison,) = (folder / "runs" / "tracking" / "tensorboard").glob("mini-*")
    assert (folder / "runs" / comparison.name / "results.json").is_file()
    runs = {path.parent.relative_to(comparison).as_posix(): path for path in comparison.rglob("events.*")}
    entries = ["dpo", "ipo", "kto", "mpo", "rlhf", "sft"]
    expected = ["reference", "best-of-4/seed-0", "rlhf/reward_model/seed-0", *(f"{name}/seed-0" for name in entries)]
    assert sorted(runs) == sorted(expected)
    for name in entries:
        events = accumulator.EventAccumulator(str(runs[f"{name}/seed-0"].parent)).Reload()
        steps = [point.step for point in events.Scalars("learning_rate")]
        assert steps == [row["step"] for row in read_log(Path(results.curves[name]["0"]))]
        (point,) = events.Scalars("final/reward/all")
        assert point.value == pytest.approx(results.entry(name).seeds["0"]["reward/all"], rel=1e-6)


def test_rlhf_shards_and_trains_adapters(language_run: tuple[Path, Results]) -> None:
    """Two sharded workers, roles on one copy of the weights, a real engine that takes the merged adapters.

    Beside PPO REINFORCE++, whose reference becomes the policy after each of three iterations.
    """
    folder, _ = language_run
    adapters = {"lora": {"rank": 4}, "learning_rate": 1e-2, "activation_checkpointing": True}
    reward = {"kind": "learned", "training": {**QUICK, **adapters}}
    entry = {"name": "rlhf", "method": {"kind": "rlhf", "reward": reward, "training": {**PPO, **adapters}}}
    resources = {"num_workers": 2, "sharding": "fsdp"}
    training = {**PPO, **adapters, "reference_every": 1}
    moving = {"kind": "reinforce_pp", "reward": {"kind": "gold"}, "training": training}
    entries = [entry, {"name": "moving", "method": moving}]
    results = run({**LANGUAGE, "name": "sharded", "entries": entries, "resources": resources}, folder)
    start, snapshot, end = results.trajectories["rlhf"]["0"]
    assert start["kl"] == 0 < snapshot["kl"] < end["kl"]
    (compared,) = results.kl_agreement["rlhf"]["0"]
    assert abs(compared["k1_z"]) < 4  # the engine sampled from the policy that the snapshot holds
    (stage,) = (path.parent for path in (folder / "runs" / "stages").glob("rlhf-*/adapter"))
    assert read_manifest(stage)["weights_verified"]["share_of_parameters"] > 0.9
    assert max(row["logp_gap/max"] for row in rows_of(stage)) < 1e-3
    assert len(list((folder / "runs" / "stages").glob("reference-*"))) == 1  # workers are not in its address
    rows = read_log(Path(results.curves["moving"]["0"]))
    assert len(rows) == 3 and all(row["kl_moving/k1"] == 0 for row in rows)  # it is the policy at each start
    assert not any(name.startswith("kl/k") for row in rows for name in row)
    assert all(row["kl"] > 0 for row in results.trajectories["moving"]["0"][1:])  # against the original one
    assert "moving" not in results.kl_agreement
    assert any(
        note.startswith("moving: the KL penalty is measured against a moving reference") for note in results.notes
    )


def rows_of(stage: Path) -> list[dict]:
    return read_log(stage / METRICS)


WORDS = ["tea", "bread", "rain", "music", "garden", "river", "winter", "paper"]


def transcripts(path: Path, number: int) -> None:
    """Raw HH-RLHF rows in which polite answers are preferred."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(number):
            question = f"\n\nHuman: tell me about {' '.join(rng.choices(WORDS, k=3))} number {i}\n\nAssistant:"
            chosen = f" Gladly, {' and '.join(rng.choices(WORDS, k=3))} are lovely."
            rejected = f" No, {' or '.join(rng.choices(WORDS, k=rng.randint(1, 4)))}."
            row = {"chosen": question + chosen, "rejected": question + rejected, "score_chosen": 4 + i % 3}
            file.write(json.dumps({**row, "score_rejected": i % 7 / 8}) + "\n")


def singles(path: Path, number: int) -> None:
    """Rows of one response each: the polite ones are desirable."""
    rng = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for i in range(number):
            prompt = f"\n\nHuman: what of {' '.join(rng.choices(WORDS, k=3))} number {i}\n\nAssistant:"
            polite = f" Gladly, {' and '.join(rng.choices(WORDS, k=3))} are lovely."
            answer = polite if i % 2 else f" No, {' or '.join(rng.choices(WORDS, k=3))}."
            file.write(json.dumps({"prompt": prompt, "completion": answer, "label": bool(i % 2)}) + "\n")


def engines_beside_scorers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of engines that run, each time evaluations begin to wait for scores."""
    found, running = list[int](), set[Generators]()
    start, stop, ended = Generators.start, Generators.stop, evaluate._ended

    def started(*arguments: Any, **settings: Any) -> Generators:
        generators = start(*arguments, **settings)
        running.add(generators)
        return generators

    def stopped(self: Generators) -> None:
        stop(self)
        running.discard(self)

    def waited(tasks: dict[Stage, list[Any]], limit_s: float) -> dict[Stage, Any]:
        found.append(len(running))
        return ended(tasks, limit_s)

    monkeypatch.setattr(Generators, "start", started)
    monkeypatch.setattr(Generators, "stop", stopped)
    monkeypatch.setattr(evaluate, "_ended", waited)
    return found


def test_text_from_raw_transcripts(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_engines = engines_beside_scorers(monkeypatch)
    transcripts(tmp_path / "data.jsonl", 160)
    singles(tmp_path / "singles.jsonl", 120)
    tree = {
        "name": "text",
        "task": {
            "kind": "text", "data": str(tmp_path / "data.jsonl"), "max_prompt_tokens": 64, "max_response_tokens": 24,
            "unpaired_data": str(tmp_path / "singles.jsonl"),
        },
        "model": {"kind": "scratch", "vocab_size": 320},
        "reference": {"training": {**QUICK, "num_steps": 40, "learning_rate": 3e-3}, "loss_on": "all"},
        "judge": {"kind": "learned", "training": {**QUICK, "num_steps": 40}},
        "entries": [
            {"name": "dpo", "method": {"kind": "dpo", "training": {**QUICK, "num_steps": 30, "num_snapshots": 1},
                                       "demonstration_weight": 1e-4, "demonstration_source": "samples"}},
            {"name": "rlhf", "method": {**ENTRIES[4]["method"], "prompts": "all"}},  # type: ignore[dict-item]
            {"name": "best-of-3", "method": {"kind": "best_of_n", "reward": LEARNED, "n": 3}},
            {"name": "kto", "method": {"kind": "kto", "training": {**QUICK, "num_steps": 30}}},
            {"name": "odpo", "method": {"kind": "odpo", "training": {**QUICK, "num_steps": 30}}},
        ],
        "evaluation": {
            "num_prompts": 8, "samples_per_prompt": 2, "frontier_samples": 8,
            "abilities": {"tasks": ["knowledge"], "folder": "pipelines/data/abilities", "limit": 12},
        },
        "resources": {"scoring": {"num_actors": 2}},  # each evaluation is scored by two tasks
    }  # fmt: skip
    results = run(tree, tmp_path)
    assert with_engines == [0]  # they were waited for once, when the engines had left
    assert not results.exact and results.data["num_train_pairs"] > 60
    dpo = results.entry("dpo").seeds["0"]
    assert dpo["preference_accuracy"] - 2 * dpo["preference_accuracy_stderr"] > 0.5
    assert dpo["kl_stderr"] > 0 and dpo["win_rate_stderr"] >= 0 and dpo["logp_gap/max"] < 1e-3
    assert results.entry("reference").seeds["0"]["kl"] == pytest.approx(0, abs=1e-6)
    assert dpo["kl_vocabulary"] > 0 and dpo["forward_kl"] > 0 and dpo["demonstration_gain_stderr"] > 0
    assert 0 < dpo["win_rate_at_equal_length"] < 1
    assert set(results.trajectories) == {"dpo", "rlhf"}
    start, snapshot, end = results.trajectories["dpo"]["0"]
    assert start["kl"] == 0 < snapshot["kl"] and (snapshot["step"], end["step"]) == (15, 30)
    assert end["reward"] == dpo["judge_score"] != snapshot["reward"] and end["kl"] == dpo["kl_vocabulary"]
    start, _, end = results.trajectories["rlhf"]["0"]  # which learned from a reward that is not the judge
    rlhf = results.entry("rlhf").seeds["0"]
    assert (start["proxy_reward"], end["proxy_reward"]) == (rlhf["reference_proxy_reward"], rlhf["proxy_reward"])
    gained = (end["proxy_reward"] - start["proxy_reward"]) / rlhf["reference_proxy_reward_sd"]
    assert end["standard_proxy_gain"] == pytest.approx(gained) and "proxy_reward" not in dpo
    assert len(results.estimated_frontier["0"]) == 33 and any(c.stage == "evaluation (frontier)" for c in results.costs)
    assert any("reward model trained on pairs that no entry was trained on" in note for note in results.notes)
    assert any("gave any token of 1 on-policy run differ by" in note for note in results.notes)
    assert not any("{" in note for note in results.notes)
    kto = results.entry("kto").seeds["0"]  # from other responses to other prompts
    assert kto["preference_accuracy"] - 2 * kto["preference_accuracy_stderr"] > 0.5
    odpo = results.entry("odpo").seeds["0"]
    assert odpo["preference_accuracy"] - 2 * odpo["preference_accuracy_stderr"] > 0.5
    offsets = [row["preference/offset"] for row in read_log(Path(results.curves["odpo"]["0"]))]
    assert all(np.log(3) < offset < np.log(6) for offset in offsets)  # scores of 4 to 6 against those of 0 to 1
    best = results.entry("best-of-3").seeds["0"]
    assert best["kl_bound"] == pytest.approx(np.log(3) - 2 / 3) and best["win_rate_stderr"] >= 0
    assert "kl" not in best and "preference_accuracy" not in best
    evaluations = ("evaluation (reference)", "evaluation")
    tokens = {c.entry: c.num_tokens_generated for c in results.costs if c.stage in evaluations}
    assert 2 < tokens["best-of-3"] / tokens[None] < 4.5
    rows = read_log(Path(results.curves["rlhf"]["0"]))
    assert all("reward/judge" in row for row in rows)
    (run_folder,) = (path.parent for path in (tmp_path / "runs").glob("*/results.json"))
    samples = load_samples(run_folder)
    assert samples is not None and samples.num_all == 16 and samples.num_left_out == 0
    assert all(row.answers.keys() == {"reference", "dpo", "rlhf", "best-of-3", "kto", "odpo"} for row in samples.rows)
    assert dpo["judge_score"] == pytest.approx(np.mean([row.answers["dpo"][1] for row in samples.rows]))
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert embedded(samples.rows[0].prompt) in page
    kept = [path for path in (tmp_path / "runs" / "rollouts").rglob("*") if path.is_file()]
    assert not kept  # neither of evaluations nor of what all of them share
    abilities = {one.entry: one for one in results.abilities}
    assert abilities.keys() == {"dpo", "rlhf", "kto", "odpo"}  # best-of-n has no policy of its own
    for one in abilities.values():
        assert (one.task, one.metric, one.num_items) == ("knowledge", "acc", 12) and 0 <= one.value <= 1
        assert one.reference == abilities["dpo"].reference
        assert one.difference == pytest.approx(one.value - one.reference)
    assert sum(cost.stage == "evaluation (abilities)" for cost in results.costs) == 5  # and the reference's
    assert "text: what is forgotten" in page or "What is forgotten" in page


@pytest.mark.long
def test_on_policy_methods_side_by_side_end_as_one_after_another(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has an engine of its own, and not a bit of its policy depends on what runs beside it."""
    methods: list[dict[str, Any]] = [
        {"kind": "rlhf", "reward": {"kind": "gold"}, "training": PPO},
        {"kind": "grpo", "reward": {"kind": "gold"}, "training": {**PPO, "group_size": 4}},
        {"kind": "dpo", "online": {"every": 4, "reward": {"kind": "gold"}}, "training": QUICK},
    ]
    tree = {**LANGUAGE, "entries": [{"name": one["kind"], "method": one} for one in methods]}
    rows = []
    for number in (1, 2):
        resources = {"concurrent_runs": number}
        (folder := tmp_path / str(number)).mkdir()
        results = run({**tree, "name": f"at-once-{number}", "resources": resources}, folder)
        rows.append([results.entry(one["kind"]).seeds for one in methods])
        assert capsys.readouterr().out.count("✓ starting 1 vLLM generation actor") == number
    assert rows[0] == rows[1]
