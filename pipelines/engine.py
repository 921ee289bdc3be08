"""Generation engines of a comparison: started where they are needed, and tried before any training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from pipelines.jobs import generator_names
from pipelines.jobs import max_length as longest_sequence
from pipelines.plan import SeedPlan, model_of
from pipelines.progress import stage_line
from prefarena.cluster.capacity import telling_capacity
from prefarena.config import Comparison, PretrainedModel, TextTask
from prefarena.errors import ClusterLostError, EntryError, UserError
from prefarena.failures import cluster_answers
from prefarena.generation.fleet import Generators
from prefarena.stages import Stage


def start_generator(
    config: Comparison,
    plan: SeedPlan,
    console: Console,
    *,
    made_from: str | None = None,
    max_length: int | None = None,
    place: int = 0,
) -> Generators:
    """Start the generation actors; whoever uses them sends their weights first.

    made_from: the folder of the model that they are made from, by default the base model's. max_length: most tokens of
    a prompt and its response, by default the task's. place: of the set of actors, as in `generator_names`.
    """
    names = generator_names(config, place)
    title = f"starting {len(names)} vLLM generation actor{'s' if len(names) > 1 else ''}"
    waiting_for = "vLLM to be imported, to load the model and to set up its memory"
    with stage_line(console, title, waiting_for), telling_capacity():
        return Generators.start(
            made_from or model_of(plan.base),
            config.generation,
            max_model_len=max_length or longest_sequence(plan.task),
            use_gpu=config.resources.use_gpu,
            names=names,
            seed=config.seeds[0],
        )


def try_engine(config: Comparison, plans: list[SeedPlan], console: Console) -> None:
    """Try, before a text task trains, whether engines take weights and generate, and end them. Needs the base model.

    All entries of a text task, and the reference, are measured by what they generate. The enumerable language generates
    for on-policy entries alone, from a model that is made here, whose family is served; an engine that fails there
    fails those entries alone, when it is started for them.

    Raises UserError as `tried_generator` does.
    """
    if not isinstance(config.task, TextTask) or not _trainings(config, plans):
        return
    samples_come_first = not config.reference.train and any(p.samples and not p.samples.settled for p in plans)
    if samples_come_first:  # they are drawn before any training, from engines that are tried
        return
    with tried_generator(config, plans[0], console):
        pass


@contextmanager
def tried_generator(config: Comparison, plan: SeedPlan, console: Console) -> Iterator[Generators]:
    """Generation actors that have shown that they take other weights than they have; they end with the block.

    Raises UserError, for all entries, where vLLM cannot make an engine for the model, where an engine does not take
    new weights, hold them and generate with them, and where the actors are lost for good within the block;
    WaitTimeoutError where one does not answer in time.
    """
    generators: Generators | None = None
    try:
        generators = start_generator(config, plan, console)
        generators.try_weights(model_of(plan.base))
        if generators.verified is not None:
            console.print(f"engine: {escape(str(generators.verified))}")
        yield generators
    except EntryError as error:
        if not cluster_answers():
            raise ClusterLostError(f"Ray no longer runs tasks here; run the same command again: {error}") from error
        model = config.model.path if isinstance(config.model, PretrainedModel) else "the model"
        raise UserError(
            f"{model}: vLLM, which generates the responses, does not work with it: {error}; this comparison measures "
            f"every policy by its responses, so use another model, or change `generation`"
        ) from error
    finally:
        if generators is not None:
            generators.stop()


def _trainings(config: Comparison, plans: list[SeedPlan]) -> list[Stage]:
    """The entries that are still to be trained."""
    stages: list[Stage | None] = []
    for plan in plans:
        stages += [plan.reference if config.reference.train else None, plan.judge]
        for trained in plan.trained:
            stages += [] if trained.failure else [trained.reward_model, trained.training]
    return [stage for stage in stages if stage is not None and not stage.settled]
