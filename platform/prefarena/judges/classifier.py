"""A judge that is a third-party sequence-classification model, with its own tokenizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from prefarena.config import ClassifierJudge
from prefarena.data.plan import bounded_passes, largest_scored
from prefarena.errors import UserError
from prefarena.judges.texts import JudgeRow, judge_rows
from prefarena.modeling.arithmetic import Arithmetic, body_in_weights, products_of
from prefarena.modeling.inspection import inspect_classifier
from prefarena.modeling.load import load_checked, load_tokenizer, read_tokenizer
from prefarena.modeling.transfer import moved
from prefarena.modeling.vocabulary import check_tokens


class ClassifierScorer:
    """Scores by the model's one logit. Only sequences of equal length share a pass, so that there is no padding at all.

    A pass has at most `batch_size` of them, and `largest_scored` tokens or one sequence.
    """

    def __init__(
        self,
        settings: ClassifierJudge,
        tokenizer: str,
        batch_size: int = 64,
        device: str | torch.device = "cpu",
        arithmetic: Arithmetic = "float32",
    ) -> None:
        """Raises UserError where no such model can be loaded, or it has more than one label."""
        self._own = check_classifier(settings)
        with _named():
            model = load_checked(
                AutoModelForSequenceClassification, settings.path, settings.revision, "sequence-classification model"
            )
        text_config = model.config.get_text_config()
        limits = [
            settings.max_tokens,
            self._own.model_max_length,
            getattr(text_config, "max_position_embeddings", None),
        ]
        self._max_tokens = min(limit for limit in limits if limit)
        self._own.truncation_side = "left"
        # Decoders read the last token that is not the pad id. Nothing is padded here, and where pad and eos share an
        # id they would pass over an eos that belongs to the text; no token has the id -1.
        text_config.pad_token_id = -1
        torch.nn.Module.to(body_in_weights(model, arithmetic), device)
        self._model, self._arithmetic = model.eval(), arithmetic
        self._batch_size, self._policy = batch_size, load_tokenizer(tokenizer)

    @torch.no_grad()
    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """Return logits, float64 [N]; one that is not finite becomes nan."""
        encoded = [self._encode(row) for row in judge_rows(self._policy, prompts, responses)]
        same_length: dict[int, list[int]] = defaultdict(list)
        for index, ids in enumerate(encoded):
            same_length[len(ids)].append(index)
        order = list[int]()
        found = torch.empty(len(encoded), dtype=torch.float64, device=self._model.device)
        most_tokens = largest_scored(self._model.device.type)
        for length in sorted(same_length):
            rows = same_length[length]
            for places in bounded_passes(np.full(len(rows), length), self._batch_size, most_tokens):
                batch = [rows[place] for place in places]
                (inputs,) = moved([np.array([encoded[index] for index in batch], np.int64)], self._model.device)
                with products_of(self._arithmetic):
                    logits = self._model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
                found[len(order) : len(order) + len(batch)] = logits[:, 0]
                order += batch
        values = np.empty(len(encoded))
        values[order] = found.cpu().numpy()  # once: every copy to the host waits for all that came before
        return np.where(np.isfinite(values), values, np.nan)

    def _encode(self, row: JudgeRow) -> list[int]:
        """Encode with the model's tokenizer: as one exchange by its chat template, else prompt and response joined."""
        text, has_specials = row["prompt"] + row["response"], False
        if self._own.chat_template:
            chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
            text, has_specials = str(self._own.apply_chat_template(chat, tokenize=False)), True
        ids: list[int] = self._own(
            text, add_special_tokens=not has_specials, truncation=True, max_length=self._max_tokens
        )["input_ids"]
        if not ids:
            raise UserError(f"judge classifier: its tokenizer finds no tokens in {text!r:.80}")
        return ids


def check_classifier(settings: ClassifierJudge) -> PreTrainedTokenizerBase:
    """Return its tokenizer. Raises UserError where config, tokenizer or headers show that it cannot be used."""
    with _named():
        config = inspect_classifier(settings.path, settings.revision)
        tokenizer = read_tokenizer(settings.path, settings.revision)
        check_tokens(settings.path, tokenizer, config, settings.revision)
    if config.num_labels != 1:
        raise UserError(
            f"judge classifier {settings.path}: it has {config.num_labels} labels, and a judge must have one"
        )
    return tokenizer


@contextmanager
def _named() -> Iterator[None]:
    """Make errors inside say that they are about the judge, since its path may be another model's, too."""
    try:
        yield
    except UserError as error:
        raise UserError(f"judge classifier {error}") from None
