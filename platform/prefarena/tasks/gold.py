"""The gold reward of the enumerable language: the judge that labels its pairs and measures every method.

For a prompt x of m letters and a response y of n tokens the raw reward is

    sum_t [ sum_j prompt[j, x_j, y_t] / sqrt(m)  +  position[t, y_t]  +  neighbour[y_{t-1}, y_t] ]

with y_{-1} the prompt's last letter and seeded Gaussian tables over the whole vocabulary, so that every response has
a reward: an empty one 0, and one with pad or bos inside less by `CONTROL_COST` for each. The reward is
(raw - offset[x]) / scale: mean 0 under the reference policy on every prompt, and variance 1 on the average prompt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefarena.config import LanguageTask
from prefarena.errors import UserError
from prefarena.mirror import bring
from prefarena.tasks.language import BOS_ID, FIRST_LETTER_ID, PAD_ID, PADDING, padded, seeded

CONTROL_COST = 2.0
_FORMAT = 1


@dataclass(frozen=True)
class GoldReward:
    """Tables and standardisation. V tokens, m prompt letters, L response positions; offsets by prompt token ids."""

    prompt: np.ndarray  # [m, V, V] prompt position, prompt letter, response token
    position: np.ndarray  # [L, V]
    neighbour: np.ndarray  # [V, V] previous token, token
    offsets: dict[tuple[int, ...], float]
    scale: float

    @classmethod
    def fit(
        cls, task: LanguageTask, prompts: list[list[int]], sequences: np.ndarray, ref_logps: np.ndarray
    ) -> GoldReward:
        """Draw the tables from `task.seed` and standardise them under the reference.

        `sequences` [N, L] are all responses (-1 behind the response), `ref_logps` [P, N] the reference's exact
        log-probs of them for each of the P prompts. Raises UserError when the raw reward does not vary.
        """
        rng, vocab_size = seeded(task.seed, "gold"), FIRST_LETTER_ID + task.num_letters
        position = 0.7 * rng.standard_normal((task.response_limit, vocab_size))
        position[:, [PAD_ID, BOS_ID]] -= CONTROL_COST
        raw = cls(
            prompt=rng.standard_normal((task.prompt_letters, vocab_size, vocab_size)),
            position=position,
            neighbour=rng.standard_normal((vocab_size, vocab_size)),
            offsets={tuple(prompt): 0.0 for prompt in prompts},
            scale=1.0,
        )
        rewards, probabilities = raw.table(prompts, sequences), np.exp(ref_logps)
        means = (probabilities * rewards).sum(axis=1)
        variance = float((probabilities * (rewards - means[:, None]) ** 2).sum(axis=1).mean())
        if not variance > 1e-12:
            raise UserError("task: the reference policy gives one response all the probability; its reward cannot vary")
        offsets = {tuple(prompt): float(mean) for prompt, mean in zip(prompts, means, strict=True)}
        return cls(raw.prompt, raw.position, raw.neighbour, offsets, float(np.sqrt(variance)))

    def table(self, prompts: list[list[int]], sequences: np.ndarray) -> np.ndarray:
        """Rewards [P, N] of every row of `sequences` [N, L] (-1 behind the response) for each of P prompts."""
        present = sequences != PADDING
        if present.any() and sequences.max() >= len(self.neighbour):
            raise UserError(f"gold reward: token {sequences.max()} is not one of the language's {len(self.neighbour)}")
        if sequences.shape[1] > len(self.position) and present[:, len(self.position) :].any():
            raise UserError(f"gold reward: a response has more than the language's {len(self.position)} tokens")
        tokens, present = np.maximum(sequences, 0)[:, : len(self.position)], present[:, : len(self.position)]
        shared = np.where(present, self.position[np.arange(tokens.shape[1]), tokens], 0.0).sum(axis=1)
        if tokens.shape[1]:
            shared += np.where(present[:, 1:], self.neighbour[tokens[:, :-1], tokens[:, 1:]], 0.0).sum(axis=1)
        return np.stack([self._standardised(prompt, tokens, present, shared) for prompt in prompts])

    def _standardised(
        self, prompt: list[int], tokens: np.ndarray, present: np.ndarray, shared: np.ndarray
    ) -> np.ndarray:
        """Rewards [N] for one prompt; `shared` [N] is what does not depend on it."""
        offset = self.offsets.get(tuple(prompt))
        if offset is None:
            raise UserError(f"gold reward: {list(prompt)} is not a prompt of this language")
        letters = np.array(prompt[1:])
        weights = self.prompt[np.arange(len(letters)), letters].sum(axis=0) / np.sqrt(len(letters))
        raw = shared + np.where(present, weights[tokens], 0.0).sum(axis=1)
        if tokens.shape[1]:
            raw += np.where(present[:, 0], self.neighbour[letters[-1], tokens[:, 0]], 0.0)
        return (raw - offset) / self.scale

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """Rewards [N] of N (prompt, response) pairs of token ids. Raises UserError for a prompt that is unknown."""
        sequences, rewards = padded(responses), np.zeros(len(responses))
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(tuple(prompt), []).append(row)
        for key, rows in rows_of.items():
            rewards[rows] = self.table([list(key)], sequences[rows])[0]
        return rewards

    def save(self, path: str | Path) -> None:
        """Write everything the reward needs as JSON: the tables too, so that no seed or model is needed to read it."""
        tree = {
            "format": _FORMAT,
            "scale": self.scale,
            "offsets": {" ".join(map(str, prompt)): offset for prompt, offset in self.offsets.items()},
            "prompt": self.prompt.tolist(),
            "position": self.position.tolist(),
            "neighbour": self.neighbour.tolist(),
        }
        Path(path).write_text(json.dumps(tree), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> GoldReward:
        """Read what `save` wrote. Raises UserError when the file is missing or not a gold reward."""
        try:
            bring(path)
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            if tree["format"] != _FORMAT:
                raise UserError(
                    f"{path}: gold reward of format {tree['format']}, but this version reads format {_FORMAT}"
                )
            offsets = {tuple(map(int, key.split())): float(offset) for key, offset in tree["offsets"].items()}
            prompt, position, neighbour = (np.array(tree[name], float) for name in ("prompt", "position", "neighbour"))
            return cls(prompt, position, neighbour, offsets, float(tree["scale"]))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a gold reward ({error!r})") from None
