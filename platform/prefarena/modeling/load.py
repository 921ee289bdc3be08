"""Load and save transformers models and tokenizers; nothing here knows how they are trained.

Weights are read from safetensors alone, and code that comes with a model is never run.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefarena.config import PretrainedModel, ScratchModel
from prefarena.errors import UserError
from prefarena.mirror import bring
from prefarena.modeling.adapters import adapter_at, merge
from prefarena.modeling.checks import (
    UNUSABLE,
    check_causal,
    check_loaded,
    check_weights,
    first_line,
    quietly,
)
from prefarena.modeling.endings import keep_ends
from prefarena.modeling.folders import check_tokenizer_files, has_tokenizer, local_folder
from prefarena.modeling.inspection import check_context

_SAFELY: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer with an eos and a pad token. Raises UserError where it has no eos, or cannot be loaded."""
    tokenizer = read_tokenizer(path, revision)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no eos token, so the end of a response cannot be learnt; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is told apart by lengths, so sharing an id is safe
    return tokenizer


def read_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer as it is; for an adapter without one, its base's. Raises UserError where none can be loaded."""
    if (folder := local_folder(path)) is not None:
        if not has_tokenizer(folder) and (adapter := adapter_at(path)) is not None:
            return read_tokenizer(adapter.base, adapter.revision)
        check_tokenizer_files(folder)
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(str(path), revision=revision or "main", trust_remote_code=False)
            tokenizer("Is this a tokenizer?")  # some faults of its files show when it is used
            return tokenizer
    except Exception as error:
        # The tokenizers library raises bare exceptions over its files; what is of another type is a bug.
        if not isinstance(error, UNUSABLE) and type(error) is not Exception:
            raise
        raise UserError(f"{path}: no tokenizer can be loaded from it ({first_line(error)})") from None


def load_policy(path: str | Path, revision: str | None = None) -> PreTrainedModel:
    """A causal language model in float32, eval mode. Raises UserError where none can be loaded, whole and sound.

    Where `path` holds an adapter, its base is loaded and the adapter merged into it.
    """
    if (adapter := adapter_at(path)) is None:
        return load_checked(AutoModelForCausalLM, path, revision, "causal language model")
    base = load_checked(AutoModelForCausalLM, adapter.base, adapter.revision, "causal language model")
    model = merge(adapter, base)
    check_loaded(path, model)
    return model.eval()


def load_checked(
    kind: Any, path: str | Path, revision: str | None, what: str, new: Collection[str] = ()
) -> PreTrainedModel:
    """Load a model of one of transformers' Auto classes in float32, eval mode.

    Raises UserError where it cannot be loaded, where its files do not hold exactly its weights, or where one of them is
    NaN or infinite. what: its name in the message. new: tensors that the files may lack, such as a head to be learnt,
    which are random numbers then.
    """
    local_folder(path)
    try:
        with quietly():
            model, info = kind.from_pretrained(
                str(path),
                revision=revision or "main",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below
                **_SAFELY,
            )
    except UNUSABLE as error:
        raise UserError(f"{path}: no {what} can be loaded from it ({first_line(error)})") from None
    check_weights(path, model, info, new=new)
    check_loaded(path, model)
    return model.eval()


def new_settings(model: ScratchModel, vocab_size: int, max_length: int) -> LlamaConfig:
    """The configuration of a Llama of these sizes, for up to `max_length` tokens."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
    )


def new_policy(model: ScratchModel, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> PreTrainedModel:
    """A Llama with random weights drawn from `seed`, for `tokenizer`'s vocabulary and up to `max_length` tokens."""
    config = new_settings(model, len(tokenizer), max_length)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float().eval()


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a standard transformers checkpoint folder (safetensors), with the tokenizer.

    Its generation config names every token that ends an answer (`modeling/endings.py`), those that a pretrained model
    came with included.
    """
    if model.can_generate() and model.generation_config is not None:
        keep_ends(model.generation_config, tokenizer)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def load_settings(folder: str | Path) -> PretrainedConfig:
    """Read the configuration of the model in a folder, and nothing else of it."""
    bring(Path(folder) / "config.json")
    return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


def new_reward_model(policy_path: str | Path, seed: int) -> PreTrainedModel:
    """A sequence-classification model with the policy's body and a fresh scalar head ~ N(0, 1 / (width + 1)).

    The random body, whose numbers are drawn because the head's come after them, is dropped before the policy's is read:
    the weights are never held twice.
    """
    bring(policy_path)
    config = AutoConfig.from_pretrained(str(policy_path), num_labels=1, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config).float()
        torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    _drop_weights(model.base_model)
    # The parameters themselves, so that two names of one tensor stay one tensor.
    body = load_policy(policy_path).base_model.state_dict(keep_vars=True)
    model.base_model.load_state_dict(body, assign=True)
    return model.eval()


def _drop_weights(module: nn.Module) -> None:
    """Replace the parameters by their shapes; buffers stay, since some are stored nowhere."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty_like(parameter, device="meta")))


def reward_model_on(policy: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """A sequence-classification model whose body is the policy's own, by the configuration in `folder`.

    Its head is a new one of zeros, in float32. Raises UserError where transformers has no such model with this body.
    """
    return scoring_model(policy, AutoConfig.from_pretrained(str(folder), num_labels=1, trust_remote_code=False))


def scoring_model(policy: PreTrainedModel, settings: PretrainedConfig) -> PreTrainedModel:
    """Make a scoring model as `reward_model_on` does, from settings that are already loaded."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(settings)
    if type(model.base_model) is not type(policy.base_model):
        raise UserError(
            f"training.lora: a {type(model).__name__} cannot share the body of a {type(policy).__name__}; train all "
            "weights"
        )
    setattr(model, model.base_model_prefix, policy.base_model)
    head = nn.Linear(model.score.in_features, 1, bias=False)
    nn.init.zeros_(head.weight)
    model.score = head
    return model.eval()


def scoring_settings(settings: PretrainedConfig) -> PretrainedConfig:
    """Turn a policy's settings into those of a model with its body and one label."""
    known = {key: value for key, value in settings.to_dict().items() if key not in ("id2label", "label2id")}
    return type(settings).from_dict({**known, "num_labels": 1})


def read_head(folder: str | Path) -> torch.Tensor:
    """The weight [1, D] of a stored reward model's head, float32; nothing else of it is read."""
    bring(folder)
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if "score.weight" in file.keys():  # noqa: SIM118 (it is no dictionary)
                return file.get_tensor("score.weight").float()
    raise UserError(f"{folder}: there is no score.weight in it")


def load_reward_model(path: str | Path) -> PreTrainedModel:
    """A sequence-classification model with one label, float32, eval mode."""
    return load_checked(AutoModelForSequenceClassification, path, None, "reward model")


def base_model(model: PretrainedModel, max_length: int) -> PreTrainedModel:
    """Load the user's model. Raises UserError where it is not causal, or its context is shorter than `max_length`."""
    policy = load_policy(model.path, model.revision)
    check_causal(model.path, policy)
    check_context(model.path, policy.config, max_length)
    return policy
