"""Whether a tokenizer and a model belong together: every token that can come up has a row in the embedding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from prefarena.errors import UserError
from prefarena.modeling.adapters import adapter_at
from prefarena.modeling.checks import UNUSABLE, first_line
from prefarena.modeling.folders import CONFIG, listed, local_folder

_REMEDY = (
    "call resize_token_embeddings(len(tokenizer)) on the model and save both, or give the tokenizer another token "
    "that has a row"
)


def num_rows(config: PretrainedConfig) -> int:
    """The number of rows in the embedding of the model with this config."""
    return int(config.get_text_config(decoder=True).vocab_size)


def beyond(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> frozenset[int]:
    """Ids of the tokenizer that have no row. A text without these tokens can still be used."""
    return frozenset(i for i in tokenizer.get_vocab().values() if i >= num_rows(config))


def ids_without_row(path: str | Path, tokenizer: PreTrainedTokenizerBase, revision: str | None) -> frozenset[int]:
    """`beyond` for the model next to a tokenizer; empty where there is none, as next to one that was just learnt."""
    if (adapter := adapter_at(path)) is not None:
        path, revision = adapter.base, adapter.revision
    folder = local_folder(path)
    if folder is not None and not (folder / CONFIG).is_file():
        return frozenset()
    try:
        config = AutoConfig.from_pretrained(str(path), revision=revision or "main", trust_remote_code=False)
    except UNUSABLE as error:
        raise UserError(f"{path}: its {CONFIG} cannot be used ({first_line(error)})") from None
    return beyond(tokenizer, config)


def check_tokens(
    path: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, revision: str | None = None
) -> None:
    """Raise UserError where a token that is needed has no row in the embedding.

    Needed are the ordinary vocabulary, bos, eos and pad, the ends of `generation_config.json`, and what the chat
    template writes. An added token that none of them is may be beyond the rows: some models have those for images. A
    row of the data that holds one is rejected (data/tokenization.py).
    """
    rows, lost = num_rows(config), beyond(tokenizer, config)
    for role, number in _roles(path, tokenizer, config, revision):
        if number >= rows:
            name = tokenizer.convert_ids_to_tokens(number) if number in lost else None
            raise UserError(
                f"{path}: {role}, {f'{name!r} with id ' if name else 'id '}{number}, has no row in the model's "
                f"embedding, which has {rows} (0 to {rows - 1}): {_REMEDY}"
            )
    names = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(lost)}
    ordinary = [name for i, name in names.items() if i not in tokenizer.added_tokens_decoder]
    if ordinary:
        raise UserError(
            f"{path}: its tokenizer has {len(tokenizer)} tokens and the model's embedding {rows} rows, so "
            f"{listed(map(repr, ordinary))} have none, so tokenizer and model do not belong together; use the "
            f"tokenizer that belongs to "
            "it, or resize_token_embeddings(len(tokenizer)) and save the model"
        )
    template = tokenizer.chat_template
    texts = list(template.values()) if isinstance(template, dict) else [template or ""]
    written = [name for name in names.values() if any(name in text for text in texts)]
    if written:
        raise UserError(
            f"{path}: the chat template writes {listed(map(repr, written))}, which have no row in the model's "
            f"embedding of {rows}: {_REMEDY}"
        )


def _roles(
    path: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, revision: str | None
) -> Iterator[tuple[str, int]]:
    """The purposes of tokens, and their ids."""
    for role in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None:
            yield f"the {role} token of its tokenizer", number
    for number in _generation_ends(path, tokenizer, revision):
        yield "an end (eos_token_id) in its generation_config.json", number


def _generation_ends(path: str, tokenizer: PreTrainedTokenizerBase, revision: str | None) -> list[int]:
    """Ids that end generation. If transformers derived the config from the model's, only those that are tokens.

    It may hold the architecture's default: GPT-2's 50256 in a model of 1,000 tokens, which then simply never comes.
    """
    if (adapter := adapter_at(path)) is not None:
        path, revision = adapter.base, adapter.revision
    if Path(path).is_dir() and not (Path(path) / "generation_config.json").is_file():
        return []
    try:
        settings = GenerationConfig.from_pretrained(path, revision=revision or "main")
    except UNUSABLE as error:
        if not Path(path).is_dir():
            return []  # a hub id without this file
        raise UserError(f"{path}: its generation_config.json cannot be used ({first_line(error)})") from None
    ends = settings.eos_token_id
    numbers = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise UserError(f"{path}: eos_token_id in its generation_config.json is {ends!r}; it must be token ids")
    derived = bool(getattr(settings, "_from_model_config", False))
    known = set(tokenizer.get_vocab().values())
    return [number for number in numbers if not derived or number in known]
