"""FLOPs that a job reports, against torch's own counter on the same passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from off_policy import example, off_policy_job, write_inputs
from on_policy import LocalGenerator, make_job
from tiny import save_tiny_policy
from torch.utils.flop_counter import FlopCounterMode

from pipelines.labelling import Questions, scoring_flops
from prefarena.config import DPO, PPOTraining
from prefarena.judges.models import RewardModelJudge
from prefarena.modeling.flops import count_model, flops_of, generated
from prefarena.modeling.heads import ScalarHead
from prefarena.modeling.load import load_policy, load_settings, new_reward_model
from prefarena.modeling.logprobs import LogProbs
from prefarena.modeling.packing import pack
from prefarena.modeling.passes import passed
from prefarena.settings.optimisation import Optimisation
from prefarena.stages import read_manifest
from prefarena.training.on_policy import train_on_policy
from prefarena.training.run_job import run_job
from prefarena.training.tally import Tally
from prefarena.training.worker import Worker

PROMPTS = [[1, 3, 4], [1, 5]]
RESPONSES = [[[6, 7, 2], [8, 2]], [[9, 2], [4, 4, 4, 2]]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_knows_what_a_pass_over_it_goes_through(shared: bool) -> None:
    batch = pack(PROMPTS, RESPONSES, shared=shared)
    sizes = [(len(p), [len(r) for r in own]) for p, own in zip(PROMPTS, RESPONSES, strict=True)]
    seen = tokens = 0
    for prompt, responses in sizes:
        # Every pair of a token and one that it sees, counted one by one.
        first = range(1, prompt + 1)
        tokens += prompt * (1 if shared else len(responses)) + sum(responses)
        seen += sum(first) * (1 if shared else len(responses))
        seen += sum(prompt + place for response in responses for place in range(1, response + 1))
    assert (batch.passed.tokens, batch.passed.visible, batch.passed.scored) == (tokens, seen, 11)


def test_a_tally_counts_what_was_computed_since_and_once(policy: str, tmp_path: Path) -> None:
    model, head = LogProbs(load_policy(policy)), ScalarHead(new_reward_model(policy, seed=0))
    model(pack(PROMPTS, RESPONSES))  # of another job: it does not count
    tally = Tally([model, head, model, None], Optimisation(), Worker(str(tmp_path)))
    batch = pack(PROMPTS, RESPONSES)
    with FlopCounterMode(display=False) as counter:
        model(batch)[0].sum().backward()
        with torch.no_grad():
            model(batch)
            head(batch)
    counts = count_model(model.model.config)
    found = tally.take()
    by_hand = counts.training(batch.passed) + counts.forward(batch.passed) + counts.forward(batch.passed, head=False)
    assert found == by_hand
    # Torch counts the products of masked pairs as well, and none of a shared prompt's attention on a CPU's own kernel.
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert tally.take() == 0


def test_generation_counts_each_token_once(policy: str) -> None:
    settings = load_settings(policy)
    expected = count_model(settings).forward(passed([3, 2], [[2], [4]]))
    assert generated(settings, [(3, 2), (2, 4)]) == expected


def test_a_training_run_reports_the_flops_of_its_steps(tmp_path: Path) -> None:
    job = off_policy_job(write_inputs(tmp_path), tmp_path / "stage", example(DPO))
    run_job(job, Worker(job.stage_dir))
    costs = read_manifest(job.stage_dir)["costs"]
    counts = count_model(load_settings(job.policy))
    # Every trained token takes three products with each weight of the layers; head and attention come on top.
    least = 3 * counts.per_token * costs["num_tokens_trained"]
    assert least < costs["num_flops"] < 3 * least


@pytest.mark.parametrize("epochs", [1, 2])
def test_on_policy_training_counts_generation_scoring_and_every_epoch(policy: str, tmp_path: Path, epochs: int) -> None:
    training = PPOTraining(num_iterations=2, rollouts_per_iteration=8, num_epochs=epochs, num_minibatches=2)
    job = make_job(tmp_path, policy, training)
    found = train_on_policy(job, Worker(job.stage_dir), LocalGenerator(policy))["costs"]
    counts = count_model(load_settings(policy))
    tokens = found["num_tokens_trained"] / epochs
    # Generation, two passes for log-probs, one for values, and in each epoch three of the policy and of the critic.
    least = counts.per_token * tokens * (1 + 2 + 1 + epochs * 6)
    assert least < found["num_flops"] < 2.5 * least
    assert np.isfinite(found["num_flops"])


def test_labels_of_a_learned_judge_cost_what_it_computes_for_them(policy: str) -> None:
    judge = RewardModelJudge.of(new_reward_model(policy, seed=0), batch_size=3)
    questions = Questions([prompt for prompt in PROMPTS for _ in range(2)], [one for own in RESPONSES for one in own])
    judge.score(questions.prompts, questions.responses)
    assert isinstance(judge.head, ScalarHead)
    counted = flops_of(judge.head.worked, count_model(load_settings(policy)), head=False)
    assert scoring_flops(questions, policy) == counted > 0
