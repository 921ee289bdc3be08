"""Jobs on a head node with authentication on, submitted from a folder outside the repository."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
import yaml
from head import TOKEN, Head, running_head, wait_for_line
from ray.job_submission import JobDetails, JobStatus, JobType

import pipelines
from pipelines.cli import main
from prefarena.cluster.jobs import JobClient, UnreachableError, exit_status, follow, head_address, read_token
from prefarena.cluster.package import write_package
from prefarena.errors import ClusterLostError, UserError
from prefarena.modeling.load import load_policy

ROOT = Path(__file__).parents[2]
LOSSES = Path(__file__).parents[1] / "helpers" / "losses.py"
QUICK = {"num_steps": 4, "batch_size": 16}
TINY: dict[str, Any] = {
    "name": "tiny",
    "task": {
        "kind": "language", "num_letters": 4, "num_prompts": 6, "prompt_letters": 2, "response_limit": 3,
        "num_demonstrations": 64, "num_pairs": 64, "num_test_pairs": 32,
    },
    "reference": {"train": False},
    "entries": [{"name": "dpo", "method": {"kind": "dpo", "training": QUICK}}],
}  # fmt: skip


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head(num_cpus=2) as running:
        yield running


@pytest.fixture
def with_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory outside the repository, with a config in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("prefarena: ") and "\n" not in error and TOKEN not in error
    return error


# ------------------------------------------------------------------------------------ without a cluster


def test_a_token_is_found_where_ray_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-a-path\n", encoding="utf-8")
    (tmp_path / "empty").write_text("\n", encoding="utf-8")
    named = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert read_token({}, tmp_path) is None
    assert read_token(named, tmp_path) == "from-a-path"
    assert read_token({**named, "RAY_AUTH_TOKEN": "direct"}, tmp_path) == "direct"
    assert read_token({**named, "RAY_AUTH_MODE": "disabled"}, tmp_path) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-the-user", encoding="utf-8")
    assert read_token({}, tmp_path) == "of-the-user"
    for bad in ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "empty")}):
        with pytest.raises(UserError, match="the token file"):
            read_token(bad, tmp_path)
    with pytest.raises(UserError, match="RAY_AUTH_MODE is token, but there is none"):
        read_token({"RAY_AUTH_MODE": "token"}, tmp_path / "token")


def test_an_address_that_is_given_wins_over_the_environment() -> None:
    assert head_address("http://a:1/", {"RAY_ADDRESS": "http://b:2"}) == "http://a:1"
    assert head_address("a:1", {}) == "http://a:1"
    assert head_address(None, {"RAY_ADDRESS": "http://b:2"}) == "http://b:2"
    assert head_address(None, {"RAY_ADDRESS": "auto"}) == "http://127.0.0.1:8265"
    with pytest.raises(UserError, match="http"):
        head_address("ray://a:10001", {})


def details(status: JobStatus, code: int | None = None) -> JobDetails:
    return JobDetails(type=JobType.SUBMISSION, status=status, entrypoint="x", driver_exit_code=code)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 143)],
)
def test_exit_statuses_are_those_of_a_shell(status: str, code: int | None, expected: int) -> None:
    assert exit_status(details(JobStatus(status), code)) == expected


def test_an_address_where_nobody_answers(capsys: pytest.CaptureFixture[str], outside: Path, with_token: None) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound, not listening
        address = f"http://user:word@127.0.0.1:{silent.getsockname()[1]}"
        error = refused(capsys, "status", "--address", address)
    assert "no Ray head answers there" in error and "--address" in error and "word" not in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "output: runs would lie in the job's temporary directory"),
        (
            ["--set", "output=/x", "--set", "task={kind: text, data: tiny.yaml}"],
            "task.data: tiny.yaml is a relative path",
        ),
        (["--set", "output=/x", "--set", "sedes=[1]"], "unknown key 'sedes'"),
    ],
    ids=["relative output", "local data", "unknown key"],
)
def test_what_a_cluster_could_not_use_is_refused_before_it_is_asked(
    capsys: pytest.CaptureFixture[str], outside: Path, arguments: list[str], says: str
) -> None:
    assert says in refused(capsys, "submit", "tiny.yaml", "--address", "http://127.0.0.1:1", *arguments)


def test_a_package_holds_the_code_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("x = 1\n", encoding="utf-8")
    folder = tmp_path / "package"
    folder.mkdir()
    write_package(folder, Path(pipelines.__file__).parent, "name: mine\n", [tmp_path / "judge.py"])
    assert {path.name for path in folder.iterdir()} == {"pipelines", "prefarena", "comparison.yaml", "judge.py"}
    assert (folder / "prefarena" / "default.yaml").is_file() and not list(folder.rglob("__pycache__"))
    for name, says in (("none.py", "no such file"), ("pipelines", "the job already has a pipelines")):
        empty = tmp_path / f"for-{name}"
        empty.mkdir()
        with pytest.raises(UserError, match=says):
            write_package(empty, Path(pipelines.__file__).parent, "", [tmp_path / name, ROOT / name])


class CutClient:
    """Stands for a head whose connection breaks after the first piece of a log, and which does not answer once."""

    shown = "http://head"
    text = "one\ntwo\nthree\n"

    def __init__(self) -> None:
        self.asked = self.tailed = 0

    def details(self, name: str) -> JobDetails:
        self.asked += 1
        if self.asked == 2:
            raise UnreachableError("not now")
        return details(JobStatus.SUCCEEDED if self.asked > 4 else JobStatus.RUNNING, 0)

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        self.tailed += 1
        yield "one\n"
        if self.tailed == 1:
            raise aiohttp.ClientConnectionError
        yield "two\n"

    def log(self, name: str) -> str:
        return self.text


def test_a_lost_connection_is_made_again_and_nothing_is_shown_twice() -> None:
    client, pieces = CutClient(), list[str]()
    assert exit_status(follow(client, "x", pieces.append)) == 0  # type: ignore[arg-type]
    assert "".join(pieces) == CutClient.text and client.tailed > 1


def test_a_head_that_stays_away_is_waited_for_no_longer_than_the_limit() -> None:
    client = CutClient()

    def gone(name: str) -> JobDetails:
        client.details = never  # type: ignore[method-assign]
        return details(JobStatus.RUNNING)

    def never(name: str) -> JobDetails:
        raise UnreachableError("gone")

    client.details = gone  # type: ignore[method-assign]
    with pytest.raises(ClusterLostError, match=r"has not answered for 0.1 s; job 'x' may still run.*logs x --follow"):
        follow(client, "x", lambda text: None, patience_s=0.1)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- on a cluster


@pytest.fixture
def client(head: Head) -> JobClient:
    return JobClient(head.address, TOKEN)


def test_a_comparison_runs_as_a_job_and_its_log_arrives(
    capsys: pytest.CaptureFixture[str], head: Head, outside: Path, with_token: None
) -> None:
    """One of its entries has a loss of the user's, DPO again, which is shipped with the job."""
    (outside / "shipped_losses.py").write_text(LOSSES.read_text(encoding="utf-8"), encoding="utf-8")
    mine = {"kind": "custom", "objective": "shipped_losses:logistic", "training": QUICK}
    two = {**TINY, "entries": [*TINY["entries"], {"name": "mine", "method": mine}]}
    (outside / "tiny.yaml").write_text(yaml.safe_dump(two), encoding="utf-8")
    output = str(outside / "shared")
    arguments = ["submit", "tiny.yaml", "--address", head.address, "--name", "whole", "--set", f"output={output}"]
    arguments += ["--include", "shipped_losses.py"]
    assert main([*arguments, "--follow"]) == 0
    text = capsys.readouterr().out
    assert f"job whole is submitted to {head.address}; it writes to {output}" in text
    assert "plan of comparison 'tiny'" in text and "report: " in text
    assert text.count("stages are under") == 1  # nothing is shown twice
    assert text.rstrip().endswith("job whole: SUCCEEDED, exit status 0")
    assert list((outside / "shared").glob("tiny-*/report.md"))
    models = [next((outside / "shared" / "stages").glob(f"{kind}-*/model")) for kind in ("dpo", "custom")]
    ours, expected = (load_policy(model).state_dict() for model in models)
    assert all(torch.equal(ours[name], value) for name, value in expected.items())  # bit for bit
    assert "already has a job of this name" in refused(capsys, *arguments)
    assert main(["status", "--address", head.address]) == 0
    assert "whole: SUCCEEDED" in capsys.readouterr().out
    assert main(["logs", "whole", "--address", head.address]) == 0
    assert "report: " in capsys.readouterr().out
    written = [path.read_text(encoding="utf-8") for path in Path(output).rglob("*.yaml")]
    assert written and TOKEN not in JobClient(head.address, TOKEN).details("whole").model_dump_json() + "".join(written)


def test_a_config_that_the_job_refuses_ends_with_its_status(
    capsys: pytest.CaptureFixture[str], head: Head, outside: Path, with_token: None
) -> None:
    settings = ["--set", f"output={outside}", "--set", "task.num_prompts=5000"]
    assert main(["submit", "tiny.yaml", "--address", head.address, "--follow", *settings]) == 2
    text = capsys.readouterr().out
    assert "make only 16" in text and "exit status 2" in text and "Traceback" not in text


def test_a_job_runs_the_code_that_submitted_it_and_a_kill_is_its_exit_status(client: JobClient, tmp_path: Path) -> None:
    write_package(tmp_path, Path(pipelines.__file__).parent, "")
    show = "print(os.path.relpath(prefarena.__file__), flush=True); os.kill(os.getpid(), 9)"
    client.submit("killed", f'python -c "import os, prefarena; {show}"', tmp_path)
    pieces: list[str] = []
    assert exit_status(follow(client, "killed", pieces.append)) == 137
    assert f"prefarena{os.sep}__init__.py\n" in "".join(pieces) and ".." not in "".join(pieces)


def test_a_stopped_job_ends_those_who_follow_it(head: Head, client: JobClient, tmp_path: Path) -> None:
    client.submit("long", 'python -c "import time; print(1234, flush=True); time.sleep(600)"', tmp_path)
    environment = {**os.environ, "RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "token", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pipelines", "logs", "long", "--follow", "--address", head.address]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        wait_for_line(process, "1234")
        assert client.stop("long", limit_s=60).status == JobStatus.STOPPED
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143 and "job long: STOPPED" in rest


@pytest.mark.parametrize(
    ("token", "says"), [("wrong", "does not accept the token"), (None, "requires a token, but none is set here")]
)
def test_without_the_right_token_one_sentence(
    capsys: pytest.CaptureFixture[str],
    head: Head,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    token: str | None,
    says: str,
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    error = refused(capsys, "status", "--address", head.address)
    assert says in error and "RAY_AUTH_TOKEN" in error


def test_a_job_that_is_not_there(capsys: pytest.CaptureFixture[str], head: Head, with_token: None) -> None:
    for command in (["logs", "nobody"], ["logs", "nobody", "--follow"], ["stop", "nobody"], ["status", "nobody"]):
        assert "has no job 'nobody'" in refused(capsys, *command, "--address", head.address)
