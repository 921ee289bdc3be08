"""The `prefarena` command."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from prefarena.errors import ClusterLostError, UserError, WaitTimeoutError

_EPILOG = """\
what is written where (under `output`, by default ./runs):
  stages/KIND-LABEL-HASH/   every finished step: tables (parquet), models (transformers folders), metrics.jsonl,
                            and manifest.json, written last. The hash covers everything that the step depends on:
                            the same settings reuse the folder, and changed settings get a folder of their own.
  NAME-HASH/                the comparison's run folder: config.yaml (resolved), results.json, report.html, report.md,
                            figures/, samples.parquet (text), checkpoints/ (links to the trained models)
  NAME-tuning-HASH/         what `tune` found: tuning.json (every trial), tuned.yaml (the winners' settings)
  reference_logps/          the reference's log-probs of pairs, named by their content: computed once for all runs
  leases/                   which process works on which step; those of a killed run are taken over
  ray_train/                Ray Train's own records of runs in progress

exit status: 0 done; 2 input that cannot be used (one sentence says what); 1 anything else, with a traceback.
`submit --follow` and `logs --follow` end with the job's own status, 143 if it was stopped.
"""

_STEPS = {
    "compare": "run the whole comparison and print its table",
    "prepare": "run only data, base model, reference policy, pairs and reference log-probs",
    "train": "run everything up to the training of the entries",
    "evaluate": "run everything up to the evaluation of every policy",
    "report": "write the report again from finished stages (runs what is missing)",
}


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = argparse.ArgumentParser(
        prog="prefarena",
        description="Should we run RLHF, or an off-policy method, on our model and our preference data?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _STEPS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text + ".",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_config(command)
        _add_retry(command)
    _add_tune(commands)
    _add_init(commands)
    doctor = commands.add_parser("doctor", help="report what is here, what a comparison needs, and what will not fit")
    doctor.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="without it: only what is here")
    _add_overrides(doctor)
    _add_estimate(commands)
    methods = commands.add_parser("methods", help="list the methods and their settings with defaults")
    methods.add_argument("--table", action="store_true", help="print trained methods as the tables in docs/methods.md")
    _add_cluster_commands(commands)
    _add_reading_commands(commands)
    return parser


def _add_tune(commands: Any) -> None:
    """Add `tune`, which searches settings and then compares the winners."""
    text = "give every entry the same budget of trials, then compare the winners"
    tune = commands.add_parser("tune", help=text, description=text + " (docs/tuning.md).")
    _add_config(tune)
    _add_retry(tune)
    only = "write tuning.json and tuned.yaml, and leave the comparison of the winners to `prefarena compare`"
    tune.add_argument("--only-trials", action="store_true", help=only)


def _add_init(commands: Any) -> None:
    """Add `init`, which writes a config."""
    text = "look at a model and data, and write a config to start from"
    init = commands.add_parser("init", help=text, description=text + "; you are asked for missing flags.")
    init.add_argument("config", nargs="?", default="mine.yaml", metavar="CONFIG.yaml", help="default: mine.yaml")
    init.add_argument("--model", help="a transformers folder, or a name on the Hugging Face hub")
    init.add_argument("--data", help="preference pairs: a file or folder (docs/data.md), a URL, or a name on the hub")
    init.add_argument("--split", default="train", help="split of a saved data set or one on the hub; default: train")
    init.add_argument(
        "--gpus", type=int, metavar="N", help="number of GPUs to use on all machines together; 0: CPUs only"
    )
    init.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of each GPU")
    init.add_argument(
        "--cpus", type=int, metavar="N", help="without GPUs: number of CPUs to use; default: all of this machine's"
    )
    init.add_argument("--quick", action="store_true", help="use few rows and steps, to see that everything runs")
    init.add_argument("--force", action="store_true", help="overwrite CONFIG.yaml if it exists")


def _add_estimate(commands: Any) -> None:
    """Add `estimate`, which says what a comparison will cost."""
    text = "estimate, before anything runs, what every stage will cost: time, memory, tokens, FLOPs and money"
    estimate = commands.add_parser("estimate", help=text, description=text + " (docs/estimate.md).")
    _add_config(estimate)
    where = "hardware elsewhere, such as 8xH100; default: this machine, after a short timed run"
    estimate.add_argument("--gpus", metavar="NxCARD", help=where)
    estimate.add_argument(
        "--price", type=float, metavar="PRICE", help="price of one device for an hour, in your currency"
    )
    tune = "estimate `prefarena tune`: the trials of every entry, and the comparison of the winners"
    estimate.add_argument("--tune", action="store_true", help=tune)
    beside = "a finished run (OUTPUT/NAME-HASH), whose actual costs are shown beside the estimate"
    estimate.add_argument("--beside", metavar="RUN", help=beside)


def _add_reading_commands(commands: Any) -> None:
    """Add `show` and `diff`, which read finished runs."""
    where = "a run folder (OUTPUT/NAME-HASH), or its URL"
    show = commands.add_parser("show", help="print the findings and the table of a finished run")
    show.add_argument("run", metavar="RUN", help=where)
    diff = commands.add_parser("diff", help="print which settings, versions and numbers differ between two runs")
    diff.add_argument("first", metavar="RUN", help=where)
    diff.add_argument("second", metavar="RUN", help=where)


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="default: the embedded default")
    _add_overrides(command)


def _add_retry(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--retry-failed",
        action="store_true",
        help="try again what failed in an earlier run, from its last checkpoint",
    )


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override a setting, e.g. --set entries.dpo.method.beta=0.3 --set seeds=[0,1,2] (repeatable)",
    )


def _add_cluster_commands(commands: Any) -> None:
    """Add `submit` and the commands for its jobs."""
    follow = "wait for the job, show its log, and end with its exit status"
    submit = commands.add_parser("submit", help="run a comparison as a job on a Ray cluster (docs/cluster.md)")
    _add_config(submit)
    _add_retry(submit)
    submit.add_argument("--name", help="the job's name; default: the comparison's and eight random characters")
    submit.add_argument("--follow", action="store_true", help=follow)
    instead = submit.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="run `prefarena doctor` there instead of the comparison")
    instead.add_argument("--tune", action="store_true", help="run `prefarena tune` there, which compares the winners")
    submit.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATH",
        help="a module or folder to ship with the code, e.g. that of a function judge (repeatable)",
    )
    status = commands.add_parser("status", help="list the jobs of a cluster, or show one of them")
    status.add_argument("job", nargs="?", metavar="JOB")
    logs = commands.add_parser("logs", help="print what a job has logged")
    logs.add_argument("--follow", action="store_true", help=follow)
    stop = commands.add_parser(
        "stop", help="stop a job; if it is submitted again, the comparison continues where it stopped"
    )
    for command in (logs, stop):
        command.add_argument("job", metavar="JOB")
    for command in (submit, status, logs, stop):
        command.add_argument(
            "--address",
            metavar="http://HEAD:8265",
            help="the dashboard of the cluster's head; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine",
        )


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.command == "methods":
            from pipelines.methods import list_methods, on_policy_table, table

            print(f"{table()}\n\n{on_policy_table()}" if arguments.table else list_methods())
            return 0
        if arguments.command in ("show", "diff"):
            from pipelines.show import diff, show

            return show(arguments.run) if arguments.command == "show" else diff(arguments.first, arguments.second)
        if arguments.command == "init":
            from pipelines.init import init

            return init(arguments)
        if arguments.command == "tune":
            return _tune(arguments)
        if arguments.command == "estimate":
            return _estimate(arguments)
        if arguments.command == "doctor":
            return _doctor(arguments.config, arguments.set)
        if arguments.command in _STEPS:
            return _run(arguments.command, arguments.config, arguments.set, arguments.retry_failed)
        from pipelines.submit import COMMANDS

        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"prefarena: {error}", file=sys.stderr)
        return 2
    except (ClusterLostError, WaitTimeoutError) as error:  # no bug of ours: the message names what did not answer
        print(f"prefarena: {error}", file=sys.stderr)
        return 1


def _run(command: str, path: str | None, overrides: list[str], retry_failed: bool) -> int:
    from pipelines.api import resolve, run

    run(resolve(path, overrides), "report" if command == "compare" else command, retry_failed=retry_failed)
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from pipelines.api import resolve, run_tuning

    config = resolve(arguments.config, arguments.set)
    run_tuning(config, retry_failed=arguments.retry_failed, only_trials=arguments.only_trials)
    return 0


def _doctor(path: str | None, overrides: list[str]) -> int:
    from prefarena.cluster.session import listen_on_loopback

    listen_on_loopback()
    from pipelines.doctor import doctor
    from prefarena.config import load_config

    return doctor(load_config(path, overrides) if path or overrides else None)


def _estimate(arguments: argparse.Namespace) -> int:
    from prefarena.cluster.session import listen_on_loopback

    listen_on_loopback()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from pipelines.estimate import run

    return run(arguments)
