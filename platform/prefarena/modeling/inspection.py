"""Checks of a model before any weight is read: of its config, its tokenizer, and the headers of its files.

The model is built with shapes in place of weights and transformers matches the files' names and shapes with it, just as
it will when it loads them. This takes some tenths of a second and no memory at any size. What shows in numbers alone
(NaN, attention that is not causal) is found when the weights are loaded (checks.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from prefarena.errors import UserError
from prefarena.modeling.adapters import Adapter, adapter_at, check_adapter
from prefarena.modeling.checks import UNUSABLE, check_direction, check_weights, first_line, quietly
from prefarena.modeling.folders import (
    ADAPTER_CONFIG,
    CONFIG,
    TensorHeader,
    check_settings_files,
    listed,
    local_folder,
    read_object,
    tensor_headers,
    weight_files,
)

#: Settings that are whole numbers above 0 in every family that has them.
_COUNTS = (
    "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "num_layers", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "n_positions",
)  # fmt: skip
_LARGEST = 2**31 - 1
#: Endings of the names of settings that are numbers in a range: its limits, and how it is told.
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("dropout", "pdrop", "dropout_prob"), lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    (("rope_theta", "rotary_emb_base"), lambda value: 0 < value < math.inf, "a number above 0"),
    (("_eps", "epsilon"), lambda value: 0 <= value < 1, "a small number that is not negative"),
)
#: safetensors' names of the types that weights are trained in.
_PLAIN = {"F16", "BF16", "F32", "F64"}
_QUANTISED = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".absmax", ".quant_map", ".weight_blocks")
_QUANTISED_SETTINGS = ("quantize_config.json", "quant_config.json")
#: Head sizes of attention that vLLM's CPU build has (`CPUAttentionBackend.get_supported_head_sizes`, vLLM 0.32).
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def inspect_policy(path: str, revision: str | None = None, *, scored: bool = False) -> PretrainedConfig:
    """The settings of the causal language model at `path`, a folder or a hub id.

    scored: whether a reward model or a critic is to be made of its body. Raises UserError for whatever the config and
    the headers of the weights show: another kind of model, other weights, quantised or pickled ones. An adapter and its
    base are looked at as the model that they make. Of a hub id, weights are looked at where they are in the cache.
    """
    if (adapter := adapter_at(path)) is not None:
        config = _inspect_base(adapter, scored)
        check_adapter(adapter, _on_shapes(path, AutoModelForCausalLM, config))
        return config
    config, headers = _settings(path, revision)
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    check_direction(path, config, masked)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{path}: {config.model_type} is not a causal language model in transformers; use one that is")
    _compare(path, AutoModelForCausalLM, config, headers)
    if scored and not _can_be_scored(path, config):
        raise UserError(
            f"{path}: transformers has no sequence classification with the body of {config.model_type}, so it cannot "
            f"become a reward model or a critic; use another judge and reward (judges.md), or another model"
        )
    return config


def inspect_classifier(path: str, revision: str | None = None) -> PretrainedConfig:
    """The settings of the sequence-classification model at `path`; raises UserError as `inspect_policy` does."""
    if (adapter := adapter_at(path)) is not None:
        raise adapter.unusable("adapters of classifiers are not merged")
    config, headers = _settings(path, revision)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(f"{path}: transformers has no sequence classification for {config.model_type}; use another")
    _compare(path, AutoModelForSequenceClassification, config, headers)
    return config


def _inspect_base(adapter: Adapter, scored: bool) -> PretrainedConfig:
    try:
        return inspect_policy(adapter.base, adapter.revision, scored=scored)
    except UserError as error:
        raise adapter.unusable(error) from None


def _can_be_scored(path: str, config: PretrainedConfig) -> bool:
    """Whether the sequence classification of this body has the linear head that reward models and critics use."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return False
    return isinstance(getattr(_on_shapes(path, AutoModelForSequenceClassification, config), "score", None), nn.Linear)


def check_context(path: str, config: PretrainedConfig, max_length: int) -> None:
    """Raise UserError where the model's context is shorter than `max_length` tokens."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and limit < max_length:
        raise UserError(
            f"{path}: prompts and responses of up to {max_length} tokens do not fit its context of {limit}; "
            "lower task.max_prompt_tokens or task.max_response_tokens"
        )


def check_head_size(path: str, config: PretrainedConfig) -> None:
    """Raise UserError where vLLM's CPU build has no attention of this model's head size."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or getattr(text, "kv_lora_rank", None):
        return
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    if isinstance(size, int) and size not in CPU_HEAD_SIZES:
        raise UserError(
            f"{path}: its attention heads have {size} dimensions, but vLLM, which generates responses, supports only "
            f"{', '.join(map(str, CPU_HEAD_SIZES))} on a CPU; set resources.use_gpu, or use another model"
        )


def check_split(path: str, config: PretrainedConfig, num_devices: int) -> None:
    """Raise UserError where vLLM cannot cut this model's layers among so many devices."""
    text = config.get_text_config(decoder=True)
    heads, inner = getattr(text, "num_attention_heads", None), getattr(text, "intermediate_size", None)
    shared = getattr(text, "num_key_value_heads", None) if not getattr(text, "kv_lora_rank", None) else None
    counts = [
        (count, what)
        for count, what in ((heads, "attention heads"), (shared, "key and value heads"), (inner, "inner dimensions"))
        if isinstance(count, int)
    ]

    def cut(count: int, what: str, among: int) -> bool:
        """Whether heads can be cut; key and value heads may also be held by several devices each."""
        return count % among == 0 or (what.startswith("key") and among % count == 0)

    for count, what in counts:
        if not cut(count, what, num_devices):
            largest = heads if isinstance(heads, int) else num_devices
            possible = [among for among in range(1, largest + 1) if all(cut(*one, among) for one in counts)]
            raise UserError(
                f"{path}: its {count} {what} cannot be divided evenly among the devices of "
                f"generation.tensor_parallel: {num_devices}; "
                f"possible with this model: {', '.join(map(str, possible))}"
            )


def _settings(path: str, revision: str | None) -> tuple[PretrainedConfig, dict[str, TensorHeader] | None]:
    """The config, and the weights' headers where the files are on this machine."""
    folder = local_folder(path)
    if folder is None:
        folder = _cached(path, revision)
    headers = None
    if folder is not None:
        if (folder / ADAPTER_CONFIG).is_file():  # of a hub id: `adapter_at` has seen to folders
            raise UserError(f"{path}: an adapter on the hub: download it, and give the folder")
        check_settings_files(folder)
        raw = read_object(folder / CONFIG)
        _check_known(path, raw)
        for numbers in (raw, raw.get("text_config")):
            _check_counts(path, numbers if isinstance(numbers, dict) else {})
        _check_ranges(path, raw)
        if (folder / "model.safetensors").is_file() or local_folder(path) is not None or _is_whole(folder):
            _check_settings_of_quantisation(folder)
            headers = tensor_headers(folder)
        _check_quantised(path, raw, headers or {})
    try:
        with quietly():
            config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    except UNUSABLE as error:
        raise UserError(f"{path}: its {CONFIG} cannot be used ({first_line(error)})") from None
    return config, headers


def _cached(path: str, revision: str | None) -> Path | None:
    """The folder of a hub id's files on this machine; None where there is none."""
    try:
        return Path(snapshot_download(path, revision=revision or "main", local_files_only=True))
    except (OSError, ValueError):
        return None


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot in the cache has its weights; it may hold the config alone."""
    try:
        return bool(weight_files(folder))
    except UserError:
        return False


def _check_known(path: str, raw: Mapping[str, Any]) -> None:
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{path}: its {CONFIG} does not say which architecture it is (model_type)")
    if kind in CONFIG_MAPPING:
        return
    if raw.get("auto_map"):
        raise UserError(
            f"{path}: {kind} needs code that comes with the model (auto_map in {CONFIG}), and such code is never run; "
            "use a model of an architecture that transformers has"
        )
    raise UserError(
        f"{path}: transformers {transformers.__version__} does not know the architecture {kind!r} (model_type in "
        f"{CONFIG}); use another model, or a release that knows it"
    )


def _check_counts(path: str, numbers: Mapping[str, Any]) -> None:
    for name in _COUNTS:
        value = numbers.get(name)
        if value is None or isinstance(value, list):  # some families have one for every layer
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
            raise UserError(f"{path}: {name} in {CONFIG} is {json.dumps(value)}; it must be a whole number above 0")
    heads, shared = numbers.get("num_attention_heads"), numbers.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise UserError(
            f"{path}: in {CONFIG} num_attention_heads, {heads}, is not a multiple of num_key_value_heads, {shared}"
        )


def _check_ranges(path: str, numbers: Mapping[str, Any]) -> None:
    """Raise UserError where a number, also one in a group of settings, is NaN or outside what its name can mean."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            _check_ranges(path, value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if math.isnan(value):
            raise UserError(f"{path}: {name} in {CONFIG} is NaN; it must be a number")
        for endings, fits, told in _RANGES:
            if name.endswith(endings) and not fits(value):
                raise UserError(f"{path}: {name} in {CONFIG} is {json.dumps(value)}; it must be {told}")


def _check_settings_of_quantisation(folder: Path) -> None:
    for name in _QUANTISED_SETTINGS:
        if (folder / name).is_file():
            kind = read_object(folder / name).get("quant_method") or "gptq or awq"
            raise _quantised(str(folder), f"{kind}, as {name} says")


def _check_quantised(path: str, raw: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> None:
    packed = [
        name
        for name, header in headers.items()
        if name.endswith(_QUANTISED) or (name.endswith(".weight") and header.dtype not in _PLAIN)
    ]
    settings = raw.get("quantization_config") or raw.get("compression_config")
    if packed:
        kind = settings.get("quant_method") if isinstance(settings, dict) else None
        raise _quantised(path, f"{kind or headers[packed[0]].dtype}; {listed(packed)}")
    if settings:
        kind = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else settings
        if headers:
            raise UserError(
                f"{path}: {CONFIG} has quantization_config ({kind}), but its weights are not quantised: remove that key"
            )
        raise _quantised(path, f"{kind}, as {CONFIG} says")


def _quantised(path: str, how: str) -> UserError:
    return UserError(
        f"{path}: its weights are quantised ({how}), and such weights cannot be trained: use the model that they were "
        "made from, in its own precision"
    )


def _compare(path: str, auto: Any, config: PretrainedConfig, headers: Mapping[str, TensorHeader] | None) -> None:
    """Raise UserError where no model can be built with `config`, or where the files do not hold its weights."""
    text = config.get_text_config(decoder=True)
    num_layers = getattr(text, "num_hidden_layers", None)
    if headers is not None and isinstance(num_layers, int) and num_layers > len(headers):
        raise UserError(
            f"{path}: {CONFIG} says {num_layers} layers, but the weights have only {len(headers)} tensors in total; "
            f"use the files of one model"
        )
    pad, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(size, int) and pad >= size:
        raise UserError(
            f"{path}: pad_token_id in {CONFIG} is {pad}, but the embedding has rows 0 to {size - 1}: set it to a token "
            "that has a row, or add rows with resize_token_embeddings and save the model"
        )
    model = _on_shapes(path, auto, config)
    if headers is None:
        return
    empty = {name: torch.empty(header.shape, device="meta", dtype=torch.float32) for name, header in headers.items()}
    try:
        with quietly():
            make: Any = type(model)
            loaded, info = make.from_pretrained(
                None,
                config=config,
                state_dict=empty,
                device_map={"": "meta"},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (*UNUSABLE, RuntimeError) as error:
        raise UserError(f"{path}: its weights do not fit its {CONFIG} ({first_line(error)})") from None
    check_weights(path, loaded, info, shapes={name: header.shape for name, header in headers.items()})


def _on_shapes(path: str, auto: Any, config: PretrainedConfig) -> PreTrainedModel:
    try:
        with quietly(), torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config)
    except (*UNUSABLE, RuntimeError) as error:
        raise UserError(f"{path}: no model can be built with its {CONFIG} ({first_line(error)})") from None
    return model
