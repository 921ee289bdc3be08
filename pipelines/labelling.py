"""Verdicts of judges on many responses: by actors of Ray Data, in parts, of which finished ones are kept.

A part is scored by one actor. What models and functions said of it is a file (`kept_rollouts.KeptValues`); an endpoint
keeps its answers itself. So a run that is killed asks again for the parts that are missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.kept_rollouts import PART_ROLLOUTS, KeptValues, Wanted, training_of
from pipelines.reference import scoring_options
from prefarena.cluster.pools import map_in_pool, through_deaths
from prefarena.config import Endpoint, PairwiseJudge, Resources
from prefarena.errors import JudgeError, UserError
from prefarena.evaluation.pairwise import pair_values
from prefarena.judges.pairwise import PairwiseComparer
from prefarena.judges.spec import Judge, JudgeSpec, load_comparer, load_judge, usage_of
from prefarena.judges.usage import total_costs
from prefarena.modeling.arithmetic import named
from prefarena.modeling.flops import count_model
from prefarena.modeling.load import load_settings
from prefarena.modeling.passes import passed

_ANSWER = pa.schema([("part", pa.int64()), ("values", pa.list_(pa.float64())), ("failure", pa.string()),
                     ("costs", pa.list_(pa.struct([("name", pa.string()), ("number", pa.int64())])))])  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """Questions to a judge: N responses to N prompts, and for a pairwise judge the N others to compare them with."""

    prompts: list[list[int]]
    responses: list[list[int]]
    others: list[list[int]] | None = None

    def parts(self) -> list[dict[str, Any]]:
        """Neighbouring questions, as rows of a Ray Data set."""
        found = []
        for number, start in enumerate(range(0, len(self.prompts), PART_ROLLOUTS)):
            own = slice(start, start + PART_ROLLOUTS)
            others = [] if self.others is None else self.others[own]
            row = {"prompts": self.prompts[own], "responses": self.responses[own], "others": others}
            found.append({"part": number, **row})
        return found


def ask(
    questions: Questions, spec: JudgeSpec, resources: Resources, batch_size: int, kept: Path
) -> tuple[np.ndarray, Counter[str]]:
    """Return a judge's value for each question, float64 [N], and what was paid for. Needs Ray.

    A score; of a pairwise judge what the response counts against the other, 0, 1/2 or 1; nan where it is silent. kept:
    the folder of finished parts. Raises UserError, with the judge's own sentence, where it cannot be used.
    """
    parts = questions.parts()
    answers: dict[int, list[float]] = {}
    costs: Counter[str] = Counter()

    def attempt() -> Iterator[dict[str, Any]]:
        import ray.data

        missing = [part for part in parts if part["part"] not in answers]
        rows = ray.data.from_items(missing, override_num_blocks=len(missing))
        done = map_in_pool(
            rows,
            Labeller,
            min(_num_actors(spec, resources), len(missing)),
            fn_constructor_args=(spec, batch_size, resources.device, max(1, int(resources.scoring.cpus)), str(kept)),
            batch_format="pyarrow",
            batch_size=1,
            **scoring_options(resources),
        )
        for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch.to_pylist()

    for answer in through_deaths(attempt, "labelling pairs") if parts else ():
        if answer["failure"] is not None:
            raise UserError(f"the pairs cannot be labelled: {answer['failure']}")
        answers[answer["part"]] = answer["values"]
        costs.update({cost["name"]: cost["number"] for cost in answer["costs"]})
    return np.array([value for part in parts for value in answers[part["part"]]], np.float64), costs


def scoring_flops(questions: Questions, reward_model: str) -> int:
    """FLOPs of scoring the questions with a reward model, each response behind a prompt of its own."""
    prompts, responses = (np.array([*map(len, side)], float) for side in (questions.prompts, questions.responses))
    counts = count_model(load_settings(reward_model))
    return round(counts.forward(passed(prompts, responses[:, None]), head=False))


def _num_actors(spec: JudgeSpec, resources: Resources) -> int:
    """The number of actors: one for an endpoint, whose `concurrency` says how much it is asked at once."""
    return 1 if isinstance(spec.settings, Endpoint) else resources.scoring.num_actors or resources.num_workers


class Labeller:
    """A Ray Data actor: parts of questions in, what the judge says of them out."""

    def __init__(self, spec: JudgeSpec, batch_size: int, device: str, num_threads: int, kept: str) -> None:
        torch.set_num_threads(num_threads)
        self._spec, self._batch_size, self._device = spec, batch_size, device
        self._kept = KeptValues(Path(kept))

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._answer(part) for part in batch.to_pylist()], schema=_ANSWER)

    def _answer(self, part: dict[str, Any]) -> dict[str, Any]:
        try:
            before = self._costs()
            values = self.ask(part["prompts"], part["responses"], part["others"])
        except (JudgeError, UserError) as error:  # travels as a row, for the driver to say it in one sentence
            return {"part": part["part"], "values": [], "failure": str(error), "costs": []}
        paid = {name: number - before[name] for name, number in self._costs().items()}
        costs = [{"name": name, "number": number} for name, number in paid.items()]
        return {"part": part["part"], "values": values.tolist(), "failure": None, "costs": costs}

    def ask(
        self, prompts: list[list[int]], responses: list[list[int]], others: list[list[int]] | None = None
    ) -> np.ndarray:
        """The judge's values [N] of a part. Raises what the judge raises."""
        if isinstance(self._spec.settings, PairwiseJudge):
            games = self._comparer.compare(prompts, responses, others or [])
            return pair_values(games.first, games.second)
        if isinstance(self._spec.settings, Endpoint):
            return self.score(prompts, responses)
        training = training_of(self._spec.path) if self._spec.path else None
        given_by = ["labels", self._spec.settings.model_dump(mode="json"), training, self._batch_size, self._device]
        return self._kept.complete(Wanted([*given_by, *named(self._spec.arithmetic)], prompts, responses, self.score))

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """New scores [N], nan where the judge has none."""
        scores = self._judge.score(prompts, responses)
        return np.where(np.isfinite(scores), scores, np.nan)

    @cached_property
    def _judge(self) -> Judge:
        """The judge, made for the first missing part, so that a fault in it is reported as that part's failure."""
        return load_judge(self._spec, self._batch_size, self._device)

    @cached_property
    def _comparer(self) -> PairwiseComparer:
        return load_comparer(self._spec)

    def _costs(self) -> dict[str, int]:
        settings = self._spec.settings
        if isinstance(settings, PairwiseJudge):
            return total_costs([self._comparer.usage])
        return total_costs([usage_of(self._judge)]) if isinstance(settings, Endpoint) else {}
