"""An adapter given as a model: its base is loaded and the adapter merged into it, provided that they fit.

peft passes over tensors that it does not know, and leaves an adapter that it does not find at zero, with a warning at
most. Here every tensor of the file must be one of the adapter's, and every one of the adapter's must be in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prefarena.errors import UserError
from prefarena.modeling.checks import UNUSABLE, first_line, quietly
from prefarena.modeling.folders import ADAPTER_CONFIG, CONFIG, TensorHeader, headers_of, listed, read_object

_FILE = "adapter_model.safetensors"
_REMEDY = (
    "or load the base, put the adapter on it with peft (PeftModel.from_pretrained), merge_and_unload, save_pretrained "
    "with the tokenizer, and give that folder"
)


@dataclass(frozen=True)
class Adapter:
    """Where an adapter is, and the model that it belongs to: a folder or a hub id, with its revision."""

    folder: Path
    base: str
    revision: str | None

    def unusable(self, why: object) -> UserError:
        """Return the error that this adapter cannot be merged, with the remedy."""
        return UserError(
            f"{self.folder}: an adapter of {self.base}, which cannot be merged into it ({why}); fix that, {_REMEDY}"
        )


def adapter_at(path: str | Path) -> Adapter | None:
    """The adapter in a folder; None where there is none. Raises UserError where it cannot be merged into a base."""
    folder = Path(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    if (folder / CONFIG).is_file():
        raise UserError(
            f"{folder}: it holds both a model ({CONFIG}) and an adapter ({ADAPTER_CONFIG}), and transformers would "
            "load the adapter on its base instead of the model; remove the files of the one that is not wanted"
        )
    settings = read_object(folder / ADAPTER_CONFIG)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{folder}: an adapter, and {ADAPTER_CONFIG} does not name its base (base_model_name_or_path): name it, "
            f"{_REMEDY}"
        )
    revision = settings.get("revision")
    adapter = Adapter(folder, base, revision if isinstance(revision, str) else None)
    if settings.get("peft_type") != "LORA":
        raise adapter.unusable(f"it is of kind {settings.get('peft_type')}, but only LORA can be merged")
    if not (folder / _FILE).is_file():
        raise adapter.unusable(f"there is no {_FILE}; pickled weights are never read")
    return adapter


def check_adapter(adapter: Adapter, base: PreTrainedModel) -> None:
    """Raise UserError unless the adapter's file holds exactly its tensors on `base`, which may have shapes alone.

    Puts the adapter's layers on `base`.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict  # half a second, and few have an adapter

    headers = headers_of(adapter.folder / _FILE)
    try:
        with quietly(), torch.device("meta"):
            tuned = get_peft_model(base, PeftConfig.from_pretrained(str(adapter.folder)))
        expected = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    except (*UNUSABLE, RuntimeError) as error:
        raise adapter.unusable(first_line(error)) from None
    _match(adapter, headers, expected)


def merge(adapter: Adapter, base: PreTrainedModel) -> PreTrainedModel:
    """Return `base` with the adapter merged into its weights, a plain model. Raises UserError as `check_adapter`."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with quietly():
            tuned: Any = PeftModel.from_pretrained(base, str(adapter.folder), use_safetensors=True)
    except (*UNUSABLE, RuntimeError) as error:
        raise adapter.unusable(first_line(error)) from None
    _match(adapter, headers_of(adapter.folder / _FILE), get_peft_model_state_dict(tuned, save_embedding_layers=False))
    merged: PreTrainedModel = tuned.merge_and_unload()
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged.requires_grad_(True)


def _match(adapter: Adapter, headers: Mapping[str, TensorHeader], expected: Mapping[str, torch.Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - headers.keys()), sorted(headers.keys() - expected.keys())
    if missing:
        raise adapter.unusable(f"{len(missing)} of its tensors are missing: {listed(missing)}")
    if unknown:
        raise adapter.unusable(f"{len(unknown)} tensors in it belong to no layer that it adapts: {listed(unknown)}")
    for name, tensor in expected.items():
        if tuple(tensor.shape) != headers[name].shape:
            sizes = " and ".join(" x ".join(map(str, shape)) for shape in (headers[name].shape, tensor.shape))
            raise adapter.unusable(f"{name} has two sizes, {sizes}, in the file and on the base")
