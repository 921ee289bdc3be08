"""Forgetting: tasks of lm-eval on every policy and the reference, and the differences, paired by item.

An `abilities` stage of a policy holds `items.parquet`, every metric of every item, and `row.json`, their means. lm-eval
runs in this process, where it reads its tasks and counts; log-likelihoods come from Ray tasks, answers from the
generation actors. Both are kept in parts while a stage is under way, so a run that is killed does not repeat them.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from pipelines.addresses import engine_inputs, file_marks
from pipelines.claims import settle
from pipelines.exact import finish_evaluation
from pipelines.kept_rollouts import KeptValues, Wanted, training_of
from pipelines.plan import SeedPlan, Trained, model_of, policy_of
from pipelines.policy_scores import ScoredWith, Scorer
from pipelines.progress import fail, stage_line
from pipelines.reference import scoring_options
from pipelines.sampling import Sampler
from prefarena.cluster.waiting import Failed, outcomes_within
from prefarena.config import Comparison
from prefarena.data.tables import write_rows
from prefarena.errors import EntryError, UserError, WaitTimeoutError
from prefarena.evaluation.ability_tasks import Item, item_values, load_tasks
from prefarena.evaluation.continuations import continuation_logps
from prefarena.evaluation.divergence import Samples
from prefarena.generation.interface import Sampling
from prefarena.mirror import bring, root_of
from prefarena.modeling.arithmetic import named, products_of
from prefarena.modeling.inspection import inspect_policy
from prefarena.modeling.load import load_tokenizer
from prefarena.records import ABILITIES
from prefarena.report.results import Ability
from prefarena.stage_files import ITEMS
from prefarena.stages import Stage

Work = list[tuple[Stage, SeedPlan, Trained | None]]
#: Where answers to tasks begin in the numbering of requests: they are others than those of any evaluation.
_FIRST_INDEX = 1 << 41


def ability_work(config: Comparison, plans: list[SeedPlan]) -> Work:
    """A stage for every policy that exists or may yet exist, each seed's reference first; empty unless asked for.

    Best-of-n has no policy of its own.
    """
    settings = config.evaluation.abilities
    if settings is None:
        return []
    files = [] if settings.folder is None else file_marks(Path(settings.folder))
    how: list[Any] = [settings.model_dump(mode="json"), files, importlib.metadata.version("lm_eval")]
    how += [config.evaluation.batch_size, config.evaluation.seed, engine_inputs(config), *named(config.scored_in)]
    found: dict[Stage, tuple[Stage, SeedPlan, Trained | None]] = {}
    for plan in plans:
        made: list[tuple[Stage, str, Trained | None]] = [(plan.reference, "reference", None)]
        made += [(one.training, f"{one.entry.name}-s{one.seed}", one) for one in plan.trained if one.training]
        root = plan.reference.folder.parent
        for policy, label, trained in made:
            stage = Stage.at(root, "abilities", label, [policy.key, how])
            found.setdefault(stage, (stage, plan, trained))
    return list(found.values())


def needed_abilities(config: Comparison, plans: list[SeedPlan]) -> list[Stage]:
    """The stages that are still to be done, of entries that have not failed."""
    work = ability_work(config, plans)
    return [stage for stage, _, trained in work if not stage.settled and not (trained and trained.failure)]


def measure_abilities(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Finish or fail the stage of every policy that was evaluated. Needs Ray."""
    if config.evaluation.abilities is None:
        return
    work = [one for one in ability_work(config, plans) if not (one[2] and one[2].failure)]

    def do(waiting: Work) -> None:
        title = f"measuring abilities of {', '.join(stage.label for stage, _, _ in waiting)}"
        with (
            stage_line(console, title, "answers to lm-eval's tasks"),
            _Engine(config, waiting[0][1], console) as engine,
        ):
            for stage, plan, trained in waiting:
                try:
                    _measure(config, plan, trained, stage, engine)
                except (EntryError, WaitTimeoutError) as error:
                    if trained is None:
                        raise UserError(f"the abilities of the reference cannot be measured: {error}") from error
                    fail(stage, str(error), console)

    settle(console, {one[0].folder: one for one in work}, do)


def _measure(config: Comparison, plan: SeedPlan, trained: Trained | None, stage: Stage, engine: _Engine) -> None:
    from prefarena.evaluation.abilities import PolicyLM, run_tasks

    settings = config.evaluation.abilities
    if settings is None:
        raise TypeError("abilities are measured where they are asked for")
    started, folder = time.perf_counter(), stage.begin()
    policy = policy_of(plan, trained) if trained else model_of(plan.reference)
    bring(Path(policy))
    length = int(inspect_policy(policy).get_text_config().max_position_embeddings)
    kept = root_of(config.output, config.resources.cache_dir) / "rollouts" / stage.key
    tasks = load_tasks(settings)
    answering = partial(engine.answers, policy, stage.key)
    model = PolicyLM(load_tokenizer(policy), length, partial(_scores, config, policy, kept, stage.label), answering)
    items = list(item_values(tasks, run_tasks(model, tasks, settings)))
    if not items:
        raise UserError(
            f"evaluation.abilities.tasks: {', '.join(settings.tasks)} have no metric that gives a number for each item"
        )
    table = pa.Table.from_pylist([item._asdict() for item in items], schema=ABILITIES)
    write_rows(table, folder / ITEMS, ABILITIES)
    finish_evaluation(folder, _means(items), started)
    engine.forget(stage.key)


def _means(items: list[Item]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for item in items:
        values[f"{item.task}/{item.metric}"].append(item.value)
    return {name: float(np.mean(own)) for name, own in values.items()}


# ------------------------------------------------------------------------------------------ log-likelihoods


def _scores(
    config: Comparison, policy: str, kept: Path, label: str, prompts: list[list[int]], responses: list[list[int]]
) -> np.ndarray:
    """The scores from a Ray task. Raises EntryError where it fails."""
    import ray

    scored_with = ScoredWith(config.evaluation.batch_size, config.resources.device, config.scored_in)
    task = ray.remote(**scoring_options(config.resources))(score_continuations)
    running = [task.remote(policy, scored_with, kept, prompts, responses)]
    what = f"log-likelihoods of answers ({label})"
    (found,) = outcomes_within(running, config.resources.task_timeout_s, what)
    if isinstance(found, Failed):
        raise EntryError(found.reason)
    return np.asarray(found)


def score_continuations(
    policy: str, scored_with: ScoredWith, kept: Path | None, prompts: list[list[int]], responses: list[list[int]]
) -> np.ndarray:
    """Compute [N, 2] as `continuation_logps` does, in parts that are kept. Runs in a Ray task."""
    with Scorer(policy, scored_with) as scorer:

        def compute(prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
            samples = Samples(prompts, responses, scorer.pad_id, scored_with.batch_size)
            with products_of(scored_with.arithmetic):
                return continuation_logps(scorer.module(), samples)

        given_by = ["continuations", training_of(policy), *scored_with.given_by()]
        return KeptValues(kept).complete(Wanted(given_by, prompts, responses, compute))


# ---------------------------------------------------------------------------------------------------- answers


@dataclass
class _Engine:
    """Generation actors that read as much as tasks ask; they are started where one asks for answers."""

    config: Comparison
    plan: SeedPlan
    console: Console
    _samplers: dict[int, Sampler] = field(default_factory=dict)

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *error: Any) -> None:
        for sampler in self._samplers.values():
            sampler.__exit__(*error)

    def answers(
        self, policy: str, version: str, prompts: list[list[int]], max_tokens: int, temperature: float
    ) -> list[list[int]]:
        """One answer to each prompt, up to the token that ends it. Raises what `Sampler.sample` raises."""
        longest = max(len(prompt) for prompt in prompts) + max_tokens
        sampling = Sampling(max_tokens, temperature, self.config.evaluation.seed, _FIRST_INDEX)
        rollouts = self._sampler(longest).sample(policy, version, prompts, sampling)
        return [rollout.response_ids for rollout in rollouts]

    def forget(self, version: str) -> None:
        """Remove what was kept of a policy's stage that has ended."""
        self._sampler(0).forget(version)

    def _sampler(self, longest: int) -> Sampler:
        """A sampler whose actors read that many tokens; actors that read fewer end first, to free memory."""
        found = next((one for length, one in self._samplers.items() if length >= longest), None)
        if found is None:
            self.__exit__(None, None, None)
            found = Sampler(self.config, self.plan, self.console, max_length=longest)
            self._samplers = {longest: found}
        return found


# ------------------------------------------------------------------------------------------------ differences


def abilities(config: Comparison, plans: list[SeedPlan]) -> list[Ability]:
    """The abilities of every measured policy, by task and metric: its mean, the reference's, and their difference."""
    stages = {(plan.seed, trained): stage for stage, plan, trained in ability_work(config, plans)}
    reference = next((stage for (_, trained), stage in stages.items() if trained is None), None)
    if reference is None or not reference.finished:
        return []
    found: list[Ability] = []
    base = _by_metric(reference)
    for (seed, trained), stage in stages.items():
        if trained is not None and stage.finished and not trained.failure:
            found += _differences(trained.entry.name, seed, _by_metric(stage), base)
    return found


def _by_metric(stage: Stage) -> dict[tuple[str, str, bool], dict[int, float]]:
    found: dict[tuple[str, str, bool], dict[int, float]] = defaultdict(dict)
    bring(stage.folder / ITEMS)
    for row in pq.read_table(stage.folder / ITEMS).to_pylist():
        found[row["task"], row["metric"], row["higher_is_better"]][row["item"]] = row["value"]
    return found


def _differences(
    entry: str,
    seed: int,
    own: dict[tuple[str, str, bool], dict[int, float]],
    base: dict[tuple[str, str, bool], dict[int, float]],
) -> Iterator[Ability]:
    """Differences on the items that both have, which are all except those whose metric is not a number."""
    for (task, metric, higher), values in own.items():
        other = base.get((task, metric, higher), {})
        items = sorted(item for item in values if item in other)
        if not items:
            continue
        pairs = np.array([[values[item], other[item]] for item in items])
        gaps = pairs[:, 0] - pairs[:, 1]
        error = float(gaps.std(ddof=1) / np.sqrt(len(gaps))) if len(gaps) > 1 else None
        yield Ability(
            entry=entry, seed=seed, task=task, metric=metric, value=float(pairs[:, 0].mean()),
            reference=float(pairs[:, 1].mean()), difference=float(gaps.mean()), stderr=error, num_items=len(items),
            higher_is_better=higher,
        )  # fmt: skip
