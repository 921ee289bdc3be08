"""A policy as lm-eval asks it: texts in; log-likelihoods by our own scoring, and answers by the generation engine.

It needs the optional package lm-eval, and is imported where abilities are measured. Texts become tokens as in lm-eval's
own model of transformers (`lm_eval.models.huggingface.HFLM`), so that numbers are comparable with published ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from prefarena.config import Abilities
from prefarena.errors import UserError

#: Contexts and continuations in, [N, 2] out, as `continuation_logps` has it.
Score = Callable[[list[list[int]], list[list[int]]], np.ndarray]
#: Contexts, the most tokens of an answer and the temperature in; the answers' tokens out.
Generate = Callable[[list[list[int]], int, float], list[list[int]]]

_MOST_TOKENS = 256  # of an answer, where a task does not say, as in HFLM
_SAMPLER = {"do_sample", "temperature", "max_gen_toks", "until"}
#: What a task may say beside these without meaning anything for an answer of greedy decoding.
_OF_NO_MEANING = {"top_p": 1.0, "top_k": 0, "num_beams": 1}


class PolicyLM(TemplateLM):
    """A policy for lm-eval. max_length: most tokens that the model reads; longer contexts lose their first ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, score: Score, generate: Generate) -> None:
        super().__init__()
        self.tokenizer, self._max_length = tokenizer, max_length
        self._score, self._generate = score, generate

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        keywords = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            keywords = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **keywords))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        contexts, continuations = [], []
        for asked, context, continuation in requests:
            if not continuation or len(continuation) > self._max_length:
                raise UserError(
                    f"evaluation.abilities: a continuation of {len(continuation)} tokens cannot be scored; the model "
                    f"reads at most {self._max_length}: {str(asked)[:200]!r}"
                )
            whole = (context + continuation)[-(self._max_length + 1) :]
            contexts.append(whole[: -len(continuation)])
            continuations.append(continuation)
        found = self._score(contexts, continuations) if contexts else np.zeros((0, 2))
        return [(float(logp), bool(is_greedy)) for logp, is_greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows, counts = list[tuple[Any, list[int], list[int]]](), list[int]()
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            own = get_rolling_token_windows(tokens, self.prefix_token_id, self._max_length, 1)
            cut = [(request.args[0], *make_disjoint_window(window)) for window in own]
            windows += cut
            counts.append(len(cut))
        values = iter(self._loglikelihood_tokens(windows))
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        groups: dict[tuple[int, float], list[int]] = defaultdict(list)
        contexts, stops = list[list[int]](), list[list[str]]()
        eos = str(self.tokenizer.decode(self.eot_token_id))
        for place, request in enumerate(requests):
            context, given = request.args
            settings = dict(normalize_gen_kwargs(given, _MOST_TOKENS))
            self._check(settings)
            most = int(settings["max_gen_toks"])
            if most >= self._max_length:
                raise UserError(
                    f"evaluation.abilities: a task asks for answers of {most} tokens, but the model reads "
                    f"at most {self._max_length} including the question"
                )
            contexts.append(self.tok_encode(context)[-(self._max_length - most) :])
            stops.append(handle_stop_sequences(settings.get("until"), eos))
            groups[most, _temperature(settings)].append(place)
        answers: dict[int, list[int]] = {}
        for (most, temperature), places in groups.items():
            found = self._generate([contexts[place] for place in places], most, temperature)
            answers |= dict(zip(places, found, strict=True))
        return [
            postprocess_generated_text(self.tokenizer.decode(answers[place], skip_special_tokens=True), stop, None)
            for place, stop in enumerate(stops)
        ]

    def _check(self, settings: dict[str, Any]) -> None:
        """Raise UserError for a sampler that the engine is not asked for."""
        greedy = _temperature(settings) == 0
        for name, value in settings.items():
            if name in _SAMPLER or greedy or _OF_NO_MEANING.get(name) == value:
                continue
            raise UserError(
                f"evaluation.abilities: a task samples answers with {name}: {value}, which is not supported; have it "
                "decode greedily, or set only a temperature"
            )


def run_tasks(model: PolicyLM, tasks: dict[str, Any], settings: Abilities) -> dict[str, list[dict[str, Any]]]:
    """Ask the policy all items of the tasks. Returns lm-eval's logged items of each, as `item_values` reads them."""
    found = evaluate(
        model, tasks, limit=settings.limit, log_samples=True, bootstrap_iters=0, verbosity="ERROR",
        apply_chat_template=settings.chat_template,
    )  # fmt: skip
    if found is None:
        raise RuntimeError("lm-eval gave no results")
    return dict(found["samples"])


class Counted:
    """In place of a policy's scores and answers: the lengths of what tasks ask for.

    scored: tokens of contexts and of their continuations. answered: tokens of questions, and the most of an answer.
    """

    def __init__(self) -> None:
        self.scored, self.answered = list[tuple[int, int]](), list[tuple[int, int]]()

    def score(self, contexts: list[list[int]], continuations: list[list[int]]) -> np.ndarray:
        self.scored += [(len(one), len(other)) for one, other in zip(contexts, continuations, strict=True)]
        return np.zeros((len(contexts), 2))

    def generate(self, contexts: list[list[int]], max_tokens: int, _: float) -> list[list[int]]:
        self.answered += [(len(one), max_tokens) for one in contexts]
        return [[] for _ in contexts]


def _temperature(settings: dict[str, Any]) -> float:
    """0 where answers are decoded greedily."""
    return float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0))
