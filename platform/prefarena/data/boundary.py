"""Where a tokenised text can be cut: the whole text's own tokens, divided between two of them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

#: Put before an answer that has to be tokenised apart, so that it is not the start of a text: there many tokenizers
#: write a space that the answer does not have.
_ANCHORS = ("\n", "x")


class Encoder:
    """Encodes texts to ids, without adding the tokenizer's special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._is_fast = type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        if not texts:
            return []
        if not self._is_fast:
            return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        # What the call above does with such a tokenizer, but for the masks and offsets that nobody reads.
        encodings = self._backend().encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def divided(self, texts: Sequence[tuple[str, int]]) -> list[tuple[list[int], int | None]]:
        """Return the ids of each whole text, and how many of them come before the character given with it.

        The second is None where the text's own offsets do not say so beyond doubt; `cut` looks closer there.
        """
        if not texts:
            return []
        if not self._is_fast:
            return [(ids, None) for ids in self.encode([text for text, _ in texts])]
        encodings = self._backend().encode_batch([text for text, _ in texts], add_special_tokens=False)
        return [(encoding.ids, _num_before(encoding, at)) for encoding, (_, at) in zip(encodings, texts, strict=True)]

    def cut(self, whole: str, at: int, ids: list[int], left_ids: list[int]) -> tuple[list[int], list[int]] | None:
        """`ids`, the tokens of `whole`, divided at its character `at`; None where no tokens meet there.

        `left_ids` are the tokens of the text before `at` by itself.
        """
        number = len(left_ids)
        alike = ids[:number] == left_ids
        # An unknown token may reach beyond the cut and still look the same.
        if alike and left_ids and left_ids[-1] != self._tokenizer.unk_token_id:
            return left_ids, ids[number:]
        if not self._is_fast:
            return (left_ids, ids[number:]) if alike else None
        offsets = self._backend().encode(whole, add_special_tokens=False).offsets
        number = sum(start < at for start, _ in offsets)
        if any(end > at for _, end in offsets[:number]) or any(start < at for start, _ in offsets[number:]):
            return None
        # A tokenizer that leaves white space out of offsets seems to have a cut where a token begins with some of it.
        if number and offsets[number - 1][1] < at and ids[:number] != left_ids:
            return None
        return ids[:number], ids[number:]

    def apart(self, text: str) -> list[int]:
        """Ids of a text that continues another one, tokenised separately."""
        for anchor in _ANCHORS:
            (left_ids, ids) = self.encode([anchor, anchor + text])
            found = self.cut(anchor + text, len(anchor), ids, left_ids)
            if found is not None:
                return found[1]
        return self.encode([text])[0]

    def _backend(self):  # type: ignore[no-untyped-def]  # tokenizers.Tokenizer, which has no types
        backend = self._tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self._tokenizer.split_special_tokens
        return backend


def _num_before(encoding: Encoding, at: int) -> int | None:
    """How many tokens come before the character `at`: where one ends there and the next begins with that character.

    None where none meet so. Tokens that cover no character, or leave white space out of their offsets, are not told
    apart here.
    """
    number = encoding.char_to_token(at)
    if not number:
        return None
    left, right = encoding.token_to_chars(number - 1), encoding.token_to_chars(number)
    if left is None or right is None:
        return None
    return number if left[0] < left[1] == at == right[0] else None
