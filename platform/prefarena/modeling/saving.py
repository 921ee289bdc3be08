"""Writing a model's folder tensor by tensor: only one tensor is held at a time, however large the model is.

The files are those of `save_pretrained`: safetensors, several with an index where one would be too large.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from prefarena.modeling.endings import keep_ends

#: Bytes of tensors in one file; a larger tensor has a file of its own.
LARGEST_FILE = 4 * 2**30
_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Which tensor is written to which file. names: the files' tensors, in order; shapes: their shapes and dtypes.

    A tensor that is not in `names` is left out: it is tied to another one, or belongs to no file.
    """

    names: dict[str, str]
    shapes: dict[str, Tensor]

    def files(self, largest: int) -> list[list[str]]:
        """The model's tensors, by files."""
        files: list[list[str]] = [[]]
        size = 0
        for name in self.names:
            own = _size(self.shapes[name])
            if files[-1] and size + own > largest:
                files.append([])
                size = 0
            files[-1].append(name)
            size += own
        return files


def layout_of(model: PreTrainedModel) -> Layout | None:
    """The layout of a model that may be spread over workers; adapters are left out, and numbers are float32.

    None where tensors in the files are made of several of the model's, which `save_pretrained` alone does.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(one, WeightConverter) for one in conversions):
        return None
    ignored, seen = set(model._keys_to_ignore_on_save or ()), set()
    tensors = {name: one for name, one in model.state_dict(keep_vars=True).items() if "lora_" not in name}
    tied = getattr(model, "all_tied_weights_keys", {})
    names: dict[str, str] = {}
    shapes: dict[str, Tensor] = {}
    # A tied tensor is written under the name that others are tied to.
    for full in sorted(tensors, key=lambda name: _plain(name) in tied):
        name, tensor = _plain(full), tensors[full]
        if name in ignored or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
        shapes[name] = torch.empty(tensor.shape, dtype=kind, device="meta")
    for full in tensors:
        name = _plain(full)
        if name in shapes:
            (names[name],) = revert_weight_conversion(model, {name: shapes[name]})
    return Layout(names, shapes)


def _plain(name: str) -> str:
    """A tensor's name without adapters around its module."""
    return name.replace(".base_layer.", ".")


def save_by_tensors(
    model: PreTrainedModel,
    layout: Layout,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    writes: bool,
    largest: int = LARGEST_FILE,
) -> None:
    """Save a policy as `save_policy` does, from whole weights that come one by one in the order of the model's state.

    Every worker that takes part in making them calls this, and goes through all of them; the one that `writes` does so.
    Raises OSError after that, so that the others do not wait for it.
    """
    writer = _Writer(Path(folder), layout, largest) if writes else None
    problem: OSError | None = None
    for name, tensor in weights:
        if writer is None or problem is not None or name not in layout.names:
            continue
        try:
            writer.add(name, tensor)
        except OSError as error:
            problem = error
    if problem is not None:
        raise problem
    if writer is not None:
        writer.close()
        _save_settings(model, tokenizer, Path(folder))


class _Writer:
    """Writes the files with weights. Tensors come in the order of the layout."""

    def __init__(self, folder: Path, layout: Layout, largest: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if _FILE.fullmatch(old.name):
                old.unlink()
        self._folder, self._layout = folder, layout
        self._parts = layout.files(largest)
        self._part = -1
        self._left: list[str] = []
        self._file: BinaryIO | None = None

    def _name(self, part: int) -> str:
        number = len(self._parts)
        return "model.safetensors" if number == 1 else f"model-{part + 1:05d}-of-{number:05d}.safetensors"

    def add(self, name: str, tensor: Tensor) -> None:
        if not self._left:
            self._next_file()
        expected, shape = self._left.pop(0), self._layout.shapes[name]
        if name != expected or tensor.shape != shape.shape:
            raise ValueError(f"{name} {list(tensor.shape)} is not the {expected} whose turn it is")
        assert self._file is not None
        flat = tensor.detach().to("cpu", shape.dtype).contiguous().reshape(-1)
        self._file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _next_file(self) -> None:
        self._end_file()
        self._part += 1
        self._left = list(self._parts[self._part])
        self._file = (self._folder / self._name(self._part)).open("wb")
        self._file.write(_header({self._layout.names[name]: self._layout.shapes[name] for name in self._left}))

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def close(self) -> None:
        self._end_file()
        if self._left or self._part + 1 < len(self._parts):
            raise ValueError(f"no weights came for {self._left[:3] or self._parts[self._part + 1][:3]}")
        if len(self._parts) == 1:
            return
        names, shapes = self._layout.names, self._layout.shapes
        where = {names[name]: self._name(part) for part, found in enumerate(self._parts) for name in found}
        sizes = {
            "total_parameters": sum(one.numel() for one in shapes.values()),
            "total_size": sum(_size(one) for one in shapes.values()),
        }
        text = json.dumps({"metadata": sizes, "weight_map": where}, indent=2, sort_keys=True)
        (self._folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _header(shapes: Mapping[str, Tensor]) -> bytes:
    """The header of a safetensors file: the length of a JSON object, which holds each tensor's dtype, shape and place.

    Padded, so that the numbers behind it are aligned: https://huggingface.co/docs/safetensors/index#format
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in shapes.items():
        stop = place + _size(shape)
        entries[name] = {"dtype": _DTYPES[shape.dtype], "shape": list(shape.shape), "data_offsets": [place, stop]}
        place = stop
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _size(shape: Tensor) -> int:
    return shape.numel() * shape.itemsize


def _save_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save everything except weights, as `save_policy` does."""
    model.config.dtype = "float32"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(folder))
    if model.can_generate() and model.generation_config is not None:
        keep_ends(model.generation_config, tokenizer)
        model.generation_config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
