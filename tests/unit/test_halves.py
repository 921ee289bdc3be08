"""A module in bfloat16 copies of its float32 weights computes what FSDP does, and gives the weights its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import random_model
from tiny import save_tiny_policy
from torch import Tensor, nn

from prefarena.config import LoRA
from prefarena.modeling.arithmetic import halve_products, in_weights
from prefarena.modeling.halves import compute_in_halves
from prefarena.modeling.heads import ScalarHead
from prefarena.modeling.layers import recompute_layers, take_off_wrappers
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs, PackedModel
from prefarena.modeling.lora import add_adapters
from prefarena.modeling.packing import pack
from prefarena.modeling.parts import whole
from prefarena.training.sharding import shard

CPU = torch.device("cpu")
ROWS = ([[1, 4, 5, 6], [1, 7]], [[[8, 9, 3], [5, 2]], [[10, 11, 12, 2]]])
Make = Callable[[], PackedModel]


def policy(family: str) -> LogProbs:
    return LogProbs(random_model(family))


def reward_model() -> ScalarHead:
    return ScalarHead(random_model("llama", "ForSequenceClassification", num_labels=1))


def adapted() -> LogProbs:
    model = random_model("llama")
    add_adapters(model, LoRA(rank=2), seed=0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(weight, 0.1)  # they add something
    return LogProbs(model)


MODULES: dict[str, Make] = {
    "llama": lambda: policy("llama"),
    "llama, tied": lambda: policy("llama-tied"),
    "gemma3": lambda: policy("gemma3"),
    "gpt2": lambda: policy("gpt2"),
    "its own head": lambda: policy("gemma2"),
    "reward model": reward_model,
    "adapters": adapted,
}


def results(module: nn.Module, *, packed: bool = True) -> list[Tensor]:
    """What the module gives, and the gradients of a sum of it."""
    out = module(pack(*ROWS, shared=packed))
    values = out if isinstance(out, Tensor) else out[0]
    (values * torch.arange(1, len(values) + 1)).sum().backward()
    return [values.detach(), *(whole(weight.grad) for weight in module.parameters() if weight.grad is not None)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", MODULES)
def test_one_worker_computes_the_bits_of_a_sharded_one(name: str, packed: bool, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        module, sharded = MODULES[name](), shard(MODULES[name](), 1, CPU, "bfloat16")
        compute_in_halves(module)
        assert same(results(module, packed=packed), results(sharded, packed=packed))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", MODULES)
def test_it_computes_what_a_model_with_halved_weights_does(name: str) -> None:
    module = MODULES[name]()
    reference = copy.deepcopy(module)
    in_weights(reference.model, "bfloat16")
    compute_in_halves(module)
    (values, *_), (theirs, *_) = results(module), results(reference)
    assert torch.equal(values, theirs)
    with torch.no_grad():
        out = module(pack(*ROWS))
    assert torch.equal(out if isinstance(out, Tensor) else out[0], theirs)


@pytest.mark.parametrize("name", MODULES)
def test_weights_and_gradients_stay_in_float32(name: str) -> None:
    module = MODULES[name]()
    before = {key: weight.clone() for key, weight in module.state_dict().items()}
    compute_in_halves(module)
    results(module)
    assert all(torch.equal(weight, before[key]) for key, weight in module.state_dict().items())
    assert all(isinstance(weight, nn.Parameter) and weight.dtype == torch.float32 for weight in module.parameters())
    assert {weight.grad.dtype for weight in module.parameters() if weight.grad is not None} == {torch.float32}
    assert all((weight.grad is not None) == weight.requires_grad for weight in module.parameters())


def test_a_pass_that_fails_leaves_the_weights_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    module = policy("llama")
    compute_in_halves(module)
    monkeypatch.setattr(type(module.model.get_submodule("model.layers.1.mlp")), "forward", None)
    with pytest.raises(TypeError):
        results(module)
    assert all(weight.dtype == torch.float32 for weight in module.parameters())


@pytest.mark.parametrize("halves_first", [True, False])
def test_recomputed_layers_are_halved_again(halves_first: bool) -> None:
    kept, recomputed = policy("llama"), policy("llama")
    for function in (compute_in_halves, recompute_layers) if halves_first else (recompute_layers, compute_in_halves):
        function(recomputed)
    compute_in_halves(kept)
    compute_in_halves(kept)  # twice is once
    assert same(results(recomputed), results(kept))


def test_a_copy_computes_in_its_own_weights() -> None:
    module = policy("llama")
    compute_in_halves(module)
    twin = copy.deepcopy(module)
    before = results(module)
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    assert same(results(twin), before)


def test_a_trained_model_computes_in_float32_again() -> None:
    module = policy("llama")
    expected, _ = module(pack(*ROWS))
    compute_in_halves(module)
    recompute_layers(module)
    assert not torch.equal(module(pack(*ROWS))[0], expected)
    take_off_wrappers(module.model)
    assert torch.equal(LogProbs(module.model)(pack(*ROWS))[0], expected)


def test_a_model_whose_products_are_halved_leaves_its_file(tmp_path: Path) -> None:
    """One weight in a mapped file would keep all of the file in the process."""
    path = save_tiny_policy(tmp_path / "model", tied=True)
    model = load_policy(path)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    file = f"{path}/model.safetensors"  # other tests may have mapped others into this process
    assert file in Path("/proc/self/maps").read_text(encoding="utf-8")
    halve_products(model.requires_grad_(False))
    assert file not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(torch.equal(one, before[name].to(one.dtype)) for name, one in model.named_parameters())
