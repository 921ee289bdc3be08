"""Off-policy methods on pairs of their own: what is drawn, what is learned from it, and what a kill leaves of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from off_policy import metric_rows, off_policy_job, weights, write_inputs
from on_policy import LIKED, Done, LikedCount, LocalGenerator, SharedGenerator, syncs
from workers import DyingWorker, KilledError, OneOfMany, Sharding

from prefarena.config import DPO, IPO, MPO, Generation, GoldJudge, LoRA, OffPolicyMethod, Optimisation, RewardModel
from prefarena.generation.interface import Sampling, StaleWeightsError
from prefarena.judges.spec import JudgeSpec
from prefarena.modeling.load import load_policy, load_tokenizer, new_reward_model, save_policy
from prefarena.modeling.logprobs import LogProbs, sequence_logps
from prefarena.records import Rollout
from prefarena.settings.off_policy import Pairwise
from prefarena.stage_files import DRAWN_PAIRS
from prefarena.stages import read_manifest
from prefarena.training.jobs import Drawing, OffPolicyJob, Replayed
from prefarena.training.online import ReplayTerm
from prefarena.training.run_job import run_job
from prefarena.training.terms import PreferenceTerm, Shares
from prefarena.training.worker import Worker

STEPS, BATCH = 12, 16
TRAINING = Optimisation(
    num_steps=STEPS, batch_size=BATCH, log_every=1, warmup_steps=0, checkpoint_every=5, learning_rate=3e-3
)

_DPO = DPO()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def job_of(inputs: Path, folder: Path, every: int | None, method: OffPolicyMethod = _DPO, **how: Any) -> OffPolicyJob:
    """Without a generator and a judge of its own; every None: offline."""
    method = method.model_copy(update={"training": TRAINING, **how.pop("changed", {})})
    job = off_policy_job(inputs, folder, method)
    if every is None:
        return job
    drawing = Drawing(every, JudgeSpec(GoldJudge(), None, str(inputs / "model")), ("none",), Generation(), 4)
    return replace(job, drawing=replace(drawing, **how))


def run(job: OffPolicyJob, worker: Worker | None = None, source: Any = None, judge: Any = None) -> dict[str, Any]:
    """What its manifest says."""
    run_job(job, worker or Worker(job.stage_dir), source or LocalGenerator(job.policy), judge or LikedCount())
    return read_manifest(job.stage_dir)


def drawn(folder: Path) -> dict[int, pa.Table]:
    """The tables of a stage by the step of their drawing."""
    return {int(path.stem): pq.read_table(path) for path in sorted((folder / DRAWN_PAIRS).glob("*.parquet"))}


def same(one: Path, other: Path) -> bool:
    found, expected = weights(one), weights(other)
    return all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def offline(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DPO without new pairs."""
    folder = tmp_path_factory.mktemp("runs") / "offline"
    run(job_of(inputs, folder, None))
    return folder


def test_without_a_drawing_the_weights_are_those_of_offline_bit_for_bit(
    inputs: Path, offline: Path, tmp_path: Path
) -> None:
    told = run(job_of(inputs, tmp_path / "never", STEPS), source="nobody is asked")["pairs"]
    assert same(tmp_path / "never", offline) and not drawn(tmp_path / "never")
    run(job_of(inputs, tmp_path / "late", STEPS - 1))
    assert not same(tmp_path / "late", offline)
    assert told["num_own_labels"] == 0 and told["mean_age"] == (STEPS - 1) / 2
    losses = [
        [row["loss"] for row in metric_rows(folder)] for folder in (offline, tmp_path / "never", tmp_path / "late")
    ]
    assert losses[0] == losses[1] and losses[2][:-1] == losses[0][:-1] != losses[2]


@pytest.mark.parametrize("method", [MPO(), IPO()], ids=lambda method: method.kind)
def test_other_methods_are_offline_without_a_drawing_too(inputs: Path, tmp_path: Path, method: OffPolicyMethod) -> None:
    for name, every in (("offline", None), ("never", STEPS + 5)):
        run(job_of(inputs, tmp_path / name, every, method))
    assert same(tmp_path / "never", tmp_path / "offline")


class Noted(LocalGenerator):
    """Keeps the weights of every version."""

    def __init__(self, policy: str) -> None:
        super().__init__(policy)
        self.versions: dict[str, dict[str, torch.Tensor]] = {}

    def sync(self, named_tensors: Any, version: str) -> None:
        super().sync(named_tensors, version)
        self.versions[version] = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def test_pairs_are_two_responses_of_the_policy_as_it_is_ordered_by_the_judge(inputs: Path, tmp_path: Path) -> None:
    job, source = job_of(inputs, tmp_path / "it", 5), Noted(str(inputs / "model"))
    told = run(job, source=source)
    found = drawn(tmp_path / "it")
    assert list(found) == [5, 10] and list(source.versions) == ["it@5", "it@10"]
    assert [len(table) for table in found.values()] == [5 * BATCH, 2 * BATCH]
    assert not all(torch.equal(source.versions["it@5"][name], value) for name, value in weights(inputs).items())
    reference = LogProbs(load_policy(inputs / "model"))
    rows = [row for table in found.values() for row in table.to_pylist()]
    own = [row for row in rows if row["drawn_at"]]
    assert len(own) > 0.5 * len(rows)
    for row in own:
        assert row["chosen_ids"] != row["rejected_ids"] and row["score_chosen"] > row["score_rejected"]
        assert row["score_chosen"] == row["chosen_ids"].count(LIKED)
        assert row["num_judged"] % 2 == 0 and row["num_tokens"] >= len(row["chosen_ids"] + row["rejected_ids"])
        with torch.no_grad():
            logps = sequence_logps(reference, [row["prompt_ids"]], [[row["chosen_ids"], row["rejected_ids"]]])[0]
        assert [row["ref_chosen_logp"], row["ref_rejected_logp"]] == pytest.approx(logps.tolist(), abs=1e-5)
    assert [row["place"] for row in rows] == list(range(5 * BATCH, STEPS * BATCH))
    ages = sum(row["place"] // BATCH - row["drawn_at"] for row in rows) + BATCH * sum(range(5))
    assert told["pairs"] == {
        "num_pairs_trained": STEPS * BATCH,
        "num_data_labels": 48,
        "num_own_labels": len(own),
        "num_kept": len(rows) - len(own),
        "num_judged": sum(row["num_judged"] for row in rows),
        "mean_age": pytest.approx(ages / (STEPS * BATCH)),
    }
    logged = metric_rows(tmp_path / "it")
    assert np.mean([row["online/age"] for row in logged]) == pytest.approx(told["pairs"]["mean_age"])
    assert told["costs"]["num_tokens_generated"] == sum(row["num_tokens"] for row in rows)


@pytest.mark.parametrize("changed", [{}, {"lora": LoRA(rank=4)}], ids=["whole", "adapters"])
def test_a_run_that_is_killed_goes_on_with_the_very_pairs(
    inputs: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    changed = {"training": TRAINING.model_copy(update=changed), "demonstration_weight": 0.01}
    straight, broken = (job_of(inputs, tmp_path / name, 3, changed=changed) for name in ("straight", "broken"))
    # Jobs of one name ask for the same samples; the folder of each is its own.
    straight, broken = replace(straight, name="it"), replace(broken, name="it")
    run(straight)
    with pytest.raises(KilledError):  # in step 7, of a block that was drawn at step 6; it goes on from step 5
        run(broken, DyingWorker(broken.stage_dir))
    before = drawn(tmp_path / "broken")
    assert list(before) == [3, 6]
    source = Noted(str(inputs / "model"))
    run(broken, source=source)
    assert list(source.versions) == ["it@9"]  # nothing is drawn again
    found, expected = drawn(tmp_path / "broken"), drawn(tmp_path / "straight")
    assert list(found) == [3, 6, 9] and all(found[step].equals(table) for step, table in expected.items())
    assert same(tmp_path / "broken", tmp_path / "straight")
    told = [read_manifest(job.stage_dir)["pairs"] for job in (straight, broken)]
    assert told[0] == told[1]


def test_a_replay_is_trained_on_the_pairs_of_an_online_run_in_an_order_of_its_own(inputs: Path, tmp_path: Path) -> None:
    source, replay = job_of(inputs, tmp_path / "source", 5), job_of(inputs, tmp_path / "replay", None)
    told = run(source)["pairs"]
    replay = replace(replay, replayed=Replayed(source.stage_dir, 5, source.method.training))
    labels = run(replay, source="nobody is asked")["pairs"]
    names = ("num_pairs_trained", "num_data_labels", "num_own_labels", "num_kept")
    assert labels == {name: told[name] for name in names}
    shares = Shares(TRAINING, 1, replay.seed)
    assert isinstance(replay.method, Pairwise) and isinstance(source.method, Pairwise)
    term = ReplayTerm(replay, replay.method, shares, 0)
    data = PreferenceTerm(source.pairs, source.method, shares, 0)
    first = [row for step in range(5) for row in data.plan.rows(step)]
    own = [row["chosen_ids"] for table in drawn(tmp_path / "source").values() for row in table.to_pylist()]
    expected = [ids.tolist() for ids in data.pairs.chosen.take(np.array(first))] + own
    rows = np.concatenate([term.plan.rows(step) for step in range(STEPS)])
    found = [ids.tolist() for ids in term.pairs.chosen.take(rows)]
    assert sorted(found) == sorted(expected) and found != expected
    assert not same(tmp_path / "replay", tmp_path / "source")


class OneAnswer(LocalGenerator):
    """Says the same to everybody."""

    def _sample(self, prompts: list[list[int]], sampling: Sampling, version: str) -> list[Rollout]:
        return [Rollout(prompt, [LIKED, 2], [0.0, 0.0], True, version) for prompt in prompts]


class Silent:
    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        return np.full(len(responses), np.nan)


class Undecided:
    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
        return np.zeros(len(responses))


@pytest.mark.parametrize("case", ["one answer", "silent", "undecided"])
def test_where_no_pair_is_found_the_data_s_own_stays(inputs: Path, offline: Path, tmp_path: Path, case: str) -> None:
    job = job_of(inputs, tmp_path / "online", 4)
    source = OneAnswer(job.policy) if case == "one answer" else LocalGenerator(job.policy)
    told = run(job, None, source, Silent() if case == "silent" else Undecided())["pairs"]
    assert told["num_own_labels"] == 0 and told["num_kept"] == (STEPS - 4) * BATCH
    assert (told["num_judged"] > 0) == (case != "one answer")
    assert same(tmp_path / "online", offline)


def test_bradley_terry_labels_are_drawn_by_the_gap_over_the_temperature(inputs: Path, tmp_path: Path) -> None:
    def share_against(name: str, temperature: float) -> float:
        job = job_of(inputs, tmp_path / name, 1, labels="bradley_terry", label_temperature=temperature)
        run(job)
        rows = [row for table in drawn(tmp_path / name).values() for row in table.to_pylist() if row["drawn_at"]]
        apart = [
            row["score_chosen"] - row["score_rejected"] for row in rows if row["score_chosen"] != row["score_rejected"]
        ]
        assert len(apart) > 20
        return float(np.mean(np.array(apart) < 0))

    assert share_against("cold", 1e-3) == 0
    assert 0.2 < share_against("hot", 1e3) < 0.8


def test_the_policy_learns_what_the_judge_likes(inputs: Path, tmp_path: Path) -> None:
    run(job_of(inputs, tmp_path / "it", 1, DPO(beta=0.1)))
    found = drawn(tmp_path / "it")
    new = [[row["score_chosen"] for row in table.to_pylist() if row["drawn_at"]] for table in found.values()]
    liked = [np.mean(scores) for scores in new]
    assert np.mean(liked[-3:]) > np.mean(liked[:3]) + 0.3
    for step, row in enumerate(metric_rows(tmp_path / "it")):  # what is drawn is new; what stayed is the reference's
        assert row["online/age"] == pytest.approx(step * (1 - row["online/own"]))


class Forgetful(LocalGenerator):
    """Loses its weights once, as an actor does that is restarted."""

    def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> Done:
        if self.num_syncs == 1:
            self.version = None
        return super().submit(prompts, sampling, version)


def test_a_generator_that_lost_its_weights_is_given_them_again(inputs: Path, tmp_path: Path) -> None:
    source = Forgetful(str(inputs / "model"))
    run(replace(job_of(inputs, tmp_path / "broken", 6), name="it"), source=source)
    assert source.num_syncs == 2
    run(replace(job_of(inputs, tmp_path / "straight", 6), name="it"))
    assert same(tmp_path / "broken", tmp_path / "straight")


def test_a_generator_that_loses_them_again_and_again_ends_the_job(inputs: Path, tmp_path: Path) -> None:
    class Hopeless(LocalGenerator):
        def submit(self, prompts: list[list[int]], sampling: Sampling, version: str) -> Done:
            return Done(StaleWeightsError("lost"))

    with pytest.raises(StaleWeightsError, match="it@6"):
        run(job_of(inputs, tmp_path / "it", 6), source=Hopeless(str(inputs / "model")))


LAYOUTS: dict[str, Sharding] = {"whole": "none", "spread": "fsdp"}


def with_reward_model(inputs: Path, folder: Path) -> OffPolicyJob:
    """Four steps, and a drawing before the third, labelled by a random reward model."""
    job = job_of(inputs, folder, 2, changed={"training": TRAINING.model_copy(update={"num_steps": 4})})
    assert job.drawing is not None
    reward = JudgeSpec(RewardModel(), str(inputs / "reward"), job.policy)
    return replace(job, name="it", drawing=replace(job.drawing, reward=reward))


def run_as_one_of_two(rank: int, jobs: dict[str, OffPolicyJob], root: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    for layout, job in jobs.items():
        worker = OneOfMany(job.stage_dir, rank, 2, LAYOUTS[layout])
        (root / layout).mkdir(exist_ok=True)
        run_job(job, worker, SharedGenerator(job.policy, root / layout, worker))
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_two_workers_draw_what_one_does_whole_or_spread(inputs: Path, tmp_path: Path) -> None:
    policy = str(inputs / "model")
    save_policy(new_reward_model(policy, 0), load_tokenizer(policy), inputs / "reward")
    alone = with_reward_model(inputs, tmp_path / "alone")
    run_job(alone, Worker(alone.stage_dir), LocalGenerator(alone.policy))
    jobs = {layout: with_reward_model(inputs, tmp_path / f"job-{layout}") for layout in LAYOUTS}
    torch.multiprocessing.spawn(run_as_one_of_two, args=(jobs, tmp_path), nprocs=2)
    [expected] = drawn(tmp_path / "alone").values()
    for layout, job in jobs.items():
        assert syncs(tmp_path / layout) == [(0, "it@2")]
        [found] = drawn(Path(job.stage_dir)).values()
        for row, other in zip(found.to_pylist(), expected.to_pylist(), strict=True):
            assert (row["id"], row["drawn_at"]) == (other["id"], other["drawn_at"])
            assert row["ref_chosen_logp"] == pytest.approx(other["ref_chosen_logp"], abs=1e-4)
            if row["drawn_at"]:
                assert row["score_chosen"] == pytest.approx(other["score_chosen"], abs=1e-4)
        for one, other in zip(metric_rows(Path(job.stage_dir)), metric_rows(tmp_path / "alone"), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-4) and one["online/own"] == other["online/own"]
