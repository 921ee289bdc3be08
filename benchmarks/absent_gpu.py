"""Let Inductor and Triton compile for a GPU that is not there. Nothing can be run.

What Inductor asks of a device (its capability, shared memory, processors) is answered from the vendor's tables; it must
be told before torch._inductor is imported, and for one card in a process (`each_apart`). Written against torch 2.13 and
Triton 3.7.1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sides import HERE, environment_python

_LIMIT_S = 1800


@dataclass(frozen=True)
class Card:
    """What kernels are chosen by. shared_memory: bytes that one block of threads may ask for."""

    name: str
    capability: tuple[int, int]
    shared_memory: int
    num_processors: int

    @property
    def number(self) -> int:
        return self.capability[0] * 10 + self.capability[1]


CARDS = {
    "A100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 166912, 108),
    "A10G": Card("NVIDIA A10G", (8, 6), 101376, 80),
    "L40S": Card("NVIDIA L40S", (8, 9), 101376, 142),
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 232448, 132),
}


def pretend(card: Card) -> None:
    """Answer for `card` wherever torch and Triton ask for a device."""
    scratch = tempfile.mkdtemp(prefix="kernels-")
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", "TRITON_CACHE_DIR": f"{scratch}/triton"}
    import torch
    import torch._dynamo.device_interface as interface
    import torch._inductor.config as inductor

    inductor.fx_graph_cache, inductor.compile_threads = False, 1
    inductor.use_static_triton_launcher = False
    properties = _properties(card)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda _=None: properties,
        "get_device_capability": lambda _=None: card.capability,
        "get_device_name": lambda _=None: card.name,
        "is_initialized": lambda: True,
        "synchronize": lambda *_: None,
        "current_stream": lambda _=None: SimpleNamespace(stream_id=0, cuda_stream=0),
        "is_bf16_supported": lambda *_, **__: True,
        "_lazy_init": lambda: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name in ("_cuda_getDevice", "_cuda_setDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
        setattr(torch._C, name, lambda *_: 0)
    device: Any = interface.CudaInterface
    device.device_count, device.is_available = staticmethod(lambda: 1), staticmethod(lambda: True)
    device.current_device = device.Worker.current_device = staticmethod(lambda: 0)
    device.get_compute_capability = staticmethod(lambda _=None: card.number)
    device.get_device_properties = device.Worker.get_device_properties = staticmethod(lambda _=None: properties)
    _pretend_to_triton(card)


def _properties(card: Card) -> SimpleNamespace:
    return SimpleNamespace(
        name=card.name,
        major=card.capability[0],
        minor=card.capability[1],
        multi_processor_count=card.num_processors,
        total_memory=80 * 2**30,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=card.shared_memory,
        shared_memory_per_multiprocessor=card.shared_memory + 1024,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
    )


def _pretend_to_triton(card: Card) -> None:
    import torch
    import torch._inductor.runtime.triton_helpers as helpers
    import torch._inductor.scheduler as scheduler
    import torch.utils._triton as availability
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    asks: dict[str, Any] = {
        "max_shared_mem": card.shared_memory,
        "multiprocessor_count": card.num_processors,
        "warpSize": 32,
        "max_num_regs": 65536,
    }
    utilities = SimpleNamespace(
        get_device_properties=lambda _: asks, load_binary=lambda *_: (0, 0, 64, 0, 1024)
    )  # nothing is loaded: the binary is looked at alone
    driver.set_active(
        SimpleNamespace(
            utils=utilities,
            get_current_target=lambda: GPUTarget("cuda", card.number, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            set_current_device=lambda _: None,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            launcher_cls=lambda *_: lambda *_a, **_k: None,
            map_python_to_cpp_type=str,
            get_device_interface=lambda: torch.cuda,
            is_active=lambda: True,
        )
    )
    helpers.set_driver_to_gpu = helpers.set_driver_to_cpu = lambda: None
    for name in dir(availability):
        if hasattr(getattr(availability, name), "cache_clear"):
            getattr(availability, name).cache_clear()
    for module in vars(scheduler), vars(availability):
        module["has_triton"] = lambda *_, **__: True


def capturing() -> tuple[Any, list[tuple[str, Any, list[Any]]]]:
    """A backend of torch.compile that compiles nothing, and where it leaves the graphs of both passes.

    Each has its pass ("forward", "backward") and its inputs, as Inductor would be handed them. To be called, and what
    is compiled by it to be run, before pretending.
    """
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[tuple[str, Any, list[Any]]] = []

    def keep(name: str) -> Any:
        def kept(graph: Any, inputs: Any) -> Any:
            graphs.append((name, graph, list(inputs)))
            return graph.forward

        return kept

    def partition(graph: Any, inputs: Any, **others: Any) -> Any:
        _recursive_joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, **others)

    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        decompositions=select_decomp_table,
        partition_fn=partition,
    )
    return backend, graphs


def lowered(graph: Any, inputs: list[Any], backward: bool) -> tuple[str, list[tuple[Any, int]]]:
    """The source that Inductor writes for a graph, its tensors taken to be on a GPU, and what that runs.

    Each kernel or product comes with the bytes of every tensor that it reads or writes, once.
    """
    import torch
    from torch import fx
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
    mode: Any = detect_fake_mode(values) or detect_fake_mode(inputs)

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            with mode:
                return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cuda:0")
        return type(value)(map(moved, value)) if isinstance(value, tuple | list) else value

    for module in [part for part in graph.modules() if isinstance(part, fx.GraphModule)]:
        for node in module.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = moved(node.meta["val"])
            if str(node.kwargs.get("device")) == "cpu":
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    view_to_reshape(graph)
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with V.set_debug_handler(DebugContext()), V.set_fake_mode(mode):
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env, is_backward=backward)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            source, _ = lowering.codegen()
            nodes = [(node, int(node.get_read_write_buffers_sizes())) for node in lowering.scheduler.nodes]
    return str(getattr(source, "value", source)), nodes


def kernels(source: str, prefix: str = "triton_") -> list[Any]:
    """The kernels of such a source whose names begin so, ready to be compiled. torch's templates are triton_tem."""
    import importlib.util
    import re

    found = []
    for name, body in re.findall(rf"async_compile\.triton\('({prefix}\w+)', '''(.*?)'''", source, re.DOTALL):
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
            file.write(body)
        spec = importlib.util.spec_from_file_location(name, file.name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(getattr(module, name))
    return found


@dataclass(frozen=True)
class Kernel:
    """shared_memory: bytes per block of threads; registers and spilled: a thread's registers, and bytes beyond them."""

    warps: int
    shared_memory: int
    registers: int
    spilled: int


def assembled(binary: Any, card: Card) -> Kernel:
    """What CUDA's assembler, which comes with Triton, says of a compiled kernel."""
    import re

    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(binary.asm["ptx"])
        file.flush()
        target = "sm_90a" if card.number == 90 else f"sm_{card.number}"
        command = [str(assembler), f"-arch={target}", "-v", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    spilled = max(map(int, re.findall(r"(\d+) bytes spill stores", said)), default=0)
    return Kernel(binary.metadata.num_warps, binary.metadata.shared, registers, spilled)


def each_apart(
    script: str, combinations: Iterable[dict[str, Any]], table: Callable[[list[dict[str, Any]]], str], out: Path | None
) -> None:
    """Print a table of what `script --one` finds of each combination, whose values it is given; `out` has it as JSON.

    Each is a process of the kernels' environment, which is made where it is missing. Ends where one of them fails.
    """
    python = environment_python(HERE / ".venv-kernels", HERE / "requirements" / "attention-kernels.txt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent / "platform"), str(HERE)])}
    rows: list[dict[str, Any]] = []
    for combination in combinations:
        one = [str(value) for value in combination.values()]
        command = [python, script, "--one", *one]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S)
        if ran.returncode:
            sys.exit(f"{' '.join(one)}: {ran.stderr[-3000:]}")
        rows.append(combination | json.loads(ran.stdout.strip().splitlines()[-1]))
        print("\n".join(table(rows[-1:]).splitlines()[2:]), flush=True)
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
