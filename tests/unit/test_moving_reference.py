"""A reference that follows the policy: where it is after every iteration, what is logged, and what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from on_policy import LikedCount, LocalGenerator, make_job, timeless
from test_on_policy_training import assert_interruption_changes_nothing, equal, final_weights
from torch import Tensor

from prefarena.config import GRPO, GRPOTraining, LoRA, OnPolicyTraining, PPOTraining, parse_config
from prefarena.errors import UserError
from prefarena.modeling.logprobs import LogProbs
from prefarena.modeling.memory import Spread
from prefarena.training.on_policy import OnPolicyTrainer, train_on_policy
from prefarena.training.on_policy_memory import memory_need
from prefarena.training.on_policy_models import OnPolicyModels, load_models
from prefarena.training.worker import Worker

SIZES: dict[str, Any] = {
    "num_iterations": 4, "rollouts_per_iteration": 24, "num_minibatches": 2, "kl_coef": 0.3, "checkpoint_every": 2,
    "warmup_iterations": 0,
}  # fmt: skip
ADAPTERS = LoRA(rank=2)
TRAININGS: dict[str, OnPolicyTraining] = {
    "ppo": PPOTraining(**SIZES, target_kl=0.1, kl_horizon=200),
    "grpo in halves": GRPOTraining(**SIZES, group_size=4, precision="bfloat16"),
    "ppo of adapters": PPOTraining(**SIZES, lora=ADAPTERS, learning_rate=1e-2),
}


def trainer_of(folder: Path, policy: str, training: OnPolicyTraining) -> OnPolicyTrainer:
    job = make_job(folder, policy, training)
    return OnPolicyTrainer(job, Worker(job.stage_dir), LocalGenerator(policy), LikedCount())


def policy_weights(trainer: OnPolicyTrainer) -> dict[str, Tensor]:
    """Of the policy's learner, copied; those of adapters by the reference's names."""
    trained = trainer.learners["policy"].trained.items()
    return {name.replace(".policy.", ".reference."): one.detach().clone() for name, one in trained}


def reference_weights(trainer: OnPolicyTrainer) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in trainer.models.followers.items()}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_reference_that_never_moves_is_as_good_as_one_that_cannot(
    tmp_path: Path, tiny_policy: str, name: str
) -> None:
    """Bit for bit, though it is held in another form: in float32, or as adapters."""
    jobs = []
    for every in (None, 99):
        training = TRAININGS[name].model_copy(update={"reference_every": every, "num_iterations": 3})
        jobs.append(make_job(tmp_path / str(every), tiny_policy, training))
        train_on_policy(jobs[-1], Worker(jobs[-1].stage_dir), LocalGenerator(tiny_policy), reward=LikedCount())
    still, moving = (timeless(job) for job in jobs)
    assert equal(final_weights(jobs[0]), final_weights(jobs[1]))
    assert [{key.replace("kl_moving/", "kl/"): value for key, value in row.items()} for row in moving] == still
    assert still[-1]["kl/k3"] > 1e-4 and not any(key in ("kl/k1", "kl/k3") for row in moving for key in row)


@pytest.mark.parametrize(("every", "mix"), [(1, 0.1), (2, 0.75)])
def test_its_weights_are_an_average_of_the_policys(tmp_path: Path, tiny_policy: str, every: int, mix: float) -> None:
    """Against the algebra, in float64."""
    training = TRAININGS["ppo"].model_copy(update={"reference_every": every, "reference_mix": mix})
    trainer = trainer_of(tmp_path, tiny_policy, training)
    expected = {name: value.double() for name, value in reference_weights(trainer).items()}
    for iteration in range(4):
        trainer.run(iteration)
        if (iteration + 1) % every == 0:
            policy = policy_weights(trainer)
            expected = {name: (1 - mix) * value + mix * policy[name].double() for name, value in expected.items()}
        for name, value in reference_weights(trainer).items():
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)
    apart = max(float((policy_weights(trainer)[name] - value).abs().max()) for name, value in expected.items())
    assert apart > 1e-4


@pytest.mark.parametrize("name", TRAININGS)
def test_a_reset_makes_it_the_policy(tmp_path: Path, tiny_policy: str, name: str) -> None:
    """The next rollouts are then at no distance from it at all, and those between two resets are at some."""
    training = TRAININGS[name].model_copy(update={"reference_every": 2})
    trainer = trainer_of(tmp_path, tiny_policy, training)
    rows = [trainer.run(iteration) for iteration in range(2)]
    assert equal(policy_weights(trainer), reference_weights(trainer))
    rows += [trainer.run(iteration) for iteration in (2, 3)]
    assert [row["kl_moving/k3"] == 0 for row in rows] == [True, False, True, False]
    assert equal(policy_weights(trainer), reference_weights(trainer))


@pytest.mark.parametrize(
    ("name", "moves"),
    [("ppo", {"reference_every": 1, "reference_mix": 0.3}), ("ppo of adapters", {"reference_every": 1})],
    ids=["average", "adapters"],
)
def test_an_interrupted_run_is_bit_equal(tmp_path: Path, tiny_policy: str, name: str, moves: dict[str, Any]) -> None:
    job = make_job(tmp_path, tiny_policy, TRAININGS[name].model_copy(update=moves))
    rows = assert_interruption_changes_nothing(job, tmp_path, LocalGenerator(tiny_policy), LocalGenerator(tiny_policy))
    assert (rows[-1]["kl_moving/k3"] > 0) == ("reference_mix" in moves)  # else the policy and it are one at each start


def bytes_held(models: OnPolicyModels) -> int:
    held = [models.reference] if models.body is None else [models.body]
    return sum(one.numel() * one.element_size() for module in held for one in module.parameters())


@pytest.mark.parametrize("name", ["grpo in halves", "ppo of adapters"])
def test_memory_is_predicted_with_what_it_takes(tmp_path: Path, tiny_policy: str, name: str) -> None:
    """A reference in float32 where one that stays would be in halves, or adapters of its own."""
    found = []
    for every in (None, 2):
        job = make_job(tmp_path, tiny_policy, TRAININGS[name].model_copy(update={"reference_every": every}))
        models = load_models(job, Worker(job.stage_dir))
        need = memory_need(job, models, 5, 4, Spread(), on_gpu=False)
        assert need is not None
        found.append((need.weights, bytes_held(models)))
        assert models.moves == (every is not None)
    (still, held), (moving, more) = found
    assert moving - still == more - held > 0


def test_a_moving_reference_in_halves_keeps_float32(tmp_path: Path, tiny_policy: str) -> None:
    """An average that moves by less than a half can tell would stand still."""
    training = TRAININGS["grpo in halves"].model_copy(update={"reference_every": 1, "reference_mix": 0.01})
    trainer = trainer_of(tmp_path, tiny_policy, training)
    before = reference_weights(trainer)
    assert isinstance(trainer.models.reference, LogProbs)
    assert {value.dtype for value in before.values()} == {torch.float32}
    trainer.run(0)
    after = reference_weights(trainer)
    moved = [float((after[name] != value).float().mean()) for name, value in before.items()]
    assert min(moved) > 0 and sum(moved) / len(moved) > 0.5


def parsed(**training: Any) -> GRPO:
    method = {"kind": "grpo", "training": training}
    found = parse_config({"entries": [{"name": "it", "method": method}]}).entries[0].method
    assert isinstance(found, GRPO)
    return found


def test_what_cannot_move_is_refused_with_a_sentence() -> None:
    with pytest.raises(UserError, match="averaging adapters does not average what they add; set reference_mix: 1"):
        parsed(reference_every=1, reference_mix=0.1, lora={"rank": 2})
    with pytest.raises(UserError, match=r"reference_mix .* needs reference_every"):
        parsed(reference_mix=0.1)
    with pytest.raises(UserError, match=r"unknown key .*ref_model_mixup_alpha'; did you mean 'reference_mix'"):
        parsed(ref_model_mixup_alpha=0.6)


def test_how_it_moves_is_in_the_address() -> None:
    assert "reference_every" not in parsed().address()["training"]
    assert parsed().model_dump()["training"]["reference_every"] is None
    every = parsed(reference_every=2)
    assert every.address()["training"] == parsed().address()["training"] | {"reference_every": 2}
    mixed = parsed(reference_every=2, reference_mix=0.5).address()["training"]
    assert mixed == every.address()["training"] | {"reference_mix": 0.5}
