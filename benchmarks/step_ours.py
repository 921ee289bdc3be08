"""Prefarena's side of benchmarks/preference_step.py: the step of production, without Ray.

    python step_ours.py SPEC SIDE

SIDE names the method and which of the step's optimisations are on.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from sides import memory_mib, serve
from torch import Tensor

from prefarena.config import DPO, MPO, OffPolicyMethod, Optimisation
from prefarena.data.tables import read_rows, write_rows
from prefarena.modeling.load import load_policy, load_tokenizer
from prefarena.modeling.logprobs import sequence_logps
from prefarena.records import REFERENCED_PAIRS
from prefarena.training.off_policy import Window, optimizer_step
from prefarena.training.terms import PreferenceTerm, Shares, collate_pairs, pair_lengths
from prefarena.training.worker import Worker


def make_method(spec: dict[str, Any], side: dict[str, Any]) -> OffPolicyMethod:
    training = Optimisation(
        learning_rate=spec["learning_rate"],
        batch_size=spec["batch_size"],
        micro_batch_size=side["micro_batch"],
        warmup_steps=0,
        schedule="constant",
        betas=spec["betas"],
        max_grad_norm=spec["max_grad_norm"],
    )
    if side["method"] == "mpo":
        return MPO(beta=spec["beta"], reference="none", demonstration_weight=0.0, training=training)
    return DPO(beta=spec["beta"], training=training)


class Step:
    """Steps of one method on the pairs of a spec."""

    def __init__(self, spec: dict[str, Any], side: dict[str, Any]) -> None:
        method = make_method(spec, side)
        self._training = method.training
        self._worker = Worker(f"{spec['output']}/ours")
        model = load_policy(spec["policy"])
        shares = Shares(self._training, self._worker.world_size, spec["seed"])
        self._term = PreferenceTerm(spec["referenced_table"], method, shares, spec["pad"])
        if side["order"] == "shuffled":  # a plan that knows no lengths
            self._term.plan = replace(self._term.plan, lengths=np.ones_like(self._term.lengths))
        self._module = self._worker.wrap(model.eval())
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=spec["learning_rate"], betas=spec["betas"], weight_decay=0.0, fused=side["fused"]
        )
        self.window = Window()

    def __call__(self, step: int) -> Tensor:
        """One update; returns the gradient's norm before clipping, []."""
        return optimizer_step(
            self._module, [self._term], step, self._optimizer, self._training, self._worker, self.window
        )

    def loss(self) -> float:
        """The mean loss of the steps since the last call."""
        return self.window.reduce(self._worker)["loss"]


def write_reference(spec: dict[str, Any], rows_at_once: int = 8) -> float:
    """The pairs with the policy's own log-probs as the reference's, in batches of like length; returns the seconds."""
    began = time.perf_counter()
    policy, table = load_policy(spec["policy"]), read_rows(spec["pairs_table"])
    pad_id = load_tokenizer(spec["policy"]).pad_token_id
    found = torch.zeros(len(table), 2)
    for rows in np.array_split(np.argsort(pair_lengths(table), kind="stable"), -(-len(table) // rows_at_once)):
        with torch.inference_mode():
            values = sequence_logps(policy, collate_pairs(table.take(pa.array(rows)).to_pydict(), pad_id))
        found[torch.from_numpy(rows)] = values.view(2, -1).T
    for column, name in enumerate(("ref_chosen_logp", "ref_rejected_logp")):
        table = table.append_column(name, pa.array(found[:, column].numpy()))
    write_rows(table, spec["referenced_table"], REFERENCED_PAIRS)
    return time.perf_counter() - began


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    side = json.loads(sys.argv[2])
    torch.set_num_threads(spec["threads"])
    before = memory_mib("VmRSS")
    step = Step(spec, side)

    def block() -> dict[str, Any]:
        began, losses, norms = time.perf_counter(), [], []
        for i in range(side["num_steps"]):
            norms.append(step(i))
            if side["log"]:
                losses.append(step.loss())
        return {
            "seconds": time.perf_counter() - began, "losses": losses, "norms": [float(norm) for norm in norms],
            "before_mib": before, "peak_mib": memory_mib("VmHWM"),
        }  # fmt: skip

    serve(block)


if __name__ == "__main__":
    main()
