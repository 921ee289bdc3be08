"""Low-rank adapters (LoRA) in a transformers model, through peft.

They are put into the model in place, which keeps its class: what packs, scores and shards a model sees no difference.
An adapter adds nothing at first (its second factor is zero), so a policy starts exactly at its reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefarena.config import LoRA
from prefarena.errors import UserError
from prefarena.mirror import bring
from prefarena.modeling.awaited import is_awaited, on_cpu_in_name
from prefarena.modeling.layers import is_linear
from prefarena.modeling.parts import whole
from prefarena.stage_files import ADAPTER

_ADAPTER, _PREFIX, _WEIGHTS = "default", "base_model.model.", "adapter_model.safetensors"


def add_adapters(model: PreTrainedModel, lora: LoRA, seed: int, name: str = _ADAPTER) -> None:
    """Freeze the model but for new adapters, and a reward model's `score`, which has nothing to start from.

    `seed` draws the adapters. name: of these adapters, where a model has others beside them; those are frozen, too.
    Raises UserError where a target is the output embedding, or is not in the model.
    """
    targets = [layer for layer, module in model.named_modules() if isinstance(module, LoraLayer)]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets or _targets(model, lora),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(config, model, name)
    score = getattr(model, "score", None)
    if score is not None:
        score.requires_grad_(True)


def _inject(config: LoraConfig, model: PreTrainedModel, name: str) -> None:
    # peft puts adapters on the device of what they adapt; of a model whose weights are awaited they are there already.
    awaited = on_cpu_in_name(model) if is_awaited(model) else nullcontext()
    with awaited, warnings.catch_warnings():
        # That there are others already, which is what roles on one body are.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, name)


def _targets(model: PreTrainedModel, lora: LoRA) -> list[str]:
    """Names of the linear layers that get an adapter."""
    heads = {model.get_output_embeddings(), getattr(model, "score", None)} - {None}
    linear = {name: layer for name, layer in model.named_modules() if is_linear(layer)}
    if not lora.targets:
        return [name for name, layer in linear.items() if layer not in heads]
    found = [name for name in linear if any(name == one or name.endswith(f".{one}") for one in lora.targets)]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in found):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name, layer in linear.items() if layer not in heads}))
            raise UserError(f"training.lora.targets: {target!r} is not a linear layer of this model, which has {known}")
    for name in found:
        if linear[name] in heads:
            raise UserError(
                f"training.lora.targets: {name} is the model's head, whose weight is read as it is; leave it out"
            )
    return found


def use_adapter(module: nn.Module, name: str) -> None:
    """Compute with the adapters of this name from now on, and with none where the module has none of this name.

    peft's own switch also decides which adapters are trained, and every role's must stay so while another one computes.
    """
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            layer._active_adapter = name


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapters of this name, by their own names."""
    found = {key: one for key, one in model.named_parameters() if "lora_" in key and f".{name}." in key}
    return dict(sorted(found.items()))


def adapted_weights(model: nn.Module) -> frozenset[str]:
    """The names of the weights that adapters change, as if the model had never had any."""
    return frozenset(f"{key}.weight" for key, layer in model.named_modules() if isinstance(layer, LoraLayer))


def merged_weights(
    model: PreTrainedModel,
    name: str = _ADAPTER,
    base: Mapping[str, Tensor] | None = None,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model with the adapters of this name merged into them, as if it had never had adapters.

    Nothing of the model is changed; each tensor is whole, and one that was adapted is new. base: what they are merged
    into in place of the model's own weights, where it holds halves of them. names: the weights that are wanted; None
    means all.
    """
    layers = {f"{key}.base_layer.weight": layer for key, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for key, tensor in model.state_dict().items():
        plain = key.replace(".base_layer.", ".")
        if "lora_" in key or (names is not None and plain not in names):
            continue
        weight = whole(tensor)
        if base is not None:
            weight = base[plain].to(weight.device)
        if key in layers:
            layer = layers[key]
            low, high = (whole(getattr(layer, part)[name].weight.detach()) for part in ("lora_A", "lora_B"))
            update = high @ low  # in float32, as adapters are, and in place from here on: half of the time
            if getattr(layer, "fan_in_fan_out", False):
                update = update.T.contiguous()
            weight = update.mul_(layer.scaling[name]).add_(weight)
        yield plain, weight


def save_adapter(
    model: PreTrainedModel, base: str, folder: str | Path, name: str = _ADAPTER, *, writes: bool = True
) -> None:
    """Save the adapters in peft's format: `PeftModel.from_pretrained` puts them on the model at `base`.

    Where the model is spread over several workers all of them call this, and the one that `writes` does so.
    """
    tensors = {
        _PREFIX + _outside(key, name): whole(one.detach()) for key, one in adapter_parameters(model, name).items()
    }
    if not writes:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config[name]
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    save_file({key: one.cpu().contiguous() for key, one in tensors.items()}, folder / _WEIGHTS)


def adapter_of(model_dir: str, base: str) -> Path | None:
    """The folder of adapters next to a trained model, if it was trained as adapters of the model at `base`."""
    folder = Path(model_dir).parent / ADAPTER
    bring(folder)
    if not (folder / "adapter_config.json").is_file():
        return None
    config = LoraConfig.from_pretrained(str(folder))
    return folder if config.base_model_name_or_path == base else None


def load_adapter(model: PreTrainedModel, folder: str | Path, name: str) -> None:
    """Put adapters that `save_adapter` wrote into the model, under this name; all of the model is frozen then."""
    _inject(LoraConfig.from_pretrained(str(folder)), model, name)
    stored = load_file(Path(folder) / _WEIGHTS)
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, name).items():
            parameter.copy_(stored[_PREFIX + _outside(key, name)])
    model.requires_grad_(False)


def _outside(key: str, name: str) -> str:
    """Convert the name of an adapter's tensor in a model to its name in a file."""
    return key.replace(f".{name}.", ".")


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the adapters into the weights that they adapt, and take them out: the model is then like any other."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()  # type: ignore[operator]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)
