"""Trackers show each step of a training once, with the row that counted, whatever is killed or fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from off_policy import metric_rows
from rich.console import Console

from pipelines.checks import check_input
from pipelines.plan import make_plan
from pipelines.report import run_folder
from pipelines.tracking import Follower, runs_of
from prefarena.config import parse_config
from prefarena.errors import UserError
from prefarena.report.results import EntryResult, Results
from prefarena.stages import write_failure, write_json, write_manifest
from prefarena.trackers import make
from prefarena.trackers.interface import OpenRun, Row, Run, Tracker
from prefarena.trackers.make import make_tracker
from tests.helpers.trackers import KINDS, check_same, needs, points, read, settings_of

ROOT = Path(__file__).parents[2]
RUN = Run("comparison-1a2b3c4d", "dpo", 0, "dpo", "dpo-dpo-s0-0123456789ab", {"beta": 0.1})
LANGUAGE: dict[str, Any] = {"entries": [{"name": "dpo", "method": {"kind": "dpo"}}]}


# ------------------------------------------------------------------------------------- stages that are made up


class Stage:
    """A training's folder, as workers leave it while it is under way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def log(self, *steps: int, loss: float = 1.0) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            for step in steps:
                row = {"step": step, "num_steps": 9, "loss": loss / step, "loss/preference": loss, "kl/k1": 0.1 * step}
                file.write(json.dumps(row) + "\n")

    def checkpoint(self, step: int) -> None:
        write_json(self.folder / "checkpoints" / f"step-{step:08d}" / "manifest.json", {"step": step})

    def forget_after(self, step: int) -> None:
        kept = [row for row in metric_rows(self.folder) if row["step"] <= step]
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        for path in (self.folder / "checkpoints").glob("step-*"):
            if int(path.name.removeprefix("step-")) > step:
                (path / "manifest.json").unlink()
                path.rmdir()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path / "stage")


@pytest.fixture
def follow(stage: Stage) -> Iterator[Callable[..., Follower]]:
    """Makes followers of the stage, which look at it only when they are told to."""
    made: list[Follower] = []

    def new(tracker: Callable[[], Tracker], **settings: Any) -> Follower:
        console = settings.pop("console", Console(file=StringIO()))
        made.append(Follower("it", tracker, {RUN: stage.folder}, console, **{"poll_s": 3600.0, **settings}))
        return made[-1]

    yield new
    for follower in made:
        follower.close()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_the_checkpoint_wait_and_those_done_again_replace_what_was_shown(
    kind: str, stage: Stage, tmp_path: Path, follow: Callable[..., Follower]
) -> None:
    needs(kind)
    follower = follow(lambda: make_tracker(settings_of(kind, tmp_path), tmp_path))
    stage.log(1, 2, 3)
    follower.catch_up()
    assert not (tmp_path / "tracking").exists()
    stage.checkpoint(2)
    follower.catch_up()
    stage.log(4, 5)
    stage.checkpoint(4)
    follower.catch_up()
    follower.close()
    check_same(read(kind, tmp_path), points(metric_rows(stage.folder)[:4]))
    # The checkpoint of step 4 turns out to be damaged while another process goes on: steps 3 and 4 are done again.
    stage.forget_after(2)
    stage.log(3, 4, 5, 6, loss=2.0)
    stage.checkpoint(6)
    again = follow(lambda: make_tracker(settings_of(kind, tmp_path), tmp_path))
    again.catch_up()
    again.close()
    check_same(read(kind, tmp_path), points(metric_rows(stage.folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_comparison_that_is_run_again_shows_nothing_twice(
    kind: str, stage: Stage, tmp_path: Path, follow: Callable[..., Follower]
) -> None:
    needs(kind)
    stage.log(1, 2, 3)
    write_manifest(stage.folder, {})
    for _ in range(2):
        follower = follow(lambda: make_tracker(settings_of(kind, tmp_path), tmp_path))
        follower.catch_up()
        follower.summarise(results({"reward": 2.0}))
        follower.close()
        assert not follower.notes()
    expected = [*points(metric_rows(stage.folder)), ("final/reward", 3, 2.0)]
    check_same(read(kind, tmp_path), expected)


def results(numbers: dict[str, float]) -> Results:
    entry = EntryResult(name="dpo", kind="dpo", seeds={"0": numbers})
    return Results(name="c", task={}, seeds=[0], exact=True, entries=[entry])


# ------------------------------------------------------------------------------------------ what may go wrong


class Kept:
    """A tracker that keeps what it is given, and fails as often as it is told."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.num_opened = self.failures_left = 0
        self.blocks = threading.Event()
        self.blocks.set()

    def open(self, run: Run, rows: Sequence[Row]) -> OpenRun:
        self.num_opened += 1
        self.rows = list(rows)
        return self

    def log(self, rows: Sequence[Row]) -> None:
        self.blocks.wait()
        if self.failures_left:
            self.failures_left -= 1
            self.rows += rows[:1]  # a part of it was done
            raise ConnectionError("the server is down\nat some length")
        self.rows += rows

    def summarise(self, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def test_a_tracker_that_fails_is_said_once_counted_and_made_whole_when_it_works_again(
    stage: Stage, follow: Callable[..., Follower]
) -> None:
    tracker, said = Kept(), StringIO()
    follower = follow(lambda: tracker, console=Console(file=said, width=200))
    stage.log(1, 2)
    stage.checkpoint(2)
    follower.catch_up()
    tracker.failures_left = 1
    stage.log(3, 4)
    stage.checkpoint(4)
    follower.catch_up()
    assert follower.notes() == [
        "Tracker it failed once (at first: the server is down); it lacks 4 rows of the stages' metrics.jsonl."
    ]
    follower.catch_up()
    assert tracker.rows == metric_rows(stage.folder) and tracker.num_opened == 2
    assert follower.notes() == ["Tracker it failed once (at first: the server is down); it has all rows now."]
    assert said.getvalue().count("the server is down") == 1 and said.getvalue().count("\n") == 1


def test_a_tracker_that_cannot_be_made_ends_nothing(stage: Stage, follow: Callable[..., Follower]) -> None:
    def fails() -> Tracker:
        raise PermissionError("no key")

    follower = follow(fails)
    stage.log(1)
    write_failure(stage.folder, "its numbers were none")
    follower.catch_up()
    follower.summarise(results({"reward": 1.0}))
    assert follower.notes() == [
        "Tracker it failed 2 times (at first: no key); it lacks 1 rows of the stages' metrics.jsonl."
    ]


def test_a_tracker_that_is_silent_is_waited_for_no_longer_than_its_limit(
    stage: Stage, follow: Callable[..., Follower]
) -> None:
    tracker = Kept()
    follower = follow(lambda: tracker, timeout_s=0.3)
    stage.log(1)
    stage.checkpoint(1)
    follower.catch_up()
    tracker.blocks.clear()
    stage.log(2)
    stage.checkpoint(2)
    started = time.monotonic()
    follower.catch_up()
    follower.summarise(results({"reward": 1.0}))
    follower.close()
    assert 0.3 <= time.monotonic() - started < 5
    assert "no answer within 0.3 s, which its timeout_s sets" in follower.notes()[0]
    tracker.blocks.set()


def test_rows_are_shown_while_nobody_asks(stage: Stage, follow: Callable[..., Follower]) -> None:
    tracker = Kept()
    follow(lambda: tracker, poll_s=0.02)
    stage.log(1, 2)
    stage.checkpoint(1)
    deadline = time.monotonic() + 20
    while len(tracker.rows) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [row["step"] for row in tracker.rows] == [1]


# -------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("tracker", "says"),
    [
        (
            {"kind": "tensorbord"},
            "tracking.0.kind: 'tensorbord' is not one of tensorboard, wandb, mlflow, trackio; did",
        ),
        ({"kind": "tensorboard", "log_dir": "x"}, "unknown key 'tracking.0.log_dir'; did you mean 'folder'?"),
        ({"kind": "wandb", "mode": "ofline"}, "did you mean 'offline'?"),
        (
            {"kind": "wandb", "api_key": "x"},
            "api_key does not belong in a config, which is stored with every run: set W",
        ),
        ({"kind": "mlflow", "token": "x"}, "set MLFLOW_TRACKING_TOKEN"),
        ({"kind": "mlflow", "uri": "https://me:pass@host/"}, "a name or password in a URI does not belong in a config"),
        ({"kind": "tensorboard", "password": "x"}, "this tracker needs none"),
    ],
)
def test_settings_that_are_refused(tracker: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config({**LANGUAGE, "tracking": [tracker]})
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert "me:pass" not in str(caught.value)


def test_the_same_tracker_twice_is_refused() -> None:
    with pytest.raises(UserError, match="the same tracker twice"):
        parse_config({**LANGUAGE, "tracking": [{"kind": "mlflow"}, {"kind": "mlflow"}]})


def test_a_package_that_is_missing_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make._PACKAGES, "trackio", ("a_module_that_is_not_there", "trackio"))
    with pytest.raises(UserError, match=r"tracking: kind trackio needs a package .* pip install trackio"):
        check_input(parse_config({**LANGUAGE, "tracking": [{"kind": "trackio"}]}))


def test_trackers_change_no_address(tmp_path: Path) -> None:
    plain = parse_config({**LANGUAGE, "output": str(tmp_path)})
    tracked = parse_config({**LANGUAGE, "output": str(tmp_path), "tracking": [{"kind": "tensorboard"}]})
    assert make_plan(plain) == make_plan(tracked)
    assert run_folder(plain, make_plan(plain)) == run_folder(tracked, make_plan(tracked))


def test_runs_are_named_by_entry_and_seed_and_what_is_shared_is_shown_once(tmp_path: Path) -> None:
    reward = {"kind": "learned"}
    entries = [
        {"name": "dpo", "method": {"kind": "dpo"}},
        {"name": "rlhf", "method": {"kind": "rlhf", "reward": reward}},
        {"name": "bo4", "method": {"kind": "best_of_n", "reward": reward}},
    ]
    config = parse_config({"output": str(tmp_path), "seeds": [0, 1], "entries": entries})
    runs = runs_of(config, make_plan(config), "c-1")
    names = ["reference", "dpo-s0", "rlhf-reward_model-s0", "rlhf-s0", "bo4-s0"]
    names += ["dpo-s1", "rlhf-reward_model-s1", "rlhf-s1", "bo4-s1"]
    assert [run.name for run in runs] == names
    assert len({run.id for run in runs}) == len({run.path for run in runs}) == len(names)
