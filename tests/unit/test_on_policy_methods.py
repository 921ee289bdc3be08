"""On-policy methods are found by their files, and one file is all that a new one takes."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from toy_methods import tried

from pipelines.methods import on_policy_table
from prefarena.config import GRPO, RLHF, RLOO, OnPolicyMethod, OnPolicyTraining
from prefarena.methods import on_policy
from prefarena.methods.on_policy import discover

TRAINING = {
    "learning_rate": 0.001, "schedule": "constant", "weight_decay": 0.0, "betas": [0.9, 0.999], "max_grad_norm": 1.0,
    "precision": "float32", "lora": None, "activation_checkpointing": False, "num_iterations": 40,
    "rollouts_per_iteration": 256, "num_epochs": 2, "num_minibatches": 4, "micro_batch_size": "auto",
    "warmup_iterations": 2, "kl_coef": 0.2, "target_kl": None, "kl_horizon": 2048, "clip": 0.2, "clip_high": None,
    "temperature": 1.0, "missing_eos_penalty": 0.0, "overlong_penalty": 0.0, "overlong_tokens": 32,
    "reward_clip": 10.0, "importance_cap": 2.0, "mode": "synchronous", "max_bad_iterations": 2,
    "checkpoint_every": 10, "num_snapshots": 0,
}  # fmt: skip
#: What stages hash of a method's training with its defaults: another one, and finished stages are not found again.
DUMPED: dict[str, dict[str, Any]] = {
    "rlhf": {
        **TRAINING, "critic_learning_rate": 0.002, "critic_warmup_iterations": 0, "value_clip": 0.2, "discount": 1.0,
        "gae_lambda": 0.95,
    },
    "grpo": {
        **TRAINING, "group_size": 8, "normalise_std": True, "kl_in": "loss", "kl_estimator": "k3_straight_through",
        "loss_mean": "tokens",
    },
    "rloo": {**TRAINING, "group_size": 8},
}  # fmt: skip


@pytest.mark.parametrize("method", [RLHF(), GRPO(), RLOO()], ids=lambda method: method.kind)
def test_stages_hash_of_settings_what_they_have_always_hashed(method: OnPolicyMethod) -> None:
    reward = method.reward.model_dump(mode="json")
    expected = {"kind": method.kind, "reward": reward, "prompts": "covered", "training": DUMPED[method.kind]}
    assert method.address() == expected


def test_methods_are_found_by_their_files_in_order_and_survive_the_way_to_a_worker() -> None:
    files = sorted(path.stem for path in Path(on_policy.__file__).parent.glob("*.py") if path.stem != "__init__")
    assert list(discover()) == files and {"grpo", "rlhf", "rloo"} <= set(files)
    for kind, method in discover().items():
        sent = method()
        found = pickle.loads(pickle.dumps(sent))
        assert found == sent and type(found) is method and isinstance(found, OnPolicyMethod) and found.kind == kind
        assert type(found.training) is type(sent.training)


def test_what_all_methods_share_has_no_advantages() -> None:
    with pytest.raises(TypeError, match="abstract"):
        OnPolicyTraining()  # type: ignore[abstract]


def test_descriptions_name_their_papers_and_the_documents_have_the_table() -> None:
    for method in discover().values():
        assert re.search(r"\(arXiv \d{4}\.\d{5}\)", str(method.__doc__).splitlines()[0]) and method.formula
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    held = page.split("<!-- table of on-policy methods -->\n")[1].split("\n<!-- end of the table -->")[0]
    assert held == on_policy_table(), "prefarena methods --table prints what docs/methods.md must hold"


TOY = '''
from typing import Literal

from pydantic import Field

from prefarena.objectives.output import ObjectiveOutput
from prefarena.objectives.rollouts import Advantages
from prefarena.settings.on_policy import OnPolicy, OnPolicyTraining


class ToyTraining(OnPolicyTraining):
    """A score is its own advantage, and the loss is doubled."""

    strength: float = Field(2.0, gt=0, description="How much it is loved.")

    def advantages(self, rollouts, kl_coef):
        return Advantages(self.strength * rollouts.scores[:, None] * rollouts.mask, rollouts.scores)

    def policy_loss(self, logps, batch, kl_coef):
        plain = super().policy_loss(logps, batch, kl_coef)
        return plain.plus(plain, 1.0)


class Toy(OnPolicy):
    """A toy that asks no baseline (arXiv 0000.00000)."""

    kind: Literal["toy"] = "toy"
    training: ToyTraining = ToyTraining()
'''
#: Arguments: the folder of the toy, and one to work in.
USE = """
import json, sys
from pathlib import Path

import prefarena.methods.on_policy

prefarena.methods.on_policy.__path__.append(sys.argv[1])

from on_policy import LikedCount, LocalGenerator, make_job, metric_rows
from tiny import save_tiny_policy

from pipelines.methods import list_methods, on_policy_table
from pipelines.plan import make_plan
from prefarena.config import OnPolicyMethod, parse_config
from prefarena.errors import UserError
from prefarena.training.on_policy import train_on_policy
from prefarena.training.worker import Worker


def parse(**settings):
    method = {"kind": "toy", "reward": {"kind": "gold"}, **settings}
    return parse_config({"output": sys.argv[2], "entries": [{"name": "toy", "method": method}]})


SIZES = {"num_iterations": 1, "rollouts_per_iteration": 12, "num_minibatches": 1}
config, said = parse(training={"strength": 3, **SIZES}), []
method = config.entries[0].method
for mistake in ({"training": {"strenght": 1}}, {"kind": "toi"}, {"training": {"strength": -1}}):
    try:
        parse(**mistake)
    except UserError as error:
        said.append(str(error))
folder = Path(sys.argv[2])
save_tiny_policy(folder / "policy")
job = make_job(folder, str(folder / "policy"), method.training)
train_on_policy(job, Worker(job.stage_dir), LocalGenerator(job.policy), reward=LikedCount())
print(json.dumps({
    "strength": method.training.strength, "is_method": isinstance(method, OnPolicyMethod), "said": said,
    "rows": metric_rows(job), "model": Path(job.model_dir).is_dir(), "listed": list_methods(),
    "stage": make_plan(config)[0].trained[0].training.key, "table": on_policy_table(),
}))
"""


def test_a_method_is_one_file(tmp_path: Path) -> None:
    found = tried(TOY, USE, tmp_path)
    assert found["is_method"] and found["strength"] == 3.0 and found["stage"].startswith("toy-")
    unknown_key, unknown_kind, out_of_range = found["said"]
    assert unknown_key.endswith("unknown key 'entries.0.method.training.strenght'; did you mean 'strength'?")
    assert "'toi' is not one of " in unknown_kind and unknown_kind.endswith("did you mean 'toy'?")
    assert "entries.0.method.training.strength: input should be greater than 0" in out_of_range
    (row,) = found["rows"]
    assert row["step"] == 1 and row["grad_norm"] > 0 and found["model"]
    assert row["reward/penalised"] == row["reward/mean"] > 0
    listed = found["listed"]
    assert "\ntoy: A toy that asks no baseline (arXiv 0000.00000).\n" in listed
    assert "\n    training.strength = 2.0    # How much it is loved.\n" in listed
    assert "| `toy` | A toy that asks no baseline" in found["table"]


HEAD = (
    "from prefarena.config import RLOO\nfrom prefarena.settings.on_policy import OnPolicy\nfrom typing import Literal\n"
)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("nothing", HEAD, "one class that is an OnPolicy, with its `training`, is wanted"),
        ("other", HEAD + "class Other(RLOO):\n    'Other.'\n", r"Other needs `kind: Literal\['other'\] = 'other'`"),
        (
            "idle",
            HEAD + "class Idle(OnPolicy):\n    'Idle.'\n    kind: Literal['idle'] = 'idle'\n",
            "Idle needs `training`, an OnPolicyTraining with its defaults",
        ),
    ],
)
def test_a_file_that_is_no_method_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, says: str
) -> None:
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(on_policy, "__path__", [str(tmp_path)])
    with pytest.raises(TypeError, match=f"{name}.*: {says}"):
        discover()
