"""Models of which no whole copy is ever made: shapes first, then each worker's own rows (`awaited.py`).

transformers builds the model and finds out which tensor of the files belongs where, as it does for a whole one; it is
handed tensors that take no memory. What it computes itself, such as rotary frequencies, is computed. So the names that
it changes, the tensors that it ties and everything that `load_checked` refuses are the same.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import WeightConverter

from prefarena.errors import UserError
from prefarena.mirror import bring
from prefarena.modeling.awaited import Findings, Source, await_from, first_layers
from prefarena.modeling.checks import UNUSABLE, check_buffers, check_weights, first_line, not_finite, not_tied, quietly
from prefarena.modeling.folders import ADAPTER_CONFIG, TensorHeader, headers_of, local_folder, weight_files

#: As `from_pretrained` looks for a generation config in a folder.
_LOCAL: dict[str, Any] = {
    "cache_dir": None, "force_download": False, "proxies": None, "local_files_only": False, "token": None,
    "revision": "main", "subfolder": "", "trust_remote_code": False,
}  # fmt: skip


class WholeOnlyError(Exception):
    """Says why a model's weights cannot be read by rows."""


def policy_shapes(path: str | Path) -> PreTrainedModel:
    """Load a policy as `load_policy` does, with its weights awaited.

    Raises UserError as that does, and WholeOnlyError where the model must be loaded whole.
    """
    return _shapes(AutoModelForCausalLM, path, "causal language model")


def reward_model_shapes(path: str | Path) -> PreTrainedModel:
    """Load a reward model as `load_reward_model` does, with its weights awaited."""
    return _shapes(AutoModelForSequenceClassification, path, "reward model")


def new_reward_model_shapes(policy_path: str | Path, seed: int) -> PreTrainedModel:
    """Make a reward model as `new_reward_model` does: the policy's weights are awaited, the head is the same."""
    bring(policy_path)
    config = AutoConfig.from_pretrained(str(policy_path), num_labels=1, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with _DrawnAndDropped():
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).float()
        head = model.score
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise WholeOnlyError(f"the head of a {type(model).__name__} is not one product")
        weight = torch.empty(head.weight.shape)
        nn.init.normal_(weight, std=1 / math.sqrt(head.in_features + 1))
    policy = policy_shapes(policy_path)
    if type(policy.base_model) is not type(model.base_model):
        raise WholeOnlyError(f"a {type(model).__name__} has a different body from a {type(policy).__name__}")
    setattr(model, model.base_model_prefix, policy.base_model)
    head.weight = nn.Parameter(weight)
    return model.eval()


def raise_if_unusable(findings: list[Findings]) -> None:
    """Raise UserError, on all workers, where a tensor that any of them read is not finite, or no longer tied."""
    for one in findings:
        for where, name in one.not_finite:
            wrong = sum(other.not_finite.get((where, name), 0) for other in findings)
            raise not_finite(where, name, wrong, one.sizes[where, name])
        for where in sorted(one.not_tied):
            raise not_tied(where)


def _shapes(kind: Any, path: str | Path, what: str) -> PreTrainedModel:
    folder = local_folder(path)
    if folder is None:
        raise WholeOnlyError("it is on the hub")
    if (folder / ADAPTER_CONFIG).is_file():
        raise WholeOnlyError("it is an adapter, which is merged into its base")
    places: dict[str, Path] = {}
    headers: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        found = headers_of(file)
        headers |= found
        places |= dict.fromkeys(found, file)
    try:
        with quietly():
            config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
            with torch.device("meta"):
                make: Any = type(kind.from_config(config))
            probe, info = _loaded(make, config, _meta(headers), {"": "meta"})
            check_weights(path, probe, info)
            if any(isinstance(one, WeightConverter) for one in probe._weight_conversions):
                raise WholeOnlyError("transformers makes its tensors of others in the files")
            marks = {name: torch.zeros(()).expand(header.shape) for name, header in headers.items()}
            model, info = _loaded(make, config, marks, None)
            model.config.name_or_path = str(path)
            if model.can_generate():
                model.adjust_generation_fn(None, True, None, str(path), **_LOCAL)
    except UNUSABLE as error:
        raise UserError(f"{path}: no {what} can be loaded from it ({first_line(error)})") from None
    check_weights(path, model, info)
    _await(model, str(path), marks, places)
    if first_layers(model) is None:
        raise WholeOnlyError("its layers cannot be told apart")
    check_buffers(path, model)
    return model.eval()


def _meta(headers: dict[str, TensorHeader]) -> dict[str, Tensor]:
    return {name: torch.empty(header.shape, device="meta", dtype=torch.float32) for name, header in headers.items()}


def _loaded(make: Any, config: PretrainedConfig, tensors: dict[str, Tensor], device_map: Any) -> tuple[Any, Any]:
    loaded: tuple[Any, Any] = make.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        device_map=device_map,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return loaded


def _await(model: PreTrainedModel, where: str, marks: dict[str, Tensor], places: dict[str, Path]) -> None:
    """Replace the placeholders that transformers put into the model by shapes, and record where each comes from."""
    keys = {mark.untyped_storage().data_ptr(): key for key, mark in marks.items()}
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    traced = {name: keys.get(named[name].untyped_storage().data_ptr()) for name in model.state_dict()}
    if lost := [name for name, key in traced.items() if key is None]:
        raise WholeOnlyError(f"transformers does not take {lost[0]} from the files as it is")
    others = _second_names(model, marks.keys() - set(traced.values()), named)
    shapes: dict[int, nn.Parameter] = {}
    for name, key in traced.items():
        assert key is not None
        owner, _, own = name.rpartition(".")
        module, tensor = model.get_submodule(owner), named[name]
        first = Source(where, name, places[key], key)
        if own in module._buffers:
            module._buffers[own] = first.whole().to(tensor.dtype)
            continue
        if id(tensor) not in shapes:
            if not tensor.ndim:
                raise WholeOnlyError(f"{name} is a single number")
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            shapes[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            tied = [Source(where, other, places[other], other) for other in others if named[other] is tensor]
            await_from(module, own, (first, *tied))
        module._parameters[own] = shapes[id(tensor)]


def _second_names(model: PreTrainedModel, unused: set[str], named: dict[str, Tensor]) -> list[str]:
    """Tensors in the files that went nowhere because they are tied to another one, with which they must agree."""
    second = sorted(unused & named.keys())
    if unused - set(second) and model._weight_conversions:
        raise WholeOnlyError("transformers renames its tensors, and does not use all of them")
    return second


class _DrawnAndDropped(TorchDispatchMode):
    """Tensors that are made empty get shapes alone; random numbers for them are drawn and dropped, one by one.

    What is drawn afterwards is the same as if all of them were kept.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            kwargs = {**kwargs, "device": torch.device("meta")}
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if drawn and args and isinstance(args[0], Tensor) and args[0].is_meta:
            func(torch.empty_like(args[0], device="cpu"), *args[1:], **kwargs)
            return args[0]
        return func(*args, **kwargs)
