"""Tiny models and tokenizers that several tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefarena.modeling.load import save_policy

VOCABULARY = ["<pad>", "<bos>", "<eos>", *"abcdefghijklm"]
BOS, EOS, FIRST_LETTER = 1, 2, 3


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Of the 16 words of `VOCABULARY`, split at blanks."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def save_tiny_policy(folder: Path, *, tied: bool = False, seed: int = 0, max_length: int = 512) -> str:
    """A random Llama over 16 tokens with its tokenizer, as a transformers folder. Returns the path."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_policy(LlamaForCausalLM(config), tiny_tokenizer(), folder)
    return str(folder)
