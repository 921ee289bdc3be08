"""How many rows there will be, and how long they are: from the language's source, or a text's first rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from prefarena.config import Comparison, DrawnPairs, LanguageTask, RewardModel, TextTask
from prefarena.data.first_rows import FirstRows
from prefarena.data.limits import usable_pairs, usable_prompts
from prefarena.data.splits import Shares
from prefarena.data.tokenization import Tokenizer
from prefarena.errors import UserError
from prefarena.modeling.passes import Pass, passed
from prefarena.tasks.language import Language

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """A table of `number` rows, known by a sample: tokens of prompts [N], and of each prompt's responses [N, R]."""

    number: int
    prompts: _Ints
    responses: _Ints

    def filled(self) -> tuple[_Ints, _Ints]:
        """Lengths of all rows, by repeating the sample."""
        return np.resize(self.prompts, self.number), np.resize(self.responses, (self.number, self.responses.shape[1]))

    def taking(self, number: int) -> Rows:
        return Rows(number, self.prompts, self.responses)

    def answered(self, lengths: Sequence[int]) -> Rows:
        """The same prompts with responses of these lengths, repeated as needed; a row takes neighbouring ones."""
        own = np.resize(np.array(lengths, np.int64), len(self.prompts))
        columns = [np.roll(own, place) for place in range(self.responses.shape[1])]
        return Rows(self.number, self.prompts, np.maximum(1, np.stack(columns, 1)))

    def single(self, column: int = 0) -> Rows:
        """Each prompt with one of its responses."""
        return Rows(self.number, self.prompts, self.responses[:, column : column + 1])

    def apart(self) -> Rows:
        """Each response as a row of its own."""
        width = self.responses.shape[1]
        return Rows(self.number * width, np.repeat(self.prompts, width), self.responses.reshape(-1, 1))

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]]) -> Rows:
        """All rows, each with one response: tokens of the prompt and of the response."""
        both = np.array(sizes, np.int64).reshape(-1, 2)
        return cls(len(both), both[:, 0], both[:, 1:])

    def cut_to_shorter(self) -> Rows:
        """All responses to a prompt as long as the shortest of them."""
        shortest = self.responses.min(1, keepdims=True)
        return Rows(self.number, self.prompts, np.broadcast_to(shortest, self.responses.shape))

    @property
    def mean_prompt(self) -> float:
        return float(self.prompts.mean())

    @property
    def mean_response(self) -> float:
        return float(self.responses.mean())

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest prompt, and of the longest response."""
        return int(self.prompts.max()), int(self.responses.max())

    def passed(self) -> Pass:
        """The work of passes over all rows, where responses share their prompt."""
        return passed(self.prompts, self.responses).times(self.number / len(self.prompts))


@dataclass(frozen=True)
class Asked:
    """What an evaluation of abilities asks of a policy.

    scored: contexts with the continuation whose log-likelihood is asked for. answered: questions with answers of as
    many tokens as each may have, which is more than most will have.
    """

    scored: Rows
    answered: Rows


@dataclass(frozen=True)
class Data:
    """The data of a comparison. judge: rows set aside for a learned judge. prompts: to sample on, by training.

    row_seconds: what making a row of the language took, or reading and tokenising one. some_prompts: a few as tokens.
    drawn: where pairs are drawn, every response that is, of which judges order `num_labelled`; the other tables are
    made of these, demonstrations too unless the rows have `answers`. abilities: where they are measured.
    responses_per_pair: distinct ones; drawn pairs have responses in common.
    """

    pairs: Rows
    test_pairs: Rows
    demonstrations: Rows
    judge: Rows
    prompts: Rows
    row_seconds: float = 0.0
    num_raw: int = 0
    some_prompts: tuple[tuple[int, ...], ...] = ()
    drawn: Rows | None = None
    num_labelled: int = 0
    answers: bool = True
    abilities: Asked | None = None
    responses_per_pair: float = 2.0

    @property
    def test_responses(self) -> Rows:
        """The distinct responses of held-out pairs, each as a row."""
        return self.test_pairs.apart().taking(round(self.responses_per_pair * self.test_pairs.number))

    def answered(self, lengths: Sequence[int]) -> Data:
        """The data if the model's own responses have these lengths."""
        found = replace(self, prompts=self.prompts.answered(lengths))
        if self.drawn is None:
            return found
        pairs, test_pairs = self.pairs.answered(lengths), self.test_pairs.answered(lengths)
        demonstrations = self.demonstrations if self.answers else self.demonstrations.answered(lengths)
        return replace(
            found, drawn=self.drawn.answered(lengths), pairs=pairs, test_pairs=test_pairs, demonstrations=demonstrations
        )


def of_language(task: LanguageTask) -> Data:
    """The data of the language. Pairs are assumed to be as long as demonstrations, which the reference imitates."""
    started = time.perf_counter()
    language = Language(task)
    table = language.sample_demonstrations()
    seconds = time.perf_counter() - started
    owners = language.prompt_rows(table["prompt_ids"].to_pylist())
    responses = np.array([len(ids) for ids in table["response_ids"].to_pylist()], np.int64)
    prompts = np.array([len(ids) for ids in language.prompt_ids], np.int64)
    covered = responses[language.covered[owners]]
    both = np.stack([covered, np.roll(covered, 1)], 1)
    pairs = Rows(task.num_pairs, np.full(len(both), prompts[0]), both)
    demonstrations = Rows(task.num_demonstrations, prompts[owners], responses[:, None])
    return Data(
        pairs=pairs,
        test_pairs=pairs.taking(task.num_test_pairs),
        demonstrations=demonstrations,
        judge=pairs.taking(0),
        prompts=Rows(task.num_prompts, pairs.prompts, pairs.responses[:, :1]),
        row_seconds=seconds / task.num_demonstrations,
        num_raw=task.num_demonstrations,
        some_prompts=tuple(map(tuple, language.prompt_ids)),
    )


def of_text(
    config: Comparison, task: TextTask, first: FirstRows, tokenizer: Tokenizer, num_rows: int, shares: Shares,
    *, answers: bool = True,
) -> Data:  # fmt: skip
    """The data of text, from its first usable rows, tokenised as for training. num_rows: of the whole source.

    Without `answers` the rows are prompts alone; what is drawn on them is taken to be as long as it may be. Raises
    UserError where none of the rows can be used.
    """
    table, seconds = (usable_pairs if answers else usable_prompts)(task, first, tokenizer)
    if not table.num_rows:
        raise UserError(f"{task.data}: none of its first {first.num_rows} rows can be trained on with this model")
    tokens = table["prompt_ids"].to_pylist()
    lengths = np.array([len(ids) for ids in tokens], np.int64)
    both = np.full((len(tokens), 2), task.max_response_tokens, np.int64)
    if answers:
        columns = [pc.list_value_length(table[f"{name}_ids"]).to_numpy() for name in ("chosen", "rejected")]
        both = np.stack(columns, 1).astype(np.int64)
    usable = num_rows * len(lengths) / first.num_rows
    if task.pairs is not None:  # which are drawn on each prompt once
        usable *= len(set(map(tuple, tokens))) / len(tokens)
    rows = Rows(0, lengths, both)
    test = usable * shares.test if task.test_source is None else min(2000.0, usable)
    judge = usable * shares.judge if isinstance(config.judge, RewardModel) else 0.0
    left = usable - judge - (test if task.test_source is None else 0.0)
    pairs = rows.taking(max(1, round(left * task.covered_share)))
    data = Data(
        pairs=pairs,
        test_pairs=rows.taking(max(1, round(test))),
        demonstrations=rows.single().taking(pairs.number),
        judge=rows.taking(round(judge)),
        prompts=rows.single().taking(max(1, round(left))),
        row_seconds=seconds / first.num_rows,
        num_raw=num_rows,
        some_prompts=tuple(map(tuple, tokens)),
        answers=answers,
    )
    data = data if task.pairs is None else _with_drawn(data, task.pairs)
    return data if task.validation_share is None else _set_aside(data, task.validation_share)


def _with_drawn(data: Data, settings: DrawnPairs) -> Data:
    """Pairs of responses that are drawn on the prompts. No two of them are taken to be equal, or tied."""
    number, covered, tested = settings.num_samples, data.pairs.number, data.test_pairs.number
    of_each = number * (number - 1) // 2 if settings.choose == "all" else 1
    demonstrations = data.demonstrations if data.answers else data.prompts.taking(number * data.prompts.number)
    return replace(
        data,
        drawn=data.prompts.taking(number * (data.prompts.number + tested)),
        num_labelled=number * (covered + tested),
        pairs=data.pairs.taking(of_each * covered),
        test_pairs=data.test_pairs.taking(of_each * tested),
        demonstrations=demonstrations,
        responses_per_pair=number / of_each if settings.choose == "all" else 2.0,
    )


def _set_aside(data: Data, share: float) -> Data:
    """Set aside the share of the training prompts on which `prefarena tune` measures its trials."""
    left = {name: getattr(data, name) for name in ("pairs", "demonstrations", "prompts")}
    kept = {name: rows.taking(max(1, round((1 - share) * rows.number))) for name, rows in left.items()}
    return replace(data, test_pairs=data.pairs.taking(max(1, round(share * data.pairs.number))), **kept)


def ids_like(lengths: Sequence[int], vocab_size: int, random: np.random.Generator) -> list[list[int]]:
    """Random token ids of these lengths."""
    return [random.integers(0, vocab_size, size).tolist() for size in lengths]
