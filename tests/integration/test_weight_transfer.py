"""What we rely on in vLLM's weight transfer between GPUs, checked without one.

Both of vLLM's sides run, trainer's and engine's, in a real engine's process on CPU; what carries the bytes (NCCL's
broadcast, CUDA's shared memory) is replaced by a queue. So a change of vLLM's interface, or of ours, fails here.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import ray
import torch
from ray import cloudpickle
from test_generation import PROMPTS, logp_gap, perturbed
from tiny import save_tiny_policy
from transformers import Gemma2Config, LlamaConfig, Qwen2Config

from prefarena.errors import WaitTimeoutError
from prefarena.generation.checksums import checksums
from prefarena.generation.fleet import Generators
from prefarena.generation.interface import Sampling, TransferLostError, UpdateInfo, WeightMismatchError
from prefarena.generation.transfer import TransferClient, within
from prefarena.generation.weights import Sums
from prefarena.modeling.load import load_policy


class Loopback:
    """The control plane of a transfer (TransferClient's methods), to the actor in whose process it runs."""

    def __init__(self, actor: Any, sums: Sums | None, version: str) -> None:
        self.actor, self.sums, self.version = actor, sums, version
        self.calls: list[tuple[str, Any]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append(("init", init_info))
        self.actor.connect(init_info)

    def start_weight_update(self) -> None:
        self.calls.append(("start", None))
        self.actor.start_update()

    def update_weights(self, update_info: UpdateInfo) -> None:
        assert isinstance(update_info, dict)
        self.calls.append(("update", {key: update_info[key] for key in ("names", "dtype_names", "shapes")}))
        self.actor.update(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(("finish", weight_version))
        self.actor.finish_update(self.sums, weight_version or self.version)


def carried_by(backend: str) -> Any:
    """Patches under which `backend` carries its bytes through a queue of this process."""
    from contextlib import ExitStack

    wire: queue.Queue[tuple[str, torch.Tensor]] = queue.Queue()
    stack = ExitStack()
    stack.enter_context(patch("torch.accelerator.synchronize", lambda *args: None))
    stack.enter_context(patch("torch.accelerator.current_device_index", lambda: 0))
    module = f"vllm.distributed.weight_transfer.{backend}_engine"
    if backend == "nccl":

        def produce(iterator: Any, group: Any, post_iter_func: Callable[..., torch.Tensor], **_: Any) -> None:
            for item in iterator:
                wire.put((item[0], post_iter_func(item).clone()))

        def consume(iterator: Any, group: Any, post_unpack_func: Callable[..., Any], **_: Any) -> None:
            for name, (shape, dtype) in iterator:
                sent_name, tensor = wire.get(timeout=30)
                assert (sent_name, list(tensor.shape), tensor.dtype) == (name, list(shape), dtype)
                post_unpack_func([(name, tensor)])

        communicator = SimpleNamespace(destroy=lambda: None)
        stack.enter_context(patch(f"{module}.packed_nccl_broadcast_producer", produce))
        stack.enter_context(patch(f"{module}.packed_nccl_broadcast_consumer", consume))
        stack.enter_context(patch(f"{module}.open_trainer_endpoint", lambda info: communicator))
        stack.enter_context(patch(f"{module}.worker_init_process_group", lambda info, parallel: communicator))
    else:

        def chunks(iterator: Any, post_iter_func: Callable[..., torch.Tensor], **_: Any) -> Any:
            for item in iterator:  # one tensor a chunk
                tensor = post_iter_func(item).clone()
                wire.put((item[0], tensor))
                dtype = str(tensor.dtype).split(".")[-1]
                yield SimpleNamespace(
                    names=[item[0]], dtype_names=[dtype], shapes=[list(tensor.shape)],
                    ipc_handle={"gpu": ()}, tensor_sizes=[tensor.nbytes],
                )  # fmt: skip

        def rebuilt(ipc_handle: Any, names: list[str], **_: Any) -> list[tuple[str, torch.Tensor]]:
            assert ipc_handle == {"gpu": ()}
            return [wire.get(timeout=30) for _ in names]

        stack.enter_context(patch(f"{module}.packed_ipc_producer", chunks))
        stack.enter_context(patch(f"{module}.packed_ipc_consumer", rebuilt))
        stack.enter_context(patch("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid="gpu")))
        stack.enter_context(patch("torch.cuda.ipc_collect", lambda: None))
    return stack


def exchange_transfer_engine(wrapper: Any, backend: str) -> None:
    """Give a vLLM worker the receiving side of `backend`, as its configuration would have."""
    worker = wrapper.worker
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from prefarena.generation.engine.rank import BACKENDS

    worker.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=BACKENDS[backend]),
        worker.vllm_config,
        worker.device,
        worker.model_runner.get_model(),
    )


def transfer(
    actor: Any, backend: str, weights: list[dict[str, torch.Tensor]], sums: list[Sums]
) -> list[tuple[str, Any]]:
    """Send each of `weights` through both sides of `backend`; what was asked of the engine."""
    from prefarena.generation.engine.sender import DeviceSender

    llm = actor._engine._llm
    try:
        with carried_by(backend):
            llm.collective_rpc(exchange_transfer_engine, args=(backend,))
            client = Loopback(actor, None, "")
            shapes = {name: tuple(tensor.shape) for name, tensor in weights[0].items()}
            sender = DeviceSender(backend, client, 3, torch.float32, "10.0.0.1", shapes)
            for update, tensors in enumerate(weights):
                client.sums, client.version = sums[update], f"{backend}@{update}"
                sender.send(tensors.items())
            sender.close()
            actor.connect(client.calls[0][1])  # as after the trainer was restarted
            return client.calls
    finally:
        actor._connected = False
        llm.collective_rpc(exchange_transfer_engine, args=("host",))


def inside(generator: Generators, *args: Any) -> Any:
    for name in (__name__, "test_generation"):
        cloudpickle.register_pickle_by_value(sys.modules[name])
    actor: Any = ray.get_actor(generator.names[0])
    return ray.get(actor.__ray_call__.remote(*args))


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_weights_go_through_both_sides_of_vllms_transfer(generator: Generators, tiny_policy: str, backend: str) -> None:
    policies = [perturbed(load_policy(tiny_policy), update) for update in range(2)]
    weights = [policy.state_dict() for policy in policies]
    sums = [Sums(checksums(tensors, torch.float32)) for tensors in weights]
    calls = inside(generator, transfer, backend, weights, sums)
    version = f"{backend}@1"
    assert generator.versions() == {generator.names[0]: version}
    assert logp_gap(policies[1], generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), version), 1.0) < 1e-4

    kinds = [kind for kind, _ in calls]
    num_chunks = 1 if backend == "nccl" else len(weights[0])
    assert kinds == ["init", *(["start", *["update"] * num_chunks, "finish"] * 2)]
    names = [name for kind, info in calls if kind == "update" for name in info["names"]]
    assert names == [*weights[0]] * 2
    if backend == "nccl":
        assert calls[0][1].items() >= {"rank_offset": 1, "world_size": 4, "master_address": "10.0.0.1"}.items()
    with pytest.raises(WeightMismatchError):
        inside(generator, transfer, backend, weights[:1], sums[1:])
    assert generator.versions() == {generator.names[0]: None}
    generator.sync(weights[0].items(), "host-again")  # the host's way works as before
    assert logp_gap(policies[0], generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), "host-again"), 1.0) < 1e-4


def load_checkpoint(actor: Any, backend: str, path: str) -> None:
    """Load a checkpoint in an engine that takes a trainer's weights over `backend`."""
    llm = actor._engine._llm
    llm.collective_rpc(exchange_transfer_engine, args=(backend,))
    try:
        with patch("torch.accelerator.synchronize", side_effect=AssertionError("of a GPU")):
            actor.load_checkpoint(path, True, f"stored-{backend}")
    finally:
        llm.collective_rpc(exchange_transfer_engine, args=("host",))


@pytest.mark.parametrize("backend", ["host", "nccl", "ipc"])
def test_a_checkpoint_is_loaded_whichever_way_a_trainers_weights_come(
    generator: Generators, tmp_path: Path, backend: str
) -> None:
    path = save_tiny_policy(tmp_path, seed=11)
    inside(generator, load_checkpoint, backend, path)
    rollouts = generator.generate(PROMPTS, Sampling(4, 1.0, seed=0), f"stored-{backend}")
    assert logp_gap(load_policy(path), rollouts, 1.0) < 1e-4


def test_each_way_is_a_class_of_vllms_own(generator: Generators) -> None:
    def kinds(actor: Any) -> dict[str, list[str]]:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        from prefarena.generation.engine.rank import BACKENDS

        registry = WeightTransferEngineFactory._registry
        return {kind: [each.__name__ for each in registry[name]().__mro__] for kind, name in BACKENDS.items()}

    found = inside(generator, kinds)
    assert found.keys() == {"host", "nccl", "ipc"}
    assert "NCCLWeightTransferEngine" in found["nccl"] and "IPCWeightTransferEngine" in found["ipc"]


#: Models with embeddings of more than a GiB. Two layers: the others are like them.
LARGE: dict[str, tuple[Any, torch.dtype]] = {
    "Qwen2.5-7B": (
        Qwen2Config(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=2, num_attention_heads=28,
            num_key_value_heads=4,
        ),
        torch.bfloat16,
    ),
    "Gemma-2-9B": (
        Gemma2Config(
            vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=16,
            num_key_value_heads=8, head_dim=256,
        ),
        torch.bfloat16,
    ),
    "Llama-3.2-3B": (
        LlamaConfig(
            vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=24,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        ),
        torch.float32,
    ),
}  # fmt: skip


def chunks_of(actor: Any, config: Any, dtype: torch.dtype, folder: str) -> tuple[int, int, list[tuple[int, list[str]]]]:
    """The IPC transfer of a model of shapes alone, with the buffer that our sender asks of vLLM.

    Returns the bytes of that buffer, those of all weights, and of each chunk the bytes and the names.
    """
    from transformers import AutoModelForCausalLM
    from vllm.distributed.weight_transfer import packed_tensor

    from prefarena.generation.engine.sender import DeviceSender
    from prefarena.generation.layout import ModelLayout

    config.save_pretrained(folder)
    with torch.device("meta"), actor._engine.model_building():
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    with actor._engine.model_building():
        layout = ModelLayout(folder)
    told: list[dict[str, Any]] = []
    client = SimpleNamespace(
        init_weight_transfer_engine=lambda info: None,
        start_weight_update=lambda: None,
        update_weights=told.append,
        finish_weight_update=lambda: None,
    )
    buffers, empty = [], torch.empty

    def buffer(size: int, **_: Any) -> torch.Tensor:
        buffers.append(size)
        return empty(size, dtype=torch.uint8, device="meta")

    stream = SimpleNamespace(synchronize=lambda: None)
    module = "vllm.distributed.weight_transfer"
    with (
        patch("torch.accelerator.current_device_index", lambda: 0),
        patch("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid="gpu")),
        patch("torch.cuda.ipc_collect", lambda: None),
        patch("torch.cuda.current_stream", lambda: stream),
        patch(f"{module}.packed_tensor.torch.empty", buffer),
        patch(f"{module}.packed_tensor.reduce_tensor", lambda tensor: (None, ())),
    ):
        assert packed_tensor.DEFAULT_PACKED_BUFFER_SIZE_BYTES == 2**30
        sender = DeviceSender("ipc", client, 1, dtype, "", layout.sent_shapes(()))
        sender.send(layout.one_by_one(weights.items(), ()))
    [size] = buffers
    total = sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize
    return size, total, [(sum(info["tensor_sizes"]), info["names"]) for info in told]


@pytest.mark.parametrize("name", LARGE)
def test_ipc_carries_embeddings_of_more_than_a_gib(generator: Generators, name: str, tmp_path: Path) -> None:
    config, dtype = LARGE[name]
    size, total, chunks = inside(generator, chunks_of, config, dtype, str(tmp_path))
    embedding = config.vocab_size * config.hidden_size * dtype.itemsize
    assert size == embedding > 2**30  # and no larger
    assert sum(carried for carried, _ in chunks) == total
    assert any("model.embed_tokens.weight" in names for _, names in chunks)


def test_ipc_takes_no_larger_a_buffer_than_a_small_model_fills(generator: Generators, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    size, total, chunks = inside(generator, chunks_of, config, torch.float32, str(tmp_path))
    assert size == total == chunks[0][0] and len(chunks) == 1


def test_our_client_has_what_vllms_trainer_side_calls(generator: Generators) -> None:
    def is_client(actor: Any) -> bool:
        from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

        return isinstance(TransferClient([], 1), VLLMWeightSyncClient)

    assert inside(generator, is_client)


class Recorder:
    """A member that answers every call at once, and keeps what was asked."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.error, self.calls = name, error, []  # type: ignore[var-annotated]

    def call_step(self, method: str, what: str, *args: Any) -> Any:
        self.calls.append((method, args))

        def result(deadline: float) -> None:
            if self.error:
                raise self.error

        return SimpleNamespace(answer=ray.put(None), result=result)


def test_every_actor_joins_nccl_with_a_rank_of_its_own(ray_session: None) -> None:
    members: list[Any] = [Recorder("a"), Recorder("b"), Recorder("c")]
    client = TransferClient(members, 30)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 4})
    ranks = [member.calls[0][1][0]["rank_offset"] for member in members]
    assert ranks == [1, 2, 3] and all(member.calls[0][0] == "connect" for member in members)
    client.init_weight_transfer_engine({"packed": True})
    assert members[2].calls[1] == ("connect", ({"packed": True},))


def test_an_actor_whose_engine_has_several_ranks_joins_with_as_many(ray_session: None) -> None:
    """Each rank adds its own number to the actor's offset, as vLLM does."""
    members: list[Any] = [Recorder("a"), Recorder("b")]
    TransferClient(members, 30, ranks_each=4).init_weight_transfer_engine({"rank_offset": 1, "world_size": 9})
    assert [member.calls[0][1][0]["rank_offset"] for member in members] == [1, 5]


def test_the_version_and_checksums_travel_with_the_end_of_an_update(ray_session: None) -> None:
    member: Any = Recorder("a")
    client = TransferClient([member], 30)
    client.begin(Sums({"x": 1}), "run@7")
    client.start_weight_update()
    client.update_weights({"names": []})
    client.finish_weight_update()
    assert member.calls == [
        ("check_joined", ()),
        ("start_update", ()),
        ("update", ({"names": []},)),
        ("finish_update", (Sums({"x": 1}), "run@7")),
    ]


def test_an_actor_that_was_restarted_ends_the_update_before_another_begins_it(ray_session: None) -> None:
    members: list[Any] = [Recorder("a"), Recorder("b", TransferLostError("restarted"))]
    client = TransferClient(members, 30)
    with pytest.raises(TransferLostError):
        client.start_weight_update()
    assert members[0].calls == [("check_joined", ())]
    with pytest.raises(TransferLostError):
        client.failed.result(0)
    client.begin(None, "again")
    assert not client.failed.done()


def test_an_actor_that_was_restarted_asks_to_be_met_again(generator: Generators, tiny_policy: str) -> None:
    with pytest.raises(TransferLostError, match="it was restarted"):
        inside(generator, lambda actor: actor.start_update())


def test_a_transfer_that_never_ends_is_left_with_an_error_that_names_it() -> None:
    with pytest.raises(WaitTimeoutError, match=r"waited 0\.05 s for a broadcast; generation\.sync_timeout_s"):
        within(0.05, "a broadcast", queue.Queue().get)
    assert within(5, "a sum", lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        within(5, "a fraction", lambda: 1 // 0)


def test_a_transfer_ends_with_what_a_step_raised_though_its_broadcast_does_not() -> None:
    failed: Future[None] = Future()
    threading.Timer(0.05, failed.set_exception, [TransferLostError("an engine died")]).start()
    with pytest.raises(TransferLostError, match="an engine died"):
        within(30, "a broadcast", queue.Queue().get, failed)
    assert within(5, "a sum", lambda: 1 + 1, Future()) == 2


def broken_off(actor: Any, weights: dict[str, torch.Tensor]) -> tuple[bool, bool, str]:
    """vLLM's sending side over NCCL with an engine that is lost when it should receive.

    Returns whether the broadcast goes on then, whether `close` ends it, and what sending raises in the end.
    """
    from prefarena.generation.engine.sender import DeviceSender

    aborted, under_way, outcome = threading.Event(), threading.Event(), queue.Queue[BaseException]()

    def broadcast(**_: Any) -> None:
        under_way.set()
        aborted.wait(30)

    def update(info: Any) -> None:
        under_way.wait(30)
        raise TransferLostError("an engine died")

    client = SimpleNamespace(
        init_weight_transfer_engine=lambda info: None, start_weight_update=lambda: None, update_weights=update,
        finish_weight_update=lambda: outcome.put(AssertionError("an update that nobody received was finished")),
    )  # fmt: skip
    module = "vllm.distributed.weight_transfer.nccl_engine"
    with (
        patch(f"{module}.packed_nccl_broadcast_producer", broadcast),
        patch(f"{module}.open_trainer_endpoint", lambda info: SimpleNamespace(destroy=aborted.set)),
    ):
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        sender = DeviceSender("nccl", client, 1, torch.float32, "10.0.0.1", shapes)

        def send() -> None:
            try:
                sender.send(weights.items())
            except BaseException as error:
                outcome.put(error)

        thread = threading.Thread(target=send)
        thread.start()
        thread.join(0.2)
        goes_on = thread.is_alive()
        sender.close()
        thread.join(30)
        return goes_on, not thread.is_alive(), type(outcome.get(timeout=1)).__name__


def test_closing_a_transfer_aborts_the_broadcast_that_a_lost_engine_left_alone(
    generator: Generators, tiny_policy: str
) -> None:
    weights = load_policy(tiny_policy).state_dict()
    assert inside(generator, broken_off, weights) == (True, True, "TransferLostError")
