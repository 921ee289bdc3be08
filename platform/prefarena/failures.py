"""Which exceptions fail one entry of a comparison and not the comparison, and the sentence that says why.

An exception that is not known here is a bug, and keeps its traceback.
"""

from __future__ import annotations

import torch

from prefarena.errors import EntryError, WaitTimeoutError

_LESS_MEMORY = (
    "lower training.micro_batch_tokens (training.micro_batch_size of on-policy methods), or set "
    "training.activation_checkpointing, training.lora, training.precision: bfloat16 or resources.sharding: fsdp"
)
#: How torch's CPU allocator says that there is no memory; it raises a plain RuntimeError.
_CPU_ALLOCATION = "can't allocate memory"


def reason_of(error: BaseException) -> str | None:
    """Why an entry failed, as one sentence with the remedy; None where `error` is not a failure but a bug.

    A failure is an EntryError, memory that ran out on a device or in the process, or a wait that outlasted its limit.
    """
    if isinstance(error, EntryError | WaitTimeoutError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU ran out of memory ({_first_sentence(error)}); {_LESS_MEMORY}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _CPU_ALLOCATION in str(error)):
        return f"the process ran out of memory ({_first_sentence(error)}); {_LESS_MEMORY}"
    return None


def is_death(error: BaseException) -> bool:
    """Whether this is Ray's word that a process died or was killed, rather than what a process raised."""
    import ray.exceptions

    died = ray.exceptions.WorkerCrashedError | ray.exceptions.RayActorError | ray.exceptions.OutOfMemoryError
    return isinstance(error, died)


def cluster_answers(seconds: float = 60.0) -> bool:
    """Whether Ray still runs tasks. Where it does not, a lost process says nothing about the entry that it worked for.

    Needs a driver that is connected to Ray; waits `seconds` at most.
    """
    import ray
    import ray.exceptions

    try:
        return bool(ray.get(ray.remote(num_cpus=0)(_answer).remote(), timeout=seconds))
    except (ray.exceptions.RayError, ConnectionError):
        return False


def _answer() -> bool:
    return True


def in_one_line(error: BaseException) -> str:
    """The beginning of an error's message, to stand within a sentence."""
    return " ".join(str(error).split())[:300].rstrip(".")


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")
