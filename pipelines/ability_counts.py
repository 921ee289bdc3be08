"""How many tokens lm-eval's tasks ask of a policy, counted before there is one."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from prefarena.config import Abilities
from prefarena.estimate.lengths import Asked, Rows
from prefarena.evaluation.ability_tasks import load_tasks


def count_asked(settings: Abilities, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Asked:
    """Go through all tasks as an evaluation does, with counts in place of scores and answers.

    max_length: most tokens that the policy reads. Answers count as long as their tasks allow. Raises UserError as
    `load_tasks` does.
    """
    from prefarena.evaluation.abilities import Counted, PolicyLM, run_tasks

    tasks, counted = load_tasks(settings), Counted()
    model = PolicyLM(tokenizer, max_length, counted.score, counted.generate)
    run_tasks(model, tasks, settings)
    return Asked(Rows.of(counted.scored), Rows.of(counted.answered))
