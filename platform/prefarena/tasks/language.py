"""The enumerable language: a seeded source of (prompt, response) whose every response can be listed.

Tokens are pad 0, bos 1, eos 2 and the letters from 3 on. A prompt is bos and a few letters; a response is at most
`response_limit` tokens, the last of them eos unless it was cut off at the limit. The source of demonstrations emits
letters and eos only. Its next-token logits at position t, after token u, in prompt x, are

    unigram[v] + bigram[u, v] + sum_j prompt[j, x_j, v] / sqrt(len x)      for a letter v
    hazard[t] + ending[u]                                                  for eos

with seeded Gaussian tables; u is the prompt's last letter at t = 0.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefarena.config import LanguageTask
from prefarena.errors import UserError
from prefarena.records import DEMONSTRATIONS, PROMPTS, content_id

PAD_ID, BOS_ID, EOS_ID, FIRST_LETTER_ID = 0, 1, 2, 3
PADDING = -1  # fills a row of `sequences` behind the response

_UNIGRAM_SCALE = 0.6
_BIGRAM_SCALE = 1.3
_PROMPT_SCALE = 1.1
_ENDING_SCALE = 0.5
_HAZARD = (1.0, 4.5)  # logit of eos at the first and at the last position


def seeded(seed: int, purpose: str) -> np.random.Generator:
    """Return a separate generator for every purpose, so that drawing more of one thing changes nothing else."""
    return np.random.default_rng([seed, *purpose.encode()])


def unpadded(sequence: np.ndarray) -> list[int]:
    """Return one row of `sequences` [L] as a list without its padding."""
    return [int(token) for token in sequence if token != PADDING]


def padded(responses: list[list[int]]) -> np.ndarray:
    """Return lists of token ids as int64 [N, longest], padded with -1."""
    rows = np.full((len(responses), max(map(len, responses), default=0)), PADDING, dtype=np.int64)
    for row, response in zip(rows, responses, strict=True):
        row[: len(response)] = response
    return rows


@dataclass(frozen=True)
class Source:
    """The logit tables of the source, in nats. V tokens, m prompt letters, L response positions."""

    unigram: np.ndarray  # [V]
    bigram: np.ndarray  # [V, V] previous, next
    prompt: np.ndarray  # [m, V, V] prompt position, prompt letter, next
    hazard: np.ndarray  # [L]
    ending: np.ndarray  # [V]

    def logps(self, prompts: np.ndarray, previous: np.ndarray, position: int) -> np.ndarray:
        """Next-token log-probs [N, V] for `prompts` [N, m] (letters) and `previous` tokens [N]."""
        num_letters = prompts.shape[1]
        logits = self.unigram + self.bigram[previous]
        for j in range(num_letters):
            logits = logits + self.prompt[j, prompts[:, j]] / np.sqrt(num_letters)
        logits[:, [PAD_ID, BOS_ID]] = -np.inf
        logits[:, EOS_ID] = self.hazard[position] + self.ending[previous]
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


class Language:
    """The vocabulary, prompts, source and tokenizer that a `LanguageTask` describes. A pure function of the task."""

    def __init__(self, task: LanguageTask) -> None:
        """Raises UserError when there are fewer different prompts than `num_prompts`."""
        self.task = task
        self.vocab_size = FIRST_LETTER_ID + task.num_letters
        num_possible = task.num_letters**task.prompt_letters
        if task.num_prompts > num_possible:
            raise UserError(
                f"task.num_prompts: {task.num_prompts} prompts were requested, but {task.prompt_letters} of "
                f"{task.num_letters} letters make only {num_possible}; raise prompt_letters or num_letters"
            )
        self.prompt_ids = self._draw_prompts(num_possible)
        self.covered = self._draw_covered()
        self.source = self._draw_source()

    def _draw_prompts(self, num_possible: int) -> list[list[int]]:
        chosen = seeded(self.task.seed, "prompts").choice(num_possible, size=self.task.num_prompts, replace=False)
        digits = np.stack(np.unravel_index(chosen, (self.task.num_letters,) * self.task.prompt_letters), axis=1)
        return [[BOS_ID, *(int(digit) + FIRST_LETTER_ID for digit in row)] for row in digits]

    def _draw_covered(self) -> np.ndarray:
        num_covered = max(1, round(self.task.covered_share * self.task.num_prompts))
        covered = np.zeros(self.task.num_prompts, dtype=bool)
        covered[seeded(self.task.seed, "covered").choice(self.task.num_prompts, num_covered, replace=False)] = True
        return covered

    def _draw_source(self) -> Source:
        rng, vocab_size = seeded(self.task.seed, "source"), self.vocab_size
        return Source(
            unigram=_UNIGRAM_SCALE * rng.standard_normal(vocab_size),
            bigram=_BIGRAM_SCALE * rng.standard_normal((vocab_size, vocab_size)),
            prompt=_PROMPT_SCALE * rng.standard_normal((self.task.prompt_letters, vocab_size, vocab_size)),
            hazard=np.linspace(*_HAZARD, self.task.response_limit),
            ending=_ENDING_SCALE * rng.standard_normal(vocab_size),
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer: a token a letter; encoding puts bos in front, as in `prompt_ids`; decoding joins letters."""
        letters = string.ascii_lowercase[: self.task.num_letters]
        vocabulary = ["<pad>", "<bos>", "<eos>", *letters]
        # A character outside the alphabet becomes pad: the language has no token for the unknown.
        backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<pad>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS_ID)]
        )
        backend.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="right"
        )

    def save_tokenizer(self, folder: str | Path) -> None:
        """Write the tokenizer so that `AutoTokenizer.from_pretrained(folder)` loads it."""
        self.tokenizer().save_pretrained(str(folder))

    def prompts(self) -> pa.Table:
        """All prompts as records.PROMPTS, in the order of `prompt_ids`; the split is `train` for each."""
        rows = [
            {"id": content_id("prompt", ids), "prompt_ids": ids, "covered": bool(covered), "split": "train"}
            for ids, covered in zip(self.prompt_ids, self.covered, strict=True)
        ]
        return pa.Table.from_pylist(rows, schema=PROMPTS)

    def prompt_rows(self, prompts: list[list[int]]) -> np.ndarray:
        """The row [N] of each prompt in `prompt_ids`. Raises UserError for a prompt that is not of this language."""
        row_of = {tuple(ids): row for row, ids in enumerate(self.prompt_ids)}
        for ids in prompts:
            if tuple(ids) not in row_of:
                raise UserError(f"{list(ids)} is not a prompt of this language")
        return np.array([row_of[tuple(ids)] for ids in prompts], dtype=np.int64)

    def sample_demonstrations(self) -> pa.Table:
        """`num_demonstrations` draws from the source as records.DEMONSTRATIONS, evenly (±1) over the prompts."""
        number, limit = self.task.num_demonstrations, self.task.response_limit
        rng = seeded(self.task.seed, "demonstrations")
        owner = np.arange(number) % self.task.num_prompts
        prompts = np.array(self.prompt_ids)[owner, 1:]
        sequences = np.full((number, limit), PADDING, dtype=np.int64)
        previous, alive = prompts[:, -1], np.ones(number, dtype=bool)
        for position in range(limit):
            logps = self.source.logps(prompts, previous, position)
            previous = (logps + rng.gumbel(size=logps.shape)).argmax(axis=1)
            sequences[alive, position] = previous[alive]
            alive &= previous != EOS_ID
        rows = []
        for i, sequence in enumerate(sequences):
            prompt_ids, response_ids = self.prompt_ids[owner[i]], unpadded(sequence)
            identifier = content_id("demonstration", i, prompt_ids, response_ids)
            rows.append({"id": identifier, "prompt_ids": prompt_ids, "response_ids": response_ids})
        return pa.Table.from_pylist(rows, schema=DEMONSTRATIONS)

    def source_logps(self, sequences: np.ndarray) -> np.ndarray:
        """The source's log p(y|x) [P, N] for every prompt and row of `sequences` [N, L], -1 behind the response."""
        totals = np.zeros((len(self.prompt_ids), len(sequences)))
        for total, prompt_ids in zip(totals, self.prompt_ids, strict=True):
            prompt = np.array([prompt_ids[1:]])
            previous = np.full(len(sequences), prompt[0, -1])
            for position in range(sequences.shape[1]):
                token = sequences[:, position]
                logps = self.source.logps(prompt, np.arange(self.vocab_size), position)
                total += np.where(token == PADDING, 0.0, logps[previous, np.maximum(token, 0)])
                previous = np.maximum(token, 0)
        return totals
