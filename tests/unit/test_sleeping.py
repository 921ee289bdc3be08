"""Engines that sleep while the workers on their GPUs learn: in which order what is given back and taken.

vLLM's engines sleep on GPUs alone. What stands for one here has its rules: it takes weights only when their memory is
there, generates when all of it is, and of level 2 forgets the weights. The same states of a real engine on a CPU, which
keeps its memory in them: tests/integration/test_generation.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from on_policy import LikedCount, LocalGenerator, make_job
from tiny import save_tiny_policy
from torch import Tensor

from pipelines.memory import refuse_what_cannot_fit
from prefarena.cluster.capacity import share_beside_engine
from prefarena.cluster.doctor import judge_memory, judge_waking, largest_room
from prefarena.cluster.needs import Heaviest, trainings
from prefarena.cluster.probe import NodeReport
from prefarena.config import Comparison, Generation, PPOTraining, parse_config
from prefarena.errors import UserError
from prefarena.generation.actor import GenerationActor
from prefarena.generation.interface import Sampling, StaleWeightsError
from prefarena.generation.layout import ModelLayout
from prefarena.modeling.load import load_policy
from prefarena.training.on_policy import OnPolicyTrainer
from prefarena.training.worker import Worker

GIB = 2**30
MEMORY = {"weights", "kv_cache"}
Mode = Literal["none", "keep", "discard"]


@dataclass(frozen=True)
class Sample:
    """As an engine gives it; the engine's own module imports vLLM."""

    token_ids: list[int]
    token_logps: list[float]
    finished: bool


class EngineDouble:
    """An engine whose memory can be given back, with vLLM's rules."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.there, self.has_weights, self.updating = set(MEMORY), True, False
        self.did: list[str] = []

    def sleep(self, level: int) -> None:
        assert self.there == MEMORY and not self.updating
        self.there, self.has_weights = set(), level == 1
        self.did.append(f"sleep {level}")

    def wake(self, parts: Collection[str]) -> None:
        assert parts and not self.there & set(parts)
        self.there |= set(parts)
        self.did.append(f"wake {' '.join(sorted(parts))}")

    def start_update(self) -> None:
        assert "weights" in self.there
        self.updating = True

    def receive(self, update_info: Any) -> None:
        assert self.updating and "weights" in self.there
        self.has_weights = True
        self.did.append("receive")

    def finish_update(self) -> None:
        self.updating = False

    def generate(self, prompts: list[list[int]], **_: Any) -> list[Sample]:
        assert self.there == MEMORY and self.has_weights and not self.updating
        self.did.append("generate")
        return [Sample([2], [-0.5], True) for _ in prompts]


class ActorOfDouble(GenerationActor):
    """An actor as its own `__init__` leaves it, with an engine that is a double."""

    def __init__(self, path: str, mode: Mode) -> None:
        self._path, self._max_model_len, self._merged_heads = path, 16, frozenset()
        self._version, self._connected, self._updating = None, False, False
        self._update, self._failed, self._checked, self._layers = None, False, None, ()
        self._sleep_mode, self._asleep = mode, set()
        self._layout = ModelLayout(path)
        self.double = EngineDouble()
        self._engine: Any = self.double
        self.sleep()

    def asked(self, version: str) -> int:
        return len(self.generate([[1, 3]], [0], Sampling(4, 1.0, 0), version))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize(("mode", "level"), [("keep", 1), ("discard", 2)])
def test_an_update_wakes_the_weights_and_generating_the_rest(policy: str, mode: Mode, level: int) -> None:
    actor, tensors = ActorOfDouble(policy, mode), load_policy(policy).state_dict()
    did = actor.double.did
    assert did == [f"sleep {level}"]  # until it is first needed
    for version in ("a@0", "a@1"):
        did.clear()
        actor.load(tensors, None, version)
        assert did == ["wake weights", "receive"] and actor.asked(version) == 1 and actor.asked(version) == 1
        actor.sleep()
        actor.sleep()
        assert did[2:] == ["wake kv_cache", "generate", "generate", f"sleep {level}"]
    # Asked again without new weights, after a lost batch: what was kept is there, and what was not is refused.
    if mode == "keep":
        assert actor.version() == "a@1" and actor.asked("a@1") == 1
    else:
        with pytest.raises(StaleWeightsError, match="no weights yet"):
            actor.asked("a@1")
        assert actor.begin_host_update("whole", None) is False


def test_an_update_that_generated_nothing_is_put_to_sleep_whole(policy: str) -> None:
    """vLLM takes an engine that has its weights alone for one that sleeps already, and would leave them there."""
    actor = ActorOfDouble(policy, "keep")
    actor.load(load_policy(policy).state_dict(), None, "a@0")
    actor.sleep()
    assert actor.double.did[-2:] == ["wake kv_cache", "sleep 1"] and not actor.double.there


def test_without_the_setting_nothing_sleeps(policy: str) -> None:
    actor = ActorOfDouble(policy, "none")
    actor.load(load_policy(policy).state_dict(), None, "a@0")
    actor.sleep()
    assert actor.asked("a@0") == 1 and actor.double.did == ["receive", "generate"]


# ------------------------------------------------------------------------------------------- training


class Sleeper(LocalGenerator):
    """Writes down what happens; while it generates, whoever trains must hold no gradient."""

    def __init__(self, policy: str) -> None:
        super().__init__(policy)
        self.did: list[str] = []
        self.trainer: OnPolicyTrainer | None = None

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        assert self.trainer is not None
        held = [one.grad for learner in self.trainer.learners.values() for one in learner.trained.values()]
        self.did.append("sync" if all(gradient is None for gradient in held) else "sync beside gradients")
        super().sync(named_tensors, version)

    def _sample(self, prompts: list[list[int]], sampling: Sampling, version: str) -> Any:
        self.did.append("generate")
        return super()._sample(prompts, sampling, version)

    def sleep(self) -> None:
        self.did.append("sleep")


class Watched(LikedCount):
    def __init__(self, did: list[str]) -> None:
        self.did = did

    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> Any:
        self.did.append("score")
        return super().score(prompts, responses)


class GivesBack(Worker):
    did: list[str]

    def give_back_cache(self) -> None:
        self.did.append("give back")


def test_the_trainer_gives_back_before_engines_wake_which_sleep_before_it_learns(tmp_path: Path, policy: str) -> None:
    """And what is learnt does not depend on it."""
    rows = {}
    for mode in ("none", "keep"):
        job = make_job(tmp_path / mode, policy, PPOTraining(num_iterations=2, rollouts_per_iteration=16))
        job = replace(job, generation=Generation(sleep_mode=mode))
        source, worker = Sleeper(policy), GivesBack(job.stage_dir)
        worker.did = source.did
        source.trainer = trainer = OnPolicyTrainer(job, worker, source, Watched(source.did))
        rows[mode] = [trainer.run(iteration) for iteration in range(2)]
        awake = ["sync", "generate", "score", "sync beside gradients", "generate", "score"]
        asleep = ["give back", "sync", "generate", "sleep", "score"] * 2
        assert source.did == (awake if mode == "none" else asleep)
    for one, other in zip(rows["none"], rows["keep"], strict=True):
        same = [name for name in one if not name.startswith("time/") and name != "tokens_per_second"]
        assert {name: one[name] for name in same} == {name: other[name] for name in same}


# --------------------------------------------------------------------------------- settings and memory


def comparison(mode: str = "keep", **changed: Any) -> Comparison:
    tree: dict[str, Any] = {
        "entries": [{"name": "ppo", "method": {"kind": "rlhf", "reward": {"kind": "gold"}}}],
        "resources": {"use_gpu": True, "gpus_per_worker": 0.9},
        "generation": {"gpus": 0.1, "sleep_mode": mode, "gpu_memory_utilization": 0.5},
    }
    return parse_config({key: {**value, **changed.get(key, {})} if key != "entries" else changed.get(key, value)
                         for key, value in tree.items()})  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"resources": {"use_gpu": False}}, "is for engines on GPUs; it needs resources.use_gpu: true"),
        ({"generation": {"tensor_parallel": 2}}, "generation.tensor_parallel: 2 takes whole GPUs"),
        ({"generation": {"gpus": 1}}, "makes room for a worker on the same GPU, but here each has its own"),
        (
            {"resources": {"labels": {"role": "train"}}, "generation": {"labels": {"role": "generate"}}},
            "makes room for a worker on the same GPU",
        ),
        (
            {"entries": [{"name": "late", "method": {"kind": "rlhf", "reward": {"kind": "gold"},
                                                    "training": {"mode": "asynchronous"}}}]},
            "entry 'late' generates meanwhile",
        ),
    ],
)  # fmt: skip
def test_sleeping_where_it_makes_no_sense_is_one_sentence(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        comparison(**changed)


def test_any_number_of_workers_may_share_their_gpus_with_an_engine_each() -> None:
    config = comparison(resources={"num_workers": 4}, generation={"num_actors": 4})
    assert config.generation.weight_sync == "host" and share_beside_engine(config) == 0.9


def test_memory_is_the_larger_of_learning_and_of_what_stays_beside_an_awake_engine() -> None:
    node = NodeReport("a", {}, None, [("H100", 80 * GIB)], True, GIB, 1024 * 1024.0)
    asleep, awake = comparison(), comparison("none")
    assert largest_room(asleep, [node], on_policy=True) == 80 * GIB
    assert largest_room(awake, [node], on_policy=True) == 40 * GIB
    memory = Heaviest(60 * GIB, "x", on_policy=True, resting=30 * GIB)
    (learning,) = judge_memory(asleep, [node], memory)
    (waking,) = judge_waking(asleep, [node], memory)
    assert learning.problem is False and waking.problem is False and "70.0 GiB of the 80.0 GiB" in waking.text
    assert judge_memory(awake, [node], memory)[0].problem is True and judge_waking(awake, [node], memory) == []
    (waking,) = judge_waking(asleep, [node], memory._replace(resting=41 * GIB))
    assert waking.problem is True and "lower the engine's part" in waking.text


def test_what_cannot_stay_beside_an_awake_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefarena.modeling.memory import MemoryNeed

    node = NodeReport("a", {}, None, [("H100", 80 * GIB)], True, GIB, 1024 * 1024.0)
    config = comparison()
    (training,) = [one for one in trainings(config) if one.on_policy]
    for resting, refused in ((39, False), (41, True)):
        need = MemoryNeed(resting * GIB, 10 * GIB, 0, GIB)
        monkeypatch.setattr("pipelines.memory.least_need", lambda *_, need=need: need)
        if not refused:
            refuse_what_cannot_fit(config, training, object(), [node])  # type: ignore[arg-type]
            continue
        with pytest.raises(UserError, match=r"the engine that wakes on the same GPU takes .* of the 80"):
            refuse_what_cannot_fit(config, training, object(), [node])  # type: ignore[arg-type]
