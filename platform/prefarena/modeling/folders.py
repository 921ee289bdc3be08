"""The files of a model's folder: its JSON, and what the headers of its safetensors say. No weight is read here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prefarena.errors import UserError
from prefarena.mirror import bring

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
#: In the names of the files that hold a vocabulary.
_VOCABULARY = re.compile(r"tokenizer\.|vocab|merges|spiece|sentencepiece|spm|bpe|tekken|tiktoken")
#: What files of weights that are not read end with, and what makes them readable.
_OTHER_WEIGHTS = {
    ".bin": "pickled weights are never read: load them in transformers where you trust them, and save_pretrained",
    ".pt": "pickled weights are never read: load them in transformers where you trust them, and save_pretrained",
    ".pth": "pickled weights are never read: load them in transformers where you trust them, and save_pretrained",
    ".ckpt": "pickled weights are never read: load them in transformers where you trust them, and save_pretrained",
    ".gguf": "GGUF is a format for inference: use the model that it was made from, or convert it to safetensors",
    ".h5": "Keras weights are not read: use the model's safetensors",
    ".msgpack": "Flax weights are not read: use the model's safetensors",
    ".safetensors": f"the file must be called {_WEIGHTS}, or be named in {_INDEX}: rename it, or save_pretrained again",
}


@dataclass(frozen=True)
class TensorHeader:
    """The entry of a safetensors file's header for one tensor. dtype: as the file spells it, such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]


def local_folder(path: str | Path) -> Path | None:
    """The folder at `path`; None for what can only be a hub id. Raises UserError for a path without a folder."""
    bring(path)
    folder = Path(path)
    if folder.is_dir():
        return folder
    text = str(path)
    if folder.is_file():
        raise UserError(f"{text}is a file; give the folder that holds the model's {CONFIG} and weights")
    if text.startswith(("/", "./", "../", "~")) or text.count("/") > 1 or text in ("", "."):
        raise UserError(f"{text}: there is no such folder")
    return None


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where there is none."""
    content = _bytes(file)
    try:
        found = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text, so not the JSON that it must be; fetch the file again") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); fix it, or fetch the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: it holds a JSON {type(found).__name__}, not an object; fetch the file again")
    return found


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """The model's safetensors headers, by name. Raises UserError where a file is absent, damaged or a pointer."""
    headers: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        headers |= headers_of(file)
    if not headers:
        raise UserError(f"{folder}: its safetensors files hold no tensors; save or fetch the model again")
    return headers


def headers_of(file: Path) -> dict[str, TensorHeader]:
    """The headers of one safetensors file, by name. Raises UserError as `tensor_headers` does."""
    _check_content(file)
    headers: dict[str, TensorHeader] = {}
    try:
        with safe_open(file, framework="pt") as content:  # type: ignore[no-untyped-call]
            for name in content.keys():  # noqa: SIM118 - it is no mapping
                part = content.get_slice(name)
                headers[name] = TensorHeader(part.get_dtype(), tuple(part.get_shape()))
    except SafetensorError as error:
        raise UserError(f"{file}: damaged or cut short, so not a safetensors file ({error}); fetch it again") from None
    return headers


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that transformers reads, which must all be there. Raises UserError where they are not."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    index = folder / _INDEX
    if not index.is_file():
        raise UserError(_no_weights(folder))
    parts = read_object(index).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
        raise UserError(f"{index}: it names no files under `weight_map`; fetch it again")
    names = sorted(set(parts.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of the {len(names)} files that {_INDEX} names are missing: {listed(missing)}; "
            "fetch them"
        )
    return [folder / name for name in names]


def check_settings_files(folder: Path) -> None:
    """Raise UserError where a JSON file that is loaded with the model is a pointer, empty or no JSON."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: there is no {CONFIG} in it, so this is not a transformers model")
    _check_objects(folder, (CONFIG, "generation_config.json"))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary."""
    return any(_VOCABULARY.search(file.name) for file in folder.iterdir())


def whole_folder(path: str | Path) -> Path | None:
    """The absolute path of a folder with a model and its tokenizer; None for an adapter, a hub id or half of one."""
    folder = local_folder(path)
    if folder is None or not (folder / CONFIG).is_file() or not has_tokenizer(folder):
        return None
    return folder.absolute()


def check_tokenizer_files(folder: Path) -> None:
    """Raise UserError where a folder holds no tokenizer, or one whose files are pointers, empty or no JSON."""
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder}: there is no tokenizer in it (tokenizer.json, tokenizer.model, vocab.json, ...); copy the files "
            "of the model's tokenizer there, or save_pretrained it"
        )
    _check_objects(folder, ("tokenizer.json", "tokenizer_config.json"))


def _check_objects(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).is_file():
            read_object(folder / name)


def listed(names: Iterable[str], most: int = 3) -> str:
    """List the first names, and say how many more there are."""
    known = list(names)
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def _bytes(file: Path) -> bytes:
    _check_content(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: it cannot be read ({error.strerror or error})") from None


def _check_content(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
    except OSError as error:
        raise UserError(f"{file}: it cannot be read ({error.strerror or error})") from None
    if not start:
        raise UserError(f"{file}: it is empty; fetch it again")
    if start == _POINTER:
        raise UserError(f"{file}: it is a git LFS pointer, not the file itself; run `git lfs pull` in its repository")


def _no_weights(folder: Path) -> str:
    for file in sorted(folder.iterdir()):
        if (why := _OTHER_WEIGHTS.get(file.suffix.lower())) is not None and not file.name.startswith("adapter_"):
            return f"{folder}: no weights in safetensors: neither {_WEIGHTS} nor {_INDEX}, but {file.name}; {why}"
    return f"{folder}: there are no weights in it: neither {_WEIGHTS} nor {_INDEX}"
