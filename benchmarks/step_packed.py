"""Our DPO step for a machine that has torch and transformers alone: ours in benchmarks/gpu.py.

    python step_packed.py SPEC SIDE

The same parts as in production (packing, chunked head, objective, batch cutting), without its config, tables and loop,
which need more than that. The reference's log-probs are computed before the first step, as data.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sides import memory_mib, serve
from step_plain import peak_mib, wait_for
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from prefarena.data.plan import within_budget
from prefarena.modeling.halves import compute_in_halves
from prefarena.modeling.logprobs import LogProbs, sequence_logps
from prefarena.objectives.preference import PairLogps, preference_output


class PackedStep:
    """DPO on the pairs of a spec, cut into passes of at most `tokens` tokens."""

    def __init__(self, spec: dict[str, Any], tokens: int) -> None:
        self._spec, self._tokens, self._device = spec, tokens, torch.device(spec["device"])
        self._prompts = [np.array(pair[0]) for pair in spec["pairs"]]
        self._responses = [[np.array(pair[1]), np.array(pair[2])] for pair in spec["pairs"]]
        self._sizes = np.array([sum(map(len, pair)) for pair in spec["pairs"]])
        model: Any = AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=torch.float32)
        attends_in = torch.bfloat16 if spec["bf16"] else torch.float32
        self._module = LogProbs(model.to(self._device).eval(), spec["max_length"], attends_in=attends_in)
        if not self._module.packed:
            raise RuntimeError("; ".join(self._module.notes))
        if spec["bf16"]:
            compute_in_halves(self._module)
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=spec["learning_rate"],
            betas=spec["betas"],
            eps=spec["epsilon"],
            weight_decay=0.0,
            fused=True,
        )
        self._reference = self._reference_logps()

    def __call__(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """One update on these pairs; returns its loss and the gradient's norm before clipping."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self._device)
        for part in within_budget(rows[np.argsort(self._sizes[rows], kind="stable")], self._sizes, self._tokens):
            logps = self._logps(part)
            scores = self._reference[torch.from_numpy(part).to(self._device)]
            policy, reference = PairLogps(logps[0::2], logps[1::2]), PairLogps(scores[:, 0], scores[:, 1])
            # The formula of prefarena.methods.dpo, whose settings need pydantic.
            h = self._spec["beta"] * policy.minus(reference).margin
            labels = torch.ones(len(part), device=self._device)
            output = preference_output(-F.logsigmoid(h), h, policy, reference, labels)
            share = output.loss.total / len(rows)
            share.backward()
            loss += share.detach()
        norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), self._spec["max_grad_norm"])
        self._optimizer.step()
        return loss, norm

    def _logps(self, rows: NDArray[np.int64]) -> Tensor:
        """[2B]: chosen and rejected in turn."""
        prompts, responses = [self._prompts[row] for row in rows], [self._responses[row] for row in rows]
        return sequence_logps(self._module, prompts, responses, device=self._device)[0]

    @torch.no_grad()
    def _reference_logps(self) -> Tensor:
        """[N, 2], by the policy as it is now."""
        found = torch.zeros(len(self._sizes), 2, device=self._device)
        for rows in within_budget(np.argsort(self._sizes, kind="stable"), self._sizes, self._tokens):
            found[torch.from_numpy(rows).to(self._device)] = self._logps(rows).view(-1, 2)
        return found


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    side = json.loads(sys.argv[2])
    torch.set_num_threads(spec["threads"])
    before, began = memory_mib("VmRSS"), time.perf_counter()
    step = PackedStep(spec, side["micro_batch_tokens"])
    setup = time.perf_counter() - began
    order, size = np.array(spec["orders"][side["order"]]), spec["batch_size"]

    def block() -> dict[str, Any]:
        began = time.perf_counter()
        rows = [step(order[i * size : (i + 1) * size]) for i in range(side["num_steps"])]
        wait_for(spec["device"])
        seconds = time.perf_counter() - began
        losses, norms = ([float(value) for value in values] for values in zip(*rows, strict=True))
        return {
            "seconds": seconds, "losses": losses, "norms": norms, "setup_seconds": setup,
            "before_mib": before, "peak_mib": peak_mib(spec["device"]),
        }  # fmt: skip

    serve(block)


if __name__ == "__main__":
    main()
