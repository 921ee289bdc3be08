"""How many rollouts an on-policy worker passes at once: as many as are predicted to fit its share of memory."""

from __future__ import annotations

from functools import partial

from torch import nn

from prefarena.config import ClassifierJudge, RewardModel
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.lora import use_adapter
from prefarena.modeling.memory import MemoryNeed, size_of, sum_of_pass, training_memory
from prefarena.modeling.roles import Role
from prefarena.modeling.room import LARGEST_MICRO_BATCH
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.on_policy_models import OnPolicyModels
from prefarena.training.prediction import fits, parts_of, write_prediction
from prefarena.training.worker import Worker


def fitting_micro_batch(
    job: OnPolicyJob, models: OnPolicyModels, longest_prompt: int, worker: Worker
) -> tuple[int, float | None]:
    """Rollouts per pass, and the MiB that this worker is predicted to hold at its peak, which rank 0 writes down.

    models: prepared, not distributed yet and on the CPU. longest_prompt: in tokens. The number is the one that
    `job.training` sets; where that is auto it is 64, halved until every worker's prediction fits the smallest share of
    memory among the workers. The prediction is None, and auto is 1, where shapes depend on numbers.
    """
    chosen, auto = job.training.micro_batch_size, job.training.micro_batch_size == "auto"
    size = LARGEST_MICRO_BATCH if chosen == "auto" else chosen
    room = min(worker.gathered(worker.memory_share_mib()))
    recomputes = job.training.activation_checkpointing
    while True:
        need = _need(job, models, longest_prompt, size, worker)
        parts = None if need is None else parts_of(need, models.held(), recomputes, worker)
        if not auto or all(worker.gathered(fits(parts, room))) or size == 1:
            break
        size = 1 if need is None else size // 2
    said = {"share_mib": room, "micro_batch_size": size} if auto else {}
    return size, write_prediction(parts, said, worker)


def _need(
    job: OnPolicyJob, models: OnPolicyModels, longest_prompt: int, size: int, worker: Worker
) -> MemoryNeed | None:
    """What is held all the while, and the larger of the two models' passes."""
    passes = [_pass(job, module, longest_prompt, size, worker) for module in models.learned.values()]
    held = [need for need in passes if need is not None]
    if len(held) < len(passes):
        return None
    # Roles share their weights, of which the policy's pass has seen all: every adapter, and the moments of each.
    own = held[:1] if models.body is not None else held
    policy = size_of(models.policy.model.parameters())
    reference = 0 if models.body is not None else policy
    if job.training.precision == "bfloat16" and not worker.shards:
        reference //= 2
    frozen = policy * _num_separate_judges(job, models) + reference
    under_way = policy  # whole weights on their way to the generation actors
    return MemoryNeed(
        weights=sum(need.weights for need in own) + frozen // _num_parts(worker) + under_way,
        gradients=sum(need.gradients for need in own),
        optimizer=sum(need.optimizer for need in own),
        activations=max(need.activations for need in held),
    )


def _pass(job: OnPolicyJob, module: nn.Module, longest_prompt: int, size: int, worker: Worker) -> MemoryNeed | None:
    loss = partial(sum_of_pass, prompt=longest_prompt, responses=[job.response_limit], number=size)
    if isinstance(module, Role):
        use_adapter(module.module, module.name)
        module = module.module
    bfloat16 = job.training.precision == "bfloat16"
    return training_memory(module, [loss], bfloat16=bfloat16, num_shards=_num_parts(worker))


def _num_parts(worker: Worker) -> int:
    return worker.world_size if worker.shards else 1


def _num_separate_judges(job: OnPolicyJob, models: OnPolicyModels) -> int:
    """Judges that are models of their own; each is taken to be of about the policy's size."""
    judges = {spec for spec in (job.reward, job.monitor) if spec is not None and _is_model(spec)}
    return len(judges - ({job.reward} if models.reward is not None else set()))


def _is_model(spec: JudgeSpec) -> bool:
    return isinstance(spec.settings, RewardModel | ClassifierJudge)
