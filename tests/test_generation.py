"""The generation actor with a real vLLM engine: versions, weights in memory, seeds, limits."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from tiny import BOS, EOS, FIRST_LETTER, VOCABULARY, save_tiny_policy
from transformers import PreTrainedModel

from prefarena.config import Generation
from prefarena.errors import WaitTimeoutError
from prefarena.generation.actor import Generator
from prefarena.generation.interface import GeneratorLostError, Sampling, StaleWeightsError
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import collate, token_logps
from prefarena.records import Rollout

PROMPTS = [[BOS, FIRST_LETTER + i % 13, FIRST_LETTER + (3 * i + i // 13) % 13] for i in range(64)]


def perturbed(policy: PreTrainedModel, seed: int, size: float = 0.1) -> PreTrainedModel:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=random))
    return policy


def logp_gap(policy: PreTrainedModel, rollouts: list[Rollout], temperature: float) -> float:
    """The largest difference (nats) between the generator's token log-probs and those of transformers."""
    sequences = collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], pad_id=0)
    with torch.no_grad():
        expected = token_logps(policy, sequences, temperature)[sequences.response_mask]
    return (expected - torch.tensor([logp for r in rollouts for logp in r.token_logps])).abs().max().item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_update_changes_what_is_generated_and_log_probs_are_the_trainers(
    generator: Generator, tiny_policy: str, temperature: float
) -> None:
    policy = load_policy(tiny_policy)
    sampling = Sampling(max_tokens=6, temperature=temperature, seed=1)
    seen = []
    for update in range(3):
        version = f"update@{update}"
        generator.sync(perturbed(policy, update).state_dict().items(), version)
        rollouts = generator.generate(PROMPTS, sampling, version)
        assert generator.version() == version
        assert {rollout.weight_version for rollout in rollouts} == {version}
        assert logp_gap(policy, rollouts, temperature) < 1e-4
        seen.append([rollout.response_ids for rollout in rollouts])
    assert seen[0] != seen[1] and seen[1] != seen[2]


def test_long_prompts_are_not_answered_from_the_cache_of_older_weights(generator: Generator, tiny_policy: str) -> None:
    policy = load_policy(tiny_policy)
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(FIRST_LETTER, len(VOCABULARY), (3, 400), generator=random).tolist()
    for update in range(2):
        generator.sync(perturbed(policy, update).state_dict().items(), f"long@{update}")
        rollouts = generator.generate(prompts, Sampling(4, 1.0, seed=0), f"long@{update}")
        assert logp_gap(policy, rollouts, 1.0) < 1e-4


def test_responses_end_at_eos_or_the_limit_within_the_vocabulary(generator: Generator, tiny_policy: str) -> None:
    generator.sync(load_policy(tiny_policy).state_dict().items(), "ends")
    rollouts = generator.generate(PROMPTS * 4, Sampling(max_tokens=5, temperature=1.0, seed=3), "ends")
    assert [rollout.prompt_ids for rollout in rollouts] == PROMPTS * 4
    assert max(max(rollout.response_ids) for rollout in rollouts) < len(VOCABULARY)
    for rollout in rollouts:
        assert len(rollout.token_logps) == len(rollout.response_ids) <= 5
        assert rollout.finished == (rollout.response_ids[-1] == EOS)
        assert EOS not in rollout.response_ids[:-1]
        assert rollout.finished or len(rollout.response_ids) == 5
    assert {rollout.finished for rollout in rollouts} == {True, False}


def test_samples_depend_on_seed_and_place_not_on_the_batch(generator: Generator, tiny_policy: str) -> None:
    generator.sync(load_policy(tiny_policy).state_dict().items(), "seeds")

    def responses(prompts: list[list[int]], seed: int, first_index: int = 0) -> list[list[int]]:
        rollouts = generator.generate(prompts, Sampling(4, 1.0, seed, first_index), "seeds")
        return [rollout.response_ids for rollout in rollouts]

    whole = responses(PROMPTS, seed=5)
    assert responses(PROMPTS, seed=5) == whole
    assert responses(PROMPTS[:20], seed=5) + responses(PROMPTS[20:], seed=5, first_index=20) == whole
    assert responses(PROMPTS, seed=6) != whole
    same_prompt = responses([PROMPTS[0]] * 32, seed=5)
    assert len({tuple(response) for response in same_prompt}) > 16


def test_a_checkpoint_folder_with_a_tied_head_can_be_loaded(tmp_path: Path, generator: Generator) -> None:
    path = save_tiny_policy(tmp_path, tied=True, seed=7)
    generator.load_checkpoint(path, "tied")
    rollouts = generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), "tied")
    assert logp_gap(load_policy(path), rollouts, 1.0) < 1e-4


def test_stale_weights_are_refused(generator: Generator, tiny_policy: str) -> None:
    generator.sync(load_policy(tiny_policy).state_dict().items(), "run@1")
    with pytest.raises(StaleWeightsError, match=r"'run@2' was asked for, but the generator holds run@1"):
        generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), "run@2")


def test_a_wait_that_lasts_too_long_names_what_it_waited_for(generator: Generator) -> None:
    hurried = Generator.connect(generator.name, Generation(generate_timeout_s=0.001))
    with pytest.raises(WaitTimeoutError, match=r"0\.001 s for generator 'test-generator' to generate 64 responses"):
        hurried.generate(PROMPTS, Sampling(4, 1.0, seed=0), "any")


def test_an_actor_that_finds_no_room_is_named_with_what_it_asked_for(ray_session: None, tiny_policy: str) -> None:
    settings = Generation(cpus=1000, start_timeout_s=1)
    with pytest.raises(WaitTimeoutError, match=r"generator 'too-big' to be placed \(num_cpus=1000\)"):
        Generator.start(tiny_policy, settings, 16, False, "too-big", seed=0)
    with pytest.raises(GeneratorLostError, match="no running generator 'too-big'"):
        Generator.connect("too-big", settings)


def test_a_killed_actor_comes_back_without_weights_and_serves_after_a_sync(
    generator: Generator, tiny_policy: str
) -> None:
    weights = load_policy(tiny_policy).state_dict()
    sampling = Sampling(4, 1.0, seed=9)
    generator.sync(weights.items(), "before")
    before = generator.generate(PROMPTS, sampling, "before")
    actor: Any = ray.get_actor(generator.name)
    os.kill(ray.get(actor.pid.remote()), 9)
    time.sleep(0.2)
    with pytest.raises(StaleWeightsError, match="no weights yet"):
        generator.generate(PROMPTS, sampling, "before")
    generator.sync(weights.items(), "before")
    assert generator.generate(PROMPTS, sampling, "before") == before
