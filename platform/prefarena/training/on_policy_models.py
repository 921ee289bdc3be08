"""The models that an on-policy worker holds: the policy, the reference, and a critic where the method has one.

In full training each is a model of its own. With adapters all of them are roles on one frozen copy of the policy
(`modeling/roles.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefarena.config import LoRA, RewardModel
from prefarena.modeling.arithmetic import Arithmetic, attends_in, halve_products, in_weights
from prefarena.modeling.awaited import AwaitedTensors
from prefarena.modeling.halves import compute_in_halves
from prefarena.modeling.heads import ScalarHead, ValueHead
from prefarena.modeling.load import (
    load_policy,
    read_head,
    reward_model_on,
    save_policy,
    scoring_model,
    scoring_settings,
)
from prefarena.modeling.logprobs import LogProbs, PackedModel
from prefarena.modeling.lora import (
    adapted_weights,
    adapter_of,
    add_adapters,
    load_adapter,
    merged_weights,
    save_adapter,
)
from prefarena.modeling.parts import whole
from prefarena.modeling.roles import Role, SharedBody
from prefarena.modeling.shapes_first import WholeOnlyError, policy_shapes
from prefarena.settings.on_policy import CriticTraining
from prefarena.stage_files import ADAPTER
from prefarena.training.jobs import OnPolicyJob
from prefarena.training.loading import Loader
from prefarena.training.saving import save_spread
from prefarena.training.worker import Worker

POLICY, CRITIC, REWARD, REFERENCE = "policy", "critic", "reward", "reference"


@dataclass(frozen=True)
class OnPolicyModels:
    """The models, made on the CPU, whole or with weights awaited; the learners and `place_frozen` distribute them.

    policy, critic: what is trained, a module or a role. reward: the reward model, where it is a role on the policy's
    body; else the worker loads it as it loads any judge. moves: whether the reference follows the policy; its weights
    are float32 then, and as a role it has adapters of its own.
    """

    policy: LogProbs | Role
    reference: LogProbs | Role
    critic: ValueHead | Role | None
    reward: Role | None = None
    moves: bool = False

    @property
    def learned(self) -> dict[str, nn.Module]:
        """The models that are trained, by the name of their learner."""
        learned: dict[str, nn.Module] = {POLICY: self.policy}
        return learned if self.critic is None else learned | {CRITIC: self.critic}

    @property
    def body(self) -> SharedBody | None:
        """The body that the roles share, where there are roles."""
        return self.policy.body if isinstance(self.policy, Role) else None

    def to_prepare(self) -> list[nn.Module]:
        """The modules that are trained, each once."""
        return [self.body] if self.body is not None else list(self.learned.values())

    def held(self) -> list[nn.Module]:
        """All modules, each once."""
        return [self.body] if self.body is not None else [*self.learned.values(), self.reference]

    @property
    def followers(self) -> dict[str, nn.Parameter]:
        """The weights of a reference that moves, by name."""
        return self.reference.trained() if isinstance(self.reference, Role) else dict(self.reference.named_parameters())

    def place_frozen(self, worker: Worker, precision: Arithmetic) -> None:
        """Place what no learner distributes on its device: the reference, or the body that roles share.

        It computes in `precision` then, as what is trained does; the body is prepared to.
        """
        if self.body is None and not worker.shards:
            if not self.moves:
                in_weights(self.reference.model, precision)
            elif precision == "bfloat16":
                compute_in_halves(self.reference)
        worker.place(self.reference if self.body is None else self.body, precision)

    @property
    def changing(self) -> frozenset[str] | None:
        """The names of the policy's weights that training changes; None: all of them."""
        return adapted_weights(self.policy.model) if isinstance(self.policy, Role) else None

    def weights(
        self, base: Mapping[str, Tensor] | None = None, names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights, whole, by name. Every worker goes through all of it.

        Adapters are merged into them: into those of `base` where it is given, since a body may hold halves. names: the
        weights that are wanted of a policy with adapters; None means all.
        """
        if isinstance(self.policy, Role):
            yield from merged_weights(self.policy.model, POLICY, base, names)
        else:
            for name, tensor in self.policy.model.state_dict().items():
                yield name, whole(tensor)


class Origin(Protocol):
    """Where the models of a job come from: its files, or shapes alone."""

    def policy(self) -> PreTrainedModel:
        """Make a new policy at each call, in float32."""

    def critic(self) -> PreTrainedModel:
        """The critic as a separate model, in its initial state."""

    def critic_on(self, policy: PreTrainedModel) -> PreTrainedModel:
        """A critic whose body is the policy's, in which its adapters are put."""

    def reward_on(self, policy: PreTrainedModel) -> PreTrainedModel | None:
        """The reward model as a role on the policy's body; None where it cannot be one."""


def load_models(job: OnPolicyJob, worker: Worker) -> OnPolicyModels:
    """The job's models. Raises UserError where one cannot be loaded."""
    return models_from(
        _Stored(job, Loader(worker)), job, (job.max_length, worker.device, attends_in(job.training.precision))
    )


def models_from(origin: Origin, job: OnPolicyJob, where: tuple[Any, ...]) -> OnPolicyModels:
    """The models that the job's settings require. where: `PackedModel`'s arguments besides the model."""
    policy, halved = origin.policy(), job.training.precision == "bfloat16"
    moves = job.training.reference_every is not None
    if job.training.lora is not None:
        return _roles(job, policy, origin, where, halved)
    critic = ValueHead(origin.critic(), *where) if isinstance(job.training, CriticTraining) else None
    reference = LogProbs(origin.policy(), *where)
    if halved and not moves:
        halve_products(reference.requires_grad_(False))
    return OnPolicyModels(LogProbs(policy, *where), reference, critic, moves=moves)


def _roles(
    job: OnPolicyJob, policy: PreTrainedModel, origin: Origin, where: tuple[Any, ...], halved: bool
) -> OnPolicyModels:
    """Everything on the policy's own weights, which are frozen."""
    lora = job.training.lora
    assert lora is not None
    roles: dict[str, PackedModel] = {POLICY: LogProbs(policy, *where), REFERENCE: LogProbs(policy, *where)}
    add_adapters(policy, lora, job.seed, POLICY)
    moves = job.training.reference_every is not None
    if moves:  # equal to the policy's, and so adding nothing at first
        add_adapters(policy, lora, job.seed, REFERENCE)
    if isinstance(job.training, CriticTraining):
        roles[CRITIC] = ValueHead(origin.critic_on(policy), *where)
    if (reward := origin.reward_on(policy)) is not None:
        roles[REWARD] = ScalarHead(reward, *where)
    body = SharedBody(roles).requires_grad_(False)
    views = {name: Role(name, body) for name in roles}
    for name in (POLICY, CRITIC):
        for parameter in views[name].trained().values() if name in views else ():
            parameter.requires_grad_(True)
    if halved:
        halve_products(body)
    return OnPolicyModels(views[POLICY], views[REFERENCE], views.get(CRITIC), views.get(REWARD), moves)


class _Stored:
    """The models in the job's folders."""

    def __init__(self, job: OnPolicyJob, loader: Loader) -> None:
        self._job, self._loader = job, loader

    def policy(self) -> PreTrainedModel:
        return self._loader.policy(self._job.policy)

    def critic(self) -> PreTrainedModel:
        job = self._job
        if job.critic:
            return self._loader.reward_model(job.critic)
        model = self._loader.new_reward_model(job.policy, job.seed)
        nn.init.zeros_(model.get_parameter("score.weight"))
        return model

    def critic_on(self, policy: PreTrainedModel) -> PreTrainedModel:
        """Start from the reward model if it is adapters of this policy; else with new adapters and a zero head."""
        job, lora = self._job, self._job.training.lora
        assert lora is not None
        if job.critic and (adapter := adapter_of(job.critic, job.policy)) is not None:
            return _load_role(policy, adapter, job.critic, CRITIC)
        critic = reward_model_on(policy, job.policy)
        add_adapters(policy, lora, job.seed + 1, CRITIC)  # a seed of its own, as its adapters are its own
        return critic

    def reward_on(self, policy: PreTrainedModel) -> PreTrainedModel | None:
        spec = self._job.reward
        if not isinstance(spec.settings, RewardModel) or spec.path is None:
            return None
        adapter = adapter_of(spec.path, self._job.policy)
        return None if adapter is None else _load_role(policy, adapter, spec.path, REWARD)


class Shapes:
    """Models that have shapes alone, by the policy's settings; to be used with `on_shapes`.

    The job's reward has no folder yet: it is a role where its own training has adapters.
    """

    def __init__(self, settings: PretrainedConfig, job: OnPolicyJob) -> None:
        self._settings, self._job = settings, job
        self._scoring = scoring_settings(settings)

    def policy(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(self._settings, dtype=torch.float32).eval()

    def critic(self) -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_config(self._scoring, dtype=torch.float32).eval()

    def critic_on(self, policy: PreTrainedModel) -> PreTrainedModel:
        critic = scoring_model(policy, self._scoring)
        lora = self._reward_adapters() or self._job.training.lora
        assert lora is not None
        add_adapters(policy, lora, self._job.seed, CRITIC)
        return critic

    def reward_on(self, policy: PreTrainedModel) -> PreTrainedModel | None:
        lora = self._reward_adapters()
        if lora is None:
            return None
        reward = scoring_model(policy, self._scoring)
        add_adapters(policy, lora, self._job.seed, REWARD)
        return reward

    def _reward_adapters(self) -> LoRA | None:
        settings = self._job.reward.settings
        return settings.training.lora if isinstance(settings, RewardModel) else None


def _load_role(policy: PreTrainedModel, adapter: Path, folder: str, name: str) -> PreTrainedModel:
    """The reward model stored at `folder`, with its head, on the policy's body; its adapters go into that."""
    model = reward_model_on(policy, folder)
    load_adapter(policy, adapter, name)
    model.get_parameter("score.weight").data.copy_(read_head(folder))
    return model


def save_models(
    models: OnPolicyModels, job: OnPolicyJob, worker: Worker, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> None:
    """The policy as a transformers folder, by rank 0; every worker calls this."""
    if models.body is None and not worker.shards:
        if worker.rank == 0:
            save_policy(models.policy.model, tokenizer, folder)
        return
    halved = models.body is not None and job.training.precision == "bfloat16"
    base = _stored_weights(job.policy) if halved and worker.rank == 0 else None
    save_spread(models.policy.model, models.weights(base), tokenizer, folder, worker, lambda: load_policy(job.policy))


def _stored_weights(policy: str) -> Mapping[str, Tensor]:
    """A policy's weights in float32; each is read when it is asked for, where it can be."""
    try:
        return AwaitedTensors(policy_shapes(policy))
    except WholeOnlyError:
        return load_policy(policy).state_dict()


def save_as_it_is(
    models: OnPolicyModels, job: OnPolicyJob, worker: Worker, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Save the policy during its training: its adapters alone, where it has any. Every worker calls this."""
    if models.body is None:
        save_models(models, job, worker, tokenizer, folder)
    else:
        save_adapter(models.policy.model, job.policy, folder, POLICY, writes=worker.rank == 0)


def save_adapters(models: OnPolicyModels, job: OnPolicyJob, worker: Worker) -> None:
    """The policy's adapters, where it has any, beside its merged model; every worker calls this."""
    if models.body is not None:
        folder = Path(job.stage_dir) / ADAPTER
        save_adapter(models.policy.model, job.policy, folder, POLICY, writes=worker.rank == 0)
