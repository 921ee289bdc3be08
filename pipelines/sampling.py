"""Samples of one policy after another, from generation actors that are replaced where they are lost."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import TracebackType

from rich.console import Console

from pipelines.engine import start_generator
from pipelines.kept_rollouts import KeptRollouts
from pipelines.plan import SeedPlan
from prefarena.config import Comparison
from prefarena.errors import ClusterLostError
from prefarena.failures import cluster_answers
from prefarena.generation.fleet import Generators
from prefarena.generation.interface import GeneratorLostError, Sampling, StaleWeightsError
from prefarena.mirror import root_of
from prefarena.modeling.flops import generated
from prefarena.modeling.load import load_settings
from prefarena.records import Rollout


def generation_counts(policy: str, rollouts: list[Rollout]) -> dict[str, float]:
    """Tokens and FLOPs of responses of the policy in a folder, as a stage's costs have them."""
    sizes = [(len(one.prompt_ids), len(one.response_ids)) for one in rollouts]
    flops = generated(load_settings(policy), sizes)
    return {"num_tokens_generated": sum(size for _, size in sizes), "num_flops": flops}


class Sampler:
    """The generation actors of an evaluation, or of drawn pairs; as a context it ends them."""

    def __init__(
        self,
        config: Comparison,
        plan: SeedPlan,
        console: Console,
        *,
        made_from: str | None = None,
        max_length: int | None = None,
    ) -> None:
        """made_from: the folder of a model of the policies' architecture; none: the base model's. max_length: most
        tokens of a prompt and its response; none: those of the task."""
        self._config, self._plan, self._console, self._made_from = config, plan, console, made_from
        self._max_length = max_length
        self._generators: Generators | None = None
        self._held = ""  # the version that the actors were given last
        self._kept = KeptRollouts(root_of(config.output, config.resources.cache_dir) / "rollouts")

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop()

    def sample(
        self, policy: str, version: str, prompts: list[list[int]], sampling: Sampling, kept_for: str | None = None
    ) -> list[Rollout]:
        """One rollout per prompt from the policy in the folder `policy`, whose weights are called `version`.

        They are kept in parts until `forget(kept_for)`, by default the version; no actor is started where all are
        there. Raises what `_draw` raises.
        """
        draw = partial(self._draw, policy, version)
        return self._kept.complete(policy, kept_for or version, prompts, sampling, draw)

    def folder_of(self, version: str) -> Path:
        """The folder in which the parts of an evaluation under way are kept."""
        return self._kept.folder_of(version)

    def forget(self, version: str) -> None:
        """Remove the samples that are kept of an evaluation that has ended."""
        self._kept.forget(version)

    def _draw(self, policy: str, version: str, prompts: list[list[int]], sampling: Sampling) -> list[Rollout]:
        """New rollouts. An actor that Ray restarts comes back without weights and is given them again; lost ones are
        replaced. Each is done at most `resources.max_failures` times. Raises GeneratorLostError beyond that, and
        WaitTimeoutError where an actor does not answer in time.
        """
        failure: Exception | None = None
        for _ in range(self._config.resources.max_failures + 1):
            try:
                if self._generators is None:
                    self._generators = start_generator(
                        self._config,
                        self._plan,
                        self._console,
                        made_from=self._made_from,
                        max_length=self._max_length,
                    )
                if self._held != version:
                    self._generators.load_checkpoint(policy, version)
                    self._held = version
                return self._generators.generate(prompts, sampling, version)
            except StaleWeightsError as error:  # an actor was restarted, and has no weights
                failure, self._held = error, ""
            except GeneratorLostError as error:
                if not cluster_answers():
                    raise ClusterLostError(
                        f"Ray no longer runs tasks here; run the same command again: {error}"
                    ) from error
                failure = error
                self._stop()
        raise GeneratorLostError(f"the samples of {version} could not be drawn: {failure}") from failure

    def _stop(self) -> None:
        generators, self._generators, self._held = self._generators, None, ""
        if generators is not None:
            generators.stop()
