"""A user's own loss: what it trains, where it is looked for, what is refused before any work, and what is hashed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from off_policy import metric_rows, off_policy_job, weights, write_inputs

from pipelines.checks import check_input
from pipelines.plan import make_plan
from prefarena.config import DPO, Comparison, Optimisation, parse_config
from prefarena.errors import UserError
from prefarena.methods.custom import Custom
from prefarena.stages import failure_of
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
TRAINING = Optimisation(num_steps=12, batch_size=16, micro_batch_tokens=64, log_every=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def comparison(objective: str, **settings: Any) -> Comparison:
    method = {"kind": "custom", "objective": objective, **settings}
    return parse_config({"entries": [{"name": "mine", "method": method}]})


def test_the_documents_example_is_dpo_bit_for_bit(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found in the working directory, as a user's is."""
    blocks = re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    ((module, text),) = blocks
    assert len(text.strip().splitlines()) <= 10
    (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    custom = Custom(objective=f"{module}:logistic", settings={"beta": 0.3}, training=TRAINING)
    custom.check()
    for name, method in (("mine", custom), ("dpo", DPO(beta=0.3, training=TRAINING))):
        run_job(off_policy_job(inputs, tmp_path / name, method), Worker(str(tmp_path / name)))
    ours, expected = weights(tmp_path / "mine"), weights(tmp_path / "dpo")
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    rows, others = (metric_rows(tmp_path / name) for name in ("mine", "dpo"))
    assert [without_times(row) for row in rows] == [without_times(row) for row in others]
    assert rows[-1]["loss"] < rows[0]["loss"]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "steps_per_second"}


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ("no_such_module_at_all:loss", "no_such_module_at_all cannot be imported"),
        ("losses:missing", "module losses has no missing"),
        ("losses:NO_LOSS", "a int, not a function"),
        (
            "losses:few",
            r"cannot be called with 4 arguments: .*; it must be a function of 4 arguments, policy, reference",
        ),
        ("losses:broken", r"raised KeyError\('reward'\) when it was tried on 3 pairs"),
        ("losses:alone", "must return two tensors, the losses and h, not Tensor"),
        ("losses:mean", r"the losses it returns must have one number for each of 3 pairs, not shape \[\]"),
        ("losses:numbers", "the h it returns must be a tensor, not float 1.0"),
        ("losses:counted", "the h it returns must be floating-point numbers, not torch.bool"),
        ("losses:detached", "no gradient with respect to the policy's log-probs"),
        ("losses:infinite", "were not finite"),
        ("losses:whitened", "changes with the other pairs of the batch"),
    ],
)
def test_what_cannot_be_trained_with_is_refused_before_any_work(objective: str, says: str) -> None:
    with pytest.raises(UserError, match=f"(?s)^objective {objective}: .*{says}") as found:
        check_input(comparison(objective))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gamma": 1.0}, r"4 arguments and the settings gamma: .*unexpected keyword argument 'gamma'"),
        ({"beta": "strong"}, "raised TypeError"),
    ],
)
def test_settings_that_the_function_does_not_take_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_input(comparison("losses:logistic", settings=settings))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({}, "key 'entries.0.method.objective' is required"),
        ({"objective": "losses.logistic"}, "entries.0.method.objective: "),
        ({"objective": "losses:logistic", "beta": 1}, "unknown key 'entries.0.method.beta'"),
        ({"objective": "losses:logistic", "settings": {"beta": float("inf")}}, "entries.0.method.settings.beta"),
    ],
)
def test_a_config_is_held_to_its_keys(method: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_config({"entries": [{"name": "mine", "method": {"kind": "custom", **method}}]})


def test_a_function_that_raises_later_fails_its_entry_with_its_traceback(inputs: Path, tmp_path: Path) -> None:
    method = Custom(objective="losses:breaks_on_larger_batches", training=TRAINING)
    method.check()
    run_job(off_policy_job(inputs, tmp_path / "mine", method), Worker(str(tmp_path / "mine")))
    reason = failure_of(tmp_path / "mine")
    assert reason is not None and "losses:breaks_on_larger_batches raised an error" in reason
    assert "ValueError: too many of them" in reason and "custom.py" not in reason


def test_source_and_settings_are_in_the_address_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "edited_losses.py"
    keys = []
    for text, beta in (("x = 1\n", 0.1), ("x = 2\n", 0.1), ("x = 2\n", 0.2), ("x = 1\n", 0.1)):
        path.write_text(text, encoding="utf-8")
        (plan,) = make_plan(comparison("edited_losses:loss", settings={"beta": beta}))
        assert plan.trained[0].training is not None
        keys.append(plan.trained[0].training.key)
    assert keys[0] == keys[3] and len(set(keys)) == 3
