"""Whatever dies while weights are on their way between devices, the next update arrives.

vLLM's state machine is a real engine's. In the tests of the fleet the processes are real, and so are their deaths; the
engine is a double that refuses what vLLM refuses, and waits for good where NCCL would.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle
from test_generation import PROMPTS
from torch import Tensor

from prefarena.config import Generation
from prefarena.errors import WaitTimeoutError
from prefarena.generation import host_transfer, transfer
from prefarena.generation.actor import GenerationActor, ServedModel
from prefarena.generation.client import Generator
from prefarena.generation.fleet import Generators
from prefarena.generation.interface import GeneratorLostError, Sampling, TransferLostError
from prefarena.generation.layout import ModelLayout
from prefarena.generation.shared import buckets
from prefarena.generation.transfer import TransferClient, free
from prefarena.modeling.load import load_policy

NAMES = ("first-engineless", "second-engineless")


class EngineDouble:
    """An engine without vLLM: one connection, one update at a time, and a folder whose files say what happens to it."""

    dtype = torch.float32

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.updating = False

    def happens(self, what: str) -> bool:
        """Whether it is to happen now; it happens once."""
        path = self.folder / what
        if not path.exists():
            return False
        path.unlink()
        return True

    def connect(self, init_info: dict[str, Any]) -> None:
        if self.happens("dies-joining"):
            os.kill(os.getpid(), signal.SIGKILL)

    def disconnect(self) -> None:
        if self.updating:
            raise RuntimeError("Cannot release a trainer connection during a weight update")

    def start_update(self) -> None:
        if self.updating:
            raise RuntimeError("start_weight_update called while a weight update is already active.")
        self.updating = True

    def receive(self, update_info: dict[str, Any]) -> None:
        if self.happens("dies-receiving"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.happens("waits-receiving"):
            time.sleep(3600)
        if self.happens("raises-receiving"):
            raise RuntimeError("out of memory, say")

    def finish_update(self) -> None:
        self.updating = False

    def held_checksums(self, tensors: Any, sample: Any) -> dict[str, int]:
        return {}


class EnginelessActor(GenerationActor):
    """A generation actor whose engine is a double."""

    def __init__(self, path: str, folder: Path) -> None:
        self._path, self._max_model_len, self._merged_heads = path, 16, frozenset()
        self._version, self._connected, self._updating = None, False, False
        self._update, self._failed, self._checked, self._layers = None, False, None, ()
        self._sleep_mode, self._asleep = "none", set()
        self._layout = ModelLayout(path)
        self._engine: Any = EngineDouble(folder)


class SenderDouble:
    """Asks of the engines what vLLM's sender over NCCL asks: its broadcast ends when all receive, or when aborted."""

    def __init__(self, client: TransferClient) -> None:
        self.client, self.ended, self.aborted = client, threading.Event(), False
        client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 3})

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        def receive() -> None:
            self.client.update_weights({"names": [name for name, _ in tensors]})
            self.ended.set()

        self.client.start_weight_update()
        pool = ThreadPoolExecutor(1)
        received = pool.submit(receive)
        self.ended.wait(120)
        pool.shutdown(wait=False)
        received.result()
        self.client.finish_weight_update()
        self.ended.clear()

    def close(self) -> None:
        self.aborted = True
        self.ended.set()


@pytest.fixture
def senders(monkeypatch: pytest.MonkeyPatch) -> list[SenderDouble]:
    """Every transfer that this process begins."""
    made: list[SenderDouble] = []

    def join(backend: str, client: TransferClient, *_: Any) -> SenderDouble:
        made.append(SenderDouble(client))
        return made[-1]

    monkeypatch.setattr(transfer, "join_transfer", join)
    return made


@pytest.fixture(scope="module")
def actors(ray_session: None, tiny_policy: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Two actors with doubles of engines, by name: the folder in which a file makes something happen to each."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    root = tmp_path_factory.mktemp("happens")
    folders = {name: root / name for name in NAMES}
    handles: list[Any] = []
    for name, folder in folders.items():
        folder.mkdir()
        actor = ray.remote(EnginelessActor).options(name=name, num_cpus=0, max_restarts=-1)
        handles.append(actor.remote(tiny_policy, folder))
    yield folders
    for handle in handles:
        ray.kill(handle)


@pytest.fixture
def fleet(actors: dict[str, Path]) -> Generators:
    """A client as a trainer that was just started has it."""
    return Generators.connect(NAMES, Generation(weight_sync="nccl", sync_timeout_s=5))


def pids() -> list[int]:
    return [Generator.connect(name, Generation()).call("pid", "", "sync_timeout_s").result() for name in NAMES]


def wait_for_another(name: str, pid: int) -> None:
    generator = Generator.connect(name, Generation())
    while generator.call("pid", "to tell its process", "start_timeout_s").result() == pid:
        time.sleep(0.1)


@pytest.fixture(scope="module")
def weights(tiny_policy: str) -> dict[str, Tensor]:
    return load_policy(tiny_policy).state_dict()


def noted(weights: dict[str, Tensor], asked: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The weights one by one; `asked` is told of each when it is made."""
    for name, tensor in weights.items():
        asked.append(name)
        yield name, tensor


def test_a_death_between_updates_costs_no_other_engine(
    fleet: Generators, senders: list[SenderDouble], weights: dict[str, Tensor]
) -> None:
    fleet.sync(weights.items(), "run@0")
    fleet.sync(weights.items(), "run@1")
    assert len(senders) == 1
    first, second = pids()
    os.kill(second, signal.SIGKILL)
    wait_for_another(NAMES[1], second)
    fleet.sync(weights.items(), "run@2")
    assert set(fleet.versions().values()) == {"run@2"}
    assert pids()[0] == first and pids()[1] != second
    assert [sender.aborted for sender in senders] == [True, False]


def test_a_death_in_an_update_restarts_the_engines_that_wait_in_it(
    fleet: Generators, senders: list[SenderDouble], weights: dict[str, Tensor], actors: dict[str, Path]
) -> None:
    fleet.sync(weights.items(), "run@0")
    before = pids()
    (actors[NAMES[0]] / "waits-receiving").touch()
    (actors[NAMES[1]] / "dies-receiving").touch()
    asked: list[str] = []
    with pytest.raises(TransferLostError):
        fleet.sync(noted(weights, asked), "run@1")
    assert asked == [*weights]  # though the engines took none: gathering one may take several processes
    fleet.sync(weights.items(), "run@1")
    assert set(fleet.versions().values()) == {"run@1"}
    assert not set(pids()) & set(before)
    assert [sender.aborted for sender in senders] == [True, False]
    fleet.leave()
    assert senders[-1].aborted


def test_a_death_on_joining_is_survived(
    fleet: Generators, senders: list[SenderDouble], weights: dict[str, Tensor], actors: dict[str, Path]
) -> None:
    first = TransferClient([Generator.connect(NAMES[0], Generation())], 30)
    first.init_weight_transfer_engine({})
    first.start_weight_update()
    with pytest.raises(TransferLostError, match="was lost, while waiting to join"):
        first.init_weight_transfer_engine({})  # in an update: it ends its process
    (actors[NAMES[1]] / "dies-joining").touch()
    fleet.sync(weights.items(), "run@0")
    assert set(fleet.versions().values()) == {"run@0"}


@pytest.mark.parametrize("waits", [False, True])
def test_engines_outlive_a_trainer_that_died_in_an_update(
    fleet: Generators, senders: list[SenderDouble], weights: dict[str, Tensor], actors: dict[str, Path], waits: bool
) -> None:
    dead = TransferClient([Generator.connect(name, Generation()) for name in NAMES], 30)
    dead.init_weight_transfer_engine({})
    dead.start_weight_update()
    before = pids()
    if waits:
        (actors[NAMES[0]] / "waits-receiving").touch()
        ray.get_actor(NAMES[0]).update.remote({})
    fleet.sync(weights.items(), "run@5")  # by the trainer that took its place
    assert set(fleet.versions().values()) == {"run@5"}
    assert not set(pids()) & set(before)
    with pytest.raises(TransferLostError, match="in the middle of an update"):
        dead.finish_weight_update()
    assert set(fleet.versions().values()) == {"run@5"}


def test_engines_that_die_in_every_update_are_lost(
    fleet: Generators, monkeypatch: pytest.MonkeyPatch, weights: dict[str, Tensor]
) -> None:
    def join(*_: Any) -> Any:
        raise TransferLostError("generator 'first' was lost")

    monkeypatch.setattr(transfer, "join_transfer", join)
    with pytest.raises(GeneratorLostError, match=r"did not arrive in 4 attempts, .* generator 'first' was lost"):
        fleet.sync(weights.items(), "run@0")


def test_an_update_that_takes_too_long_is_no_end_of_the_next_one(
    fleet: Generators, senders: list[SenderDouble], weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_and_wait(sender: SenderDouble, tensors: Any) -> None:
        sender.client.start_weight_update()
        sender.ended.wait(120)

    with monkeypatch.context() as patches:
        patches.setattr(SenderDouble, "send", begin_and_wait)
        with pytest.raises(WaitTimeoutError, match=r"waited 5 s for generators to take weights 'run@0' over nccl"):
            fleet.sync(weights.items(), "run@0")
    assert senders[0].aborted and set(fleet.versions().values()) == {None}
    fleet.sync(weights.items(), "run@1")
    assert set(fleet.versions().values()) == {"run@1"}


# ------------------------------------------------------------------------------------------- through host memory


@pytest.fixture
def by_host(actors: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Generators:
    """A client whose updates are several buckets."""
    monkeypatch.setattr(host_transfer, "BUCKET_BYTES", 2**15)
    return Generators.connect(NAMES, Generation(sync_timeout_s=60))


def test_an_actor_that_dies_between_buckets_has_no_part_in_the_rest(
    by_host: Generators, weights: dict[str, Tensor], actors: dict[str, Path]
) -> None:
    by_host.sync(weights.items(), "run@0")
    first, second = pids()
    (actors[NAMES[0]] / "dies-receiving").touch()
    by_host.sync(weights.items(), "run@1")
    wait_for_another(NAMES[0], first)
    assert by_host.versions() == {NAMES[0]: None, NAMES[1]: "run@1"}
    by_host.sync(weights.items(), "run@1")
    assert set(by_host.versions().values()) == {"run@1"} and pids()[1] == second


def test_tensors_are_all_asked_for_though_no_actor_is_left(
    by_host: Generators, weights: dict[str, Tensor], actors: dict[str, Path]
) -> None:
    """Where a model is spread over several processes, gathering a tensor takes all of these."""
    for folder in actors.values():
        (folder / "dies-receiving").touch()
    asked: list[str] = []
    by_host.sync(noted(weights, asked), "run@2")
    assert asked == [*weights]
    by_host.sync(weights.items(), "run@2")
    assert set(by_host.versions().values()) == {"run@2"}


def test_an_update_whose_trainer_died_between_buckets_is_ended_by_the_next(
    by_host: Generators, weights: dict[str, Tensor]
) -> None:
    before = pids()
    members = [Generator.connect(name, Generation()) for name in NAMES]
    bucket = next(buckets(weights.items(), torch.float32, 2**15))
    for member in members:
        member.call_update("begin_host_update", "to begin", "dead", None).result()
        member.call_update("take_bucket", "to take", "dead", bucket, step=True).result()
    assert set(by_host.versions().values()) == {None}
    by_host.sync(weights.items(), "run@3")
    for member in members:
        with pytest.raises(TransferLostError, match="in the middle of an update"):
            member.call_update("end_host_update", "to end", "dead", None, "dead", step=True).result()
    assert set(by_host.versions().values()) == {"run@3"} and pids() == before


def test_an_engine_that_raised_in_an_update_is_restarted_for_the_next(
    by_host: Generators, weights: dict[str, Tensor], actors: dict[str, Path]
) -> None:
    """vLLM has layers then of which a part was replaced."""
    first, second = pids()
    (actors[NAMES[0]] / "raises-receiving").touch()
    with pytest.raises(RuntimeError, match="out of memory, say"):
        by_host.sync(weights.items(), "run@4")
    assert by_host.versions()[NAMES[0]] is None and pids() == [first, second]
    by_host.sync(weights.items(), "run@4")
    assert set(by_host.versions().values()) == {"run@4"}
    assert pids()[0] != first and pids()[1] == second


def test_the_limit_of_an_update_grows_with_the_model() -> None:
    generator = Generator(None, "g", Generation(sync_timeout_s=10))
    generator.served = ServedModel("", frozenset(), num_bytes=14 * 2**30)
    assert generator.sync_limit_s == 10 + 448
    generator.served = ServedModel("", frozenset(), num_bytes=2**20)
    assert generator.sync_limit_s == 10


# ------------------------------------------------------------------------------------------------ vLLM's own engine


def inside(generator: Generators, function: Callable[[Any], Any]) -> Any:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    actor: Any = ray.get_actor(generator.names[0])
    return ray.get(actor.__ray_call__.remote(function))


def begin_and_leave(actor: Any) -> str:
    """Begin an update; what vLLM says when the connection is to be released in it."""
    actor.connect({})
    actor.start_update()
    try:
        actor._engine.disconnect()
    except RuntimeError as error:
        return str(error)
    return ""


def test_an_engine_in_the_middle_of_an_update_is_restarted_to_join_another(
    generator: Generators, tiny_policy: str
) -> None:
    pid = inside(generator, lambda actor: actor.pid())
    assert "Cannot release a trainer connection during a weight update" in inside(generator, begin_and_leave)
    settings = Generation()
    free([Generator.connect(name, settings) for name in generator.names], settings)
    assert inside(generator, lambda actor: actor.pid()) != pid
    assert generator.versions() == {generator.names[0]: None}
    generator.sync(load_policy(tiny_policy).state_dict().items(), "after")
    assert len(generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), "after")) == len(PROMPTS)
