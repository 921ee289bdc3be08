"""The generation actor with a real vLLM engine: versions, weights in memory, seeds, limits."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle
from tiny import BOS, EOS, FIRST_LETTER, VOCABULARY, save_tiny_policy
from transformers import PreTrainedModel

from prefarena.config import Generation
from prefarena.errors import WaitTimeoutError
from prefarena.generation.fleet import Generators
from prefarena.generation.interface import (
    EngineError,
    GeneratorLostError,
    Sampling,
    StaleWeightsError,
    WeightMismatchError,
    WeightUpdateError,
)
from prefarena.modeling.endings import load_ends
from prefarena.modeling.load import load_policy, load_tokenizer
from prefarena.modeling.logprobs import LogProbs, Sequences, token_logps
from prefarena.records import Rollout

PROMPTS = [[BOS, FIRST_LETTER + i % 13, FIRST_LETTER + (3 * i + i // 13) % 13] for i in range(64)]


def inside(generator: Generators, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function of the (first) actor in its process."""
    cloudpickle.register_pickle_by_value(sys.modules[function.__module__])  # tests are not importable there
    actor: Any = ray.get_actor(generator.names[0])
    return ray.get(actor.__ray_call__.remote(function, *args))


def perturbed(policy: PreTrainedModel, seed: int, size: float = 0.1) -> PreTrainedModel:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=random))
    return policy


def logp_gap(policy: PreTrainedModel, rollouts: list[Rollout], temperature: float) -> float:
    """The largest difference (nats) between the generator's token log-probs and those of transformers."""
    sequences = Sequences.of([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    with torch.no_grad():
        expected = token_logps(LogProbs(policy), sequences, temperature)[sequences.response_mask]
    return (expected - torch.tensor([logp for r in rollouts for logp in r.token_logps])).abs().max().item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_update_changes_what_is_generated_and_log_probs_are_the_trainers(
    generator: Generators, tiny_policy: str, temperature: float
) -> None:
    policy = load_policy(tiny_policy)
    sampling = Sampling(max_tokens=6, temperature=temperature, seed=1)
    seen = []
    for update in range(3):
        version = f"update@{update}"
        generator.sync(perturbed(policy, update).state_dict().items(), version)
        rollouts = generator.generate(PROMPTS, sampling, version)
        assert generator.versions() == {"test-generator": version}
        assert {rollout.weight_version for rollout in rollouts} == {version}
        assert logp_gap(policy, rollouts, temperature) < 1e-4
        seen.append([rollout.response_ids for rollout in rollouts])
    assert seen[0] != seen[1] and seen[1] != seen[2]


def sleep_as(actor: Any, mode: str) -> list[str]:
    """Have the actor's engine, which holds its weights, go to sleep. Returns the parts that vLLM takes to be asleep."""
    actor._sleep_mode = mode
    actor.sleep()
    return sorted(actor._engine._llm.llm_engine.model_executor.sleeping_tags)


def test_vllm_sleeps_and_wakes_in_parts_as_the_actor_has_it(generator: Generators, tiny_policy: str) -> None:
    """An engine for CPUs keeps its memory, and goes through the states of one that gives it back."""
    policy, sampling = load_policy(tiny_policy), Sampling(max_tokens=6, temperature=1.0, seed=1)
    try:
        for update, mode in enumerate(("keep", "keep", "discard")):
            version = f"asleep@{update}"
            generator.sync(perturbed(policy, update).state_dict().items(), version)
            assert inside(generator, sleep_as, mode) == ["kv_cache", "weights"]
            if mode == "discard":
                with pytest.raises(StaleWeightsError):
                    generator.generate(PROMPTS, sampling, version)
                generator.sync(policy.state_dict().items(), version)
            assert logp_gap(policy, generator.generate(PROMPTS, sampling, version), 1.0) < 1e-4
    finally:
        inside(generator, lambda actor: setattr(actor, "_sleep_mode", "none"))


def keep_prefix_cache(actor: Any, keep: bool) -> None:
    """Have the actor's engine keep (or again reset) what it computed with older weights."""
    llm = actor._engine._llm
    if keep:
        llm.reset_prefix_cache = lambda: True
    else:
        del llm.reset_prefix_cache  # the class's own again


def test_without_a_reset_long_prompts_are_answered_from_the_cache_of_older_weights(
    generator: Generators, tiny_policy: str
) -> None:
    policy = load_policy(tiny_policy)
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(FIRST_LETTER, len(VOCABULARY), (3, 400), generator=random).tolist()

    def gap(update: int) -> float:
        generator.sync(perturbed(policy, update).state_dict().items(), f"long@{update}")
        return logp_gap(policy, generator.generate(prompts, Sampling(4, 1.0, seed=0), f"long@{update}"), 1.0)

    assert gap(0) < 1e-4 and gap(1) < 1e-4
    inside(generator, keep_prefix_cache, True)
    try:
        assert gap(2) > 0.1
    finally:
        inside(generator, keep_prefix_cache, False)
    assert gap(3) < 1e-4


def test_responses_end_at_eos_or_the_limit_within_the_vocabulary(generator: Generators, tiny_policy: str) -> None:
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


def set_ends(actor: Any, ends: tuple[int, ...]) -> tuple[int, ...]:
    """Have the actor's engine end at other tokens; what it ended at."""
    old: tuple[int, ...] = actor._engine.end_ids
    actor._engine.end_ids = ends
    return old


def test_responses_end_at_each_of_several_ends(generator: Generators, tiny_policy: str) -> None:
    ends = {EOS, FIRST_LETTER, FIRST_LETTER + 1}
    generator.sync(load_policy(tiny_policy).state_dict().items(), "several")
    assert inside(generator, set_ends, tuple(ends)) == load_ends(tiny_policy, load_tokenizer(tiny_policy))
    try:
        rollouts = generator.generate(PROMPTS * 2, Sampling(max_tokens=5, temperature=1.0, seed=3), "several")
    finally:
        inside(generator, set_ends, (EOS,))
    assert {rollout.response_ids[-1] for rollout in rollouts if rollout.finished} == ends
    for rollout in rollouts:
        assert not ends & set(rollout.response_ids[:-1])
        assert rollout.finished == (rollout.response_ids[-1] in ends)
        assert rollout.finished or len(rollout.response_ids) == 5


def test_samples_depend_on_seed_and_place_not_on_the_batch(generator: Generators, tiny_policy: str) -> None:
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


def test_a_checkpoint_folder_with_a_tied_head_can_be_loaded(tmp_path: Path, generator: Generators) -> None:
    path = save_tiny_policy(tmp_path, tied=True, seed=7)
    generator.load_checkpoint(path, "tied")
    rollouts = generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), "tied")
    assert logp_gap(load_policy(path), rollouts, 1.0) < 1e-4


def receive_instead(actor: Any, path: str) -> None:
    """Have the actor's engine always be given the weights at `path`; empty: those that it is sent."""
    from prefarena.modeling.load import load_policy

    if not path:
        del actor._engine.receive  # the class's own again
        return
    with actor._engine.model_building():
        stored = dict(load_policy(path).state_dict())
    actor._engine.receive = lambda _: type(actor._engine).receive(actor._engine, {"tensors": stored})


def refuse_updates(actor: Any, refuse: bool) -> None:
    """Have the actor's engine raise what vLLM might when an update begins, or no longer."""

    def start() -> None:
        raise KeyError("model.layers.0.strange.weight")

    if refuse:
        actor._engine.start_update = start
    else:
        del actor._engine.start_update


def test_a_trial_shows_whether_an_engine_takes_weights(generator: Generators, tiny_policy: str, tmp_path: Path) -> None:
    generator.try_weights(tiny_policy)
    assert generator.versions() == {generator.names[0]: None}
    assert generator.verified is not None and generator.verified.share == 1.0
    other = save_tiny_policy(tmp_path, seed=3)
    blind = Generators.connect(generator.names, Generation(verify_weights=False))
    blind.try_weights(tiny_policy)
    assert blind.verified is None
    for kept in (tiny_policy, other):  # the old weights, and those of another model
        inside(generator, receive_instead, kept)
        try:
            with pytest.raises(WeightMismatchError, match="engine's weights are not those that were sent"):
                generator.try_weights(tiny_policy)
            with pytest.raises(WeightMismatchError, match=r"differ from those of transformers by [\d.]+ nats"):
                blind.try_weights(tiny_policy)
        finally:
            inside(generator, receive_instead, "")
    inside(generator, refuse_updates, True)
    try:
        with pytest.raises(EngineError, match=r"it raised KeyError: 'model\.layers\.0\.strange\.weight'$"):
            generator.try_weights(tiny_policy)
    finally:
        inside(generator, refuse_updates, False)
    generator.try_weights(tiny_policy)


def test_stale_weights_are_refused(generator: Generators, tiny_policy: str) -> None:
    generator.sync(load_policy(tiny_policy).state_dict().items(), "run@1")
    with pytest.raises(StaleWeightsError, match=r"'run@2' was asked for, but the generator holds run@1"):
        generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), "run@2")


def test_a_wait_that_lasts_too_long_names_what_it_waited_for(generator: Generators) -> None:
    hurried = Generators.connect(generator.names, Generation(generate_timeout_s=0.001))
    with pytest.raises(WaitTimeoutError, match=r"0\.001 s for generator 'test-generator' to generate 64 responses"):
        hurried.generate(PROMPTS, Sampling(4, 1.0, seed=0), "any")


def test_an_actor_that_finds_no_room_is_named_with_what_it_asked_for(ray_session: None, tiny_policy: str) -> None:
    settings = Generation(cpus=1000, start_timeout_s=1)
    with pytest.raises(WaitTimeoutError, match=r"generator 'too-big' to be placed \(num_cpus=1000\)"):
        Generators.start(tiny_policy, settings, 16, False, ("too-big",), seed=0)
    with pytest.raises(GeneratorLostError, match="no running generator 'too-big'"):
        Generators.connect(("too-big",), settings)


def test_a_killed_actor_comes_back_without_weights_and_serves_after_a_sync(
    generator: Generators, tiny_policy: str
) -> None:
    weights = load_policy(tiny_policy).state_dict()
    sampling = Sampling(4, 1.0, seed=9)
    generator.sync(weights.items(), "before")
    before = generator.generate(PROMPTS, sampling, "before")
    pid = inside(generator, lambda actor: actor.pid())
    pending = generator.submit(PROMPTS * 200, Sampling(100, 1.0, seed=0), "before")
    time.sleep(0.5)
    os.kill(pid, 9)
    with pytest.raises(StaleWeightsError, match="no weights yet"):
        pending.result()  # it was at work when it was killed
    assert generator.versions() == {"test-generator": None}
    generator.sync(weights.items(), "before")
    assert generator.generate(PROMPTS, sampling, "before") == before


# -------------------------------------------------------------------------- what an engine must be sent, and holds


def test_a_partial_update_is_refused_and_leaves_no_version(generator: Generators, tiny_policy: str) -> None:
    weights = load_policy(tiny_policy).state_dict()
    generator.sync(weights.items(), "whole")
    before = generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), "whole")
    pid = inside(generator, lambda actor: actor.pid())
    without_head = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    with pytest.raises(WeightUpdateError, match=r"missing: lm_head\.weight"):
        generator.sync(without_head.items(), "partial")
    with pytest.raises(WeightUpdateError, match=r"does not have: lm_head\.bias"):
        generator.sync([*weights.items(), ("lm_head.bias", torch.zeros(16))], "more")
    with pytest.raises(WeightUpdateError, match=r"lm_head\.weight was sent with shape \(64, 16\), .* \(16, 64\)"):
        generator.sync([*without_head.items(), ("lm_head.weight", torch.zeros(64, 16))], "turned")
    with pytest.raises(StaleWeightsError, match="no weights yet"):
        generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), "whole")
    generator.sync(weights.items(), "whole")  # by the same process
    assert generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), "whole") == before
    assert inside(generator, lambda actor: actor.pid()) == pid


Q, K, V = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")


def test_some_layers_are_replaced_alone_on_top_of_the_others(generator: Generators, tiny_policy: str) -> None:
    policy = load_policy(tiny_policy)
    generator.sync(policy.state_dict().items(), "base")
    names = generator.layers_of({Q}, "base")
    assert names == {Q, K, V} and generator.layers_of({Q}, "other") is None
    assert generator.layers_of({Q, "model.norm.weight"}, "base") == {Q, K, V, "model.norm.weight"}
    assert generator.layers_of({Q, "unknown.weight"}, "base") is None
    for update in range(2):
        with torch.no_grad():
            policy.get_parameter(Q).mul_(2)
            policy.get_parameter(V).add_(0.1)
        part = {name: tensor for name, tensor in policy.state_dict().items() if name in names}
        generator.sync(part.items(), f"part@{update}", since="base" if update == 0 else "part@0")
        rollouts = generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), f"part@{update}")
        assert logp_gap(policy, rollouts, 1.0) < 1e-4
    generator.sync(part.items(), "late", since="base")  # which no actor holds any more: none takes it
    assert generator.versions() == {"test-generator": "part@1"}
    assert generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), "part@1") == [
        replace(rollout, weight_version="part@1") for rollout in rollouts
    ]


def note_what_is_read_back(actor: Any) -> None:
    """From now on."""
    from prefarena.generation.engine import rank

    actor.read_back, actor.noted = rank._read_back, []
    rank._read_back = lambda module, columns: actor.noted.append(module) or actor.read_back(module, columns)


def num_read_back(actor: Any) -> int:
    """How many layers were read back since `note_what_is_read_back`, which ends."""
    from prefarena.generation.engine import rank

    rank._read_back = actor.read_back
    return len(actor.noted)


def test_only_what_was_sent_is_read_back(generator: Generators, tiny_policy: str) -> None:
    """Each layer costs a product, and the head's is the largest."""
    weights = load_policy(tiny_policy).state_dict()
    generator.sync(weights.items(), "base")
    inside(generator, note_what_is_read_back)
    try:
        generator.sync([(name, weights[name]) for name in (Q, K, V)], "part", since="base")
    finally:
        number = inside(generator, num_read_back)
    assert number == 1  # the engine has one layer for all three


def test_a_part_of_a_layer_is_refused(generator: Generators, tiny_policy: str) -> None:
    """vLLM would fill the rest of a fused layer with whatever its buffer held."""
    weights = load_policy(tiny_policy).state_dict()
    generator.sync(weights.items(), "base")
    with pytest.raises(WeightUpdateError, match=rf"hold every tensor of a layer; missing: {re.escape(V)}$"):
        generator.sync([(name, weights[name]) for name in (Q, K)], "part", since="base")
    assert generator.versions() == {"test-generator": None}
    generator.sync(weights.items(), "base")


def corrupt_updates(actor: Any, name: str | None) -> None:
    """Have the actor's engine receive one tensor with two of its numbers exchanged, or (None) as it was sent."""
    engine = actor._engine
    if name is None:
        del engine.receive
        return

    def receive(update_info: dict[str, Any]) -> None:
        tensors = dict(update_info["tensors"])
        wrong = tensors[name].clone()
        wrong.view(-1)[:2] = wrong.view(-1)[:2].flip(0)
        type(engine).receive(engine, {"tensors": tensors | {name: wrong}})

    engine.receive = receive


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"],
)
def test_an_engine_that_holds_something_else_is_found_out_and_not_used(
    generator: Generators, tiny_policy: str, name: str
) -> None:
    weights = perturbed(load_policy(tiny_policy), 0).state_dict()
    inside(generator, corrupt_updates, name)
    try:
        with pytest.raises(
            WeightMismatchError, match=rf"engine's weights are not those that were sent: {re.escape(name)} differ"
        ):
            generator.sync(weights.items(), "corrupt")
    finally:
        inside(generator, corrupt_updates, None)
    with pytest.raises(StaleWeightsError):
        generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), "corrupt")
    generator.sync(weights.items(), "mended")
    assert generator.versions() == {"test-generator": "mended"}


# ------------------------------------------------------------------------------------------------ several actors


@pytest.fixture(scope="module")
def two_actors(generator: Generators, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generators]:
    """The shared actor, and one whose model has a tied head."""
    tied = save_tiny_policy(tmp_path_factory.mktemp("two") / "tied", tied=True)
    second = Generators.start(tied, Generation(), 512, use_gpu=False, names=("tied-generator",), seed=0)
    yield Generators.connect((*generator.names, *second.names), Generation())
    second.stop()


def test_two_actors_generate_what_one_does(generator: Generators, two_actors: Generators, tmp_path: Path) -> None:
    policy = load_policy(save_tiny_policy(tmp_path, tied=True, seed=3))
    for update in range(2):
        version, sampling = f"both@{update}", Sampling(4, 1.0, seed=update)
        two_actors.sync(perturbed(policy, update).state_dict().items(), version)
        assert two_actors.versions() == {"test-generator": version, "tied-generator": version}
        rollouts = two_actors.generate(PROMPTS, sampling, version)
        assert logp_gap(policy, rollouts, 1.0) < 1e-4
        alone = generator.generate(PROMPTS, sampling, version)
        assert [rollout.response_ids for rollout in rollouts] == [rollout.response_ids for rollout in alone]


def test_a_batch_is_asked_for_without_waiting_for_it(generator: Generators, tiny_policy: str) -> None:
    generator.sync(load_policy(tiny_policy).state_dict().items(), "ahead")
    started = time.perf_counter()
    pending = generator.submit(PROMPTS * 4, Sampling(32, 1.0, seed=0), "ahead")
    asked = time.perf_counter()
    assert len(pending.result()) == 256
    assert asked - started < time.perf_counter() - asked


def test_an_untied_head_is_not_lost_on_an_engine_that_ties_it(two_actors: Generators, tiny_policy: str) -> None:
    with pytest.raises(WeightMismatchError, match=r"not those that were sent: (lm_head|model\.embed_tokens)\.weight"):
        two_actors.sync(load_policy(tiny_policy).state_dict().items(), "untied")
    assert two_actors.versions() == {"test-generator": "untied", "tied-generator": None}
