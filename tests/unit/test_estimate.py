"""What an estimate counts, what it takes from a timed run or from a table, and what it makes of them."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from beside import dies, waits
from off_policy import off_policy_job, write_inputs
from tiny import save_tiny_policy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from pipelines.cli import main
from pipelines.estimate import Estimator, on_cards
from pipelines.estimate_tune import num_trainings
from pipelines.memory import model_settings
from prefarena.cluster.needs import Lengths as MostTokens
from prefarena.cluster.needs import trainings
from prefarena.config import DPO, Comparison, LanguageTask, LoRA, Optimisation, RewardModel, TextTask, parse_config
from prefarena.data.first_rows import look_at_prompts
from prefarena.data.splits import Shares as DataShares
from prefarena.data.tables import TokenColumn, read_rows
from prefarena.data.tokenization import Tokenizer
from prefarena.errors import UserError
from prefarena.estimate.beside_ray import meter
from prefarena.estimate.calibration import Bench, Steps, Timed, time_sizes, time_training
from prefarena.estimate.company import company
from prefarena.estimate.hardware import CARDS, Cards, parse_cards
from prefarena.estimate.interval import Interval
from prefarena.estimate.lengths import Data, Rows, of_language, of_text
from prefarena.estimate.result import Estimated, by_entry, price_of
from prefarena.estimate.speeds import Curve, OnCards
from prefarena.estimate.stages import planned
from prefarena.estimate.trainings import Workload
from prefarena.estimate.work import Judging, Manner, Passes, Sampling, StageWork, Writing
from prefarena.modeling.flops import count_model
from prefarena.modeling.load import load_policy
from prefarena.modeling.memory import MemoryNeed
from prefarena.modeling.passes import Pass, passed
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

LLAMA = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)


@pytest.mark.parametrize("settings", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_flops_are_those_that_torch_counts(settings: PretrainedConfig) -> None:
    rows, length = 3, 7
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    counts = count_model(settings)
    whole = Pass(rows * length, rows * length * length, rows * length)  # eager attention computes what is masked too
    ids = torch.zeros(rows, length, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        model(input_ids=ids)
    with FlopCounterMode(display=False) as both:
        model(input_ids=ids).logits.sum().backward()
    assert counts.forward(whole) == forward.get_total_flops()
    assert counts.training(whole) == both.get_total_flops()
    assert counts.parameters == counts.trained == sum(one.numel() for one in model.parameters())


def test_adapters_save_the_gradient_of_the_weights() -> None:
    whole, adapters, one = count_model(LLAMA), count_model(LLAMA, LoRA(rank=4)), Pass(100, 1000, 50)
    assert adapters.parameters == whole.parameters and adapters.trained < whole.trained / 5
    assert 2 / 3 < adapters.training(one) / whole.training(one) < 1
    assert whole.training(one, recomputed=True) - whole.training(one) == whole.forward(one, head=False)


def test_a_shared_prompt_is_passed_once_and_seen_by_both_responses() -> None:
    found = passed(np.array([2]), np.array([[3, 1]]))
    seen_by_prompt, seen_by_responses = 1 + 2, (3 + 4 + 5) + 3
    assert found == Pass(6, seen_by_prompt + seen_by_responses, 4)


# ------------------------------------------------------------------------------------------------ tokens


def lengths(folder: Path, *names: str) -> Rows:
    table = read_rows(folder)
    prompts, *responses = (TokenColumn.of(table, f"{name}_ids").lengths for name in ("prompt", *names))
    return Rows(len(prompts), prompts, np.stack(responses, 1))


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_tokens_are_those_of_a_real_run(tmp_path: Path, weight: float) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    # 3 passes over 256 demonstrations, and 16 over 48 pairs.
    training = Optimisation(batch_size=16, num_steps=48, warmup_steps=0)
    settings = DPO(training=training, demonstration_weight=weight)
    run_job(off_policy_job(inputs, tmp_path / "job", settings), Worker(str(tmp_path / "job")))
    spent = json.loads((tmp_path / "job" / "manifest.json").read_text(encoding="utf-8"))["costs"]
    pairs = lengths(inputs / "pairs", "chosen", "rejected")
    demonstrations = lengths(inputs / "demonstrations", "response")
    data = Data(pairs, pairs, demonstrations, pairs.taking(0), pairs.single())
    config = parse_config({"entries": [{"name": "x", "method": settings.model_dump()}]})
    model = load_policy(inputs / "model").config
    work = Workload(config, model, data, {}, 4).off_policy(settings, "entries.x.method.training")
    assert work.trained == pytest.approx(spent["num_tokens_trained"])


def test_the_reference_goes_over_the_languages_own_demonstrations() -> None:
    task = LanguageTask(num_demonstrations=512, num_pairs=64)
    data = of_language(task)
    assert data.demonstrations.number == 512 and data.pairs.number == 64
    assert data.pairs.prompts.tolist() == [4] * len(data.pairs.prompts)
    assert data.pairs.responses.min() >= 1 and data.pairs.responses.max() <= task.response_limit


def test_memory_is_that_of_passes_that_are_made() -> None:
    lengths = np.full(64, 10)
    lengths[0] = 100
    rows = Rows(64, lengths, np.full((64, 2), 4))
    few, whole = Optimisation(batch_size=4, num_steps=1), Optimisation(batch_size=4)
    method = {"kind": "rlhf", "training": {"rollouts_per_iteration": 16, "num_minibatches": 2}}
    config = parse_config({"entries": [{"name": "x", "method": method}]})
    workload = Workload(config, LLAMA, Data(rows, rows, rows.single(), rows, rows.single()), {}, 4)
    assert workload.longest_pass(rows, few, 8192).prompt == 10  # the long row is in another batch
    assert workload.longest_pass(rows, whole, 8192).prompt > 20
    sizes = {one.where: workload.in_one_pass(one, 32) for one in trainings(config)}
    assert sizes["entries.x.method.training"] == 8  # of a minibatch, however many a pass may hold
    assert sizes["reference.training"] == 32


@pytest.mark.parametrize(
    "several", [{"demonstration_weight": 0.1}, {"training": {"batch_size": 8, "micro_batch_tokens": 16 * 4}}]
)
def test_a_step_of_one_pass_has_no_gradients_while_it_runs(several: dict[str, Any]) -> None:
    def need(**settings: Any) -> MemoryNeed:
        method = {"kind": "dpo", "training": {"batch_size": 4}} | settings
        config = parse_config({"entries": [{"name": "x", "method": method}]})
        [training] = [one for one in trainings(config) if one.where == "entries.x.method.training"]
        found = training.need(LLAMA, MostTokens(8, 4), training.sizes[0])
        assert found is not None
        return found

    one_pass, more = need(), need(**several)  # passes of four pairs, all of them
    assert (one_pass.weights, one_pass.optimizer) == (more.weights, more.optimizer)
    assert one_pass.total < more.total


# ---------------------------------------------------------------------------------------------- hardware


@pytest.mark.parametrize(
    ("text", "number", "name"), [("8xH100", 8, "H100"), ("a100", 1, "A100"), (" 16 x L40S ", 16, "L40S")]
)
def test_cards_by_number_and_name(text: str, number: int, name: str) -> None:
    assert parse_cards(text) == Cards(CARDS[name], number)


@pytest.mark.parametrize("text", ["8xTPU", "H100x8", "eight H100", "0xH100", "", "8"])
def test_unknown_cards_are_told_in_a_sentence(text: str) -> None:
    with pytest.raises(UserError, match="--gpus"):
        parse_cards(text)


def test_more_cards_than_there_are_is_told() -> None:
    config = parse_config(
        {"entries": [{"name": "x", "method": {"kind": "dpo"}}], "resources": {"use_gpu": True, "num_workers": 8}}
    )
    with pytest.raises(UserError, match="asks for 9 GPUs"):
        on_cards(config, parse_cards("8xH100"))
    laid_out, _ = on_cards(config, parse_cards("9xH100"))
    assert laid_out == config


@pytest.mark.parametrize(("cards", "workers", "actors"), [("1xH100", 1, 1), ("8xH100", 4, 4), ("6xA100", 4, 2)])
def test_a_config_without_gpus_is_laid_out_as_init_does_it(cards: str, workers: int, actors: int) -> None:
    config = parse_config({"entries": [{"name": "x", "method": {"kind": "dpo"}}]})
    found, _ = on_cards(config, parse_cards(cards))
    assert (found.resources.num_workers, found.generation.num_actors, found.resources.use_gpu) == (
        workers,
        actors,
        True,
    )


def on_h100s(**changed: Any) -> OnCards:
    resources = {"use_gpu": True, **changed}
    return OnCards(parse_cards("64xH100"), parse_config(
        {"entries": [{"name": "x", "method": {"kind": "dpo"}}], "resources": resources}
    ))  # fmt: skip


def test_a_pass_takes_its_flops_at_the_share_of_the_peak_that_is_reached() -> None:
    flops, card = 1e18, CARDS["H100"]
    part = Passes(10, flops, 1e6, Manner("bfloat16"), True, 16)
    found = on_h100s().seconds(part, StageWork((), workers=4))
    assert found == Interval(*(flops / 4 / (card.half * share) for share in reversed(card.flops)))
    slower = on_h100s().seconds(replace(part, manner=Manner("float32")), StageWork((), workers=4))
    assert slower.middle / found.middle == pytest.approx(card.half / card.single)


def test_small_passes_wait_for_launches_and_spread_ones_for_the_network() -> None:
    speeds, small = on_h100s(), Passes(1000, 1e9, 1e4, Manner("bfloat16"), True, 16)
    computed = small.flops / (CARDS["H100"].half * 0.38)
    assert speeds.seconds(small, StageWork(())).middle > 1000 * computed
    spread = replace(small, weights=7 * 10**9)
    inside, across = (speeds.seconds(spread, StageWork((), workers=number)).middle for number in (8, 16))
    assert across > 5 * inside > speeds.seconds(small, StageWork((), workers=8)).middle


def test_generation_reads_the_weights_once_a_token_whatever_the_batch() -> None:
    few = Sampling(1, 8, 100, 100, 100, 0.0, 7 * 10**9, 0)
    more = replace(few, sequences=200)
    speeds = on_h100s()
    seconds = [speeds.seconds(part, StageWork(())).middle for part in (few, more, replace(few, sequences=512))]
    assert seconds[0] == seconds[1] < seconds[2]  # the engine takes 256 at a time
    assert seconds[0] == pytest.approx(100 * 2 * 7e9 / (3.35e12 * 0.6))


# ------------------------------------------------------------------------------------- what is made of it


def stage(entry: str | None, name: str, seconds: float, devices: float = 1, times: int = 1) -> Estimated:
    return Estimated(name, entry, Interval(seconds / 2, seconds, 2 * seconds), devices, times, 1.0, 2.0, 3.0, None)


def test_ratios_are_of_device_seconds_of_all_seeds_without_evaluation() -> None:
    stages = [
        stage(None, "reference", 1e6), stage("dpo", "training", 10, times=3), stage("dpo", "evaluation", 1e6),
        stage("rlhf", "reward model", 20, times=3), stage("rlhf", "training", 50, devices=2, times=3),
    ]  # fmt: skip
    dpo, rlhf = by_entry(stages)
    assert (dpo.ratio, rlhf.ratio) == (1.0, 12.0)
    assert dpo.seconds == Interval(15, 30, 60) and rlhf.device_seconds.middle == 360
    assert rlhf.trained == 12


def test_a_price_is_of_devices_and_hours() -> None:
    assert price_of(Interval(1800, 3600, 7200), 2.5) == Interval(1.25, 2.5, 5.0)
    with pytest.raises(UserError, match="--price"):
        price_of(Interval.exactly(1), -1)


def test_a_curve_goes_through_what_was_measured_and_on_along_its_last_line() -> None:
    curve = Curve(((10, 1.0), (20, 3.0), (40, 5.0)))
    assert [curve.at(size) for size in (10, 15, 30, 60)] == [1.0, 2.0, 4.0, 7.0]
    assert Curve(((10, 1.0),)).at(30) == 3.0
    assert Curve(((10, 2.0), (20, 1.0))).at(40) == 2.0  # noise is no speed-up


def test_a_timed_run_leaves_the_weights_and_times_growing_passes(tmp_path: Path) -> None:
    model = load_policy(write_inputs(tmp_path) / "model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = Rows(8, np.full(8, 3), np.full((8, 2), 4))
    bench = Bench(rows, 8, 8, tmp_path / "bench", "cpu", 1, 5.0)
    timed = time_training(model, Optimisation(), count_model(model.config), 16, bench)
    sizes = [size for size, _ in timed.training.points]
    assert sizes == sorted(sizes) and len(sizes) == 3 and timed.step > 0
    assert all(seconds > 0 for _, seconds in (*timed.training.points, *timed.forward.points))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_timed_batches_have_the_size_that_their_seconds_are_taken_to_be_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A batch has neighbours in length, so the shortest has a fraction of the tokens of the mean one.
    made: list[int] = []
    monkeypatch.setattr(
        "prefarena.estimate.calibration.optimizer_step", lambda _, terms, at, *__: made.append(terms[0].num_tokens(at))
    )
    model = load_policy(write_inputs(tmp_path) / "model")
    responses = np.random.default_rng(0).integers(1, 60, (200, 2))
    bench = Bench(Rows(200, np.full(200, 3), responses), 8, 128, tmp_path / "bench", "cpu", 1, 5.0)
    steps = Steps(model, Optimisation(), bench)
    for number in (1, 4, 16):
        one, step = steps.of(number)
        for at in range(5):
            step(at)
        # There are sixteen batches of sixteen pairs, so the five nearest to the mean are a third of them.
        assert made == pytest.approx([one.tokens] * 5, rel=0.25)
        made.clear()


def test_timed_passes_grow_up_to_the_one_of_the_training_if_the_budget_allows(tmp_path: Path) -> None:
    def sizes(budget_s: float, times: dict[int, float]) -> list[float]:
        bench = Bench(Rows(1, np.ones(1, int), np.ones((1, 2), int)), 8, 8, tmp_path, "cpu", 1, budget_s)
        clock = SimpleNamespace(now=0.0)

        def of(number: int) -> tuple[Pass, Any]:
            def run(_: int) -> None:
                clock.now += times[number]

            return Pass(number, number, number), run

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bench, "clock", property(lambda _: lambda: clock.now))
            found, _ = time_sizes(of, 8, bench)
        return [one.tokens for one, _ in found]

    times = {1: 0.7, 4: 2.5, 8: 5.0}
    assert sizes(6.0, times) == [1, 4, 8]  # the next pass would have been of 8 pairs, not of 16
    assert sizes(4.0, times) == [1, 4]
    assert sizes(2.0, times) == [1]


def test_repetitions_count_by_their_median_in_own_time_and_by_the_shortest_on_the_clock(tmp_path: Path) -> None:
    def seconds(threads: int) -> float:
        bench = Bench(Rows(1, np.ones(1, int), np.ones((1, 2), int)), 8, 8, tmp_path, "cpu", threads, 1.0)
        clock = SimpleNamespace(now=0.0)

        def run(at: int) -> None:
            clock.now += (0.3, 0.1, 0.2, 0.4, 0.2)[at]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bench, "clock", property(lambda _: lambda: clock.now))
            [(_, took)], _ = time_sizes(lambda _: (Pass(1, 1, 1), run), 1, bench)
        return took

    assert seconds(threads=1) == pytest.approx(0.2) and seconds(threads=2) == pytest.approx(0.1)


def test_processes_that_fill_the_cores_take_longer_by_what_others_use_of_these() -> None:
    timed = Timed(Curve(((1, 2.0),)), Curve(((1, 1.0),)), 0.5, 0.1, had=0.72)
    slower = timed.on(1.6, processes=2)
    assert slower.training.at(1) == 2.5 and slower.forward.at(1) == 1.25 and slower.step == 0.625
    assert slower.had == pytest.approx(0.9)  # of its own part, which is 0.8
    assert timed.on(3.6, processes=2) == timed  # there is room for both


def test_use_of_the_cores_is_that_of_the_processes_since_it_was_last_read() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    idle = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        in_use = meter({psutil.Process(busy.pid), psutil.Process(idle.pid)})
        time.sleep(1.0)
        assert 0.2 < in_use() < 1.1  # this machine may have other work
        busy.kill()
        busy.wait()
        in_use()
        time.sleep(0.2)
        assert in_use() == pytest.approx(0.0, abs=0.05)
    finally:
        busy.kill()
        idle.kill()


def test_processes_beside_the_timed_one_live_as_long_as_it_is_timed() -> None:
    with company(2, waits):
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


def test_a_process_that_cannot_run_beside_others_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match="no room for 2 training processes"), company(1, dies):
        pass
    assert multiprocessing.active_children() == []


def test_passes_are_timed_beside_as_many_trainings_as_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    entries = [{"name": name, "method": {"kind": name}} for name in ("dpo", "ipo", "rlhf")]

    def processes(**resources: Any) -> list[int]:
        config = parse_config({"entries": entries, "resources": resources})
        settings, data = model_settings(config), of_language(LanguageTask(num_demonstrations=64, num_pairs=640))
        assert settings is not None
        found = {(one.stage, one.entry): one.work for one in planned(Workload(config, settings, data, {}, 4))}
        names = [("reference", None), ("training", "dpo"), ("reward model", "rlhf"), ("training", "rlhf")]
        return [
            next(part.manner.processes for _, part in found[name].parts if isinstance(part, Passes) and part.backward)
            for name in names
        ]

    assert processes() == [1, 1, 1, 1]
    assert processes(concurrent_runs=2) == [1, 2, 2, 1]
    assert processes(concurrent_runs=0) == [1, 3, 3, 1]  # no more trainings, though there is room for four
    assert processes(concurrent_runs=4, cpus_per_worker=2) == [1, 2, 2, 1]
    assert processes(num_workers=2) == [2, 2, 2, 2]


@pytest.mark.parametrize(("cpus", "processes"), [(2, 1), (3, 1), (4, 2), (64, 2)])
def test_trainings_beside_engines_are_timed_as_many_at_once_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, cpus: int, processes: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cpus))
    entries = [{"name": name, "method": {"kind": name}} for name in ("rlhf", "grpo", "dpo")]
    config = parse_config({"entries": entries, "resources": {"concurrent_runs": 0}})
    settings, data = model_settings(config), of_language(LanguageTask(num_demonstrations=64, num_pairs=640))
    assert settings is not None
    found = {(one.stage, one.entry): one.work for one in planned(Workload(config, settings, data, {}, 4))}
    for entry in ("rlhf", "grpo"):  # a worker and an engine take a CPU each
        timed = {part.manner.processes for _, part in found["training", entry].parts if isinstance(part, Passes)}
        assert processes in timed and max(timed) == processes


def test_a_policy_on_the_way_costs_a_part_of_what_the_final_one_costs(tmp_path: Path) -> None:
    """Samples on held-out prompts alone, no pairs, and half as many divergences."""
    training = {"num_snapshots": 3}
    tree = {
        "task": {"kind": "text", "data": "pairs.jsonl", "covered_share": 0.5},
        "model": {"kind": "scratch"},
        "judge": {"kind": "function", "function": "rewards_that_fail:short"},
        "entries": [
            {"name": "dpo", "method": {"kind": "dpo", "training": training}},
            {"name": "rlhf", "method": {"kind": "rlhf", "training": training}},
        ],
    }
    config = parse_config(tree)
    rows = Rows(64, np.full(64, 8), np.full((64, 2), 4))
    data, settings = Data(rows, rows, rows.single(), rows.taking(0), rows.single()), model_settings(config)
    assert settings is not None
    found = {(one.stage, one.entry): one for one in planned(Workload(config, settings, data, {}, 4))}
    snapshots, final = found["evaluation (snapshots)", "dpo"], found["evaluation", "dpo"]
    assert snapshots.times == 3 and snapshots.work.generated == final.work.generated / 3
    parts, whole = dict(snapshots.work.parts), dict(final.work.parts)
    assert parts.keys() == whole.keys() - {"log-probs"}
    few, many = parts["divergences"], whole["divergences"]
    assert isinstance(few, Passes) and isinstance(many, Passes) and few.flops == pytest.approx(many.flops / 6)
    # The reward that it learned from scores a snapshot's samples; of the final policy those on both groups of other
    # prompts as well, and the reference's on held-out ones.
    parts, whole = (dict(found[stage, "rlhf"].work.parts) for stage in ("evaluation (snapshots)", "evaluation"))
    few, many = parts["proxy"], whole["proxy"]
    assert isinstance(few, Passes) and isinstance(many, Passes) and few.flops == pytest.approx(many.flops / 4)


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        "task: {kind: language, num_demonstrations: 64, num_pairs: 64}\nreference: {train: false}\n"
        "entries: [{name: dpo, method: {kind: dpo, training: {micro_batch_tokens: 512}}}]\n",
        encoding="utf-8",
    )
    assert main(["estimate", str(path), "--gpus", "2xH100", "--price", "2"]) == 0
    shown = capsys.readouterr().out
    assert "estimate by stage" in shown and "estimate by entry" in shown and "price" in shown
    assert main(["estimate", str(path), "--gpus", "2xH10"]) == 2
    assert "8xH100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "number"),
    [
        ({}, 24 + 12),  # of each batch of 8 the better half goes on with the second seed
        ({"seeds": [1, 2, 3], "kept_share": 0.25}, 24 + 2 * 6),
        ({"num_trials": 10}, 10 + 4 + 1),
        ({"device_seconds": 12 * 5.0}, 12),  # spent by the first batch
        ({"device_seconds": 12 * 5.0 + 1}, 24),
    ],
)
def test_trials_are_trained_as_often_as_the_budget_says(changed: dict[str, Any], number: int) -> None:
    config = parse_config({"entries": [{"name": "x", "method": {"kind": "dpo"}}], "tuning": changed})
    assert num_trainings(config, Interval.exactly(5.0)) == number


def test_a_tuning_is_its_trials_and_the_comparison_of_the_winners(tmp_path: Path) -> None:
    config = parse_config({
        "task": {"kind": "language", "num_demonstrations": 64, "num_pairs": 640, "num_test_pairs": 8},
        "reference": {"train": False}, "seeds": [0, 1, 2],
        "tuning": {
            "num_trials": 8, "seeds": [7, 8], "sampler": "random",
            "spaces": {
                "dpo": {"training.num_epochs": {"values": [1, 3]}},
                "rlhf": {"training.kl_coef": {"low": 0.1, "high": 1}},
            },
        },
        "entries": [
            {"name": "dpo", "method": {"kind": "dpo", "training": {"batch_size": 8, "micro_batch_tokens": 512}}},
            {"name": "rlhf", "method": {"kind": "rlhf", "training": {"num_iterations": 2, "micro_batch_size": 8}}},
        ],
    })  # fmt: skip
    found = Estimator(parse_cards("2xH100"), tmp_path, print).of_tuning(config)
    times = {(one.entry, one.stage): one.times for one in found}
    assert times["dpo", "training"] == 3 and times["dpo", "trials: training"] == times["rlhf", "trials: training"] == 12
    assert times["rlhf", "trials: reward model"] == 2  # its settings are not searched, so trials share it
    assert times[None, "trials: pairs"] == 2  # each seed of the selection is another language
    tokens = {stage: one.trained for one in found if one.entry == "dpo" for stage in [one.stage]}
    # A mean of passes once and three times over the pairs, as the first batch was proposed.
    assert 1.0 < tokens["trials: training"] / tokens["training"] < 3.0
    [dpo, _] = by_entry(found)
    assert dpo.trained == pytest.approx(12 * tokens["trials: training"] + 3 * tokens["training"])


def test_every_budget_of_labels_has_all_of_its_stages(tmp_path: Path) -> None:
    config = parse_config({
        "task": {"kind": "language", "num_demonstrations": 64, "num_pairs": 640, "num_test_pairs": 8},
        "reference": {"train": False}, "label_budgets": [128, 512],
        "entries": [
            {"name": "dpo", "method": {"kind": "dpo", "training": PASSES}},
            {"name": "kto", "method": {"kind": "kto", "training": PASSES}},
            {"name": "rlhf", "method": {"kind": "rlhf", "training": {"micro_batch_size": 8}, "reward": LEARNED}},
            {"name": "best_of_n", "method": {"kind": "best_of_n", "reward": LEARNED}},
        ],
    })  # fmt: skip
    found = {(one.entry, one.stage): one for one in Estimator(parse_cards("2xH100"), tmp_path, print).of(config)}
    for name, stages in {
        "dpo": ["training", "evaluation"], "kto": ["training", "evaluation"],
        "rlhf": ["reward model", "training", "evaluation (scores of all responses)", "evaluation"],
        "best_of_n": ["reward model", "evaluation"],
    }.items():  # fmt: skip
        for stage in stages:
            few, many = (found[f"{name}-{number}", stage] for number in (128, 512))
            learns = stage in ("training", "reward model") and (name, stage) != ("rlhf", "training")
            assert few.trained == pytest.approx(many.trained / (4 if learns else 1), rel=0.05)


def test_this_machine_is_timed_without_ray_where_nothing_generates(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(
        "task: {kind: language, num_letters: 4, response_limit: 2, num_prompts: 8, prompt_letters: 2,\n"
        "  num_demonstrations: 64, num_pairs: 64, num_test_pairs: 8}\n"
        "reference: {training: {num_steps: 4, micro_batch_tokens: 512}}\n"
        "entries: [{name: dpo, method: {kind: dpo, training: {micro_batch_tokens: 512, batch_size: 8}}}]\n",
        encoding="utf-8",
    )
    assert main(["estimate", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "list every response" in shown and "starting an engine" not in shown
    [row] = [line for line in shown.splitlines() if re.search(r"dpo +│ training", line)]
    seconds, memory = (float(row.split("│")[at].split()[0].replace(",", "")) for at in (3, 5))
    assert seconds > 0 and memory > 500  # a process and a small model


# ------------------------------------------------------------------------------------------- pairs that are drawn

PASSES = {"micro_batch_tokens": 512}  # of a size that need not be found
LEARNED = {"kind": "learned", "training": PASSES}
FUNCTION = {"kind": "function", "function": "prefarena.judges.sentiment:valence"}
SMALL = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)


def drawn(**changed: Any) -> Comparison:
    """A comparison on pairs that are drawn, whose rows are prompts alone; nothing of it is there."""
    pairs = {"num_samples": 4} | changed.pop("pairs", {})
    return parse_config({
        "task": {"kind": "text", "data": "prompts.jsonl", "max_response_tokens": 16, "pairs": pairs, **changed},
        "model": {"kind": "pretrained", "path": "model"}, "reference": {"train": False},
        "judge": FUNCTION,
        "entries": [{"name": "dpo", "method": {"kind": "dpo", "training": {"batch_size": 8}}}],
        "evaluation": {"num_prompts": 8, "samples_per_prompt": 1},
    })  # fmt: skip


def data_of(config: Comparison, folder: Path) -> Data:
    """As of 40 prompts of which one stands there twice, a fifth of them to test on."""
    assert isinstance(config.task, TextTask)
    path = folder / "prompts.jsonl"
    texts = [f"{first} {second}" for first in "abcdefghijklm" for second in "abc"] + ["a a"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    task = config.task.model_copy(update={"data": str(path)})
    tokenizer = Tokenizer.load(save_tiny_policy(folder / "model"), None, task)
    return of_text(config, task, look_at_prompts(task), tokenizer, 40, DataShares(0.2, 0.0, 0), answers=False)


def stage_of(config: Comparison, data: Data, name: str) -> StageWork:
    [found] = [one.work for one in planned(Workload(config, SMALL, data, {}, 16)) if one.stage == name]
    return found


@pytest.mark.parametrize(("choose", "of_each"), [("all", 6), ("best_worst", 1)])
def test_drawn_pairs_are_counted_from_the_prompts(tmp_path: Path, choose: str, of_each: int) -> None:
    config = drawn(covered_share=0.5, pairs={"choose": choose})
    data = data_of(config, tmp_path)
    train, test = 31, 8  # of 39 different prompts
    assert data.drawn is not None and data.drawn.number == 4 * (train + test)
    assert (data.pairs.number, data.test_pairs.number) == (of_each * 16, of_each * test)
    assert data.num_labelled == 4 * (16 + test) and data.demonstrations.number == 4 * train
    distinct = {"all": 4 * test, "best_worst": 2 * test}
    assert data.test_responses.number == distinct[choose] and data.test_responses.responses.shape[1] == 1
    [generated] = [part for _, part in stage_of(config, data, "drawn").parts if isinstance(part, Sampling)]
    assert generated.calls * generated.sequences == data.drawn.number
    [judged] = [part for _, part in stage_of(config, data, "pairs").parts if isinstance(part, Judging)]
    assert judged.responses == data.num_labelled


def test_all_that_is_drawn_is_as_long_as_what_the_model_answers(tmp_path: Path) -> None:
    config = drawn()
    data = data_of(config, tmp_path)
    assert data.pairs.mean_response == 16  # nobody has seen an answer yet
    seen = data.answered([3, 5])
    for rows in (seen.drawn, seen.pairs, seen.test_pairs, seen.demonstrations, seen.prompts):
        assert rows is not None and rows.mean_response == pytest.approx(4, abs=0.1)
    shorter = [stage_of(config, one, "training").trained for one in (seen, data)]
    assert shorter[0] < shorter[1]


def test_a_learned_annotator_scores_by_passes_and_a_function_by_its_own_time(tmp_path: Path) -> None:
    config = drawn(pairs={"annotators": [{"judge": FUNCTION}, {}]}).model_copy(update={"judge": RewardModel()})
    data = data_of(config, tmp_path)
    data = replace(data, judge=data.pairs)
    kinds = [type(part).__name__ for name, part in stage_of(config, data, "pairs").parts if name == "labels"]
    assert kinds == ["Judging", "Passes"]
    parts = dict(stage_of(config, data, "pairs").parts)
    assert isinstance(parts["writing"], Writing)
    assert parts["writing"].rows == data.pairs.number + data.test_pairs.number


# --------------------------------------------------------------------------------- the reference's log-probs


def scoring_passes(work: StageWork) -> dict[str, float]:
    """Tokens that are scored, by the arithmetic."""
    return {part.manner.precision: part.tokens for _, part in work.parts if isinstance(part, Passes)}


def test_training_pairs_are_scored_in_the_arithmetic_of_the_training_that_reads_them() -> None:
    rows = Rows(64, np.full(64, 10), np.full((64, 2), 4))
    data = Data(rows, rows.taking(16), rows.single(), rows.taking(0), rows.single())
    halves = {"batch_size": 8, "precision": "bfloat16"}
    entries = [
        {"name": "dpo", "method": {"kind": "dpo", "training": halves}},
        {"name": "kto", "method": {"kind": "kto", "training": halves}},
    ]
    config = parse_config({**drawn().model_dump(), "entries": entries})
    logps = stage_of(config, data, "logps")
    assert config.scored_in == "float32"
    assert scoring_passes(logps) == {"bfloat16": 64 * 18, "float32": 16 * 18}
    assert [name for name, _ in logps.parts].count("start") == 2  # a pool for each
    # Of both responses to a prompt, each beside another response: the prompt is passed once with each.
    assert scoring_passes(stage_of(config, data, "responses")) == {"bfloat16": 2 * 64 * 18}


def test_pairs_are_scored_by_one_pool_where_evaluations_compute_as_training_does() -> None:
    rows = Rows(64, np.full(64, 10), np.full((64, 2), 4))
    data = Data(rows, rows.taking(16), rows.single(), rows.taking(0), rows.single())
    logps = stage_of(drawn(), data, "logps")
    assert scoring_passes(logps) == {"float32": 80 * 18}
    assert [name for name, _ in logps.parts].count("start") == 1


def test_shared_tokens_are_as_many_as_the_shorter_response_has() -> None:
    rows = Rows(2, np.array([10, 10]), np.array([[4, 6], [5, 3]]))
    assert rows.cut_to_shorter().responses.tolist() == [[4, 4], [3, 3]]
