"""The models that an on-policy worker holds: the policy, the reference, and a critic where the method has one.

In full training each is a model of its own. With adapters all of them are roles on one frozen copy of the policy
(`modeling/roles.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefarena.config import PPOTraining, RewardModel
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.arithmetic import attends_in, in_weights
from prefarena.modeling.heads import ScalarHead, ValueHead
from prefarena.modeling.load import (
    load_policy,
    load_reward_model,
    new_reward_model,
    read_head,
    reward_model_on,
    save_policy,
)
from prefarena.modeling.logprobs import LogProbs, PackedModel
from prefarena.modeling.lora import (
    ADAPTER_FOLDER,
    adapter_of,
    add_adapters,
    load_adapter,
    merged_weights,
    save_adapter,
)
from prefarena.modeling.parts import whole
from prefarena.modeling.roles import Role, SharedBody
from prefarena.settings.optimisation import Precision
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.worker import Worker

POLICY, CRITIC, REWARD, REFERENCE = "policy", "critic", "reward", "reference"


@dataclass(frozen=True)
class OnPolicyModels:
    """On the CPU and whole when they are made; the learners and `place_frozen` distribute them.

    policy, critic: what is trained, a module or a role. reward: the reward model, where it is a role on the policy's
    body; else the worker loads it as it loads any judge.
    """

    policy: LogProbs | Role
    reference: LogProbs | Role
    critic: ValueHead | Role | None
    reward: Role | None = None

    @property
    def learned(self) -> dict[str, nn.Module]:
        """What is trained, by the name of its learner."""
        learned: dict[str, nn.Module] = {POLICY: self.policy}
        return learned if self.critic is None else learned | {CRITIC: self.critic}

    @property
    def body(self) -> SharedBody | None:
        """What the roles share, where there are roles."""
        return self.policy.body if isinstance(self.policy, Role) else None

    def to_prepare(self) -> list[nn.Module]:
        """The modules that are trained, each once."""
        return [self.body] if self.body is not None else list(self.learned.values())

    def held(self) -> list[nn.Module]:
        """All modules, each once."""
        return [self.body] if self.body is not None else [*self.learned.values(), self.reference]

    def place_frozen(self, worker: Worker, precision: Precision) -> None:
        """Put what no learner distributes where it belongs: the reference, or the body that roles share.

        It computes in `precision` then, as what is trained does; the body is prepared to.
        """
        if self.body is None and not worker.shards:
            in_weights(self.reference.model, precision)
        worker.place(self.reference if self.body is None else self.body, precision)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights, whole, by name; adapters are merged into them. Every worker goes through all of it."""
        if isinstance(self.policy, Role):
            yield from merged_weights(self.policy.model, POLICY)
        else:
            for name, tensor in self.policy.model.state_dict().items():
                yield name, whole(tensor)


def load_models(job: OnPolicyJob, worker: Worker) -> OnPolicyModels:
    """The job's models. Raises UserError where one cannot be loaded."""
    where = (job.max_length, worker.device, attends_in(job.training.precision))
    policy = load_policy(job.policy)
    if job.training.lora is not None:
        return _roles(job, policy, where)
    critic = None
    if isinstance(job.training, PPOTraining):
        model = load_reward_model(job.critic) if job.critic else new_reward_model(job.policy, job.seed)
        if not job.critic:
            nn.init.zeros_(model.get_parameter("score.weight"))
        critic = ValueHead(model, *where)
    reference = load_policy(job.policy)
    return OnPolicyModels(LogProbs(policy, *where), LogProbs(reference, *where), critic)


def _roles(job: OnPolicyJob, policy: PreTrainedModel, where: tuple[Any, ...]) -> OnPolicyModels:
    """Everything on the policy's own weights, which are frozen.

    The critic starts from the reward model where that was trained as adapters of the same policy; else from the policy,
    with new adapters and a head of zeros.
    """
    lora = job.training.lora
    assert lora is not None
    roles: dict[str, PackedModel] = {POLICY: LogProbs(policy, *where), REFERENCE: LogProbs(policy, *where)}
    add_adapters(policy, lora, job.seed, POLICY)
    if isinstance(job.training, PPOTraining):
        start = adapter_of(job.critic, job.policy) if job.critic else None
        critic = reward_model_on(policy, job.policy if start is None else str(job.critic))
        if start is None:
            add_adapters(policy, lora, job.seed + 1, CRITIC)  # a seed of its own, as its adapters are its own
        else:
            _load_role(policy, critic, start, str(job.critic), CRITIC)
        roles[CRITIC] = ValueHead(critic, *where)
    if (path := _reward_adapter(job.reward, job.policy)) is not None:
        reward = reward_model_on(policy, str(job.reward.path))
        _load_role(policy, reward, path, str(job.reward.path), REWARD)
        roles[REWARD] = ScalarHead(reward, *where)
    body = SharedBody(roles).requires_grad_(False)
    views = {name: Role(name, body) for name in roles}
    for name in (POLICY, CRITIC):
        for parameter in views[name].trained().values() if name in views else ():
            parameter.requires_grad_(True)
    return OnPolicyModels(views[POLICY], views[REFERENCE], views.get(CRITIC), views.get(REWARD))


def _load_role(policy: PreTrainedModel, model: PreTrainedModel, adapter: Path, folder: str, name: str) -> None:
    """The adapters and the head of a stored reward model."""
    load_adapter(policy, adapter, name)
    head = model.get_parameter("score.weight")
    head.data.copy_(read_head(folder))


def _reward_adapter(reward: JudgeSpec, base: str) -> Path | None:
    """The adapters of the reward, where it is a model that was trained as adapters of `base`."""
    learned = isinstance(reward.settings, RewardModel) and reward.path is not None
    return adapter_of(str(reward.path), base) if learned else None


def save_models(
    models: OnPolicyModels, job: OnPolicyJob, worker: Worker, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> None:
    """The policy as a transformers folder, by rank 0; every worker calls this."""
    if models.body is None and not worker.shards:
        if worker.rank == 0:
            save_policy(models.policy.model, tokenizer, folder)
        return
    gathered: dict[str, Tensor] = {}
    for name, tensor in models.weights():
        if worker.rank == 0:
            gathered[name] = tensor.detach().cpu()
    if worker.rank == 0:
        plain = load_policy(job.policy)
        plain.load_state_dict(gathered)
        save_policy(plain, tokenizer, folder)


def save_adapters(models: OnPolicyModels, job: OnPolicyJob, worker: Worker) -> None:
    """The policy's adapters, where it has any, beside its merged model; every worker calls this."""
    if models.body is not None:
        folder = Path(job.stage_dir) / ADAPTER_FOLDER
        save_adapter(models.policy.model, job.policy, folder, POLICY, writes=worker.rank == 0)
