"""Pairs of random tokens with lengths as in HH-RLHF. Needs NumPy and transformers alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

#: Together TRL's default max_length, 1024: where this cuts a pair, TRL would, too.
MAX_PROMPT, MAX_RESPONSE = 512, 512
#: Every 5th percentile of the lengths of prompts, chosen and rejected responses in HH-RLHF's harmless split (1,992
#: pairs), in tokens of a BPE of 8,192 learnt from them.
HH_PERCENTILES = (
    (12, 17, 19, 22, 26, 33, 47, 61, 73, 85, 97, 110, 122, 137, 152, 171, 196, 229, 276, 353, 849),
    (2, 7, 9, 12, 14, 16, 18, 21, 23, 26, 29, 32, 37, 42, 48, 56, 64, 77, 92, 122, 282),
    (2, 7, 10, 13, 16, 19, 22, 25, 29, 33, 37, 42, 48, 55, 61, 68, 78, 91, 114, 151, 576),
)
EQUAL_LENGTHS = (128, 64, 64)

TokenPairs = list[tuple[list[int], list[int], list[int]]]


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer for models that see random tokens: pad, bos and eos are 0, 1 and 2."""
    words = {f"t{i}": i for i in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")),
        pad_token="t0",
        bos_token="t1",
        eos_token="t2",
    )


def equal_lengths(num_pairs: int) -> NDArray[np.int64]:
    """[pairs, 3] of prompt, chosen, rejected: all pairs the same."""
    return np.tile(EQUAL_LENGTHS, (num_pairs, 1))


def hh_lengths(num_pairs: int, seed: int) -> NDArray[np.int64]:
    """[pairs, 3], drawn from HH-RLHF's distribution."""
    drawn = np.random.default_rng(seed).uniform(0, 100, (num_pairs, 3))
    grid = np.linspace(0, 100, len(HH_PERCENTILES[0]))
    columns = [np.interp(drawn[:, i], grid, percentiles) for i, percentiles in enumerate(HH_PERCENTILES)]
    return np.minimum(np.stack(columns, 1).astype(np.int64), (MAX_PROMPT, MAX_RESPONSE, MAX_RESPONSE))


def random_pairs(lengths: NDArray[np.int64], vocabulary: int, seed: int) -> TokenPairs:
    """Random tokens in prompts, chosen and rejected responses of these lengths, [pairs, 3]."""
    source = np.random.default_rng(seed)
    ids = [[source.integers(3, vocabulary, length).tolist() for length in row] for row in lengths]
    return [(prompt, chosen, rejected) for prompt, chosen, rejected in ids]
