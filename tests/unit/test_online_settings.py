"""Off-policy methods online: what a configuration may say, and what the plan, the jobs and the report make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import sampled_job
from pipelines.jobs import entry_job, reward_model_job
from pipelines.plan import SeedPlan, make_plan, model_of
from pipelines.trials import spaces_of
from prefarena.cluster.capacity import generates, side_by_side
from prefarena.cluster.needs import Lengths, trainings
from prefarena.config import DPO, Comparison, draws_responses, parse_config, reward_of
from prefarena.errors import UserError
from prefarena.modeling.load import new_settings
from prefarena.report.online import online_table
from prefarena.report.results import EntryResult, Results
from prefarena.stages import write_failure
from prefarena.training.jobs import OffPolicyJob, Replayed

GOLD = {"kind": "gold"}


def method(every: int | None = 8, kind: str = "dpo", replay: str | None = None, **online: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": kind, **({} if replay is None else {"replay": replay})}
    return found | ({} if every is None else {"online": {"every": every, **online}})


def config_of(*methods: dict[str, Any], **more: Any) -> Comparison:
    entries = [{"name": f"e{place}", "method": one} for place, one in enumerate(methods)]
    return parse_config({"entries": entries, **more})


def planned(*methods: dict[str, Any], **more: Any) -> tuple[Comparison, SeedPlan]:
    config = config_of(*methods, **more)
    return config, make_plan(config)[0]


TEXT = {"task": {"kind": "text", "data": "x.jsonl"}}


@pytest.mark.parametrize(
    ("one", "more", "says"),
    [
        (method(0), {}, "online.every"),
        ({"kind": "dpo", "online": {}}, {}, "'entries.0.method.online.every' is required"),
        (
            method(4, "kto"),
            {},
            "online draws labelled pairs, but kto learns from labelled responses",
        ),
        (method(4, "aot"), {}, "aot learns from ranks of labelled pairs"),
        (method(4, "rlhf"), {}, "unknown key 'entries.0.method.online'"),
        (method(reward=GOLD), TEXT, "online.reward kind gold exists only on the enumerable language"),
        (method(reward={"kind": "pairwise", "base_url": "http://x", "model": "m"}), TEXT, "pairwise"),
        (method(temperature=0), {}, "online.temperature"),
        ({"kind": "dpo", "replay": "e1"}, {}, "entry 'e0': replay: 'e1' is not an online entry of this comparison"),
        (method(replay="e0"), {}, "cannot be combined with online"),
        ({"kind": "dpo", "replay": "e1", "tail_weight": 0.5}, {}, "cannot be combined with tail_weight"),
    ],
)
def test_what_cannot_be_is_said(one: dict[str, Any], more: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(one, **more)
    assert says in str(caught.value)


def test_offline_entries_keep_their_addresses_and_every_setting_has_one_of_its_own() -> None:
    plans = [planned(one)[1] for one in (method(None), {"kind": "dpo", "online": None})]
    assert plans[0].trained[0].stages() == plans[1].trained[0].stages()
    _, plan = planned(
        method(None), method(4, reward=GOLD), method(8, reward=GOLD), method(8), method(8, temperature=0.7)
    )
    assert len({one.training for one in plan.trained}) == 5
    assert [one.reward_model is not None for one in plan.trained] == [False, False, False, True, True]


def test_a_proxy_is_the_reward_model_that_rlhf_has() -> None:
    config, plan = planned(method(8), {"kind": "rlhf"})
    online, rlhf = plan.trained
    assert online.reward_model == rlhf.reward_model is not None and online.scores is None
    assert reward_model_job(plan, online) == reward_model_job(plan, rlhf)
    job = entry_job(config, plan, online)
    assert isinstance(job, OffPolicyJob) and job.drawing is not None and online.reward_model is not None
    assert job.drawing.reward.path == model_of(online.reward_model)


def test_a_replay_depends_on_the_training_whose_pairs_it_has() -> None:
    config, plan = planned(method(8, reward=GOLD), method(None, replay="e0"), method(None))
    source, replay, offline = plan.trained
    job, learned = entry_job(config, plan, replay), config.entries[0].method
    assert isinstance(job, OffPolicyJob) and isinstance(learned, DPO) and source.training is not None
    assert job.replayed == Replayed(str(source.training.folder), 8, learned.training) and job.drawing is None
    assert replay.replayed == source and offline.replayed is None
    assert replay.training not in (source.training, offline.training)
    _, other = planned(method(4, reward=GOLD), method(None, replay="e0"))
    assert other.trained[1].training != replay.training


def test_a_replay_on_text_is_scored_by_the_reward_that_labelled_its_pairs(tmp_path: Path) -> None:
    by_words = {"kind": "function", "function": "prefarena.judges.sentiment:valence"}
    own = {"kind": "function", "function": "mine:score"}
    methods = [method(8), method(None, replay="e0"), method(8, reward=own), method(None, replay="e2")]
    config, plan = planned(*methods, method(None), **TEXT, judge=by_words)
    online, replay, of_own, replay_of_own, offline = plan.trained
    assert replay.reward_model is None and replay.learned_from == online.reward_model is not None
    jobs = {one.entry.name: sampled_job(config, plan, one, tmp_path) for one in plan.trained}
    assert jobs["e1"].proxy == jobs["e0"].proxy is not None and jobs["e3"].proxy == jobs["e2"].proxy is not None
    assert jobs["e0"].proxy.path == model_of(online.reward_model) and offline.learned_from is None
    assert (of_own.learned_from, replay_of_own.learned_from, jobs["e4"].proxy) == (None, None, None)


def test_a_replay_of_other_arithmetic_is_refused() -> None:
    half = {**method(None, replay="e0"), "training": {"precision": "bfloat16"}}
    with pytest.raises(UserError, match=r"'e0' has the reference's log-probs in float32; set training.precision to it"):
        config_of(method(8, reward=GOLD), half)


def test_pairs_are_labelled_as_the_task_s_own() -> None:
    language = {"task": {"kind": "language", "labels": "bradley_terry", "label_temperature": 0.5}}
    drawn = {"labels": "bradley_terry", "label_temperature": 2.0}
    text = {"task": {**TEXT["task"], "pairs": drawn}}
    for more, told in (
        (language, ("bradley_terry", 0.5)),
        (text, ("bradley_terry", 2.0)),
        (TEXT, ("deterministic", 1.0)),
    ):
        config, plan = planned(method(8), **more)
        job = entry_job(config, plan, plan.trained[0])
        assert isinstance(job, OffPolicyJob) and job.drawing is not None
        assert (job.drawing.labels, job.drawing.label_temperature) == told
        assert job.drawing.every == 8 and len(job.drawing.generators) == config.generation.num_actors


def test_an_entry_online_needs_generation_actors_beside_its_workers() -> None:
    offline, online = config_of(method(None)), config_of(method(8, reward=GOLD))
    assert (generates(offline), generates(online)) == (False, True)
    assert [len(together) for together in side_by_side(online)] == [1, 1, 2]
    assert [draws_responses(config.entries[0].method) for config in (offline, online)] == [False, True]
    assert reward_of(offline.entries[0].method) is None


def test_a_worker_is_counted_with_the_models_that_it_holds_beside() -> None:
    needs = []
    for one in (method(None), method(8, reward=GOLD), method(8)):
        config = config_of(one)
        [training] = [found for found in trainings(config) if found.where == "entries.e0.method.training"]
        need = training.need(new_settings(config.model, 16, 8), Lengths(4, 4), 512)  # type: ignore[arg-type]
        assert need is not None and training.on_policy == ("online" in one)
        needs.append(need.weights)
    assert needs[1:] == pytest.approx([2 * needs[0], 3 * needs[0]], rel=1e-3)


def test_the_report_tells_labels_and_ages_where_somebody_is_online() -> None:
    told = {"pairs_trained": 512.0, "data_labels": 512.0, "pair_age": 3.5}
    offline = EntryResult(name="dpo", kind="dpo", settings={"online": None}, seeds={"0": told, "1": told})
    own = {**told, "data_labels": 64.0, "own_labels": 448.0, "responses_judged": 1000.0, "pair_age": 0.5}
    online = EntryResult(name="dpo-4", kind="dpo", settings=method(4), seeds={"0": own, "1": own | {"pair_age": 0.7}})
    without = EntryResult(name="old", kind="dpo", seeds={"0": {"kl": 1.0}})
    results = Results(name="x", task={}, seeds=[0, 1], exact=True, entries=[offline, without])
    assert online_table(results) is None
    table = online_table(results.model_copy(update={"entries": [offline, online, without]}))
    assert table is not None and table.rows == (
        ("dpo", "offline", "512", "512", "–", "–", "3.5"),
        ("dpo-4", "4", "512", "64", "448", "1,000", "0.6 ± 0.1"),
    )
    assert (online.group, offline.group) == ("dpo online", "dpo")


def test_a_replay_fails_with_the_training_that_it_needs(tmp_path: Path) -> None:
    _, plan = planned(method(8, reward=GOLD), method(None, replay="e0"), output=str(tmp_path))
    source, replay = plan.trained
    assert source.training is not None and replay.failure is None
    write_failure(source.training.folder, "its engine was lost")
    assert replay.failure == "the training whose pairs it replays failed: its engine was lost"


def test_a_replay_fails_with_the_reward_model_that_would_have_labelled_its_pairs(tmp_path: Path) -> None:
    _, plan = planned(method(8), method(None, replay="e0"), output=str(tmp_path))
    source, replay = plan.trained
    assert source.reward_model is not None and replay.reward_model is None
    write_failure(source.reward_model.folder, "no step was finite")
    wanted = "the training whose pairs it replays failed: its reward model failed: no step was finite"
    assert replay.failure == wanted


def test_a_replay_whose_source_cannot_be_measured_is_measured_itself(tmp_path: Path) -> None:
    _, plan = planned(method(8, reward=GOLD), method(None, replay="e0"), output=str(tmp_path))
    source, replay = plan.trained
    write_failure(source.evaluation.folder, "the judge was silent")
    assert source.failure is not None and replay.failure is None


def test_trials_have_nothing_to_replay() -> None:
    with pytest.raises(UserError, match="entry 'e1': replay: trials run without the entry that it replays"):
        spaces_of(config_of(method(8, reward=GOLD), method(None, replay="e0"), seeds_vary="task"))
