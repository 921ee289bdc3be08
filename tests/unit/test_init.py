"""`prefarena init` looks at a model and at data, and writes a config that can be used as it is."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, LlamaConfig

from pipelines.checks import check_input
from pipelines.cli import main
from pipelines.init import fits
from pipelines.init_config import Hardware, Look, Memory, Wanted, config_text
from pipelines.starting_points import starting_point
from prefarena.cluster.needs import num_parameters
from prefarena.config import Comparison, load_config, parse_config
from tests.helpers.tiny import VOCABULARY, save_tiny_policy

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
WORDS = VOCABULARY[3:]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_policy(tmp_path_factory.mktemp("model") / "policy")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs of letters: prompts of up to 90 tokens, responses of up to 20."""
    rng, rows = random.Random(0), []
    for i in range(120):
        words = [" ".join(rng.choices(WORDS, k=k)) for k in (80 if i % 10 == 0 else 5, 8, 18)]
        rows.append({"prompt": f"{words[0]} ", "chosen": words[1], "rejected": words[2]})
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def made(tmp_path: Path, *arguments: str) -> tuple[str, Comparison]:
    """What `init` wrote, as text and as it is read."""
    path = tmp_path / "my comparison.yaml"
    assert main(["init", str(path), *arguments]) == 0
    return path.read_text(encoding="utf-8"), load_config(path)


@pytest.mark.parametrize("quick", [[], ["--quick"]], ids=["whole", "quick"])
def test_what_is_written_loads_and_passes_the_checks_before_any_work(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: list[str]
) -> None:
    text, config = made(tmp_path, "--model", model, "--data", data, "--gpus", "0", "--cpus", "2", *quick)
    check_input(config)
    said = capsys.readouterr().out
    assert "my comparison.yaml" in said and "prefarena doctor" in said and "no chat template" in said
    assert config.name == "my-comparison" and [entry.name for entry in config.entries] == ["dpo", "mpo", "rlhf"]
    task = yaml.safe_load(text)["task"]
    assert (task["max_prompt_tokens"], task["max_response_tokens"]) == (128, 64)
    assert config.reference.train  # a model without a template has yet to learn to answer
    assert "arXiv" in text and "100% of the prompts" in text


def test_a_chat_model_is_its_own_reference_and_transcripts_go_through_its_template(model: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    chat = save_tiny_policy(tmp_path / "chat")
    tokenizer.save_pretrained(chat)
    rows = [
        {"chosen": f"\n\nHuman: a {word}\n\nAssistant: b", "rejected": f"\n\nHuman: a {word}\n\nAssistant: c"}
        for word in WORDS
    ] * 8
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _, config = made(tmp_path, "--model", chat, "--data", str(tmp_path / "hh.jsonl"), "--gpus", "0", "--cpus", "8")
    assert not config.reference.train and config.task.kind == "text" and config.task.transcripts == "messages"
    assert config.resources.cpus_per_worker == config.generation.cpus == 4


def test_an_existing_file_is_kept_unless_forced(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine", encoding="utf-8")
    arguments = ["init", str(path), "--model", model, "--data", data, "--gpus", "0"]
    assert main(arguments) == 2
    assert "mine.yaml exists and is not overwritten" in capsys.readouterr().err and path.read_text() == "mine"
    assert main([*arguments, "--force"]) == 0
    assert load_config(path).entries


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"--model": "nowhere/at-all"}, "nowhere/at-all"),
        ({"--data": "nothing.jsonl"}, "nothing.jsonl"),
        ({"--gpus": "-1"}, "--gpus must be 0 or more"),
        ({"--model": None}, "--model is needed"),
        ({"--data": None}, "--data is needed"),
        ({"config": "no/such/folder/x.yaml"}, "there is no folder"),
    ],
)
def test_input_that_cannot_be_used_is_one_sentence_and_nothing_is_written(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, str | None], says: str
) -> None:
    given = {"config": str(tmp_path / "x.yaml"), "--model": model, "--data": data, "--gpus": "0"} | changed
    config = given.pop("config")
    flags = [part for name, value in given.items() if value is not None for part in (f"{name}={value}",)]
    assert main(["init", str(config), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("prefarena: ") and "\n" not in error and says in error
    assert not list(tmp_path.iterdir())


def test_a_terminal_is_asked_for_what_is_missing(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["", model, data, "2", ""])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    _, config = made(tmp_path)
    assert config.resources.use_gpu and config.resources.num_workers == config.generation.num_actors == 1
    assert next(answers, None) is None


# -------------------------------------------------------------------------------------- sizes and hardware


def llama(width: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=int(2.7 * width), num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=width // 128, max_position_embeddings=4096,
    )  # fmt: skip


def chosen(settings: LlamaConfig, hardware: Hardware) -> tuple[Comparison, Memory]:
    """The first config that is predicted to fit."""
    look = Look(settings, num_parameters(settings), 4096, True, False, 9, True, (100, 400), (50, 300))
    wanted = Wanted(Path("x.yaml"), "model", "data", "train", hardware, False)
    for memory in Memory.choices(hardware):
        config = parse_config(yaml.safe_load(config_text(wanted, "x", look, memory)))
        if fits(config, settings, hardware):
            return config, memory
    raise AssertionError("nothing fits")


@pytest.mark.parametrize(
    ("gib", "expected"),
    [(80, Memory("bfloat16")), (2.2, Memory("bfloat16", True, False, True))],
    ids=["large", "small"],
)
def test_memory_is_saved_as_far_as_the_hardware_makes_it_necessary(gib: float, expected: Memory) -> None:
    config, memory = chosen(llama(1024, 4), Hardware(2, gib, 8))
    assert memory == expected
    trainings = [config.entries[0].method.training, config.entries[2].method.training]  # type: ignore[union-attr]
    assert all((training.lora is not None) == memory.adapters for training in trainings)


def test_many_gpus_share_a_model_that_one_cannot_hold() -> None:
    config, memory = chosen(llama(1024, 4), Hardware(8, 3, 8))
    assert memory.sharded and not memory.adapters and config.resources.sharding == "fsdp"
    assert config.resources.num_workers == 4 and config.generation.num_actors == 4


def test_learning_rates_fall_with_size_and_every_one_has_its_source() -> None:
    points = [starting_point(int(size)) for size in (1.35e8, 1.7e9, 7e9, 7e10)]
    assert len({id(point) for point in points}) == 4
    rates = [point.preference.value for point in points]
    assert rates == sorted(rates, reverse=True) and rates[2] == 5e-7
    assert all(rate.value > 0 and rate.source for point in points for rate in point[1:])


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 8, 64, 130])
def test_every_layout_is_a_config_that_validates(gpus: int) -> None:
    look = Look(llama(512, 2), 10**7, 4096, gpus % 2 == 0, True, 9, False, (100, 400), (50, 300))
    for quick in (False, True):
        wanted = Wanted(Path("x.yaml"), "a: model", 'da"ta', "test", Hardware(gpus, 80, 2), quick)
        for memory in Memory.choices(wanted.hardware):
            tree: dict[str, Any] = yaml.safe_load(config_text(wanted, "x", look, memory))
            config = parse_config(tree)
            assert config.model.kind == "pretrained" and config.model.path == "a: model"
            assert config.resources.num_workers + config.generation.num_actors <= max(2, gpus)


def test_limits_never_exceed_the_models_context() -> None:
    look = Look(llama(512, 2), 10**7, 100, True, False, 9, True, tuple(range(90)), tuple(range(80)))
    assert sum(look.limits()) <= 100 and min(look.limits()) > 0
