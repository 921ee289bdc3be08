"""Train the entries of a comparison: `python -m pipelines.train CONFIG`, or `prefarena train`."""

from __future__ import annotations

import sys

from rich.console import Console

from pipelines.plan import SeedPlan, Trained, entry_job, generator_names, max_length, model_of, reward_model_job
from pipelines.prepare import run
from pipelines.progress import stage_line
from prefarena.cluster.capacity import telling_capacity
from prefarena.config import Comparison, OffPolicyMethod, OnPolicyMethod
from prefarena.generation.fleet import Generators


def train(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Run every entry's training that is not finished. The shared stages must be. Needs Ray."""
    every = [(plan, trained) for plan in plans for trained in plan.trained]
    off_policy = [
        entry_job(config, plan, trained) for plan, trained in every if isinstance(trained.entry.method, OffPolicyMethod)
    ]
    reward_models = [reward_model_job(plan, trained) for plan, trained in every if trained.reward_model is not None]
    run(config.resources, [*off_policy, *reward_models], config, console)
    on_policy = [(plan, trained) for plan, trained in every if isinstance(trained.entry.method, OnPolicyMethod)]
    if any(not (trained.training and trained.training.finished) for _, trained in on_policy):
        _train_on_policy(config, on_policy, console)


def _train_on_policy(config: Comparison, entries: list[tuple[SeedPlan, Trained]], console: Console) -> None:
    generator = start_generator(config, entries[0][0], console)
    try:
        jobs = [entry_job(config, plan, trained) for plan, trained in entries]
        run(config.resources.model_copy(update={"concurrent_runs": 1}), jobs, config, console)
    finally:
        generator.stop()


def start_generator(config: Comparison, plan: SeedPlan, console: Console) -> Generators:
    """The generation actors, with the shape of the reference policy; whoever uses them sends their weights first."""
    names = generator_names(config)
    title = f"starting {len(names)} vLLM generation actor{'s' if len(names) > 1 else ''}"
    with stage_line(console, title), telling_capacity():
        return Generators.start(
            model_of(plan.reference),
            config.generation,
            max_model_len=max_length(plan.task),
            use_gpu=config.resources.use_gpu,
            names=names,
            seed=config.seeds[0],
        )


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
