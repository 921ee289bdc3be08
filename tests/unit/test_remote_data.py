"""Data on S3, from a real server on loopback."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from s3 import BUCKET, fs, server

from pipelines.plan import make_plan
from pipelines.preferences import check_text_task
from prefarena.cluster.doctor import judge_reach
from prefarena.cluster.probe import look
from prefarena.config import Comparison, TextTask, parse_config
from prefarena.data.sources import find_parts, read_rows_of, version_of
from prefarena.errors import UserError

__all__ = ["fs", "server"]  # fixtures

ROWS = [{"prompt": f"Is {i} even?", "chosen": "Yes." * (1 + i), "rejected": "No."} for i in range(12)]


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def text_config(data: str) -> Comparison:
    entries = [{"name": "dpo", "method": {"kind": "dpo"}}]
    return parse_config({"task": {"kind": "text", "data": data}, "entries": entries})


def test_files_of_a_folder_are_read(fs: Any) -> None:
    fs.pipe_file(f"{BUCKET}/folder/a.jsonl", lines(ROWS[:5]))
    fs.pipe_file(f"{BUCKET}/folder/b.jsonl", lines(ROWS[5:]))
    parts = check_text_task(TextTask(kind="text", data=f"s3://{BUCKET}/folder"))
    assert [part.path for part in parts] == [f"s3://{BUCKET}/folder/{name}.jsonl" for name in "ab"]
    rows = [row for part in parts for _, row in read_rows_of(part, ("prompt", "chosen", "rejected"), 10_000)]
    assert rows == ROWS


@pytest.mark.parametrize("split", [None, "train"])
def test_a_saved_dataset_keeps_its_scheme(fs: Any, tmp_path: Path, split: str | None) -> None:
    table = datasets.Dataset.from_list(ROWS)
    saved = datasets.DatasetDict({split: table}) if split else table
    saved.save_to_disk(f"s3://{BUCKET}/saved-{split}")
    parts = find_parts(f"s3://{BUCKET}/saved-{split}", "train")
    assert {part.path for part in parts} == {f"s3://{BUCKET}/saved-{split}"}
    rows = [row for part in parts for _, row in read_rows_of(part, ("prompt", "chosen", "rejected"), 10_000)]
    assert rows == ROWS


@pytest.mark.parametrize("name", ["one.jsonl", "many"])
def test_changed_content_gives_another_stage_and_the_same_content_the_same(fs: Any, name: str) -> None:
    path = f"{BUCKET}/changing/{name}" + ("" if name.endswith("jsonl") else "/part.jsonl")
    config, keys = text_config(f"s3://{BUCKET}/changing/{name}"), []
    for rows in (ROWS, ROWS, [*ROWS[:-1], {**ROWS[-1], "rejected": "Ho."}]):  # of one length
        fs.pipe_file(path, lines(rows))
        keys.append(make_plan(config)[0].data.key)
    assert keys[0] == keys[1] != keys[2]
    if not name.endswith("jsonl"):
        fs.pipe_file(f"{BUCKET}/changing/{name}/another.jsonl", lines(ROWS))
        assert make_plan(config)[0].data.key not in keys


def test_a_hub_dataset_that_cannot_be_asked_counts_by_the_commit_that_is_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert version_of("org/pairs") == []
    known = tmp_path / "datasets--org--pairs" / "refs" / "main"
    known.parent.mkdir(parents=True)
    known.write_text("0123abcd")
    assert version_of("org/pairs") == ["0123abcd"]


@pytest.mark.parametrize(("url", "driver", "extra"), [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gcs")])
def test_a_missing_driver_is_one_sentence(monkeypatch: pytest.MonkeyPatch, url: str, driver: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, driver, None)  # as where it is not installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url[:2], raising=False)
    with pytest.raises(UserError) as error:
        find_parts(url, "train")
    assert str(error.value) == (
        f"{url}: {driver} is not installed, which {url[:2]}:// needs; pip install 'prefarena[{extra}]'"
    )


def test_what_a_store_refuses_is_one_sentence(fs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        find_parts(f"s3://{BUCKET}/nothing.jsonl", "train")
    with pytest.raises(UserError, match="no such file or folder"):
        find_parts("s3://no-such-bucket/nothing.jsonl", "train")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fs.clear_instance_cache()
    with pytest.raises(UserError, match="Unable to locate credentials"):
        find_parts(f"s3://{BUCKET}/folder", "train")


def test_a_node_says_what_it_cannot_read(fs: Any, tmp_path: Path) -> None:
    fs.pipe_file(f"{BUCKET}/there/a.jsonl", lines(ROWS))
    places = {
        "task.data": f"s3://{BUCKET}/there",
        "task.pretraining_text": f"s3://{BUCKET}/elsewhere",
        "model.path": str(tmp_path / "nothing"),
    }
    report = look("here", None, "", places)
    findings = judge_reach([report], places)
    assert [finding.problem for finding in findings] == [True, True, False]
    assert f"task.pretraining_text: s3://{BUCKET}/elsewhere is not there" in findings[0].text
    assert f"model.path: {tmp_path}/nothing is not there" in findings[1].text
    assert findings[2].text == f"task.data: every node can read s3://{BUCKET}/there"
