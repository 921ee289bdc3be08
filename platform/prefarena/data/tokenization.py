"""From text to token ids, once, with an exact boundary between prompt and response.

What is trained on is what the tokenizer makes of the whole conversation, prompt and answer together, divided where the
prompt ends (`data/boundary.py`; the texts are those of `data/conversations.py`). Where a token reaches over that place,
prompt and answer are tokenised apart, and counted. A prompt starts with exactly one bos (where the tokenizer has one),
a response ends with exactly one token that ends an answer (`modeling/endings.py`); one that a chat template or the text
itself wrote there is not doubled, and nothing stands behind it.

Truncation: a prompt over the limit is dropped, or keeps its bos and its last tokens; a response over the limit keeps
its first tokens and so loses its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prefarena.config import TextTask
from prefarena.data.boundary import Encoder
from prefarena.data.conversations import Conversations, Texts
from prefarena.data.formats import Pair
from prefarena.data.rejections import (
    EMPTY_PROMPT,
    EMPTY_RESPONSE,
    END_INSIDE,
    IDENTICAL,
    IDENTICAL_CUT,
    PROMPT_TOO_LONG,
    Unusable,
)
from prefarena.errors import UserError
from prefarena.modeling.endings import configured_ends, end_ids
from prefarena.modeling.load import load_tokenizer
from prefarena.modeling.vocabulary import ids_without_row

#: The ids of a whole text, and how many of them are the prompt's; None: not known yet.
Divided = tuple[list[int], int | None]


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a pair, whether truncation touched it, and how its responses were tokenised.

    num_responses_apart: responses tokenised by themselves, since no token of the whole text ends where the prompt does.
    num_responses_as_written: responses not as the chat template would render them (`conversations.Texts`).
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_cut: bool
    num_responses_cut: int
    num_responses_apart: int
    num_responses_as_written: int


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids of a prompt without answers, and whether truncation touched it."""

    prompt_ids: list[int]
    prompt_cut: bool


@dataclass(frozen=True)
class Tokenizer:
    """Converts prompts and responses to ids, within a task's limits. Raises UserError where these leave no room.

    unembedded: tokens that have no row in the model's embedding; a row that holds one is rejected.
    model_ends: tokens that the model's generation config names as ends, beside those that the tokenizer tells of.
    """

    tokenizer: PreTrainedTokenizerBase
    task: TextTask
    unembedded: frozenset[int] = frozenset()
    model_ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            name = self.tokenizer.name_or_path
            raise UserError(
                f"{name}: its tokenizer has no eos token, so the end of a response cannot be learned; set one"
            )
        if self.tokenizer.bos_token_id is not None and self.task.max_prompt_tokens < 2:
            raise UserError("task.max_prompt_tokens: 1 leaves no room for a prompt after its bos token")

    @classmethod
    def load(cls, path: str | Path, revision: str | None, task: TextTask) -> Tokenizer:
        """Load the tokenizer at `path` and the facts about the model there. Raises UserError like `load_tokenizer`."""
        tokenizer = load_tokenizer(path, revision)
        unembedded = ids_without_row(path, tokenizer, revision)
        return cls(tokenizer, task, unembedded=unembedded, model_ends=configured_ends(path, tokenizer, revision))

    def pair(self, pair: Pair) -> TokenPair:
        """Return a pair's ids within the limits. Raises Unusable where the pair cannot be trained on."""
        (done,) = self.pairs([pair])
        if isinstance(done, Unusable):
            raise done
        return done

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer, ascending."""
        return end_ids(self.tokenizer, self.model_ends)

    @cached_property
    def conversations(self) -> Conversations:
        return Conversations(self.tokenizer, self.ends)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    def ends_in_words(self) -> list[str]:
        """The tokens that end an answer, as text."""
        return [str(self.tokenizer.convert_ids_to_tokens(number)) for number in self.ends]

    def pairs(self, pairs: Sequence[Pair]) -> list[TokenPair | Unusable]:
        """Ids of each pair within the limits, or why it cannot be trained on. All texts are encoded in one call."""
        found = [self._try_texts(pair) for pair in pairs]
        wholes = [whole for texts in found if isinstance(texts, Texts) for whole in _wholes(texts)]
        ids = iter(self.encoder.divided(wholes))
        return [
            texts if isinstance(texts, Unusable) else self._try_fit(pair, texts, [next(ids), next(ids)])
            for pair, texts in zip(pairs, found, strict=True)
        ]

    def prompts(self, pairs: Sequence[Pair]) -> list[TokenPrompt | Unusable]:
        """Ids of each pair's prompt within the limit, without answers, or why it cannot be used."""
        found = [self._try_prompt(pair) for pair in pairs]
        ids = iter(self.encoder.encode([text for text in found if isinstance(text, str)]))
        return [text if isinstance(text, Unusable) else self._try_fit_prompt(next(ids)) for text in found]

    def _try_prompt(self, pair: Pair) -> str | Unusable:
        try:
            return self.conversations.prompt(pair)
        except Unusable as error:
            return error

    def _try_fit_prompt(self, ids: list[int]) -> TokenPrompt | Unusable:
        try:
            return TokenPrompt(*self._fit_prompt(self._begun(ids)))
        except Unusable as error:
            return error

    def _try_texts(self, pair: Pair) -> Texts | Unusable:
        try:
            return self.conversations.texts(pair)
        except Unusable as error:
            return error

    def _try_fit(self, pair: Pair, texts: Texts, ids: list[Divided]) -> TokenPair | Unusable:
        try:
            return self._fit(pair, texts, ids)
        except Unusable as error:
            return error

    def _fit(self, pair: Pair, texts: Texts, ids: list[Divided]) -> TokenPair:
        """The ids of a pair's texts within the limits. `ids`: of the prompt with each answer."""
        prompt, responses, num_apart = self._divided(texts, ids)
        prompt_ids, prompt_cut = self._fit_prompt(self._begun(prompt))
        answers = [self._ended(found, texts) for found in responses]
        limit = self.task.max_response_tokens
        chosen, rejected = (answer[:limit] for answer in answers)
        if answers[0] == answers[1] and not pair.is_single:
            raise Unusable(IDENTICAL)
        if chosen == rejected and not pair.is_single:
            raise Unusable(IDENTICAL_CUT)
        if min(map(len, answers)) < 2:
            raise Unusable(EMPTY_RESPONSE, "the tokenizer finds no token in it")
        num_cut = sum(len(answer) > limit for answer in answers)
        return TokenPair(prompt_ids, chosen, rejected, prompt_cut, num_cut, num_apart, texts.num_as_written)

    def _divided(self, texts: Texts, ids: list[Divided]) -> tuple[list[int], list[list[int]], int]:
        """The prompt's ids, each answer's, and how many of these had to be tokenised apart.

        The prompt's are those of its text by itself, as generation would make them, unless the answers' own tokens
        agree on others.
        """
        (chosen, at_chosen), (rejected, at_rejected) = ids
        if at_chosen is not None and at_chosen == at_rejected and chosen[:at_chosen] == rejected[:at_chosen]:
            return chosen[:at_chosen], [chosen[at_chosen:], rejected[at_chosen:]], 0
        return self._divided_by_prompt(texts, [chosen, rejected])

    def _divided_by_prompt(self, texts: Texts, wholes: list[list[int]]) -> tuple[list[int], list[list[int]], int]:
        """Divide like `_divided` where the two texts alone do not settle it. `wholes`: of prompt with answer."""
        alone = self.encoder.encode([texts.prompt])[0]
        at = len(texts.prompt)
        cuts = [
            self.encoder.cut(texts.prompt + answer, at, whole, alone)
            for answer, whole in zip(texts.answers, wholes, strict=True)
        ]
        prompts = [cut[0] for cut in cuts if cut is not None]
        prompt = alone if alone in prompts or not prompts else prompts[0]
        responses = [
            cut[1] if cut is not None and cut[0] == prompt else self.encoder.apart(answer)
            for answer, cut in zip(texts.answers, cuts, strict=True)
        ]
        return prompt, responses, sum(cut is None or cut[0] != prompt for cut in cuts)

    def _begun(self, ids: list[int]) -> list[int]:
        """A prompt's ids at full length: one bos, then the text."""
        bos = self.tokenizer.bos_token_id
        while ids and ids[0] == bos:
            ids = ids[1:]
        if not ids:
            raise Unusable(EMPTY_PROMPT, "the tokenizer finds no token in it")
        return ids if bos is None else [bos, *ids]

    def _ended(self, ids: list[int], texts: Texts) -> list[int]:
        """An answer's ids at full length: the text, then the one token that ends it."""
        has_end = texts.is_closed and bool(ids) and ids[-1] in self.ends
        body, end = (ids[:-1], ids[-1]) if has_end else (ids, texts.end_id)
        bos = self.tokenizer.bos_token_id
        if any(token in self.ends or (bos is not None and token == bos) for token in body):
            raise Unusable(END_INSIDE)
        return [*body, end]

    def text(self, text: str) -> list[list[int]]:
        """Cut pretraining text into pieces of up to prompt + response tokens, each with a bos, the last with an eos."""
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        ids = [*self.encoder.encode([text])[0], self.tokenizer.eos_token_id]
        size = self.task.max_prompt_tokens + self.task.max_response_tokens - len(bos)
        return [bos + ids[start : start + size] for start in range(0, len(ids), size)]

    def _fit_prompt(self, ids: list[int]) -> tuple[list[int], bool]:
        limit = self.task.max_prompt_tokens
        if len(ids) <= limit:
            return ids, False
        if self.task.long_prompts == "drop":
            raise Unusable(PROMPT_TOO_LONG, f"{len(ids)} tokens")
        head = ids[:1] if self.tokenizer.bos_token_id is not None else []
        return head + ids[len(ids) - (limit - len(head)) :], True


def _wholes(texts: Texts) -> list[tuple[str, int]]:
    """The texts to encode, the prompt with each answer, and where the prompt ends in them."""
    return [(texts.prompt + answer, len(texts.prompt)) for answer in texts.answers]


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens on `texts`, and save it as a transformers folder.

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
