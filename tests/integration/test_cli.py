"""Bad input from the command line: one clear sentence, status 2, before anything is started or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray

from pipelines.cli import build_parser, main
from prefarena.errors import ClusterLostError, WaitTimeoutError
from prefarena.methods import discover


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, check status 2, and return its one message."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("prefarena: ") and "\n" not in error and "Traceback" not in error
    return error


def text_config(folder: Path, data: str, **task: object) -> str:
    path = folder / "config.json"  # JSON is YAML
    tree = {
        "name": "bad",
        "output": str(folder / "runs"),
        "task": {"kind": "text", "data": str(folder / data), **task},
        "entries": [{"name": "dpo", "method": {"kind": "dpo"}}],
    }
    path.write_text(json.dumps(tree), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task.sede=1", "unknown key 'task.sede'; did you mean 'seed'?"),
        ("entries.dpo.method.beta=high", "entries.2.method.beta"),
        ("task.num_prompts=5000", "make only 2197"),
        ("model.num_heads=4", "hidden_size / num_heads is 16"),
        ("resources.num_workers=3", "cannot be divided evenly"),
        ("entries.rlhf.method.training.num_minibatches=7", "cannot be cut into 7 minibatches"),
        ("entries.dpo.method.pretraining_weight=1", "needs task.pretraining_text"),
    ],
)
def test_settings_that_cannot_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str, says: str
) -> None:
    assert says in refused(capsys, "compare", "--set", f"output={tmp_path}", "--set", override)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "data.jsonl"),
        ("", "data.jsonl"),
        ('{"chosen": "a b", "rejected": "a c", "prompt": "x"}\n{"chosen": \n', "data.jsonl:2"),
        ('{"text": "a"}\n', "chosen"),
    ],
    ids=["missing file", "empty file", "broken line", "missing columns"],
)
def test_data_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "data.jsonl").write_text(content, encoding="utf-8")
    assert says in refused(capsys, "compare", text_config(tmp_path, "data.jsonl"))
    assert not (tmp_path / "runs").exists()


def test_too_few_resources(ray_session: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    settings = [f"output={tmp_path}", "resources.num_workers=64"]
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    error = refused(capsys, "compare", *arguments)
    assert f"the cluster has {cpus} CPUs, but 65 are asked for" in error
    assert "resources.num_workers x cpus_per_worker" in error and "generation.num_actors x cpus" in error


@pytest.mark.parametrize("kind", [WaitTimeoutError, ClusterLostError])
def test_what_does_not_answer_is_one_sentence_and_status_1(
    kind: type[Exception], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def silent(*_: object, **__: object) -> None:
        raise kind("generator-0 has not started after 600 s (generation.start_timeout_s)")

    monkeypatch.setattr("pipelines.compare.compare", silent)
    assert main(["compare", "--set", f"output={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert said == "prefarena: generator-0 has not started after 600 s (generation.start_timeout_s)\n"


def test_methods_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for line in ("mpo: Maximum Preference Optimization", "beta = 0.1", "tau = 0.1", "training.gae_lambda = 0.95"):
        assert line in text
    assert text.startswith(f"{next(iter(discover()))}: ")
    for kind in ("sft", "mpo", "dpo", "simpo", "ipo", "rlhf", "grpo", "reinforce_pp", "rloo", "best_of_n"):
        assert f"\n{kind}: " in text


def test_the_table_of_methods_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--table"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("| `kind` |") and rows[-1].startswith("| `rloo` | REINFORCE, leave one out")
    assert any(row.startswith("| `sppo_hard` | Self-Play") for row in rows)
    assert [row for row in rows if row.startswith("| `dpo` |") and "yes | `beta` 0.1, `label_smoothing` 0.0" in row]


def test_help_says_what_is_written_where() -> None:
    text = build_parser().format_help()
    for word in ("results.json", "report.md", "manifest.json", "exit status"):
        assert word in text
