"""How many rollouts an on-policy worker passes at once: as many as are predicted to fit its share of memory."""

from __future__ import annotations

from functools import partial

from torch import nn

from prefarena.config import RewardModel
from prefarena.generation.shared import BUCKET_BYTES, DEVICE_BUCKET_BYTES, MOST_BUCKETS
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.lora import use_adapter
from prefarena.modeling.memory import MemoryNeed, Spread, size_of, sum_of_pass, training_memory
from prefarena.modeling.roles import Role
from prefarena.modeling.room import LARGEST_MICRO_BATCH
from prefarena.settings.judges import is_model
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.on_policy_models import OnPolicyModels
from prefarena.training.prediction import fits, parts_of, write_prediction
from prefarena.training.worker import Worker

_FLOAT = 4  # bytes; what is trained, and what is sent, is float32


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
    spares, on_gpu = worker.spares(job.training), worker.device.type == "cuda"
    while True:
        need = memory_need(job, models, longest_prompt, size, worker.spread, on_gpu=on_gpu)
        parts = None if need is None else parts_of(need, models.held(), spares, worker)
        if not auto or all(worker.gathered(fits(parts, room))) or size == 1:
            break
        size = 1 if need is None else size // 2
    said = {"share_mib": room, "micro_batch_size": size} if auto else {}
    return size, write_prediction(parts, said, worker)


def memory_need(
    job: OnPolicyJob, models: OnPolicyModels, longest_prompt: int, size: int, spread: Spread, *, on_gpu: bool
) -> MemoryNeed | None:
    """Memory held throughout, plus the larger of the two models' passes, on the worker that holds most (rank 0).

    models: as `load_models` makes them, or with shapes alone. size: rollouts in a pass. None where shapes depend on
    numbers.
    """
    passes = [_pass(job, module, longest_prompt, size, spread) for module in models.learned.values()]
    held = [need for need in passes if need is not None]
    if len(held) < len(passes):
        return None
    # Roles share their weights, of which the policy's pass has seen all: every adapter, and the moments of each.
    own = held[:1] if models.body is not None else held
    gradients = sum(need.gradients for need in own)
    activations = max(need.activations for need in held)
    frozen, frozen_parts = _frozen(job, models, spread.num_parts)
    weights, host = sum(need.weights for need in own) + frozen, sum(need.host for need in own)
    weights, host = (weights, host + frozen_parts) if spread.offloaded else (weights + frozen_parts, host)
    sent = _under_way(job, models, spread, on_gpu)
    if on_gpu:  # sent between two steps, when there are no activations; what was freed for them takes it
        activations = max(activations, sent)
    else:  # the object store's copy stays mapped into the process
        weights += sent
    return MemoryNeed(weights, gradients, sum(need.optimizer for need in own), activations, host)


def _pass(job: OnPolicyJob, module: nn.Module, longest_prompt: int, size: int, spread: Spread) -> MemoryNeed | None:
    loss = partial(sum_of_pass, prompt=longest_prompt, responses=[job.response_limit], number=size)
    if isinstance(module, Role):
        use_adapter(module.module, module.name)
        module = module.module
    halved = job.training.precision == "bfloat16"
    return training_memory(module, [loss], bfloat16=halved, spread=spread)


def _frozen(job: OnPolicyJob, models: OnPolicyModels, num_parts: int) -> tuple[int, int]:
    """Bytes of the frozen models beside those that are trained: of those that every worker holds whole, and of this
    worker's part of those that are spread where models are.
    """
    frozen, parts = 0, 0
    if models.body is None:
        parts += size_of(models.reference.parameters()) // num_parts
    policy = _policy_size(models)
    for spec in _separate_judges(job, models):
        judge = policy // 2 if spec.arithmetic == "bfloat16" else policy
        if isinstance(spec.settings, RewardModel):
            parts += judge // num_parts
        else:
            frozen += judge
    return frozen, parts


def _under_way(job: OnPolicyJob, models: OnPolicyModels, spread: Spread, on_gpu: bool) -> int:
    """Bytes of the copies of the policy's weights that are on their way to the generation actors.

    Tensors are gathered or merged one by one. Through host memory they are there in buckets; from GPU to GPU they are
    packed on the device, where a bucket exists twice while it is filled, the last one may still be on its way, and each
    may be exceeded by a tensor.
    """
    policy = _policy_size(models)
    if not on_gpu:
        return min(policy, MOST_BUCKETS * BUCKET_BYTES)
    largest = max(_FLOAT * one.numel() for one in models.policy.model.parameters())
    made = largest if spread or models.body is not None else 0
    if job.generation.weight_sync == "host":
        return made
    return made + largest + min(2 * policy, MOST_BUCKETS * DEVICE_BUCKET_BYTES)


def _policy_size(models: OnPolicyModels) -> int:
    """Bytes of the policy's weights in float32, without adapters."""
    return _FLOAT * sum(one.numel() for name, one in models.policy.model.named_parameters() if "lora_" not in name)


def _separate_judges(job: OnPolicyJob, models: OnPolicyModels) -> set[JudgeSpec]:
    """Judges that are models of their own; each is taken to be of about the policy's size."""
    judges = {spec for spec in (job.reward, job.monitor) if spec is not None and is_model(spec.settings)}
    return judges - ({job.reward} if models.reward is not None else set())
