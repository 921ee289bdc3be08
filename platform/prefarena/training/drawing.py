"""New pairs of a policy in training: two responses of it to each prompt, ordered by a judge, with reference log-probs.

What is drawn depends on the policy, the job's seed and the step, whatever the number of workers: requests, labels and
passes are pure functions of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from prefarena.data.plan import bounded_passes, largest_scored
from prefarena.generation.interface import Pending, RolloutSource, Sampling
from prefarena.judges.spec import Judge
from prefarena.modeling.arithmetic import attends_in, halve_products, in_weights
from prefarena.modeling.flops import count_model
from prefarena.modeling.logprobs import LogProbs, can_pack
from prefarena.modeling.lora import adapted_weights, merged_weights
from prefarena.modeling.packing import pack
from prefarena.modeling.parts import whole
from prefarena.modeling.passes import NOTHING, passed
from prefarena.records import ONLINE_PAIRS, Rollout, content_id
from prefarena.settings.judges import is_model
from prefarena.tasks.annotation import chance_of_gap
from prefarena.tasks.language import seeded
from prefarena.training.jobs import Drawing, OffPolicyJob
from prefarena.training.learner import Learner
from prefarena.training.loading import Loader
from prefarena.training.policy_source import PolicySource
from prefarena.training.reward_model import over_workers
from prefarena.training.tally import Tally
from prefarena.training.worker import Worker

#: So often a prompt is sampled on until its two responses differ and the judge tells them apart.
_MOST_ROUNDS = 8
#: Responses that are asked for in one call, and that a model scores in one pass.
_ASKED_AT_ONCE, _SCORED_AT_ONCE = 2048, 64
#: Columns of a pair, in the order in which the reference's pass gives them.
_LOGP_NAMES = ("ref_chosen_logp", "ref_rejected_logp", "ref_chosen_shared_logp", "ref_rejected_shared_logp")

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class TrainedWeights:
    """The weights of a policy in training, as generators get them; any adapters are merged on the way."""

    model: PreTrainedModel
    has_adapters: bool

    @property
    def changing(self) -> frozenset[str] | None:
        return adapted_weights(self.model) if self.has_adapters else None

    def weights(self, *, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        if self.has_adapters:
            yield from merged_weights(self.model, names=names)
            return
        for name, tensor in self.model.state_dict().items():
            yield name, whole(tensor)


@dataclass(frozen=True)
class Done:
    """A request that is already answered, for workers that ask for nothing."""

    def result(self) -> list[Rollout]:
        return []


@dataclass
class Answers:
    """The answers to one prompt: two different responses with their scores, once there are any, and what they cost."""

    responses: list[list[int]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    num_judged: int = 0
    num_tokens: int = 0

    def count(self, rollouts: list[Rollout]) -> None:
        self.num_tokens += sum(len(one.response_ids) for one in rollouts)


class PairDrawer:
    """Draws the pairs of a job; connects, loads and places what it needs when the first pairs are drawn."""

    def __init__(
        self,
        job: OffPolicyJob,
        drawing: Drawing,
        worker: Worker,
        pad_id: int,
        source: RolloutSource | None = None,
        judge: Judge | None = None,
    ) -> None:
        """source, judge: replace the actors and the reward that `drawing` names."""
        self._job, self._drawing, self._worker, self._pad_id = job, drawing, worker, pad_id
        self._source, self._judge = source, judge
        self._policy: PolicySource | None = None
        self._reference: LogProbs | None = None
        self._tally: Tally | None = None
        self._generated = NOTHING

    @property
    def _most_tokens(self) -> int:
        return largest_scored(self._worker.device.type)

    def draw(self, step: int, rows: pa.Table, first_place: int, learner: Learner) -> pa.Table:
        """Draw new pairs to the prompts of `rows`, as ONLINE_PAIRS, the same on every worker; every worker calls it.

        rows: REFERENCED_PAIRS, which stay where the policy's responses, drawn again and again, are equal, or where the
        judge is silent or (deterministic labels) sees a tie. first_place: of the first row among all that are trained
        on. Raises what generators and judge raise.
        """
        prompts = rows["prompt_ids"].to_pylist()
        policy = self._ready(learner)
        if self._drawing.generation.sleep_mode != "none":  # engines are about to wake on the workers' devices
            learner.drop_gradients()
            self._worker.give_back_cache()
        policy.push(step)
        found = self._answered(prompts, step, policy)
        policy.rest()
        return self._table(rows, found, step, first_place)

    def judge_calls(self) -> dict[str, int]:
        """Calls of an endpoint by all workers of this attempt; empty for other judges, and before the first."""
        return {} if self._judge is None else Loader(self._worker).calls_of(self._judge)

    def flops(self) -> float:
        """FLOPs of generation, reference and a judge model in this attempt; every worker calls it at the end."""
        if self._tally is None or self._reference is None:
            return 0.0
        return self._tally.take() + count_model(self._reference.model.config).forward(self._generated)

    def leave(self) -> None:
        """Release what the connection to the engines' devices holds."""
        from prefarena.generation.fleet import Generators

        if isinstance(self._source, Generators):
            self._source.leave()

    def _ready(self, learner: Learner) -> PolicySource:
        """Return the policy's generators, after making sure that reference and judge are loaded, too."""
        if self._policy is None:
            self._policy = self._connected(learner)
            self._reference = self._placed_reference()
            self._judge = self._judge or Loader(self._worker).judge(self._drawing.reward, _SCORED_AT_ONCE)
            models = [self._reference, getattr(self._judge, "head", None)]
            self._tally = Tally(models, self._job.method.training, self._worker)
        return self._policy

    def _connected(self, learner: Learner) -> PolicySource:
        from prefarena.generation.fleet import Generators

        drawing, job = self._drawing, self._job
        self._source = self._source or Generators.connect(drawing.generators, drawing.generation)
        weights = TrainedWeights(learner.module.get_submodule("model"), job.method.training.lora is not None)  # type: ignore[arg-type]
        return PolicySource(job.name, drawing.generation, self._worker, self._source, weights)

    def _placed_reference(self) -> LogProbs:
        """Load and place the policy that training started from, with which the pairs of the data were scored."""
        job, worker, precision = self._job, self._worker, self._job.arithmetic
        model = Loader(worker).policy(job.policy)
        reference = LogProbs(model, job.max_length, worker.device, attends_in(precision)).requires_grad_(False)
        if precision == "bfloat16":
            halve_products(reference)
        if not worker.shards:
            in_weights(reference.model, precision)
        worker.place(reference, precision)
        return reference

    # ------------------------------------------------------------------------------------ responses and scores

    def _answered(self, prompts: list[list[int]], step: int, policy: PolicySource) -> list[Answers]:
        """The answers to every prompt; prompts for which no pair was found have no responses."""
        found = [Answers() for _ in prompts]
        waiting = list(range(len(prompts)))
        for attempt in range(_MOST_ROUNDS):
            twice = [prompts[place] for place in waiting for _ in range(2)]
            rollouts = self._sampled(twice, step, attempt, policy)
            pairs = {place: rollouts[2 * i : 2 * i + 2] for i, place in enumerate(waiting)}
            for place, pair in pairs.items():
                found[place].count(pair)
            different = [place for place, (one, other) in pairs.items() if one.response_ids != other.response_ids]
            asked = [prompts[place] for place in different for _ in range(2)]
            answers = [one.response_ids for place in different for one in pairs[place]]
            scores = self._scores(asked, answers).reshape(-1, 2)
            for place, both in zip(different, scores.tolist(), strict=True):
                found[place].num_judged += 2
                if self._tells_apart(both):
                    found[place].responses = [one.response_ids for one in pairs[place]]
                    found[place].scores = both
            waiting = [place for place in waiting if not found[place].responses]
            if not waiting:
                break
        return found

    def _tells_apart(self, scores: list[float]) -> bool:
        if not np.isfinite(scores).all():
            return False
        return self._drawing.labels != "deterministic" or scores[0] != scores[1]

    def _sampled(self, prompts: list[list[int]], step: int, attempt: int, policy: PolicySource) -> list[Rollout]:
        """Sample a response to each prompt, for every worker: rank 0 asks, and the actors share the work."""
        seed = int(seeded(self._job.seed, f"online-{step}-{attempt}").integers(2**62))
        found: list[Rollout] = []
        for start in range(0, len(prompts), _ASKED_AT_ONCE):
            part = prompts[start : start + _ASKED_AT_ONCE]
            sampling = Sampling(
                max_tokens=self._drawing.response_limit,
                temperature=self._drawing.temperature,
                seed=seed,
                first_index=start,
            )

            def ask(part: list[list[int]] = part, sampling: Sampling = sampling) -> Pending:
                return policy.source.submit(part, sampling, policy.version(step)) if self._worker.rank == 0 else Done()

            found += self._worker.share(policy.wait(ask(), step, ask))
        sizes = [len(prompt) for prompt in prompts], [[len(one.response_ids)] for one in found]
        self._generated = self._generated.plus(passed(*sizes))
        return found

    def _scores(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        """The judge's scores, [N] float64, on every worker; nan where it is silent."""
        judge, number = self._judge, len(prompts)
        assert judge is not None
        if number == 0:
            return np.zeros(0)
        if is_model(self._drawing.reward.settings):  # passes that every worker makes, where it is spread over them
            lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], np.int64)
            passes = bounded_passes(lengths, _SCORED_AT_ONCE, self._most_tokens)
        else:
            passes = np.array_split(np.arange(number), min(number, self._worker.world_size))

        def score(rows: Rows) -> np.ndarray:
            return judge.score([prompts[i] for i in rows], [responses[i] for i in rows])

        return over_workers(passes, score, self._worker)

    # -------------------------------------------------------------------------------------------------- pairs

    def _table(self, rows: pa.Table, found: list[Answers], step: int, first_place: int) -> pa.Table:
        """The pairs, in the order of `rows`."""
        drawing = self._drawing
        draws = seeded(self._job.seed, f"online-labels-{step}").random(len(found))
        made: list[dict[str, Any]] = []
        for place, (row, one, draw) in enumerate(zip(rows.to_pylist(), found, draws, strict=True)):
            beside = {"place": first_place + place, "num_judged": one.num_judged, "num_tokens": one.num_tokens}
            if not one.responses:
                made.append({**row, **beside, "drawn_at": 0})
                continue
            gap = one.scores[0] - one.scores[1]
            as_drawn = draw < chance_of_gap(gap, drawing.labels, drawing.label_temperature)
            both = list(zip(one.responses, one.scores, strict=True))
            (chosen, chosen_score), (rejected, rejected_score) = both if as_drawn else reversed(both)
            pair = {
                "id": content_id("online", first_place + place, row["prompt_ids"], chosen, rejected),
                "prompt_ids": row["prompt_ids"],
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "label": 1.0,
                "source": f"policy at step {step}",
                "score_chosen": chosen_score,
                "score_rejected": rejected_score,
            }
            made.append({**pair, **beside, "drawn_at": step})
        new = [row for row in made if row["drawn_at"]]
        for row, logps in zip(new, self._reference_logps(new), strict=True):
            row |= dict(zip(_LOGP_NAMES, logps.tolist(), strict=True))
        return pa.Table.from_pylist(made, schema=ONLINE_PAIRS)

    def _reference_logps(self, pairs: list[dict[str, Any]]) -> np.ndarray:
        """The reference's log-probs [N, 4], nats, float64, in the order of `_LOGP_NAMES`, on every worker."""
        if not pairs:
            return np.zeros((0, 4))
        sizes = [len(one["prompt_ids"]) + len(one["chosen_ids"]) + len(one["rejected_ids"]) for one in pairs]
        passes = bounded_passes(np.array(sizes, np.int64), _SCORED_AT_ONCE, self._most_tokens)
        return over_workers(passes, lambda rows: self._pass([pairs[i] for i in rows]), self._worker)

    @torch.no_grad()
    def _pass(self, pairs: list[dict[str, Any]]) -> np.ndarray:
        reference = self._reference
        assert reference is not None
        prompts = [one["prompt_ids"] for one in pairs]
        responses = [[one["chosen_ids"], one["rejected_ids"]] for one in pairs]
        batch = pack(prompts, responses, shared=can_pack(reference), device=self._worker.device, pad_id=self._pad_id)
        values = reference(batch)[0]
        shorter = batch.lengths.view(-1, 2).amin(1).repeat_interleave(2)
        both = [batch.sums(values).view(-1, 2), batch.first_sums(values, shorter).view(-1, 2)]
        return torch.cat(both, 1).double().cpu().numpy()
