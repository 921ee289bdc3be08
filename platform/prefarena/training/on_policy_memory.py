"""How many rollouts an on-policy worker passes at once: as many as are predicted to fit its share of memory."""

from __future__ import annotations

from functools import partial

from torch import nn

from prefarena.config import ClassifierJudge, RewardModel
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.memory import MemoryNeed, size_of, sum_of_pass, training_memory
from prefarena.modeling.room import LARGEST_MICRO_BATCH
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.prediction import fits, parts_of, write_prediction
from prefarena.training.worker import Worker

#: Beside what is trained: the reference, and the whole weights that are handed to the generation actors.
_COPIES_OF_POLICY = 2


def fitting_micro_batch(
    job: OnPolicyJob, learned: dict[str, nn.Module], longest_prompt: int, worker: Worker
) -> tuple[int, float | None]:
    """Rollouts per pass, and the MiB that this worker is predicted to hold at its peak, which rank 0 writes down.

    learned: the policy, as a `LogProbs`, and the critic where there is one, neither of them wrapped yet and both on the
    CPU. longest_prompt: in tokens. The number is the one that `job.training` sets; where that is auto it is 64, halved
    until every worker's prediction fits the smallest share of memory among the workers. The prediction is None, and
    auto is 1, where shapes depend on numbers.
    """
    chosen, auto = job.training.micro_batch_size, job.training.micro_batch_size == "auto"
    size = LARGEST_MICRO_BATCH if chosen == "auto" else chosen
    room = min(worker.gathered(worker.memory_share_mib()))
    while True:
        need = _need(job, learned, longest_prompt, size)
        parts = None if need is None else parts_of(need, list(learned.values()), False, worker)
        if not auto or all(worker.gathered(fits(parts, room))) or size == 1:
            break
        size = 1 if need is None else size // 2
    said = {"share_mib": room, "micro_batch_size": size} if auto else {}
    return size, write_prediction(parts, said, worker)


def _need(job: OnPolicyJob, learned: dict[str, nn.Module], longest_prompt: int, size: int) -> MemoryNeed | None:
    """What is held all the while, and the larger of the two models' passes."""
    held = [need for module in learned.values() if (need := _pass(job, module, longest_prompt, size)) is not None]
    if len(held) < len(learned):
        return None
    policy = size_of(learned["policy"].parameters())
    judges = {spec for spec in (job.reward, job.monitor) if spec is not None and _is_model(spec)}
    return MemoryNeed(
        weights=sum(need.weights for need in held) + (_COPIES_OF_POLICY + len(judges)) * policy,
        gradients=sum(need.gradients for need in held),
        optimizer=sum(need.optimizer for need in held),
        activations=max(need.activations for need in held),
    )


def _pass(job: OnPolicyJob, module: nn.Module, longest_prompt: int, size: int) -> MemoryNeed | None:
    loss = partial(sum_of_pass, prompt=longest_prompt, responses=[job.response_limit], number=size)
    return training_memory(module, [loss], bfloat16=job.training.precision == "bfloat16")


def _is_model(spec: JudgeSpec) -> bool:
    """Whether the worker holds a model for it; one of about the policy's size is assumed."""
    return isinstance(spec.settings, RewardModel | ClassifierJudge)
