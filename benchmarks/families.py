"""What each model family does here: `python -m benchmarks.families [FAMILY...]` prints the table of docs/models.md.

Each family gets a tiny random model of two layers. It is trained with DPO and GRPO by `prefarena compare`, to the
report; an engine is given other weights than it started with, and its log-probs are held against those of
transformers; for each tensor of its first layer, and those outside layers, wrong numbers must be noticed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import yaml

from pipelines.cli import main as prefarena
from prefarena.cluster.session import ray_session
from prefarena.generation.client import last_error
from prefarena.modeling.support import why_not_packed
from prefarena.report.results import load_results
from tests.helpers.families import LARGEST_GAP, compare, engine_process, make
from tests.helpers.models import random_model, save_model
from tests.helpers.tiny import FIRST_LETTER, VOCABULARY

#: As the table calls them, and as tests.helpers.models does.
TABLE = {
    "Llama": "llama", "GPT-2": "gpt2", "GPT-NeoX (Pythia)": "gpt-neox", "Gemma-2": "gemma2", "Gemma-3 (text)": "gemma3",
    "OLMo-2": "olmo2", "Qwen-2": "qwen2", "Qwen-3": "qwen3", "Phi-3": "phi3", "Mistral": "mistral", "OPT": "opt",
    "Granite": "granite", "Mixtral": "mixtral", "Bloom": "bloom",
}  # fmt: skip
#: vLLM sets up a process for experts when its first engine starts, or not at all.
NEEDS_ITS_OWN_PROCESS = {"mixtral"}
HEAD = ["family", "training", "served", "gap, nats", "tensors verified", "parameters verified", "DPO and GRPO"]
_LENGTHS = {"max_prompt_tokens": 16, "max_response_tokens": 8}


def say_a(rows: list[dict[str, Any]]) -> list[float]:
    """The judge and the reward: how often a response says a."""
    return [float(row["response"].split().count("a")) for row in rows]


def trained_as(family: str) -> str:
    """Packed, or padded and why."""
    why = why_not_packed(random_model(family), sum(_LENGTHS.values()))
    return "packed" if why is None else f"padded: {why}"


def try_engine(family: str, scratch: Path, run: Any) -> list[str]:
    """What an engine does with new weights: four cells of the table."""
    old, new = make(scratch / family, family)
    try:
        outcome = compare(old, new, run(str(scratch / family), new.state_dict()))
    except ray.exceptions.RayError as error:  # the others are tried all the same
        return [f"no: {last_error(str(error))}", "", "", ""]
    verified = outcome.verified
    right = outcome.gap < LARGEST_GAP < outcome.old_gap and not outcome.unnoticed
    told = f"{verified.num_tensors} of {verified.num_tensors_sent}"
    share = f"{100 * verified.share:.1f} %" if verified.skipped else "100 %"
    return ["yes" if right else "WRONG", f"{outcome.gap:.0e}", told, share]


def run_comparison(family: str, scratch: Path) -> str:
    """How a comparison of DPO and GRPO with this family ends."""
    config, output = scratch / f"{family}.yaml", scratch / f"{family}-runs"
    config.write_text(yaml.safe_dump(comparison(family, scratch, output)), encoding="utf-8")
    refused = io.StringIO()
    with contextlib.redirect_stdout(sys.stderr), contextlib.redirect_stderr(refused):
        status = prefarena(["compare", str(config)])
    if status:
        trained = [path.name for kind in ("dpo", "grpo") for path in (output / "stages").glob(f"{kind}-*")]
        when = f"AFTER {', '.join(trained)}" if trained else "before any training"
        return f"refused {when}: {refused.getvalue().strip()}"
    (results,) = output.glob("*/results.json")
    failures = {entry.name: entry.failures for entry in load_results(results.parent).entries if entry.failures}
    return f"FAILED: {failures}" if failures else "to the report"


def comparison(family: str, scratch: Path, output: Path) -> dict[str, Any]:
    """The configuration."""
    model = save_model(scratch / family, random_model(family))
    first, *others = VOCABULARY[FIRST_LETTER:]
    data = scratch / "pairs.jsonl"
    pairs = [{"prompt": f"{x} {y}", "chosen": first, "rejected": y} for x in [first, *others] for y in others]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    reward = {"kind": "function", "function": "benchmarks.families:say_a"}
    rollouts = {"num_iterations": 2, "rollouts_per_iteration": 16, "group_size": 4, "num_minibatches": 1}
    dpo = {"kind": "dpo", "training": {"batch_size": 16, "num_steps": 6}}
    grpo = {"kind": "grpo", "reward": reward, "training": rollouts}
    return {
        "name": family,
        "output": str(output),
        "model": {"kind": "pretrained", "path": model},
        "task": {"kind": "text", "data": str(data), **_LENGTHS},
        "reference": {"train": False},
        "judge": reward,
        "evaluation": {"num_prompts": 8, "samples_per_prompt": 1},
        "entries": [{"name": "dpo", "method": dpo}, {"name": "grpo", "method": grpo}],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the table of families of docs/models.md.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(TABLE.values())}; default: all")
    parser.add_argument("--engines-only", action="store_true", help="run no comparisons")
    parser.add_argument("--comparisons-only", action="store_true", help="try no engines by themselves")
    chosen = parser.parse_args()
    table = {title: family for title, family in TABLE.items() if family in (chosen.families or TABLE.values())}
    rows = {family: [title, trained_as(family)] for title, family in table.items()}
    with tempfile.TemporaryDirectory() as folder, ray_session():
        scratch = Path(folder)
        for alone in (False, True):
            here = [family for family in rows if (family in NEEDS_ITS_OWN_PROCESS) == alone]
            if here and not chosen.comparisons_only:
                with engine_process() as run:
                    for family in here:
                        rows[family] += try_engine(family, scratch / "engines", run)
                        print(rows[family], file=sys.stderr, flush=True)
        for family in rows if not chosen.engines_only else []:
            rows[family] += [*[""] * (len(HEAD) - 1 - len(rows[family])), run_comparison(family, scratch)]
            print(rows[family], file=sys.stderr, flush=True)
    for cells in [HEAD, ["---"] * len(HEAD), *rows.values()]:
        print("| " + " | ".join(cells) + " |")
    return int(any(word in " ".join(cells) for cells in rows.values() for word in ("WRONG", "AFTER", "FAILED")))


if __name__ == "__main__":
    sys.exit(main())
