"""From text to token ids, once, with an exact boundary between prompt and response.

Prompt and response are tokenised apart and put one after the other, so that the boundary is exact by construction and
the prompt's ids are the very ones that generation is given. A prompt starts with exactly one bos (where the tokenizer
has one), a response ends with exactly one eos; a bos or eos that a chat template or the text itself wrote there is not
doubled.

Messages go through the tokenizer's chat template. A tokenizer without one gets them as a transcript: a blank line,
`System:`, `Human:` or `Assistant:`, and the content, as in HH-RLHF. Plain prompts stay plain whatever the tokenizer.

Truncation: a prompt over the limit is dropped, or keeps its bos and its last tokens; a response over the limit keeps
its first tokens and so loses its eos.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prefarena.config import TextTask
from prefarena.data.formats import Message, Pair
from prefarena.data.rejections import (
    EMPTY_PROMPT,
    EMPTY_RESPONSE,
    END_INSIDE,
    IDENTICAL,
    IDENTICAL_CUT,
    PROMPT_TOO_LONG,
    TEMPLATE_REFUSES,
    Unusable,
)
from prefarena.errors import UserError
from prefarena.modeling.load import load_tokenizer
from prefarena.modeling.vocabulary import ids_without_row

#: What a template, which is a program, can fail with; its compilation fails with the first.
_TEMPLATE_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_TURNS = {"user": "Human", "assistant": "Assistant", "system": "System", "developer": "System", "tool": "Tool"}


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a pair, and what truncation touched."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_cut: bool
    num_responses_cut: int


@dataclass(frozen=True)
class Tokenizer:
    """Prompts and responses to ids, within a task's limits. Raises UserError where these leave no room.

    unembedded: tokens that have no row in the model's embedding; a row that holds one is rejected.
    """

    tokenizer: PreTrainedTokenizerBase
    task: TextTask
    unembedded: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            name = self.tokenizer.name_or_path
            raise UserError(
                f"{name}: its tokenizer has no eos token, so the end of a response cannot be learnt; set one"
            )
        if self.tokenizer.bos_token_id is not None and self.task.max_prompt_tokens < 2:
            raise UserError("task.max_prompt_tokens: 1 leaves no room for a prompt after its bos token")

    @classmethod
    def load(cls, path: str | Path, revision: str | None, task: TextTask) -> Tokenizer:
        """The tokenizer at `path`, and what is known of the model there. Raises UserError as `load_tokenizer` does."""
        tokenizer = load_tokenizer(path, revision)
        return cls(tokenizer, task, unembedded=ids_without_row(path, tokenizer, revision))

    def pair(self, pair: Pair) -> TokenPair:
        """Ids within the limits. Raises Unusable where the pair cannot be trained on."""
        (done,) = self.pairs([pair])
        if isinstance(done, Unusable):
            raise done
        return done

    def pairs(self, pairs: Sequence[Pair]) -> list[TokenPair | Unusable]:
        """Ids of each pair within the limits, or why it cannot be trained on. All texts are encoded in one call."""
        texts = [self._try_texts(pair) for pair in pairs]
        ids = iter(self._encode([text for found in texts if not isinstance(found, Unusable) for text in found]))
        return [
            found if isinstance(found, Unusable) else self._try_fit(pair, list(islice(ids, len(found))))
            for pair, found in zip(pairs, texts, strict=True)
        ]

    def _try_texts(self, pair: Pair) -> list[str] | Unusable:
        """The texts to encode: prompt, chosen and rejected as they are read; for messages then both bare answers."""
        messages = pair.messages
        if messages is None:
            return [str(pair.prompt), pair.chosen, pair.rejected]
        try:
            prompt = self._render(messages)
            answers = [self._render_answer(prompt, messages, answer) for answer in (pair.chosen, pair.rejected)]
        except Unusable as error:
            return error
        return [prompt, *answers, pair.chosen, pair.rejected]

    def _try_fit(self, pair: Pair, ids: list[list[int]]) -> TokenPair | Unusable:
        try:
            return self._fit(pair, ids)
        except Unusable as error:
            return error

    def _fit(self, pair: Pair, ids: list[list[int]]) -> TokenPair:
        """The ids of a pair's texts, in the order of `_try_texts`, within the limits."""
        prompt_ids, prompt_cut = self._fit_prompt(self._begun(ids[0]))
        answers = [self._ended(found, ids[3 + i] if pair.messages else None) for i, found in enumerate(ids[1:3])]
        limit = self.task.max_response_tokens
        chosen, rejected = (answer[:limit] for answer in answers)
        if answers[0] == answers[1]:
            raise Unusable(IDENTICAL)
        if chosen == rejected:
            raise Unusable(IDENTICAL_CUT)
        if min(map(len, answers)) < 2:
            raise Unusable(EMPTY_RESPONSE, "the tokenizer finds no token in it")
        return TokenPair(prompt_ids, chosen, rejected, prompt_cut, sum(len(answer) > limit for answer in answers))

    def _begun(self, ids: list[int]) -> list[int]:
        """A prompt's ids at full length: one bos, then the text."""
        bos = self.tokenizer.bos_token_id
        while ids and ids[0] == bos:
            ids = ids[1:]
        if not ids:
            raise Unusable(EMPTY_PROMPT, "the tokenizer finds no token in it")
        return ids if bos is None else [bos, *ids]

    def _ended(self, ids: list[int], bare: list[int] | None) -> list[int]:
        """An answer's ids at full length: the text, then one eos. `bare`: a message's ids without its template."""
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if bare is not None and eos in bare:
            raise Unusable(END_INSIDE)
        if bare is not None and eos in ids:
            ids = ids[: ids.index(eos)]  # what a template writes after the end of the turn is not the answer's
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        if eos in ids or (bos is not None and bos in ids):
            raise Unusable(END_INSIDE)
        return [*ids, eos]

    def text(self, text: str) -> list[list[int]]:
        """Pretraining text as pieces of at most prompt + response tokens, each with a bos, the last with an eos."""
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        ids = [*self._encode([text])[0], self.tokenizer.eos_token_id]
        size = self.task.max_prompt_tokens + self.task.max_response_tokens - len(bos)
        return [bos + ids[start : start + size] for start in range(0, len(ids), size)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens of the tokenizer's own."""
        if not texts:
            return []
        if getattr(type(self.tokenizer), "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus:
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        # What the call above does with such a tokenizer, but for the masks and offsets that nobody reads.
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _fit_prompt(self, ids: list[int]) -> tuple[list[int], bool]:
        limit = self.task.max_prompt_tokens
        if len(ids) <= limit:
            return ids, False
        if self.task.long_prompts == "drop":
            raise Unusable(PROMPT_TOO_LONG, f"{len(ids)} tokens")
        head = ids[:1] if self.tokenizer.bos_token_id is not None else []
        return head + ids[len(ids) - (limit - len(head)) :], True

    def _render(self, messages: list[Message], answered: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            turns = "".join(f"\n\n{_TURNS[m['role']]}: {m['content']}" for m in messages)
            return turns if answered else turns + "\n\nAssistant:"
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)
        except _TEMPLATE_FAILURES as error:
            raise Unusable(TEMPLATE_REFUSES, f"{type(error).__name__}: {error}") from None
        return str(text)

    def _render_answer(self, prompt: str, messages: list[Message], answer: str) -> str:
        """What the whole conversation has after its prompt; the bare answer where a template rewrites the prompt."""
        whole = self._render([*messages, {"role": "assistant", "content": answer}], answered=True)
        return whole.removeprefix(prompt) if whole.startswith(prompt) else answer


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, learnt from `texts` and saved as a transformers folder.

    The same texts in the same order give the same tokenizer. pad, bos and eos are distinct tokens 0, 1 and 2. Raises
    UserError where `vocab_size` cannot hold them and the 256 bytes.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = ["<|pad|>", "<|bos|>", "<|eos|>"]
    if vocab_size < 256 + len(special):
        raise UserError(f"model.vocab_size: {vocab_size} is too small for 256 bytes and {len(special)} special tokens")
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(str(folder))
    return tokenizer
