"""Which files of a folder hold rows: not those that systems and editors leave, and only those of the split."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefarena.errors import UserError

#: What saved datasets, hub downloads and trainers write beside rows.
_METADATA = {
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "trainer_state.json",
    "metadata.json",
    "schema.json",
    "config.json",
    "package.json",
    "index.json",
}
_LEFTOVERS = ("~", ".swp", ".swo", ".swx", ".bak", ".orig", ".tmp", ".part", ".crdownload", ".lock", "#")
_LEADING = (".", "_", "#", "~$")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_SHARD = re.compile(r"^(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]{16})?$")  # how `datasets` names shards: by their split
_ENDING = re.compile(r"(\.(jsonl|ndjson|json|parquet|csv|tsv))?(\.(gz|zst|zstd|bz2|xz))?$", re.IGNORECASE)
_NUM_NAMED = 5


@dataclass(frozen=True)
class Choice:
    """The files to read, by name in order, and in one sentence those of the folder that are not read."""

    files: list[str]
    notes: list[str]


def choose(
    folder: str,
    files: Sequence[str],
    others: Sequence[str],
    endings: Sequence[str],
    split: str,
    head: Callable[[str], bytes],
    settings: tuple[str, str] = ("task.data", "task.split"),
) -> Choice:
    """Which of the folder's `files` to read; `others` are its folders. `head(name)` gives a file's first bytes.

    Where names tell splits (`train-00000-of-00002.parquet`, `test.jsonl`) those of `split` are read. Raises UserError
    where there is none of it, which names the `settings` of folder and split.
    """
    data = [name for name in sorted(files) if name.lower().endswith(tuple(endings)) and not _is_leftover(name)]
    data = [name for name in data if name.lower() not in _METADATA]
    if len(data) > 1:
        data = [name for name in data if not (name.lower().endswith(".json") and _is_one_object(head(name)))]
    chosen = _of_split(folder, data, split, settings)
    unread = sorted((set(files) - set(chosen)) | {f"{name}/" for name in others})
    return Choice(chosen, [f"{folder}: not read: {listed(unread)}"] if unread and chosen else [])


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def _is_leftover(name: str) -> bool:
    return name.startswith(_LEADING) or name.lower().endswith(_LEFTOVERS)


def _is_one_object(start: bytes) -> bool:
    """Whether a file begins as one JSON object over many lines, or is one that has nothing of a row."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"{"):
        return False
    line, newline, rest = text.partition(b"\n")
    try:
        row = json.loads(line)
    except ValueError:
        return bool(newline)
    return not rest.strip() and not {"chosen", "rejected", "prompt", "text"} & set(row)


def _of_split(folder: str, files: list[str], split: str, settings: tuple[str, str]) -> list[str]:
    stems = {name: _stem(name) for name in files}
    exact = [name for name in files if stems[name].lower() == split.lower()]
    if exact:
        return exact
    splits = {name: _split_in(stem) for name, stem in stems.items()}
    named = {name: found for name, found in splits.items() if found is not None}
    if not named:
        return files
    wanted = _SPLIT_OF.get(split.lower(), split.lower())
    chosen = [name for name in files if splits[name] == wanted]
    if not chosen:
        there = sorted({stems[name] if _is_shard(name) else str(found) for name, found in named.items()})
        raise UserError(
            f"{folder}: its files are named by split, but none belongs to {split!r}: there are {listed(there)}; set "
            f"{settings[1]} to one of them, or name the file itself in {settings[0]}"
        )
    shards = sorted({stems[name] for name in chosen if _is_shard(name)})
    if len(shards) > 1:
        raise UserError(
            f"{folder}: more than one split matches {split!r}: {listed(shards)}; set {settings[1]} to one of them"
        )
    return chosen


def _bare(name: str) -> str:
    return _ENDING.sub("", name)


def _is_shard(name: str) -> bool:
    return _SHARD.match(_bare(name)) is not None


def _stem(name: str) -> str:
    """A file's name without its endings and the number of its shard."""
    found = _SHARD.match(_bare(name))
    return found[1] if found else _bare(name)


def _split_in(stem: str) -> str | None:
    """The split that a name tells by its first word that is one."""
    words = re.split(r"[^a-z]+", stem.lower())
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), None)
