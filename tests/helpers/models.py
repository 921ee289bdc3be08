"""Tiny random models of many families, with a tokenizer, as transformers folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.helpers.tiny import BOS, EOS, VOCABULARY, tiny_tokenizer

_LLAMA = {
    "vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {
    "vocab_size": len(VOCABULARY), "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64,
    "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
_OPT = {
    "vocab_size": len(VOCABULARY), "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "word_embed_proj_dim": 64,
    "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": BOS, "eos_token_id": EOS,
    "pad_token_id": 0,
}  # fmt: skip
#: Name to configuration class and settings.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_LLAMA, "tie_word_embeddings": False}),
    "llama-tied": ("Llama", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {**_LLAMA, "tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**_LLAMA, "tie_word_embeddings": False}),
    "gpt2": ("GPT2", _GPT2),
    "gpt-neox": ("GPTNeoX", {**_LLAMA, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2", {**_LLAMA, "head_dim": 32, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3Text", {**_LLAMA, "head_dim": 32, "query_pre_attn_scalar": 32}),
    "olmo2": ("Olmo2", _LLAMA),
    "phi3": ("Phi3", _LLAMA),
    "opt": ("OPT", _OPT),
    "granite": ("Granite", _LLAMA),
    "mixtral": ("Mixtral", {**_LLAMA, "num_local_experts": 2}),
    "bloom": ("Bloom", {"vocab_size": 16, "hidden_size": 64, "n_layer": 2, "n_head": 2, "pad_token_id": 0}),
}
#: Those whose body transformers can put a score on.
SCORED = [name for name in FAMILIES if name not in ("olmo2", "granite")]


def random_model(family: str, task: str = "ForCausalLM", **changed: Any) -> PreTrainedModel:
    """A model of a family with weights drawn from seed 0. task: the ending of the class, such as `ForCausalLM`."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**settings, **changed})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _class(name, task)(config).eval()


def _class(name: str, task: str) -> Callable[..., PreTrainedModel]:
    body = name.removesuffix("Text")
    for full in (f"{name}{task}", f"{body}{task}", f"{body}{task.replace('ForCausalLM', 'LMHeadModel')}"):
        if hasattr(transformers, full):
            found: Callable[..., PreTrainedModel] = getattr(transformers, full)
            return found
    raise LookupError(f"transformers has no {name}{task}")


def save_model(folder: Path, model: Any, **keywords: Any) -> str:
    """A folder with the model and the tokenizer of tests.helpers.tiny. Returns the path."""
    model.save_pretrained(str(folder), **keywords)
    tiny_tokenizer().save_pretrained(str(folder))
    return str(folder)
