"""An engine is tried before any training, and what it cannot serve is one sentence then."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from test_end_to_end import LANGUAGE, QUICK

from pipelines import engine
from pipelines.cli import main
from pipelines.plan import make_plan
from prefarena.config import Comparison, parse_config
from prefarena.errors import UserError
from prefarena.generation import transfer as transfer_module
from prefarena.generation.actor import ServedModel
from prefarena.generation.client import last_error
from prefarena.generation.fleet import Generators
from prefarena.generation.interface import GeneratorLostError, WeightMismatchError, WeightUpdateError
from prefarena.generation.layout import ModelLayout
from prefarena.generation.transfer import DeviceTransfer
from prefarena.generation.trial import change, change_back, check_served, token_logps, trial_prompts
from prefarena.modeling.load import load_policy
from prefarena.stages import write_failure
from tests.helpers.models import random_model, save_model

# ------------------------------------------------------------------------------------------ what an engine computes


@pytest.mark.parametrize(
    ("dtype", "gap", "old_gap", "agrees"),
    [
        (torch.float32, 0.0004, 0.03, True),
        (torch.float32, 0.02, 0.03, False),
        (torch.float32, 0.02, 2.0, False),  # nearly all of the weights arrived
        (torch.float32, float("nan"), 0.03, False),
        (torch.bfloat16, 0.08, 0.09, True),  # rounding
        (torch.bfloat16, 0.15, 0.5, True),
        (torch.bfloat16, 0.4, 0.5, False),
        (torch.float16, 2.0, 2.0, False),
    ],
)
def test_log_probs_show_whether_an_engine_took_the_weights(
    dtype: torch.dtype, gap: float, old_gap: float, agrees: bool
) -> None:
    new = torch.tensor([-1.0, -2.0, -0.5])
    signs = torch.tensor([1.0, -1.0, 1.0])
    given = new + gap * signs
    old = given + old_gap * signs
    if agrees:
        check_served(given, new, old, dtype)
        return
    with pytest.raises(WeightMismatchError, match="differ from those of transformers by"):
        check_served(given, new, old, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_is_changed_in_the_engines_type_and_changed_back(dtype: torch.dtype) -> None:
    numbers = [0.0, 1.0, -1.0, 1e-6, -0.02, 0.0173, 3.5, -120.0, 1 / 3]
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.tensor(numbers))
    change(model)
    assert (model.weight.detach().to(dtype) != torch.tensor(numbers).to(dtype)).all()
    change_back(model)
    assert model.weight.tolist() == pytest.approx(numbers, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("vocab_size", "max_length"), [(16, 24), (3, 2), (151_936, 4096), (300, 5)])
def test_a_trials_prompts_fit_the_model(vocab_size: int, max_length: int) -> None:
    prompts, num_tokens = trial_prompts(vocab_size, max_length)
    assert num_tokens >= 1 and all(1 <= len(prompt) <= max_length - num_tokens for prompt in prompts)
    assert 0 <= min(map(min, prompts)) <= max(map(max, prompts)) < vocab_size
    assert len({tuple(prompt) for prompt in prompts}) > 1


def test_log_probs_of_responses_are_those_of_the_next_token() -> None:
    model = random_model("gpt2")
    [one, two, other] = token_logps(model, [([1, 4], [5, 2]), ([3], [7])]).tolist()
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([[1, 4, 5]])).logits[0].log_softmax(-1)
        last = model(input_ids=torch.tensor([[3]])).logits[0, 0].log_softmax(-1)
    assert [one, two, other] == pytest.approx([float(logps[1, 5]), float(logps[2, 2]), float(last[7])], abs=1e-5)


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("Traceback:\n  File \"x\", line 1\nKeyError: 'head.weight'", "KeyError: 'head.weight'"),
        (
            "Traceback:\n  f()\nValueError: inner\n\nDuring handling:\n  g()\n"
            "pydantic_core._pydantic_core.ValidationError: 1 error for ModelConfig\n  Value error, not supported.",
            "pydantic_core._pydantic_core.ValidationError: 1 error for ModelConfig Value error, not supported",
        ),
        ("the worker died", "the worker died"),
    ],
)
def test_the_last_error_of_a_traceback_is_told(text: str, last: str) -> None:
    assert last_error(text) == last


# ------------------------------------------------------------------------------------------------- when it is tried


def text_task(tmp_path: Path, family: str = "gpt2", **changed: Any) -> Comparison:
    """A comparison of DPO alone, whose evaluation alone generates."""
    model = save_model(tmp_path / "model", random_model(family))
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(f'{{"prompt": "a {x}", "chosen": "b", "rejected": "c"}}\n' for x in "abcdefghijklm"))
    tree: dict[str, Any] = {
        "name": "tried", "output": str(tmp_path / "runs"), "model": {"kind": "pretrained", "path": model},
        "task": {"kind": "text", "data": str(data), "max_prompt_tokens": 16, "max_response_tokens": 8,
                 "test_share": 0.4},
        "reference": {"training": QUICK}, "judge": {"kind": "function", "function": "rewards_that_fail:short"},
        "entries": [{"name": "dpo", "method": {"kind": "dpo", "training": QUICK}}],
    }  # fmt: skip
    return parse_config({**tree, **changed})


def refuses(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have no engine start; the settings of those that were to be started."""
    asked: list[Any] = []

    def start(model: str, settings: Any, **_: Any) -> Generators:
        asked.append(settings)
        raise GeneratorLostError("the engine raised ValueError: no such architecture")

    monkeypatch.setattr(Generators, "start", start)
    monkeypatch.setattr(engine, "cluster_answers", lambda: True)
    monkeypatch.setattr(engine, "telling_capacity", lambda: __import__("contextlib").nullcontext())
    return asked


def test_an_engine_that_only_evaluation_needs_is_tried_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = refuses(monkeypatch)
    config = text_task(tmp_path)
    says = r"model: vLLM, which generates the responses, .* no such architecture; this comparison measures every policy"
    with pytest.raises(UserError, match=says):
        engine.try_engine(config, make_plan(config), Console(quiet=True))
    assert len(asked) == 1


def test_nothing_is_tried_where_nothing_is_left_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = refuses(monkeypatch)
    config = text_task(tmp_path, reference={"train": False})
    plans = make_plan(config)
    training = plans[0].trained[0].training
    assert training is not None
    write_failure(training.folder, "diverged")
    engine.try_engine(config, plans, Console(quiet=True))
    language = parse_config({**LANGUAGE, "output": str(tmp_path)})
    engine.try_engine(language, make_plan(language), Console(quiet=True))
    assert asked == []


def test_reference_samples_that_are_drawn_before_training_are_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = refuses(monkeypatch)
    judge = {"kind": "learned", "training": QUICK}
    untrained = text_task(tmp_path, judge=judge, reference={"train": False})
    engine.try_engine(untrained, make_plan(untrained), Console(quiet=True))
    assert asked == []
    with pytest.raises(UserError), engine.tried_generator(untrained, make_plan(untrained)[0], Console(quiet=True)):
        pass
    trained = text_task(tmp_path, judge=judge)
    with pytest.raises(UserError):
        engine.try_engine(trained, make_plan(trained), Console(quiet=True))


# --------------------------------------------------------------------------------- what a trainer sends between GPUs


@pytest.mark.parametrize("family", ["mixtral", "gemma2", "gpt2"])
def test_trainers_send_what_a_checkpoint_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    path = save_model(tmp_path, random_model(family))
    state = load_policy(path).state_dict()
    layout, sent = ModelLayout(path), dict[str, torch.Tensor]()
    merged = layout.tied if family == "gemma2" else frozenset()
    member: Any = SimpleNamespace(served=ServedModel(path, merged), sync_limit_s=30)
    sender = SimpleNamespace(send=sent.update)
    monkeypatch.setattr(transfer_module, "join_transfer", lambda *_: sender)
    settings: Any = SimpleNamespace(weight_sync="nccl", tensor_parallel=1)
    transfer = DeviceTransfer([member], settings, torch.float32)
    transfer.send(state.items(), None, "new")
    expected = {name: tensor for name, tensor in layout.as_checkpoint(state).items() if name not in merged}
    assert sent.keys() == expected.keys() and all(sent[name].equal(expected[name]) for name in sent)
    assert bool(merged) == ("lm_head.weight" in state.keys() - sent.keys())
    shapes = [(name, tuple(tensor.shape)) for name, tensor in sent.items()]
    assert shapes == [*layout.sent_shapes(merged).items()]  # what vLLM is told beforehand
    first, *others = state
    for names, wrong in (
        (others, f"missing: {first}$"),
        ([first, *others[:-1]], f"missing: {others[-1]}$"),
        ([*state, first], f"sent twice: {first}$"),
    ):
        with pytest.raises(WeightUpdateError, match=wrong):
            transfer.send(((name, state[name]) for name in names), None, "wrong")


# ---------------------------------------------------------------------------------------------------- a whole command


@pytest.mark.timeout(300)
def test_a_model_whose_weights_no_engine_takes_is_refused_before_any_training(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = text_task(tmp_path, "bloom")  # whose tied head vLLM 0.32 refuses
    tree = config.model_dump(mode="json", exclude_unset=True)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main(["compare", str(path)]) == 2
    told = capsys.readouterr().err
    assert "vLLM, which generates the responses, does not work with it" in told and "Traceback" not in told
    kinds = {folder.name.split("-")[0] for folder in (tmp_path / "runs" / "stages").iterdir()}
    assert kinds == {"data", "base"}
