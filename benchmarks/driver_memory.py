"""Peak memory of the driver of a comparison, by the size of the model: it must not grow with it.

    python benchmarks/driver_memory.py [--model FOLDER]    # SmolLM2-135M-Instruct and a tiny model, about 6 minutes

Each model goes through a whole comparison of its own (DPO on text: base, reference log-probs, training, evaluation by
vLLM, report) with a Ray of its own. The driver is the process that runs it; Ray's workers, which hold models, are
others. Both models have the same tokenizer and data. Prints a table, and writes it to
benchmarks/results/driver_memory.txt.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from prefarena.training.process_memory import peak_mib
from tests.helpers.real_model import smollm2

NUM_PAIRS, NUM_STEPS = 60, 2
RESULTS = Path(__file__).parent / "results" / "driver_memory.txt"
WORDS = ["river", "stone", "window", "music", "garden", "winter", "paper", "bridge", "candle", "market", "forest"]


def length(rows: list[dict[str, Any]]) -> list[float]:
    """The judge: no model of its own."""
    return [float(len(row["response"])) for row in rows]


def write_data(folder: Path) -> Path:
    source, path = random.Random(0), folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(NUM_PAIRS):
            prompt, chosen, rejected = (" ".join(source.choices(WORDS, k=size)) for size in (8, 6, 5))
            file.write(
                json.dumps({"prompt": f"{i} {prompt}?", "chosen": f" {chosen}", "rejected": f" {rejected}"}) + "\n"
            )
    return path


def write_tiny(model: str, folder: Path) -> str:
    """A model of the same kind and tokenizer, of two narrow layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from prefarena.modeling.load import load_tokenizer, save_policy

    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    config = AutoConfig.from_pretrained(model)
    for name, value in sizes.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: sizes["num_hidden_layers"]]
    save_policy(AutoModelForCausalLM.from_config(config), load_tokenizer(model), folder / "tiny")
    return str(folder / "tiny")


def config_of(model: str, folder: Path) -> dict[str, Any]:
    training = {"num_steps": NUM_STEPS, "batch_size": 8, "warmup_steps": 0}
    return {
        "name": "driver", "output": str(folder / "runs"),
        "task": {"kind": "text", "data": str(folder / "pairs.jsonl"), "max_response_tokens": 8},
        "model": {"kind": "pretrained", "path": model}, "reference": {"train": False},
        "judge": {"kind": "function", "function": "benchmarks.driver_memory:length"},
        "entries": [{"name": "dpo", "method": {"kind": "dpo", "training": training}}],
        "evaluation": {"num_prompts": 4, "samples_per_prompt": 1, "num_reference_samples": 4},
    }  # fmt: skip


def run(model: str, folder: Path) -> None:
    """A comparison in this process, and what it held at most."""
    import prefarena

    prefarena.compare(config_of(model, folder), quiet=True)
    print(json.dumps({"peak_mib": peak_mib()}))


def measure(model: str) -> dict[str, float]:
    """MiB of the driver's peak, and of the model's weights as they are stored."""
    with tempfile.TemporaryDirectory() as root:
        write_data(Path(root))
        command = [sys.executable, "-m", "benchmarks.driver_memory", "--run", root, "--model", model]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    size = sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) / 2**20
    return {"model_mib": size, **json.loads(said.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder; SmolLM2-135M-Instruct where none is given")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = arguments.model or smollm2()
    if arguments.run:
        run(model, Path(arguments.run))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {name: measure(path) for name, path in (("tiny", write_tiny(model, Path(folder))), ("given", model))}
    tiny, given = found["tiny"], found["given"]
    grown = (given["peak_mib"] - tiny["peak_mib"]) / (given["model_mib"] - tiny["model_mib"])
    lines = [
        f"{'model':>24} {'its weights, MiB':>18} {'peak of the driver, MiB':>26}",
        *(
            f"{name:>24} {one['model_mib']:18.0f} {one['peak_mib']:26.0f}"
            for name, one in (("tiny", tiny), (Path(model).name, given))
        ),
        f"the driver's peak grew by {grown:.3f} of what the weights grew by",
    ]
    print("\n".join(lines))
    RESULTS.write_text("\n".join(["$ python benchmarks/driver_memory.py", *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
