"""What a comparison, or a method of it, asks for: which stages there are depends on it."""

from __future__ import annotations

from prefarena.config import Comparison, OffPolicyMethod, PairwiseJudge, RewardModel, Section, TextTask, reward_of
from prefarena.settings.off_policy import Pairwise


def learns_judge(config: Comparison) -> bool:
    """Whether the judge of a text task is trained, on pairs that are set aside for it."""
    return config.trained_judge is not None


def is_pairwise(config: Comparison) -> bool:
    """Whether policies are compared rather than scored."""
    return isinstance(config.task, TextTask) and isinstance(config.judge, PairwiseJudge)


def learns_a_reward(config: Comparison) -> bool:
    """Whether a reward model is trained: as a reward, or as the judge of a text task."""
    return learns_judge(config) or any(learned_reward(entry.method) is not None for entry in config.entries)


def learned_reward(method: Section) -> RewardModel | None:
    """A method's reward, where it is one that is trained."""
    keyed = reward_of(method)
    return keyed[1] if keyed is not None and isinstance(keyed[1], RewardModel) else None


def needs_shared(method: OffPolicyMethod) -> bool:
    """Whether it learns from pairs that have the log-probs of their first tokens, too."""
    return isinstance(method, Pairwise) and method.needs_shared
