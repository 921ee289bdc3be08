"""Train the entries of a comparison: `prefarena train`."""

from __future__ import annotations

from collections import Counter
from functools import partial

from rich.console import Console

from pipelines.claims import settle
from pipelines.engine import start_generator
from pipelines.jobs import entry_job, reward_model_job
from pipelines.plan import SeedPlan, Trained
from pipelines.runner import run, run_at_once, run_group
from prefarena.cluster.capacity import cluster_nodes, generating_at_once
from prefarena.config import Comparison, OffPolicyMethod, draws_responses
from prefarena.config.label_budgets import all_limits
from prefarena.errors import UserError
from prefarena.failures import cluster_answers
from prefarena.generation.interface import GeneratorLostError
from prefarena.stages import is_settled, write_failure
from prefarena.training.jobs import Job


def train(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Bring every entry's training to its end, finished or failed. The shared stages must be finished. Needs Ray."""
    check_numbers_of_pairs(plans)
    every = [(plan, trained) for plan in plans for trained in plan.trained]
    off_policy = [
        entry_job(config, plan, trained)
        for plan, trained in every
        if isinstance(trained.entry.method, OffPolicyMethod)
        and not draws_responses(trained.entry.method)
        and trained.replayed is None
    ]
    reward_models = [reward_model_job(plan, trained) for plan, trained in every if trained.reward_model is not None]
    run(config.resources, [*off_policy, *reward_models], config, console)
    with_generators = {
        trained.training.folder: (plan, trained)
        for plan, trained in every
        if draws_responses(trained.entry.method) and trained.training and not trained.failure
    }
    settle(console, with_generators, partial(_train_with_generators, config, console))
    replays = [(plan, trained) for plan, trained in every if trained.replayed is not None and not trained.failure]
    run(config.resources, [entry_job(config, plan, trained) for plan, trained in replays], config, console)


def check_numbers_of_pairs(plans: list[SeedPlan]) -> None:
    """Raise UserError where an entry is to learn from more pairs than there are."""
    for plan in plans:
        known = plan.pairs.manifest()["data"]["num_train_pairs"]
        for trained in plan.trained:
            most = max(all_limits(trained.entry.method), default=0)
            if most > known:
                raise UserError(
                    f"entry {trained.entry.name!r} asks for {most:,} pairs (num_pairs, label_budgets), but there are "
                    f"only {known:,} to train on; ask for fewer"
                )


def _train_with_generators(config: Comparison, console: Console, entries: list[tuple[SeedPlan, Trained]]) -> None:
    """Train entries whose policies respond, as many at a time as there is room for beside their generation actors."""
    number = min(generating_at_once(config, cluster_nodes()), len(entries))
    lanes = [
        [entry_job(config, plan, trained, place) for plan, trained in entries[place::number]] for place in range(number)
    ]
    beside_actors = partial(_train_beside_actors, config, entries[0][0], console, number)
    works = [partial(beside_actors, place, jobs) for place, jobs in enumerate(lanes)]
    run_at_once(console, [job for jobs in lanes for job in jobs], works)


def _train_beside_actors(
    config: Comparison, plan: SeedPlan, console: Console, number: int, place: int, jobs: list[Job]
) -> None:
    """Train one after another with one set of generation actors, or with new ones where those are lost.

    An engine that cannot be made fails all of them. The entry that loses its actors more than `resources.max_failures`
    times fails, and the next ones get new actors. number: of such sets that are at work at the same time; place:
    of this one among them.
    """
    losses: Counter[str] = Counter()
    while waiting := [job for job in jobs if not is_settled(job.stage_dir)]:
        try:
            generator = start_generator(config, plan, console, place=place)
        except GeneratorLostError as error:
            if not cluster_answers():
                raise
            for job in waiting:
                write_failure(job.stage_dir, f"its generation engine does not start: {error}", label=job.name)
            return
        try:
            run_group(config, config.resources, number, waiting)
        except GeneratorLostError as error:
            if not cluster_answers():
                raise
            job = next(job for job in waiting if not is_settled(job.stage_dir))
            losses[job.stage_dir] += 1
            console.print(f"{job.name} lost its generation actors: {error}", markup=False)
            if losses[job.stage_dir] > config.resources.max_failures:
                write_failure(job.stage_dir, str(error), label=job.name)
        finally:
            generator.stop()
