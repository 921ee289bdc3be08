"""Low-rank adapters (LoRA) in a transformers model, through peft.

They are put into the model in place, which keeps its class: what packs, scores and shards a model sees no difference.
An adapter adds nothing at first (its second factor is zero), so a policy starts exactly at its reference.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from prefarena.config import LoRA
from prefarena.errors import UserError

_ADAPTER = "default"


def add_adapters(model: PreTrainedModel, lora: LoRA, seed: int) -> None:
    """Freeze the model but for new adapters, and a reward model's `score`, which has nothing to start from.

    `seed` draws the adapters. Raises UserError where a target is the output embedding, or is not in the model.
    """
    targets = _targets(model, lora)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, _ADAPTER)
    score = getattr(model, "score", None)
    if score is not None:
        score.requires_grad_(True)


def _targets(model: PreTrainedModel, lora: LoRA) -> list[str]:
    """Names of the linear layers that get an adapter."""
    heads = {model.get_output_embeddings(), getattr(model, "score", None)} - {None}
    linear = {name: layer for name, layer in model.named_modules() if _is_linear(layer)}
    if not lora.targets:
        return [name for name, layer in linear.items() if layer not in heads]
    found = [name for name in linear if any(name == one or name.endswith(f".{one}") for one in lora.targets)]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in found):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name, layer in linear.items() if layer not in heads}))
            raise UserError(f"training.lora.targets: {target!r} is no linear layer of this model; it has {known}")
    for name in found:
        if linear[name] in heads:
            raise UserError(
                f"training.lora.targets: {name} is the model's head, whose weight is read as it is; leave it out"
            )
    return found


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"  # GPT-2's, which peft knows too


def save_adapter(model: PreTrainedModel, base: str, folder: str | Path) -> None:
    """The adapters in peft's format: `PeftModel.from_pretrained` puts them on the model at `base`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config[_ADAPTER]
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    tensors = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    named = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the adapters into the weights that they adapt, and take them out: the model is then like any other."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()  # type: ignore[operator]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)
