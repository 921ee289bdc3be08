"""The eta and gamma terms: what they are over, their gradient by brute force, and beside an on-policy method's loss."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from on_policy import LikedCount, LocalGenerator, make_job, timeless
from tiny import BOS, EOS, FIRST_LETTER
from torch import Tensor, nn

from pipelines.annotate import ExactReference
from pipelines.demonstrations import make_demonstrations
from pipelines.jobs import entry_job
from pipelines.plan import SeedPlan, make_plan
from prefarena.config import GRPOTraining, PPOTraining, TextTask, parse_config
from prefarena.data.first_rows import look_at_demonstrations
from prefarena.data.formats import normalise_demonstration
from prefarena.data.tables import read_rows, write_rows
from prefarena.errors import UserError
from prefarena.evaluation.enumeration import Responses, enumerate_responses
from prefarena.modeling.load import load_policy
from prefarena.modeling.logprobs import LogProbs
from prefarena.records import DEMONSTRATIONS, PAIRS, PRETRAINING
from prefarena.settings.optimisation import Optimisation
from prefarena.stage_files import EXACT
from prefarena.stages import write_manifest
from prefarena.tasks.language import Language
from prefarena.training.jobs import OnPolicyJob, Regulariser
from prefarena.training.learner import Pass
from prefarena.training.on_policy import OnPolicyTrainer, Phases, train_on_policy
from prefarena.training.on_policy_batch import learnable
from prefarena.training.rollouts import minibatches
from prefarena.training.terms import LikelihoodTerm, Shares
from prefarena.training.worker import Worker

PROMPTS = [[BOS, FIRST_LETTER + i, FIRST_LETTER + 2] for i in range(3)]
LIMIT = 2


class Double(Worker):
    """A worker that trains in float64."""

    def wrap(self, module: nn.Module) -> nn.Module:
        return super().wrap(module.double())


def demonstrations(folder: Path, number: int, seed: int = 0) -> Path:
    """Responses of at most two tokens to three prompts, some of them several times."""
    rng = np.random.default_rng(seed)
    responses = [[int(rng.integers(FIRST_LETTER, 16)), EOS] if rng.random() < 0.8 else [EOS] for _ in range(number)]
    rows = {"id": [f"{i:03d}" for i in range(number)], "prompt_ids": [PROMPTS[i % 3] for i in range(number)]}
    table = pa.table({**rows, "response_ids": responses}, schema=DEMONSTRATIONS)
    write_rows(table, folder / "demonstrations" / "part.parquet", DEMONSTRATIONS)
    return folder / "demonstrations"


def flat_gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def cross_entropy_gradient(policy: str, rows: list[dict[str, Any]]) -> Tensor:
    """Of -E[log pi(y|x)] under these rows' own distribution, as a sum over every response to each prompt."""
    model = load_policy(policy).double()
    listed = Responses.listed(16, LIMIT, EOS)
    total = torch.zeros((), dtype=torch.float64)
    for prompt in PROMPTS:
        shares = Counter(tuple(row["response_ids"]) for row in rows if row["prompt_ids"] == prompt)
        for length in range(1, LIMIT + 1):
            responses = torch.tensor(listed.sequences[listed.lengths == length, :length])
            weights = torch.tensor([shares.pop(tuple(one), 0) / len(rows) for one in responses.tolist()])
            whole = torch.cat([torch.tensor(prompt).expand(len(responses), -1), responses], 1)
            log_softmax = torch.log_softmax(model(whole).logits[:, len(prompt) - 1 : -1], -1)
            total = total - (weights * log_softmax.gather(-1, responses[..., None]).sum((1, 2))).sum()
        assert not shares
    total.backward()
    return flat_gradient(model)


def test_the_gradient_of_the_term_is_that_of_the_cross_entropy_over_every_response(
    tmp_path: Path, tiny_policy: str
) -> None:
    """Where D_ref is drawn from the reference, that is the gradient of KL(pi_ref || pi) on its draws."""
    path = demonstrations(tmp_path, 40)
    term = LikelihoodTerm(str(path), Shares(Optimisation(batch_size=40, micro_batch_tokens=64), 1, 0), 0, weight=1.0)
    module = LogProbs(load_policy(tiny_policy).double())
    for rows in term.plan.micro_batches(0, 0):
        (term(module, rows, torch.device("cpu")).loss.total / term.count(0)).backward()
    found, expected = flat_gradient(module), cross_entropy_gradient(tiny_policy, read_rows(path).to_pylist())
    assert expected.abs().max() > 1e-3
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_of_pairs_the_term_takes_the_chosen_responses_of_as_many_as_are_learned_from(
    tmp_path: Path, tiny_policy: str
) -> None:
    rows = {"id": ["a", "b", "c"], "prompt_ids": PROMPTS, "chosen_ids": [[3, 2], [4, 2], [5, 2]]}
    others = {"rejected_ids": [[2]] * 3, "label": [1.0] * 3, "source": ["x"] * 3}
    scores = {"score_chosen": [None] * 3, "score_rejected": [None] * 3}
    write_rows(pa.table({**rows, **others, **scores}), tmp_path / "pairs" / "part.parquet", PAIRS)
    shares = Shares(Optimisation(batch_size=2), 1, 0)
    term = LikelihoodTerm(str(tmp_path / "pairs"), shares, 0, first=2)
    assert [ids.tolist() for ids in term.responses.take(np.arange(2))] == [[3, 2], [4, 2]]
    assert len(term.plan.lengths) == 2


# ------------------------------------------------------------------------------------------------- on policy

PPO = PPOTraining(num_iterations=1, rollouts_per_iteration=24, num_minibatches=2, kl_coef=0.3, micro_batch_size=12)
GRPO = GRPOTraining(
    num_iterations=1, rollouts_per_iteration=24, num_minibatches=2, kl_coef=0.3, micro_batch_size=12, group_size=4
)


@pytest.fixture
def job(tmp_path: Path, tiny_policy: str) -> OnPolicyJob:
    return make_job(tmp_path, tiny_policy, PPO)


def regulariser(folder: Path, **settings: Any) -> Regulariser:
    texts = {"id": ["a", "b"], "ids": [[BOS, 5, 6, 7], [BOS, 8, 9]]}
    write_rows(pa.table(texts), folder / "pretraining" / "part.parquet", PRETRAINING)
    text = str(folder / "pretraining")
    return Regulariser(demonstrations=str(demonstrations(folder, 12)), pretraining=text, **settings)


def gradient_of_a_step(job: OnPolicyJob, *, rollouts: bool = True, beside: bool = True) -> Tensor:
    """Of the policy, in the first optimizer step, from its rollouts and from what is beside them."""
    trainer = OnPolicyTrainer(job, Double(job.stage_dir), LocalGenerator(job.policy), reward=LikedCount())
    trainer.scorers.reference.double()
    batch = learnable(trainer.make_experience(Phases()), job.training, kl_coef=0.3).batch
    rows = minibatches(24, 2, seed=0, iteration=0, epoch=0)[0]
    ((learner, term), *_) = trainer.terms(kl_coef=0.3)
    parts, scale = trainer.parts(batch, rows), 1 / trainer.count(batch, rows)
    passes = [Pass(partial(term, part), scale) for part in parts] if rollouts else []
    passes += trainer.beside.passes(0, 0, 0) if beside else []
    learner.accumulate(passes)
    return flat_gradient(learner.module)


@pytest.mark.parametrize("training", [PPO, GRPO], ids=["ppo", "grpo"])
def test_a_step_has_the_gradient_of_its_rollouts_and_eta_times_that_of_the_term(
    job: OnPolicyJob, tmp_path: Path, training: PPOTraining | GRPOTraining
) -> None:
    job = replace(job, training=training, critic=job.critic if training is PPO else None)
    with_term = replace(job, regulariser=regulariser(tmp_path, demonstration_weight=0.3))
    found = gradient_of_a_step(with_term) - gradient_of_a_step(job)
    # As many demonstrations as rollouts in a minibatch: the table's twelve, each once.
    expected = 0.3 * cross_entropy_gradient(job.policy, read_rows(tmp_path / "demonstrations").to_pylist())
    assert expected.abs().max() > 1e-3
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    narrow = replace(with_term, training=training.model_copy(update={"micro_batch_size": 1}))
    alone = gradient_of_a_step(narrow, rollouts=False)
    assert (alone - expected).abs().max() < 1e-6 * expected.abs().max()


def test_pretraining_text_is_mixed_in_by_its_own_weight(job: OnPolicyJob, tmp_path: Path) -> None:
    once, twice = (
        gradient_of_a_step(replace(job, regulariser=regulariser(tmp_path, pretraining_weight=w)), rollouts=False)
        for w in (0.5, 1.0)
    )
    assert once.abs().max() > 1e-3
    assert (2 * once - twice).abs().max() < 1e-6 * twice.abs().max()


def test_without_a_weight_training_is_as_it_was(job: OnPolicyJob, tmp_path: Path) -> None:
    rows = []
    for name, own in (("plain", Regulariser()), ("unweighted", regulariser(tmp_path))):
        one = replace(job, stage_dir=str(tmp_path / name), regulariser=own)
        train_on_policy(one, Worker(one.stage_dir), LocalGenerator(job.policy), LikedCount())
        rows.append(timeless(one))
    assert rows[0] == rows[1] and "demonstration/nll" not in rows[0][0]


def test_a_training_logs_the_term_counts_its_tokens_and_holds_the_policy(job: OnPolicyJob, tmp_path: Path) -> None:
    job = replace(job, training=PPO.model_copy(update={"learning_rate": 1e-2}))
    nll, counts = {}, {}
    for weight in (0.0, 3.0):
        one = replace(
            job,
            stage_dir=str(tmp_path / f"with-{weight}"),
            regulariser=regulariser(tmp_path, demonstration_weight=weight),
        )
        train_on_policy(one, Worker(one.stage_dir), LocalGenerator(job.policy), LikedCount())
        last = timeless(one)[-1]
        counts[weight] = last["num_tokens_trained"]
        module = LogProbs(load_policy(one.model_dir))
        term = LikelihoodTerm(str(tmp_path / "demonstrations"), Shares(Optimisation(batch_size=12), 1, 0), 0)
        with torch.no_grad():
            nll[weight] = float(term(module, np.arange(12), torch.device("cpu")).loss.value)
        assert ("demonstration/nll" in last) == (weight > 0)
    assert nll[3.0] < nll[0.0] - 0.05
    tokens = sum(3 + len(row["response_ids"]) for row in read_rows(tmp_path / "demonstrations").to_pylist())
    assert counts[3.0] - counts[0.0] == 4 * tokens  # the first rollouts are the same, and there are two steps an epoch


# ------------------------------------------------------------------------------------------- settings, stages


def plan_of(tmp_path: Path, methods: dict[str, dict[str, Any]], **task: Any) -> SeedPlan:
    entries = [{"name": name, "method": method} for name, method in methods.items()]
    config = {"output": str(tmp_path), "task": {"kind": "language", **task}, "entries": entries}
    return make_plan(parse_config(config))[0]


def test_defaults_are_in_no_address_and_a_source_is_where_its_term_is_at_work(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        {
            "plain": {"kind": "dpo", "demonstration_weight": 0.1},
            "data": {"kind": "dpo", "demonstration_weight": 0.1, "demonstration_source": "data"},
            "samples": {"kind": "dpo", "demonstration_weight": 0.1, "demonstration_source": "samples"},
            "ppo": {"kind": "rlhf"},
            "ppo-data": {"kind": "rlhf", "demonstration_weight": 0.0, "pretraining_weight": 0.0},
            "ppo-samples": {"kind": "rlhf", "demonstration_weight": 0.1, "demonstration_source": "samples"},
        },
    )
    keys = {one.entry.name: one.training.key.rsplit("-", 1)[-1] for one in plan.trained if one.training}
    assert keys["plain"] == keys["data"] != keys["samples"]
    assert keys["ppo"] == keys["ppo-data"] != keys["ppo-samples"]
    assert list(plan.demonstrations) == ["samples"] and plan.demonstrations["samples"] in plan.shared()
    assert not plan_of(tmp_path, {"off": {"kind": "dpo", "demonstration_source": "samples"}}).demonstrations


def test_a_job_reads_the_source_that_its_method_names(tmp_path: Path) -> None:
    weights = {"demonstration_weight": 0.1}
    methods: dict[str, dict[str, Any]] = {
        f"{kind}-{source}": {"kind": kind, **weights, "demonstration_source": source}
        for kind in ("mpo", "rlhf")
        for source in ("data", "chosen", "samples")
    }
    methods["mpo-chosen"]["num_pairs"] = 100
    methods["rlhf-chosen"]["reward"] = {"kind": "learned", "num_pairs": 100}
    entries = [{"name": name, "method": method} for name, method in methods.items()]
    config = parse_config({"output": str(tmp_path), "entries": entries})
    (plan,) = make_plan(config)
    where = {
        "data": plan.data.folder / "demonstrations",
        "chosen": plan.pairs.folder / "train_pairs",
        "samples": plan.demonstrations["samples"].folder / "demonstrations",
    }
    for trained in plan.trained:
        job, source = entry_job(config, plan, trained), trained.entry.name.partition("-")[2]
        own = job.regulariser  # type: ignore[attr-defined]
        assert own.demonstrations == str(where[source]) and own.demonstration_weight == 0.1
        assert own.num_demonstrations == (100 if source == "chosen" else None)


def test_samples_of_the_language_follow_the_reference(tmp_path: Path, tiny_policy: str) -> None:
    from rich.console import Console

    task = {"num_letters": 13, "num_prompts": 3, "prompt_letters": 2, "response_limit": 2, "num_demonstrations": 6000}
    methods = {"mpo": {"kind": "mpo", "demonstration_source": "samples"}}
    plan = plan_of(tmp_path, methods, **task, num_pairs=8, num_test_pairs=8)
    config = parse_config({"output": str(tmp_path), "entries": [{"name": "mpo", "method": methods["mpo"]}]})
    assert not isinstance(plan.task, TextTask)
    language = Language(plan.task)
    exact = enumerate_responses(load_policy(tiny_policy), language.prompt_ids, 2, EOS)
    folder = plan.pairs.begin()
    np.savez(
        folder / EXACT,
        ref_logps=exact.logps,
        rewards=exact.logps,
        lengths=exact.lengths,
        covered=language.covered,
    )
    write_manifest(folder, {})
    make_demonstrations(config, [plan], Console(quiet=True))
    rows = read_rows(plan.demonstrations_of(plan.trained[0].entry.method)).to_pylist()  # type: ignore[arg-type]
    assert Counter(tuple(row["prompt_ids"]) for row in rows) == {tuple(ids): 2000 for ids in language.prompt_ids}
    ref = ExactReference.load(folder / EXACT).ref_logps
    places = {tuple(ids[:n]): i for i, (ids, n) in enumerate(zip(exact.sequences.tolist(), exact.lengths, strict=True))}
    prompts = {tuple(ids): i for i, ids in enumerate(language.prompt_ids)}
    drawn = np.array([ref[prompts[tuple(row["prompt_ids"])], places[tuple(row["response_ids"])]] for row in rows])
    expected = float((np.exp(ref) * ref).sum(1).mean())
    assert abs(drawn.mean() - expected) < 4 * drawn.std() / len(drawn) ** 0.5


# ---------------------------------------------------------------------------------------------- a user's file


def test_a_file_is_for_text_and_must_be_named(tmp_path: Path) -> None:
    own = [{"name": "mpo", "method": {"kind": "mpo", "demonstration_source": "file"}}]
    for task in ({"kind": "language"}, {"kind": "text", "data": "pairs.jsonl"}):
        with pytest.raises(UserError, match=r"entry 'mpo': demonstration_source: file needs task.demonstration_data"):
            parse_config({"task": task, "entries": own})
    keys = []
    for content in ("first", "second, longer"):
        (tmp_path / "own.jsonl").write_text(content)
        task = {"kind": "text", "data": "pairs.jsonl", "demonstration_data": str(tmp_path / "own.jsonl")}
        (plan,) = make_plan(parse_config({"task": task, "entries": own}))
        others = [{"name": "mpo", "method": {"kind": "mpo"}}]
        (plain,) = make_plan(parse_config({"task": {"kind": "text", "data": "pairs.jsonl"}, "entries": others}))
        assert plan.logps.key == plain.logps.key  # nothing but the trainings that read it depends on the file
        keys.append(plan.demonstrations["file"].key)
    assert keys[0] != keys[1]


@pytest.mark.parametrize("name", ["response", "completion"])
def test_a_row_of_demonstrations_is_a_prompt_and_its_response(name: str) -> None:
    found = normalise_demonstration({"prompt": "Why?", name: " So."})
    assert (found.prompt, found.chosen, found.is_single) == ("Why?", " So.", True)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Why?"}, "missing column 1, first at {path}:2 (response)"),
        ({"prompt": "Why?", "response": 3}, "wrong type 1, first at {path}:2 (chosen is int, not text)"),
        ({"prompt": " ", "response": "So."}, "empty prompt 1, first at {path}:2"),
        ({"prompt": "Why?", "response": " "}, "empty response 1, first at {path}:2"),
    ],
)
def test_a_file_is_refused_before_any_work_with_its_name_and_row(
    tmp_path: Path, row: dict[str, Any], says: str
) -> None:
    path = tmp_path / "own.jsonl"
    lines = [{"prompt": "Why?", "response": "So."}, row, {"prompt": "What?", "response": "That."}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError) as refused:
        look_at_demonstrations(TextTask(data="pairs.jsonl"), str(path))
    assert says.format(path=path) in str(refused.value) and "\n" not in str(refused.value)
