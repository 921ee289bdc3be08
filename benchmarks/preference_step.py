"""A step of preference optimisation: Prefarena's against TRL 1.16's DPOTrainer and plain PyTorch, on this CPU.

    python benchmarks/preference_step.py [--data HH_ROWS.jsonl.gz] [--repeats 3] [--out FILE]

The first run makes TRL's environment, benchmarks/.venv-trl116, from benchmarks/requirements/trl-dpo.txt (TORCH_INDEX in
the environment: where pip finds a CPU build of torch). `--data` takes raw HH-RLHF rows; without it, pairs are random
tokens with HH-RLHF's distribution of lengths.

For natural and for equal lengths it first shows that all DPO sides compute the same (losses and gradient norms of ten
steps) and refuses to go on where they do not. Then it times blocks of steps, the sides taking turns; a block is one
pass over the same pairs for every side. Each side is one process that stays warm and waits while others work; its first
block is not counted. Rates are medians over blocks, memory is the most that each process ever held.

    --ablation    instead: ours with each of its optimisations off, one at a time
    --search      instead: TRL with each of its settings that could make it faster (times alone)
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from preference_setting import MODEL, SETTINGS, Setting, num_parameters, num_tokens, prepare
from sides import HERE, Report, Side, environment_python, machine, versions, versions_in
from step_ours import PRODUCTION, write_reference

ENVIRONMENT = HERE / ".venv-trl116"
REQUIREMENTS = HERE / "requirements" / "trl-dpo.txt"
#: Largest relative difference that counts as the same.
TOLERANCE = 1e-4

Blocks = list[dict[str, Any]]
Program = Literal["trl", "plain", "ours"]
_SCRIPTS: dict[Program, str] = {"trl": "trl_dpo.py", "plain": "step_plain.py", "ours": "step_ours.py"}


@dataclass(frozen=True)
class Contender:
    """One side with its settings; `switches` go to its program as they are."""

    title: str
    program: Program
    switches: dict[str, Any] = field(default_factory=dict)

    @property
    def is_dpo(self) -> bool:
        return self.switches.get("method", "dpo") == "dpo"

    def start(self, python: str, spec: Path, setting: Setting, **changed: Any) -> Side:
        """Its process. `changed` replaces settings."""
        side = {"num_steps": setting.num_steps, "log": False} | self.switches | changed
        script = str(HERE / _SCRIPTS[self.program])
        command = [python if self.program == "trl" else sys.executable, script, str(spec), json.dumps(side)]
        return Side(command, spec.with_name(f"{self.title}.log".replace(" ", "-")), setting.threads)


_TRL = {"order": "shuffled", "micro_batch": 8, "precompute": False, "fused": True, "attention": "sdpa"}
#: What makes TRL fastest here (`--search`), besides the settings that all of its sides have: no activation
#: checkpointing, no autocast.
_TRL_BEST = {"order": "bucketed", "micro_batch": 1}
MAIN = (
    Contender("TRL online", "trl", _TRL),
    Contender("TRL precomputed", "trl", _TRL | {"precompute": True}),
    Contender("TRL online, best", "trl", _TRL | _TRL_BEST),
    Contender("TRL precomputed, best", "trl", _TRL | _TRL_BEST | {"precompute": True}),
    Contender("plain PyTorch", "plain", {"order": "shuffled"}),
    Contender("ours, DPO", "ours", PRODUCTION),
    Contender("ours, MPO", "ours", PRODUCTION | {"method": "mpo"}),
)
#: One change each against production, except the last: all of them.
ABLATION = (
    Contender("ours, DPO", "ours", PRODUCTION),
    Contender("prompt not shared", "ours", PRODUCTION | {"rows": "repeated"}),
    Contender("nor packed: padded rows", "ours", PRODUCTION | {"rows": "padded"}),
    Contender("a pair a pass", "ours", PRODUCTION | {"micro_batch_tokens": 1}),
    Contender("512 tokens per pass", "ours", PRODUCTION | {"micro_batch_tokens": 512}),
    Contender("2048 tokens per pass", "ours", PRODUCTION | {"micro_batch_tokens": 2048}),
    Contender("a batch a pass", "ours", PRODUCTION | {"micro_batch_tokens": 8192}),
    Contender("head not chunked", "ours", PRODUCTION | {"chunked_head": False}),
    Contender("no length bucketing", "ours", PRODUCTION | {"order": "shuffled"}),
    Contender("torch.compile", "ours", PRODUCTION | {"compiled": True}),
    Contender("AdamW not fused", "ours", PRODUCTION | {"fused": False}),
    Contender(
        "none of them",
        "ours",
        PRODUCTION | {"rows": "padded", "chunked_head": False, "order": "shuffled", "fused": False,
                 "micro_batch_tokens": 8192},
    ),
)  # fmt: skip
_PRECOMPUTED = _TRL | {"precompute": True}
SEARCH = (
    Contender("shuffled, micro-batch 8", "trl", _PRECOMPUTED),
    *(
        Contender(f"bucketed, micro-batch {size}", "trl", _PRECOMPUTED | {"order": "bucketed", "micro_batch": size})
        for size in (8, 4, 2, 1)
    ),
    Contender("the best, eager", "trl", _PRECOMPUTED | _TRL_BEST | {"attention": "eager"}),
    Contender("the best, not fused", "trl", _PRECOMPUTED | _TRL_BEST | {"fused": False}),
)
#: Ours against theirs, with what a reader may hold them to.
RATIOS = (
    ("ours, DPO", "TRL online"),
    ("ours, DPO", "TRL precomputed"),
    ("ours, MPO", "TRL online"),
    ("ours, DPO", "TRL online, best"),
    ("ours, DPO", "TRL precomputed, best"),
    ("ours, MPO", "TRL precomputed, best"),
    ("ours, DPO", "plain PyTorch"),
)


# ---------------------------------------------------------------------------------------------------- parity


@dataclass(frozen=True)
class Trace:
    """Losses and gradient norms of the first steps of one side."""

    title: str
    losses: list[float]
    norms: list[float]


@dataclass(frozen=True)
class Parity:
    traces: list[Trace]

    def largest(self, trace: Trace) -> tuple[float, float]:
        """Its largest relative differences of losses and of norms from the first trace's."""
        first = self.traces[0]
        return _largest(trace.losses, first.losses), _largest(trace.norms, first.norms)

    @property
    def starts_at_log_two(self) -> bool:
        """At the first step policy and reference are the same: every pair's margin is 0."""
        return all(abs(trace.losses[0] - math.log(2)) <= TOLERANCE for trace in self.traces)

    @property
    def same(self) -> bool:
        return self.starts_at_log_two and all(max(self.largest(trace)) <= TOLERANCE for trace in self.traces)

    def lines(self) -> list[str]:
        rows = []
        for trace in self.traces:
            loss, norm = self.largest(trace)
            rows.append(f"  {trace.title:24}{trace.losses[0]:14.7f}{trace.losses[-1]:14.7f}{loss:12.1e}{norm:12.1e}")
        count = len(self.traces[0].losses)
        head = (
            f"  {f'same over {count} steps?':24}{'first loss':>14}{'last loss':>14}{'loss, rel.':>12}{'norm, rel.':>12}"
        )
        return [head, *rows]


def _largest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def parity(python: str, spec: Path, setting: Setting, contenders: tuple[Contender, ...]) -> Parity:
    """Every DPO side, with its own settings, on the very same batches."""
    traces = []
    for contender in contenders:
        if not contender.is_dpo:
            continue
        side = contender.start(python, spec, setting, order="bucketed", num_steps=setting.parity_steps, log=True)
        try:
            block = side.block()
        finally:
            side.end()
        traces.append(Trace(contender.title, block["losses"], block["norms"]))
    return Parity(traces)


# -------------------------------------------------------------------------------------------------- measure


def measure(
    python: str, spec: Path, setting: Setting, contenders: tuple[Contender, ...], repeats: int
) -> dict[str, Blocks]:
    """Blocks of each side in turns A B C, C B A, ...; a first block of each is run and dropped."""
    sides: dict[str, Side] = {}
    found: dict[str, Blocks] = {contender.title: [] for contender in contenders}
    try:
        for contender in contenders:
            sides[contender.title] = contender.start(python, spec, setting)
            sides[contender.title].block()
        for repeat in range(repeats):
            for contender in contenders if repeat % 2 == 0 else reversed(contenders):
                found[contender.title].append(sides[contender.title].block())
    finally:
        for side in sides.values():
            side.end()
    return found


@dataclass(frozen=True)
class Measured:
    """Of one side: seconds per block (median and range), peak memory, and that less what it held before the model."""

    seconds: float
    fastest: float
    slowest: float
    peak_mib: float
    model_mib: float

    @classmethod
    def of(cls, blocks: Blocks) -> Measured:
        seconds = [block["seconds"] for block in blocks]
        peak = max(block["peak_mib"] for block in blocks)
        return cls(statistics.median(seconds), min(seconds), max(seconds), peak, peak - blocks[0]["before_mib"])


# --------------------------------------------------------------------------------------------------- report


def measured_lines(setting: Setting, tokens: int, found: dict[str, Measured]) -> list[str]:
    """A table of all sides; the last two columns against the first of them."""
    first = next(iter(found.values()))
    lines = [
        f"  {'':24}{'s/step':>8}{'of blocks':>14}{'pairs/s':>9}{'tokens/s':>10}{'peak MiB':>10}{'less base':>10}"
        f"{'speed':>8}{'memory':>8}"
    ]
    for title, one in found.items():
        step = one.seconds / setting.num_steps
        span = f"{one.fastest / setting.num_steps:.2f}-{one.slowest / setting.num_steps:.2f}"
        lines.append(
            f"  {title:24}{step:8.2f}{span:>14}{setting.num_pairs / one.seconds:9.2f}{tokens / one.seconds:10.0f}"
            f"{one.peak_mib:10.0f}{one.model_mib:10.0f}{first.seconds / one.seconds:8.2f}"
            f"{one.model_mib / first.model_mib:8.2f}"
        )
    return lines


def ratio_lines(found: dict[str, Measured]) -> list[str]:
    lines = [f"  {'ours / theirs':48}{'pairs/s':>9}{'peak':>8}{'less base':>11}"]
    for ours, theirs in RATIOS:
        a, b = found[ours], found[theirs]
        speed, peak, model = b.seconds / a.seconds, a.peak_mib / b.peak_mib, a.model_mib / b.model_mib
        lines.append(f"  {f'{ours} / {theirs}':48}{speed:8.2f}x{peak:7.2f}x{model:10.2f}x")
    return lines


def header(python: str, repeats: int) -> list[str]:
    names = ("transformers", "torch")
    return [
        f"A preference step. TRL's environment: {versions_in(python, 'trl', *names)}; ours: {versions(*names)}",
        machine(),
        f"Llama, width {MODEL.hidden_size}, {MODEL.num_layers} layers, vocabulary {MODEL.vocab_size}, float32; "
        f"{repeats} blocks a side; less base: less what the process held before the model was loaded",
    ]


def description(setting: Setting, spec: dict[str, Any], parameters: int, source: str) -> str:
    pairs, tokens = setting.num_pairs, num_tokens(spec)
    prompts = sum(len(prompt) for prompt, _, _ in spec["pairs"])
    return (
        f"{setting.title}: {source}; {parameters / 1e6:.1f}M parameters\n  {setting.num_steps} steps of "
        f"{setting.batch_size} pairs, {tokens / pairs:.0f} tokens per pair (prompt in both sequences: "
        f"{2 * prompts / tokens:.0%}); learning rate {setting.learning_rate:g}, beta {setting.beta}, "
        f"{setting.threads} threads"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="raw HH-RLHF rows, jsonl(.gz); else random tokens with their lengths")
    parser.add_argument("--repeats", type=int, default=3, help="blocks of steps of each side")
    parser.add_argument("--out", type=Path, help="also write the result there")
    parser.add_argument("--only", choices=[setting.name for setting in SETTINGS], help="one setting")
    parser.add_argument("--parity", action="store_true", help="compare losses and gradients, take no times")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ablation", dest="contenders", action="store_const", const=ABLATION, default=MAIN)
    what.add_argument("--search", dest="contenders", action="store_const", const=SEARCH)
    arguments = parser.parse_args()
    contenders: tuple[Contender, ...] = arguments.contenders
    python = environment_python(ENVIRONMENT, REQUIREMENTS)
    report = Report(arguments.out)
    report.say(header(python, arguments.repeats))
    for setting in SETTINGS:
        if arguments.only not in (None, setting.name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = prepare(setting, arguments.data, Path(folder) / setting.name)
            spec = json.loads(path.read_text(encoding="utf-8"))
            real = arguments.data is not None and setting.name == "natural"
            source = "pairs of HH-RLHF" if real else "random tokens"
            report.say(["", description(setting, spec, num_parameters(path.with_name("policy")), source)])
            report.say([f"  reference log-probs of all pairs, by ours, once: {write_reference(spec):.1f} s"])
            if contenders is not SEARCH:  # one program, and settings that change no number
                same = parity(python, path, setting, contenders)
                report.say(same.lines())
                if not same.same:
                    sys.exit(f"the sides differ by more than {TOLERANCE:g}, or do not start at log 2: nothing is timed")
            if not arguments.parity:
                blocks = measure(python, path, setting, contenders, arguments.repeats)
                found = {title: Measured.of(of_side) for title, of_side in blocks.items()}
                report.say(measured_lines(setting, num_tokens(spec), found))
                if contenders is MAIN:
                    report.say(ratio_lines(found))
    report.save()


if __name__ == "__main__":
    main()
