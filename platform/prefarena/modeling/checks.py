"""Whether a model that was loaded is the one in its files: all of its weights from there, numbers, and causal.

transformers fills what is missing with random numbers and passes over what it does not know; both are only logged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from prefarena.errors import UserError
from prefarena.modeling.folders import listed

#: What transformers, and the libraries below it, raise over files and settings that cannot be used. RuntimeError is not
#: among them: memory that runs out is one.
UNUSABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
#: Buffers of old checkpoints that models make themselves today: attention masks, rotary frequencies, positions.
_OLD_BUFFERS = re.compile(r"(attn|attention)\.(bias|masked_bias)$|inv_freq$|position_ids$")
_HEADS = re.compile(r"(^|\.)(score|classifier|v_head|value_head|reward_head|qa_outputs)\.")
#: What a classifier that was made of a language model may still carry, and never uses.
_LANGUAGE_HEADS = re.compile(r"^(lm_head|embed_out)\.(weight|bias)$")
_ADAPTERS = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer)\b")


def check_weights(
    where: str | Path,
    model: PreTrainedModel,
    info: Mapping[str, Collection[Any]],
    *,
    new: Collection[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Raise UserError unless the weights of `model` are those of its files, neither more nor fewer.

    info: what `from_pretrained(output_loading_info=True)` returns with the model. new: names that may be missing, such
    as a head that is to be learnt. shapes: the shapes of the tensors in the files, where they are known.
    """
    missing = sorted(set(info["missing_keys"]) - set(new))
    scored = model.get_output_embeddings() is None
    unexpected = sorted(
        name
        for name in info["unexpected_keys"]
        if not _is_old_buffer(name, shapes) and not (scored and _LANGUAGE_HEADS.search(name))
    )
    mismatched = sorted(info["mismatched_keys"])
    if not (missing or unexpected or mismatched):
        return
    found = []
    if missing:
        found.append(f"{_number(missing)} missing ({listed(missing)}), which would be random numbers")
    if unexpected:
        found.append(f"{_number(unexpected)} not in that model ({listed(unexpected)})")
    if mismatched:
        told = [f"{name} is {_size(is_)} and should be {_size(should)}" for name, is_, should in mismatched]
        found.append(f"{_number(mismatched)} of another size ({listed(told)})")
    raise UserError(
        f"{where}: its weights are not those of a {type(model).__name__} with its config.json: "
        f"{'; '.join(found)}; {_remedy(missing, unexpected, mismatched)}"
    )


def check_loaded(where: str | Path, model: PreTrainedModel) -> None:
    """Raise UserError where a weight is NaN or infinite, or where a head that the config ties is not tied."""
    for name, tensor in model.state_dict().items():
        _check_finite(where, name, tensor)
    check_buffers(where, model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model._tied_weights_keys and getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not embedding.weight:
        raise not_tied(where)


def check_buffers(where: str | Path, model: PreTrainedModel) -> None:
    """Raise UserError where a buffer that was read is NaN or infinite, or rotary frequencies that were computed."""
    read = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in read:
            _check_finite(where, name, buffer)
        elif name.endswith("inv_freq") and not _finite(buffer):
            raise UserError(
                f"{where}: the rotary frequencies that follow from its config.json ({name}) are NaN or infinite; fix "
                "rope_theta, or the other numbers of rope_parameters"
            )


def _check_finite(where: str | Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and tensor.numel() and not _finite(tensor):
        raise not_finite(where, name, int((~torch.isfinite(tensor)).sum()), tensor.numel())


def not_finite(where: str | Path, name: str, wrong: int, number: int) -> UserError:
    """Return the error that `wrong` of the `number` numbers in a tensor are not finite."""
    return UserError(
        f"{where}: {wrong} of the {number} numbers in {name} are NaN or infinite; "
        "the model is damaged, or its training diverged: use another checkpoint"
    )


def not_tied(where: str | Path) -> UserError:
    """Return the error that a head which the config ties to the embedding differs from it."""
    return UserError(
        f"{where}: config.json says that the head is tied to the embedding (tie_word_embeddings), but the weights "
        "hold a head of its own with other numbers; if that is meant, set tie_word_embeddings to false there"
    )


@torch.no_grad()
def check_causal(where: str | Path, model: PreTrainedModel) -> None:
    """Raise UserError where a later token changes earlier logits, or where the logits are not numbers."""
    size = model.config.get_text_config().vocab_size
    tokens = [(3 + 5 * i) % size for i in range(6)]
    ids = torch.tensor([tokens, [*tokens[:-1], (tokens[-1] + 1) % size]], device=model.device)
    try:
        one, other = (model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in ids)
    except (*UNUSABLE, RuntimeError) as error:
        raise UserError(
            f"{where}: the model cannot be run with its config.json ({first_line(error)}); its settings contradict it"
        ) from None
    if not bool(torch.isfinite(one).all()):
        raise UserError(
            f"{where}: the model's logits are NaN or infinite although its weights are finite; look for a number in "
            "config.json that is out of range (an epsilon, rope_theta, a scale)"
        )
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-7):
        raise UserError(
            f"{where}: not a causal language model: a token changes the logits before it ({type(model).__name__} "
            "attends to both sides); use a decoder"
        )


def check_direction(where: str | Path, config: PretrainedConfig, masked: bool) -> None:
    """Raise UserError where the config says that attention is not causal. masked: of a masked language model."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        why = "it is an encoder-decoder"
    elif getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        why = "config.json sets use_bidirectional_attention"
    elif masked and getattr(text, "is_decoder", True) is False:
        why = f"{config.model_type} is a masked language model, whose tokens attend to later ones"
    else:
        return
    raise UserError(f"{where}: not a causal language model: {why}; use a decoder")


@contextmanager
def quietly() -> Iterator[None]:
    """A context in which transformers logs errors only and shows no progress: what it would warn of is raised here."""
    level, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if progress:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """The message of a library's error, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".") if lines else type(error).__name__


def _finite(tensor: torch.Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # NaN where any is; takes no memory
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _is_old_buffer(name: str, shapes: Mapping[str, tuple[int, ...]] | None) -> bool:
    """Whether this is a buffer that older releases saved. A mask is four-dimensional or a scalar, a bias is neither."""
    if not _OLD_BUFFERS.search(name):
        return False
    shape = (shapes or {}).get(name)
    return shape is None or not name.endswith("bias") or len(shape) in (0, 4)


def _remedy(missing: list[str], unexpected: list[str], mismatched: list[Any]) -> str:
    if any(_ADAPTERS.search(name) for name in unexpected):
        return "they hold adapters that are not merged: merge them (peft's merge_and_unload) and save_pretrained"
    heads = [name for name in unexpected if _HEADS.search(name)]
    if heads and len(heads) == len(unexpected):
        return f"{heads[0]} is the head of a reward model or classifier: use the language model, without that head"
    if missing and any(_same_tail(name, unexpected) for name in missing):
        return (
            "the files have these names with another prefix: load the model with the class that saved it, and save that"
        )
    if [name for name in missing if not _HEADS.search(name)] == [] and missing:
        return "its head was never trained, or is missing: use a model that has one"
    if all(name.split(".")[-2:-1] in (["lm_head"], ["embed_out"]) for name in missing) and missing:
        return (
            "it was saved without its head: save the whole language model, or, if its head is the embedding, set "
            "tie_word_embeddings to true in config.json"
        )
    if mismatched and not missing:
        return "config.json and the weights are of different models: use the files of one"
    return "save the whole model again with save_pretrained, with the config.json that belongs to it"


def _same_tail(name: str, others: list[str]) -> bool:
    return any(other.endswith("." + name) or name.endswith("." + other) for other in others)


def _number(names: Collection[Any]) -> str:
    return f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'}"


def _size(shape: Any) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
