"""Comparisons as jobs on a cluster: `prefarena submit`, `status`, `logs` and `stop`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pipelines
from prefarena.config import Comparison, PretrainedModel, TextTask, dump_config, load_config
from prefarena.errors import UserError
from prefarena.stores import is_url

if TYPE_CHECKING:
    from prefarena.cluster.jobs import JobClient

_STOP_LIMIT_S = 60.0
_INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended


def submit(arguments: argparse.Namespace) -> int:
    """Start a comparison on a cluster; with --follow, its log here and its exit status."""
    from prefarena.cluster.jobs import connect
    from prefarena.cluster.package import CONFIG_NAME, write_package

    config = load_config(arguments.config, arguments.set)
    check_paths(config)
    client = connect(arguments.address)
    name = arguments.name or f"{config.name}-{uuid.uuid4().hex[:8]}"
    _warn_of_other_ray(client)
    with tempfile.TemporaryDirectory(prefix="prefarena-") as folder:
        include = [Path(path) for path in arguments.include]
        write_package(Path(folder), Path(pipelines.__file__).parent, dump_config(config), include)
        module = "doctor" if arguments.check else "tune" if arguments.tune else "compare"
        retry = " --retry-failed" if arguments.retry_failed and not arguments.check else ""
        client.submit(name, f"python -m pipelines {module} {CONFIG_NAME}{retry}", Path(folder))
    what = f"it looks at {config.output}" if arguments.check else f"it writes to {config.output}"
    print(f"job {name} is submitted to {client.shown}; {what}", flush=True)
    if arguments.follow:
        return _follow(client, name)
    print(f"prefarena logs {name} --follow    shows its log; `status` and `stop` take its name, too")
    return 0


def check_paths(config: Comparison) -> None:
    """Raise UserError for a path that means a different place on the cluster than here."""
    if not is_url(config.output) and not Path(config.output).is_absolute():
        raise UserError(
            f"output: {config.output} would lie in the job's temporary directory; give an absolute path that all nodes "
            "share, e.g. --set output=/shared/prefarena, or a URL, e.g. s3://bucket/prefarena"
        )
    paths: dict[str, str | None] = {"tuned": config.tuned}
    if isinstance(config.task, TextTask):
        paths |= {
            f"task.{name}": getattr(config.task, name)
            for name in ("data", "test_data", "unpaired_data", "demonstration_data", "pretraining_text")
        }
    if isinstance(config.model, PretrainedModel):
        paths["model.path"] = config.model.path
    for place, tracker in enumerate(config.tracking):
        folder = getattr(tracker, "folder", None) or getattr(tracker, "uri", None)
        if folder and not is_url(folder) and not Path(folder).is_absolute():
            raise UserError(
                f"tracking.{place}: {folder} would lie in the job's temporary directory; give an absolute path that "
                f"exists on the cluster, or leave it out to have it next to the stages, under `output`"
            )
    for key, path in paths.items():
        if path and not Path(path).is_absolute() and Path(path).exists():
            raise UserError(
                f"{key}: {path} is a relative path on this machine, which the cluster cannot see; put it on storage "
                f"that all nodes share, and give its absolute path or URL"
            )


def status(arguments: argparse.Namespace) -> int:
    """Show every job of a cluster, or one."""
    from prefarena.cluster.jobs import connect, describe

    client = connect(arguments.address)
    if arguments.job is not None:
        details = client.details(arguments.job)
        print(f"{arguments.job}: {describe(details)}")
        print(f"  started {_when(details.start_time)}, ended {_when(details.end_time)}: {details.entrypoint}")
        return 0
    found = sorted((job for job in client.jobs() if job.submission_id), key=lambda job: job.start_time or 0)
    for job in found:
        print(f"{job.submission_id}: {describe(job)}; started {_when(job.start_time)}")
    if not found:
        print(f"{client.shown} has no jobs")
    return 0


def logs(arguments: argparse.Namespace) -> int:
    """Print what a job has logged; with --follow until it ends, then return its exit status."""
    from prefarena.cluster.jobs import connect

    client = connect(arguments.address)
    if arguments.follow:
        return _follow(client, arguments.job)
    text = client.log(arguments.job)
    if text is None:
        raise UserError(f"job {arguments.job!r} has no log: it has not started yet, or its node is gone")
    _write(text)
    return 0


def stop(arguments: argparse.Namespace) -> int:
    """End a job; the same comparison submitted again goes on where it was."""
    from prefarena.cluster.jobs import connect, describe

    client = connect(arguments.address)
    print(f"{arguments.job}: {describe(client.stop(arguments.job, _STOP_LIMIT_S))}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "submit": submit,
    "status": status,
    "logs": logs,
    "stop": stop,
}


def _follow(client: JobClient, name: str) -> int:
    from prefarena.cluster.jobs import describe, exit_status, follow

    try:
        details = follow(client, name, _write)
    except KeyboardInterrupt:
        print(f"\njob {name} is still running; `prefarena stop {name}` ends it", file=sys.stderr)
        return _INTERRUPTED
    print(f"job {name}: {describe(details)}", flush=True)
    return exit_status(details)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _when(milliseconds: int | None) -> str:
    """Write a time of Ray's as local time."""
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M:%S") if milliseconds else "not yet"


def _warn_of_other_ray(client: JobClient) -> None:
    import ray

    if client.cluster_version != ray.__version__:
        print(f"warning: {client.shown} runs Ray {client.cluster_version}, this is {ray.__version__}", file=sys.stderr)
