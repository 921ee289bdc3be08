"""Totals of an on-policy training run over its iterations: tokens, rewards and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefarena.config import OnPolicyTraining
from prefarena.modeling.flops import count_model
from prefarena.modeling.logprobs import Sequences
from prefarena.modeling.passes import passed
from prefarena.training.experience import Scorers
from prefarena.training.on_policy_models import OnPolicyModels
from prefarena.training.tally import Tally
from prefarena.training.worker import Worker


class RolloutCounts:
    """Sums over all iterations, those of earlier attempts included; `totals` by the names that costs and logs have."""

    def __init__(self, models: OnPolicyModels, scorers: Scorers, settings: OnPolicyTraining, worker: Worker) -> None:
        judges = [getattr(judge, "head", None) for judge in (scorers.reward, scorers.monitor)]
        self._tally = Tally([*models.learned.values(), models.reference, *judges], settings, worker)
        self._generating = count_model(models.policy.model.config)
        self._num_epochs = settings.num_epochs
        names = ("num_tokens_generated", "num_tokens_trained", "num_rewards", "num_flops")
        self.totals: dict[str, float] = dict.fromkeys(names, 0)

    def add(self, sequences: Sequences, *, num_beside: int) -> None:
        """Count an iteration on these rollouts of all workers; every worker calls it.

        num_beside: tokens of other data that the policy was trained on in addition to them.
        """
        prompts, responses = sequences.prompt_lengths, sequences.response_lengths
        found = {
            "num_tokens_generated": int(responses.sum()),
            "num_tokens_trained": int(sequences.lengths.sum()) * self._num_epochs + num_beside,
            "num_rewards": len(responses),
            "num_flops": self._tally.take() + self._generating.forward(passed(prompts, responses[:, None])),
        }
        for name, value in found.items():
            self.totals[name] += value

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's totals; one of an earlier version lacks some."""
        self.totals = {name: state.get(name, 0) for name in self.totals}
