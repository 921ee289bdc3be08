"""TRL's side of benchmarks/preference_step.py. Runs in TRL's own environment, so it imports nothing of Prefarena.

    python trl_dpo.py SPEC SIDE

TRL's own `train()` runs; a callback stops it between blocks until a line comes, and answers with what the block took.
SPEC is the JSON that preference_step.py writes, SIDE says how TRL is set.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from sides import answer, memory_mib
from step_plain import peak_mib, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class TokenisedTrainer(DPOTrainer):
    """DPOTrainer on pairs that are token ids already; TRL 1.16 takes text alone, and would cut it elsewhere."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class Blocks(TrainerCallback):
    """Stops `train()` between blocks of steps. Time runs from a line's arrival to the end of the block's last step."""

    def __init__(self, device: str, before_mib: float) -> None:
        self.setup: dict[str, float] = {}
        self._device, self._before_mib = device, before_mib
        self._rows: list[dict[str, float]] = []
        self._seconds = 0.0
        self._began = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        wait_for(self._device)
        self._seconds = time.perf_counter() - self._began

    def on_log(self, *_: Any, **context: Any) -> None:
        self._rows.append(context["logs"])

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """The data are one block, so an epoch is one. Ours and the plain side see them again and again, too."""
        rows = [row for row in self._rows if "loss" in row]
        answer(
            {
                "seconds": self._seconds,
                "losses": [row["loss"] for row in rows],
                "norms": [row["grad_norm"] for row in rows],
                "before_mib": self._before_mib,
                "peak_mib": peak_mib(self._device),
                **self.setup,
            }
        )
        self._rows = []
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self._began = time.perf_counter()


def make_trainer(spec: dict[str, Any], side: dict[str, Any], callback: Blocks) -> DPOTrainer:
    """No evaluation, no saving, activation checkpointing only where `side` asks for it; with TRL's own metrics."""
    pairs = [spec["pairs"][row] for row in spec["orders"][side["order"]]][: side["num_steps"] * spec["batch_size"]]
    columns = {f"{name}_ids": [pair[i] for pair in pairs] for i, name in enumerate(("prompt", "chosen", "rejected"))}
    arguments = DPOConfig(
        output_dir=spec["output"],
        seed=0,
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=spec["betas"][0],
        adam_beta2=spec["betas"][1],
        adam_epsilon=spec["epsilon"],
        weight_decay=0.0,
        max_grad_norm=spec["max_grad_norm"],
        optim="adamw_torch_fused" if side["fused"] else "adamw_torch",
        beta=spec["beta"],
        max_length=spec["max_length"],
        per_device_train_batch_size=side["micro_batch"],
        gradient_accumulation_steps=spec["batch_size"] // side["micro_batch"],
        precompute_ref_log_probs=side["precompute"],
        train_sampling_strategy="sequential",
        num_train_epochs=100_000,
        bf16=spec["bf16"],
        use_cpu=spec["device"] == "cpu",
        gradient_checkpointing=side.get("checkpointing", False),
        dataloader_num_workers=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1 if side["log"] else 1_000_000,
    )
    model = AutoModelForCausalLM.from_pretrained(
        spec["policy"], dtype=torch.float32, attn_implementation=side["attention"]
    )
    return TokenisedTrainer(
        model=model,  # the reference is loaded from the same folder
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(spec["policy"]),
        callbacks=[callback],
    )


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    side = json.loads(sys.argv[2])
    sys.stdout = sys.stderr  # stdout carries results alone
    torch.set_num_threads(spec["threads"])
    blocks = Blocks(spec["device"], memory_mib("VmRSS"))
    began = time.perf_counter()
    trainer = make_trainer(spec, side, blocks)
    blocks.setup = {"setup_seconds": time.perf_counter() - began}
    trainer.train()


if __name__ == "__main__":
    main()
