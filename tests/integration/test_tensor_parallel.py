"""An engine over several devices: what it generates, that every rank takes new weights, and what a death does."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.util.placement_group import placement_group_table
from test_generation import PROMPTS, inside, logp_gap, perturbed
from tiny import save_tiny_policy
from transformers import PreTrainedModel
from waiting import wait_until

from prefarena.config import Generation, LoRA
from prefarena.generation.fleet import Generators
from prefarena.generation.interface import Sampling, StaleWeightsError, WeightMismatchError, WeightUpdateError
from prefarena.modeling.load import load_policy
from prefarena.modeling.lora import adapted_weights, add_adapters, merged_weights
from tests.helpers.families import LARGEST_GAP, compare, make, process_for_engine, serve

GREEDY = Sampling(max_tokens=8, temperature=0.0, seed=0)
TWO = Generation(tensor_parallel=2)


@pytest.fixture(scope="module")
def two_ranks(ray_session: None, tiny_policy: str) -> Iterator[Generators]:
    """One engine over two devices, in a placement group of its own."""
    running = Generators.start(tiny_policy, TWO, 512, use_gpu=False, names=("two-ranks",), seed=0)
    yield running
    running.stop()


def ranks_of(generator: Generators) -> list[int]:
    """The ids of the processes of the ranks."""
    return inside(generator, lambda actor: actor._engine._llm.collective_rpc("end_with", args=(os.getpid(),)))


def reservation(generators: Generators) -> dict[str, Any]:
    """What Ray says of the placement group of the only engine."""
    [engine] = generators._members
    return placement_group_table(engine._group)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def same_when_greedy(one: Generators, other: Generators, version: str) -> None:
    """Each prompt's likeliest response is the same, and its log-probs are, within 1e-4 nats."""
    first, second = (source.generate(PROMPTS, GREEDY, version) for source in (one, other))
    assert [rollout.response_ids for rollout in first] == [rollout.response_ids for rollout in second]
    logps = [torch.tensor([logp for r in found for logp in r.token_logps]) for found in (first, second)]
    assert (logps[0] - logps[1]).abs().max() < 1e-4


def test_two_devices_generate_what_one_does_with_each_update(
    two_ranks: Generators, generator: Generators, tiny_policy: str
) -> None:
    policy = load_policy(tiny_policy)
    for update in range(2):
        version = f"both@{update}"
        perturbed(policy, update)
        for source in (two_ranks, generator):
            source.sync(policy.state_dict().items(), version)
        assert two_ranks.verified is not None and two_ranks.verified.share == 1 and not two_ranks.verified.skipped
        same_when_greedy(two_ranks, generator, version)
        sampled = two_ranks.generate(PROMPTS, Sampling(4, 0.7, seed=update), version)
        assert logp_gap(policy, sampled, 0.7) < 1e-4


def test_a_checkpoint_is_loaded_by_every_rank(two_ranks: Generators, tmp_path: Path) -> None:
    path = save_tiny_policy(tmp_path, tied=True, seed=7)
    two_ranks.load_checkpoint(path, "tied")
    assert logp_gap(load_policy(path), two_ranks.generate(PROMPTS, Sampling(4, 1.0, seed=0), "tied"), 1.0) < 1e-4


def test_a_trial_shows_that_every_rank_takes_weights(two_ranks: Generators, tiny_policy: str) -> None:
    two_ranks.try_weights(tiny_policy)
    assert two_ranks.verified is not None and two_ranks.verified.share == 1
    assert two_ranks.versions() == {"two-ranks": None}


def change_in_a_rank(wrapper: Any, rank: int, ending: str) -> None:
    """Change a parameter in one rank alone."""
    if wrapper.rank == rank:
        with torch.no_grad():
            next(p for name, p in wrapper.get_model().named_parameters() if name.endswith(ending)).view(-1)[0] += 1


def finish_with_a_fault(actor: Any, ending: str) -> None:
    """Have the second rank hold something else when an update ends; nothing: as it is."""
    engine = actor._engine
    if not ending:
        del engine.finish_update
        return

    def finish() -> None:
        type(engine).finish_update(engine)
        engine._llm.collective_rpc(change_in_a_rank, args=(1, ending))

    engine.finish_update = finish


@pytest.mark.parametrize("ending", ["layernorm.weight", "embed_tokens.weight"])
def test_what_one_rank_holds_wrongly_is_noticed(two_ranks: Generators, tiny_policy: str, ending: str) -> None:
    """A norm, which every rank has a copy of, and an embedding, of which each has a part."""
    weights = load_policy(tiny_policy).state_dict()
    padded = ending.startswith("embed")  # all 16 rows are in the first rank; the second has padding alone
    inside(two_ranks, finish_with_a_fault, ending)
    try:
        if padded:
            two_ranks.sync(weights.items(), "padding")
        else:
            with pytest.raises(WeightMismatchError, match="engine's weights are not those that were sent"):
                two_ranks.sync(weights.items(), "wrong")
            assert two_ranks.versions() == {"two-ranks": None}
    finally:
        inside(two_ranks, finish_with_a_fault, "")
    two_ranks.sync(weights.items(), "right")
    assert two_ranks.versions() == {"two-ranks": "right"}


def test_layers_that_adapters_change_reach_every_rank(two_ranks: Generators, tiny_policy: str) -> None:
    """Sent merged, alone, on top of the version of which each rank holds a part."""
    policy = load_policy(tiny_policy)
    add_adapters(policy, LoRA(rank=4, targets=("q_proj", "down_proj")), seed=0)
    two_ranks.sync(merged_weights(policy), "adapted@0")
    for update in (1, 2):
        perturb_adapters(policy, 0.2 * update)
        names = two_ranks.layers_of(adapted_weights(policy), f"adapted@{update - 1}")
        assert names is not None
        assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj", "down_proj"}
        two_ranks.sync(merged_weights(policy, names=names), f"adapted@{update}", since=f"adapted@{update - 1}")
        assert two_ranks.verified is not None and not two_ranks.verified.skipped
        rollouts = two_ranks.generate(PROMPTS, Sampling(4, 0.7, seed=update), f"adapted@{update}")
        merged = load_policy(tiny_policy)
        merged.load_state_dict(dict(merged_weights(policy)))
        assert logp_gap(merged, rollouts, 0.7) < 1e-4 and logp_gap(load_policy(tiny_policy), rollouts, 0.7) > 1e-2


def perturb_adapters(policy: PreTrainedModel, size: float) -> None:
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=size)


def receive_wrongly(actor: Any, name: str) -> None:
    """Have the engine take one tensor with a last column of its own, which the last rank has; nothing: as it is."""
    engine = actor._engine
    if not name:
        del engine.receive
        return

    def receive(update_info: dict[str, Any]) -> None:
        tensors = dict(update_info["tensors"])
        wrong = tensors[name].clone()
        wrong[:, -1] += 1
        type(engine).receive(engine, {"tensors": tensors | {name: wrong}})

    engine.receive = receive


def test_what_one_rank_holds_wrongly_of_an_adapted_layer_is_noticed(two_ranks: Generators, tiny_policy: str) -> None:
    policy = load_policy(tiny_policy)
    add_adapters(policy, LoRA(rank=4, targets=("down_proj",)), seed=0)
    two_ranks.sync(merged_weights(policy), "whole")
    perturb_adapters(policy, 0.2)
    names = two_ranks.layers_of(adapted_weights(policy), "whole")
    changed = "model.layers.1.mlp.down_proj.weight"
    inside(two_ranks, receive_wrongly, changed)
    try:
        with pytest.raises(WeightMismatchError, match=f"were sent: {re.escape(changed)} differ"):
            two_ranks.sync(merged_weights(policy, names=names), "wrong", since="whole")
        assert two_ranks.versions() == {"two-ranks": None}
    finally:
        inside(two_ranks, receive_wrongly, "")


def test_a_partial_update_is_refused(two_ranks: Generators, tiny_policy: str) -> None:
    weights = load_policy(tiny_policy).state_dict()
    with pytest.raises(WeightUpdateError, match=r"missing: model\.norm\.weight"):
        two_ranks.sync([(name, each) for name, each in weights.items() if name != "model.norm.weight"], "partial")
    two_ranks.sync(weights.items(), "whole")


def test_a_killed_rank_ends_the_whole_engine_which_comes_back_without_weights(
    two_ranks: Generators, tiny_policy: str
) -> None:
    weights = load_policy(tiny_policy).state_dict()
    two_ranks.sync(weights.items(), "before")
    before = two_ranks.generate(PROMPTS, GREEDY, "before")
    actor, ranks = inside(two_ranks, lambda actor: actor.pid()), ranks_of(two_ranks)
    assert len({actor, *ranks}) == 3
    pending = two_ranks.submit(PROMPTS * 50, Sampling(100, 1.0, seed=0), "before")
    time.sleep(0.5)
    os.kill(ranks[1], signal.SIGKILL)
    with pytest.raises(StaleWeightsError, match="no weights yet"):
        pending.result()
    assert gone(actor) and all(map(gone, ranks))
    group = reservation(two_ranks)
    assert group["state"] == "CREATED" and group["bundles"] == {0: {"CPU": 2.0}}
    two_ranks.sync(weights.items(), "before")
    assert two_ranks.generate(PROMPTS, GREEDY, "before") == before


def raise_in_the_second(wrapper: Any) -> None:
    if wrapper.rank == 1:
        raise ValueError("out of memory, say")


def fail_in_a_rank(actor: Any) -> None:
    """Have the second rank raise, while the first goes on."""
    with actor._engine._in_step():
        actor._engine._llm.collective_rpc(raise_in_the_second)


@pytest.mark.long
def test_an_engine_of_which_a_rank_raised_is_not_asked_again(two_ranks: Generators, tiny_policy: str) -> None:
    weights = load_policy(tiny_policy).state_dict()
    two_ranks.sync(weights.items(), "before")
    pid = inside(two_ranks, lambda actor: actor.pid())
    with pytest.raises(RuntimeError, match="out of memory, say"):
        inside(two_ranks, fail_in_a_rank)
    with pytest.raises(StaleWeightsError, match="no weights yet"):
        two_ranks.generate(PROMPTS, GREEDY, "before")
    assert gone(pid)
    two_ranks.sync(weights.items(), "after")
    assert len(two_ranks.generate(PROMPTS, GREEDY, "after")) == len(PROMPTS)


def test_a_stopped_engine_leaves_no_process_and_no_reservation(two_ranks: Generators) -> None:
    """The last of the tests that use it."""
    ranks, name = ranks_of(two_ranks), reservation(two_ranks)["placement_group_id"]
    two_ranks.stop()
    wait_until(lambda: all(map(gone, ranks)), "the ranks to end", 30)
    wait_until(lambda: placement_group_table()[name]["state"] == "REMOVED", "the reservation to end", 30)


# --------------------------------------------------------------------------------------------------- longer ones

#: How their tensors are cut: a key head that both ranks hold; fused in the checkpoint; with biases, key heads cut; a
#: head that the engine has no layer for; experts, of a width that vLLM's kernel for CPUs need not pad.
SHARED_HEAD = {"num_key_value_heads": 1}
WIDE_EXPERTS = {"intermediate_size": 256}


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "changed"),
    [("llama", SHARED_HEAD), ("gpt2", {}), ("phi3", {}), ("qwen2", {}), ("gemma2", {}), ("mixtral", WIDE_EXPERTS)],
)
def test_every_way_of_cutting_tensors_is_verified(
    ray_session: None, tmp_path: Path, family: str, changed: dict[str, Any]
) -> None:
    old, new = make(tmp_path, family, **changed)
    with process_for_engine(TWO) as call:
        outcome = compare(old, new, call(serve, str(tmp_path), new.state_dict(), TWO))
    assert outcome.gap < LARGEST_GAP < outcome.old_gap
    assert bool(outcome.verified.skipped) == (family == "mixtral")  # experts are in a layout of their kernel's own
    assert outcome.unnoticed == []
