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
from torch import Tensor, nn

from prefarena.config import DPO, MPO, Optimisation
from prefarena.data.plan import within_budget
from prefarena.data.tables import read_rows, write_rows
from prefarena.modeling.layers import decoder_layers
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs, sequence_logps
from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.preference import PairLogps
from prefarena.records import REFERENCED_PAIRS
from prefarena.settings.off_policy import Pairwise
from prefarena.training.learner import Learner
from prefarena.training.off_policy import optimizer_step
from prefarena.training.terms import Pairs, PreferenceTerm, Rows, Shares
from prefarena.training.window import Window
from prefarena.training.worker import Worker


def make_method(spec: dict[str, Any], side: dict[str, Any]) -> Pairwise:
    training = Optimisation(
        learning_rate=spec["learning_rate"],
        batch_size=spec["batch_size"],
        micro_batch_tokens=side["micro_batch_tokens"],
        warmup_steps=0,
        schedule="constant",
        betas=spec["betas"],
        max_grad_norm=spec["max_grad_norm"],
    )
    if side["method"] == "mpo":
        return MPO(beta=spec["beta"], reference="none", demonstration_weight=0.0, training=training)
    return DPO(beta=spec["beta"], training=training)


class Step:
    """Steps of one method on the pairs of a spec. The switches of `side`, all on in production:

    rows: `packed`; `repeated`: packed, but with the prompt before each response; `padded`: a padded row for each
    response. chunked_head: no logits are held; else those of all response positions. order: `bucketed` by length, or
    `shuffled`. fused: AdamW in one pass. micro_batch_tokens: most tokens in a forward pass. compiled (off in
    production): each layer's MLP and norms by torch.compile, for all lengths.
    """

    def __init__(self, spec: dict[str, Any], side: dict[str, Any], worker: Worker) -> None:
        method = make_method(spec, side)
        self._training = method.training
        self._worker = worker
        module = LogProbs(load_policy(spec["policy"]), spec["max_length"])
        if side["rows"] == "padded":
            module.packed = False
        if not side["chunked_head"]:
            module.plain_head = False
        if side["compiled"]:
            for part in (part for layer in decoder_layers(module) for part in layer.children()):
                if "Attention" not in type(part).__name__:
                    part.compile(dynamic=True)
        shares = Shares(self._training, self._worker.world_size, spec["seed"], packed=side["rows"] == "packed")
        kind = RepeatedPrompts if side["rows"] == "repeated" else PreferenceTerm
        self._term = kind(spec["referenced_table"], method, shares, spec["pad"])
        if side["order"] == "shuffled":  # a plan that knows no lengths
            plan = self._term.plan
            self._term.plan = replace(plan, lengths=np.ones_like(plan.lengths))
        self._learner = Learner("model", module.eval(), self._training, worker, fused=side["fused"])
        self.window = Window()

    def __call__(self, step: int) -> Tensor:
        """One update; returns the gradient's norm before clipping, []."""
        rate = self._training.learning_rate
        return optimizer_step(self._learner, [self._term], step, rate, self._worker, self.window)

    def loss(self) -> float:
        """The mean loss of the steps since the last call."""
        return self.window.reduce(self._worker)[f"loss/{self._term.name}"]


class RepeatedPrompts(PreferenceTerm):
    """Packed rows in which each response has a prompt of its own: what sharing the prompt is measured against."""

    def __call__(self, module: nn.Module, rows: Rows, device: torch.device) -> ObjectiveOutput:
        pairs, twice = self.pairs, np.repeat(rows, 2)
        responses = [[ids] for pair in pairs.responses(rows) for ids in pair]
        logps, batch = sequence_logps(module, pairs.prompts.take(twice), responses, device=device)
        lengths = batch.lengths.float()
        reference = PairLogps(
            pairs.numbers("ref_chosen_logp", rows, device), pairs.numbers("ref_rejected_logp", rows, device)
        )
        policy, num_tokens = (PairLogps(values[0::2], values[1::2]) for values in (logps, lengths))
        return self.method.mean_loss(policy, reference, pairs.numbers("label", rows, device), num_tokens)


def write_reference(spec: dict[str, Any], tokens_at_once: int = 8192) -> float:
    """The pairs with the policy's own log-probs as the reference's, in passes of like length; returns the seconds."""
    began = time.perf_counter()
    module = LogProbs(load_policy(spec["policy"]), spec["max_length"])
    table, pairs = read_rows(spec["pairs_table"]), Pairs(spec["pairs_table"], referenced=False)
    sizes = pairs.prompts.lengths + pairs.chosen.lengths + pairs.rejected.lengths
    found = np.zeros((len(table), 2), dtype=np.float32)
    for rows in within_budget(np.argsort(sizes, kind="stable"), sizes, tokens_at_once):
        with torch.inference_mode():
            found[rows] = sequence_logps(module, pairs.prompts.take(rows), pairs.responses(rows))[0].view(-1, 2).numpy()
    for column, name in enumerate(("ref_chosen_logp", "ref_rejected_logp")):
        table = table.append_column(name, pa.array(found[:, column]))
    write_rows(table, spec["referenced_table"], REFERENCED_PAIRS)
    return time.perf_counter() - began


PRODUCTION: dict[str, Any] = {
    "method": "dpo", "order": "bucketed", "rows": "packed", "chunked_head": True, "fused": True,
    "micro_batch_tokens": 1024, "compiled": False,
}  # fmt: skip


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    side = json.loads(sys.argv[2])
    torch.set_num_threads(spec["threads"])
    before = memory_mib("VmRSS")
    step = Step(spec, side, Worker(f"{spec['output']}/ours"))

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
