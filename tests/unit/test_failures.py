"""Which exceptions become a failed row, and which stay a traceback."""

from __future__ import annotations

import pytest
import torch

from prefarena.errors import EntryError, JudgeError, WaitTimeoutError
from prefarena.failures import reason_of
from prefarena.generation.interface import GeneratorLostError, WeightMismatchError


def cpu_allocation_error() -> RuntimeError:
    """What torch raises where the machine has not enough memory: asked for here, not made up."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (EntryError("no way on"), "no way on"),
        (JudgeError("the judge is silent"), "the judge is silent"),
        (GeneratorLostError("generator 'g' is gone"), "generator 'g' is gone"),
        (WeightMismatchError("other weights"), "other weights"),
        (WaitTimeoutError("waited 3 s"), "waited 3 s"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the GPU ran out of memory (CUDA"),
        (MemoryError(), "the process ran out of memory (MemoryError)"),
    ],
)
def test_a_failure_has_its_reason(error: BaseException, words: str) -> None:
    assert words in str(reason_of(error))


def test_memory_that_the_machine_has_not_is_a_failure_with_the_settings_to_change() -> None:
    reason = reason_of(cpu_allocation_error())
    assert reason is not None
    assert "ran out of memory" in reason
    assert "micro_batch_tokens" in reason


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shape mismatch"), AssertionError(), OSError("disk")])
def test_a_bug_is_none(error: BaseException) -> None:
    assert reason_of(error) is None
