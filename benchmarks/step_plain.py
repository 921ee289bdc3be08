"""A preference step as one writes it first, in plain PyTorch: the plain side of benchmarks/preference_step.py.

    python step_plain.py SPEC SIDE

In the style of DPO's first implementation: chosen and rejected sequences concatenated into one padded batch, logits of
every position, a reference model beside the policy. Needs torch and transformers alone.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from sides import memory_mib, serve
from torch import Tensor
from transformers import AutoModelForCausalLM


def padded(pairs: list[Any], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels [2B, T], chosen first; labels are -100 outside the responses."""
    rows = [(prompt, response) for side in (1, 2) for prompt, response in ((pair[0], pair[side]) for pair in pairs)]
    shape = (len(rows), max(len(prompt) + len(response) for prompt, response in rows))
    ids, mask, labels = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    for row, (prompt, response) in enumerate(rows):
        whole = prompt + response
        ids[row, : len(whole)] = torch.tensor(whole)
        mask[row, : len(whole)] = 1
        labels[row, len(prompt) : len(whole)] = torch.tensor(response)
    return ids, mask, labels


def logps(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs [B] of the chosen and of the rejected responses."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    labels = labels[:, 1:]
    scored = labels != -100
    tokens = logits.log_softmax(-1).gather(-1, labels.masked_fill(~scored, 0)[..., None])[..., 0]
    chosen, rejected = (tokens * scored).sum(-1).chunk(2)
    return chosen, rejected


def peak_mib(device: str) -> float:
    """The most memory that was ever held, by this process or on its GPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else memory_mib("VmHWM")


def wait_for(device: str) -> None:
    """Until the device has done all that it was told, so that a clock read afterwards is right."""
    if device == "cuda":
        torch.cuda.synchronize()


def step(
    policy: Any, reference: Any, optimizer: torch.optim.Optimizer, passes: list[Any], spec: Any
) -> tuple[Tensor, Tensor]:
    """One update on a batch that is cut into passes; returns its loss and the gradient's norm before clipping."""
    optimizer.zero_grad()
    losses = [share_of_loss(policy, reference, padded(pairs, spec["pad"]), spec) for pairs in passes]
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), spec["max_grad_norm"])
    optimizer.step()
    return torch.stack(losses).sum(), norm


def share_of_loss(policy: Any, reference: Any, batch: Any, spec: Any) -> Tensor:
    """What a pass adds to the mean loss of its batch; its gradients are added to the policy's."""
    batch = [part.to(spec["device"]) for part in batch]
    with torch.autocast(spec["device"], torch.bfloat16, enabled=spec["bf16"]):
        chosen, rejected = logps(policy, *batch)
        with torch.no_grad():
            reference_chosen, reference_rejected = logps(reference, *batch)
    losses = -F.logsigmoid(spec["beta"] * ((chosen - rejected) - (reference_chosen - reference_rejected)))
    share = losses.sum() / spec["batch_size"]
    share.backward()
    return share.detach()


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    side = json.loads(sys.argv[2])
    torch.set_num_threads(spec["threads"])
    before = memory_mib("VmRSS")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=torch.float32).to(spec["device"]).eval()
        for _ in range(2)
    )
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=spec["learning_rate"], betas=spec["betas"], eps=spec["epsilon"], weight_decay=0.0
    )
    pairs, size = [spec["pairs"][row] for row in spec["orders"][side["order"]]], spec["batch_size"]
    micro_batch = side.get("micro_batch", size)  # pairs of a pass

    def block() -> dict[str, Any]:
        began, rows = time.perf_counter(), []
        for first in range(0, side["num_steps"] * size, size):
            passes = [pairs[at : at + micro_batch] for at in range(first, first + size, micro_batch)]
            rows.append(step(policy, reference, optimizer, passes, spec))
        wait_for(spec["device"])
        seconds = time.perf_counter() - began
        losses, norms = ([float(value) for value in values] for values in zip(*rows, strict=True))
        return {
            "seconds": seconds, "losses": losses, "norms": norms,
            "before_mib": before, "peak_mib": peak_mib(spec["device"]),
        }  # fmt: skip

    serve(block)


if __name__ == "__main__":
    main()
