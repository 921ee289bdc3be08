"""A policy that is spread over two workers goes to engines on other devices tensor by tensor, and is never whole.

The workers are real (gloo, FSDP2); what carries the bytes is a double, as NCCL has no CPUs.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from workers import OneOfMany

from prefarena.config import Generation, LoRA
from prefarena.generation import fleet as fleet_module
from prefarena.generation import transfer as transfer_module
from prefarena.generation.actor import ServedModel
from prefarena.generation.checksums import checksums
from prefarena.generation.fleet import Generators
from prefarena.generation.interface import TransferLostError
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs
from prefarena.modeling.lora import add_adapters, merged_weights
from prefarena.training.drawing import TrainedWeights
from prefarena.training.policy_source import PolicySource
from prefarena.training.sharding import shard


class Watched:
    """A policy's weights; counts how many whole ones are there each time that another is made."""

    changing = None

    def __init__(self, policy: TrainedWeights) -> None:
        self._policy, self.most = policy, list[int]()  # in each sending

    def weights(self, *, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        self.most.append(0)
        made: list[weakref.ref[Tensor]] = []
        for name, tensor in self._policy.weights(names=names):
            made = [one for one in made if one() is not None] + [weakref.ref(tensor)]
            self.most[-1] = max(self.most[-1], len(made))
            yield name, tensor
            del tensor


class Carrier:
    """In place of vLLM's sender over NCCL: copies each tensor. The first loses its engine at the fourth tensor."""

    made: list[Carrier]

    def __init__(self) -> None:
        self.taken, self.closed = dict[str, Tensor](), False
        self.made.append(self)

    def send(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in named_tensors:
            if len(self.taken) == 3 and len(self.made) == 1:
                raise TransferLostError("an engine died")
            self.taken[name] = tensor.clone()
            del tensor

    def close(self) -> None:
        self.closed = True


def trained(path: str, adapts: bool) -> Any:
    """The policy, the same on every worker, with adapters that change it, or without."""
    model = load_policy(path)
    if adapts:
        add_adapters(model, LoRA(rank=4), seed=0)
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.copy_(0.2 * torch.randn(weight.shape, generator=random))
    return model


def push_as_one_of_two(rank: int, path: str, root: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    answer = SimpleNamespace(result=lambda deadline: False)
    member: Any = SimpleNamespace(
        served=ServedModel(path, frozenset()), sync_limit_s=60.0, call=lambda *_: answer, version=lambda: None
    )
    for adapts in (False, True):
        Carrier.made = []
        worker = OneOfMany(str(root / f"stage-{adapts}"), rank, 2, "fsdp")
        module = LogProbs(trained(path, adapts))
        shard(module, 2, torch.device("cpu"), "float32")
        policy = Watched(TrainedWeights(module.model, adapts))
        generators = Generators([member], Generation(weight_sync="nccl"))
        generators.dtype = torch.float32
        with (
            patch.object(transfer_module, "join_transfer", lambda *_: Carrier()),
            patch.object(fleet_module, "free", lambda *_: None),
        ):
            PolicySource("rlhf", Generation(), worker, generators, policy).push(0)
        assert len(policy.most) == 2  # of every worker, as each gathers with the other
        if rank != 0:
            continue
        whole = dict(merged_weights(trained(path, True))) if adapts else load_policy(path).state_dict()
        lost, sent = Carrier.made
        assert lost.closed and len(lost.taken) == 3 and not sent.closed
        assert sent.taken.keys() == whole.keys()
        broken_off, complete = policy.most  # the error of the first has the tensor that was being sent
        assert broken_off <= 3 and complete <= 2 < len(whole)
        for name, tensor in whole.items():
            torch.testing.assert_close(sent.taken[name], tensor, rtol=0, atol=1e-6)
        assert generators._transfer is not None and generators._transfer._client.sums is not None
        assert generators._transfer._client.sums.of == checksums(sent.taken, torch.float32)
    torch.distributed.destroy_process_group()


def test_a_sharded_policy_is_sent_between_devices_tensor_by_tensor(tiny_policy: str, tmp_path: Path) -> None:
    """Whole or with adapters; an engine that is lost on the way costs a second sending, in which all take part."""
    torch.multiprocessing.spawn(push_as_one_of_two, (tiny_policy, tmp_path), nprocs=2)
