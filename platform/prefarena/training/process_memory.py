"""The memory of this process, as the operating system counts it."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

#: mallopt's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD; the largest of the first, and what glibc goes by with it.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LARGEST, _TRIMMED = 2**25, 2**26
_APART, _TRIMMED_APART = 2**20, 2**17
#: What oneDNN and torch's wrapper of it read when the process first needs them, and the kernels that each is to keep. A
#: pass of one length needs some forty, with all layers and gradients.
_KERNEL_CACHES, _KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), 128


def return_tensors(at_once: bool) -> None:
    """Whether tensors above 1 MiB go back to the system as they are freed, or stay in the process for the next ones.

    Only glibc can be told; by itself it moves from the first to the second while a job runs. Kept, they may be many
    times what a job holds at once: 700 MiB for 190 where layers are recomputed and large and small tensors take turns,
    and 3.4 GiB for 1.9 where SmolLM2-135M trains adapters. Returned, every tensor's pages are made anew, and a small
    model's steps took 5 to 10 % longer.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _APART if at_once else _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, _TRIMMED_APART if at_once else _TRIMMED)


def keep_few_kernels() -> None:
    """Bound the kernels that oneDNN keeps, which computes products in bfloat16 on a CPU; before the first of them.

    It compiles one for each shape, and keeps 1,024 twice over. Packed passes have ever new numbers of tokens, so a job
    of 45 steps left half a GiB of kernels that nobody asks for again. What the user has set stays.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(_KERNELS))


def kept_share(at_once: bool) -> float:
    """The part of freed tensors that glibc keeps, as a share of the temporary ones: gradients and activations.

    Measured by tests/integration/test_memory.py and benchmarks/rlhf_memory.py: 0.2 to 0.8 where tensors stay in the
    process, 0.0 to 0.2 where they go back at once. Weights and moments are never freed.
    """
    return 0.2 if at_once else 0.45


def give_back_freed() -> None:
    """Return to the system what was freed so far; with glibc only."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def forget_peak() -> None:
    """Measure the peak from now on. Where that is not possible it stays the peak of the process so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # not Linux, or not allowed
        return


def resident_mib() -> float:
    """MiB in use now; 0 where the system does not tell."""
    return _status("VmRSS") or 0.0


def peak_mib() -> float:
    """The largest number of MiB in use since `forget_peak`."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _status(name: str) -> float | None:
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 2**10
    return None
