"""A comparison: entries x seeds on one task, and the resources to run them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Field, ValidationInfo, field_validator, model_validator

from prefarena import methods
from prefarena.config.abilities import Abilities
from prefarena.config.best_of_n import BestOfN
from prefarena.config.devices import Arithmetic, Generation, Resources, check_devices, usual_dtype
from prefarena.config.label_budgets import all_limits, at_budgets
from prefarena.config.models import Model, ScratchModel
from prefarena.config.tasks import LanguageTask, Task, TextTask
from prefarena.config.tracking import Tracking
from prefarena.config.tuning import Tuning
from prefarena.methods import on_policy
from prefarena.settings.judges import (
    ClassifierJudge,
    EvaluationJudge,
    FunctionJudge,
    JudgeSettings,
    PairwiseJudge,
    RewardModel,
    is_same_function,
)
from prefarena.settings.off_policy import OffPolicy, Pairwise
from prefarena.settings.on_policy import OnPolicy
from prefarena.settings.optimisation import Optimisation
from prefarena.settings.section import Section, is_none
from prefarena.settings.unpaired import Unpaired

#: Every method, as their files are found.
METHODS: tuple[type[Section], ...] = (*methods.discover().values(), *on_policy.discover().values(), BestOfN)
OffPolicyMethod = OffPolicy
OnPolicyMethod = OnPolicy
if TYPE_CHECKING:  # a union that is made of what is found means nothing to a type checker
    Method = OffPolicy | OnPolicy | BestOfN
else:
    Method = Annotated[Union[METHODS], Field(discriminator="kind")]  # noqa: UP007


def reward_of(method: Section) -> tuple[str, JudgeSettings] | None:
    """What scores responses for a method, and the key of that setting; None where labels of the data are all it has."""
    if isinstance(method, OnPolicy | BestOfN):
        return "reward", method.reward
    if isinstance(method, Pairwise) and method.online is not None:
        return "online.reward", method.online.reward
    return None


def draws_responses(method: Section) -> bool:
    """Whether its training has the policy respond, for which it needs generation actors."""
    return isinstance(method, OnPolicy) or (isinstance(method, Pairwise) and method.online is not None)


class Reference(Section):
    """How the reference policy is made from the base model: SFT on the demonstrations."""

    train: bool = Field(True, description="If false, the base model itself is the reference.")
    loss_on: Literal["response", "all"] = Field(
        "response", description="Which tokens are learned: the response's, or with `all` the prompt's as well."
    )
    seed: int = 0
    training: Optimisation = Optimisation(learning_rate=3e-3, num_steps=400, batch_size=256)

    @model_validator(mode="after")
    def _is_evaluated_once(self) -> Reference:
        self.training.check_no_snapshots("the reference")
        return self


class Entry(Section):
    """A method with settings, in a comparison."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.=-]*$", description="Unique; used in tables and folder names.")
    group: str | None = Field(
        None, description="Name of the grid that it belongs to in a sweep; by default the method's name."
    )
    method: Method


class Evaluation(Section):
    """How every entry is evaluated. Enumerable tasks are evaluated exactly; these settings are for the others."""

    num_prompts: int = Field(128, ge=1, description="Held-out prompts to sample on.")
    samples_per_prompt: int = Field(2, ge=1)
    temperature: float = Field(1.0, gt=0)
    batch_size: int = Field(
        64,
        ge=1,
        description="Maximum number of sequences in a forward pass, which also holds at most 8,192 tokens (4,096 on "
        "a CPU), unless it is a single sequence.",
    )
    num_reference_samples: int = Field(
        512,
        ge=2,
        description="Number of samples from the reference on training prompts, by which learned rewards are "
        "normalised.",
    )
    frontier_samples: int = Field(
        0,
        ge=0,
        description="Text tasks: number of samples from the reference on each held-out prompt, from which the best "
        "score at any KL is estimated, and with it each entry's regret. 0 turns this off; otherwise at least 8. n "
        "samples reach KLs of up to about log n - 2 nats.",
    )
    num_coverage_prompts: int | None = Field(
        None,
        ge=0,
        description="Text tasks with task.covered_share below 1: number of training prompts with pairs, and as many "
        "without, on which policies are sampled and measured in addition to the held-out ones; by default "
        "num_prompts.",
    )
    abilities: Abilities | None = Field(
        None,
        exclude_if=is_none,
        description="Text tasks: what else policies are measured on, by lm-eval, against the reference; none: nothing.",
    )
    win_matrix: bool = Field(True, description="Compute win rates between all entries, not only against the reference.")
    seed: int = 0

    @model_validator(mode="after")
    def _few_samples_show_no_frontier(self) -> Evaluation:
        if 0 < self.frontier_samples < 8:
            raise ValueError("frontier_samples: fewer than 8 samples per prompt show no frontier; give 0 or at least 8")
        return self


def _with_value(section: Section, value: object, where: str = "") -> Iterator[str]:
    """The settings within a section that have this value, by their full names; entries by their own."""
    for name, own in section:
        found = {name: own} if not isinstance(own, tuple) else {f"{name}[{at}]": one for at, one in enumerate(own)}
        for key, one in found.items():
            label = f"{name}.{one.name}" if isinstance(one, Entry) else key
            if isinstance(one, Section):
                yield from _with_value(one, value, f"{where}{label}.")
            elif one == value:
                yield f"{where}{label}"


class Comparison(Section):
    """Entries x seeds on one task: what `prefarena compare` runs."""

    name: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    output: str = Field(
        "runs",
        description="Folder for stages and run folders: a path that all nodes share, or the URL of an object store.",
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    seeds_vary: Literal["training", "task"] = Field(
        "training",
        description="`training`: all seeds share task, reference and pairs. `task`: on the enumerable language "
        "every seed is another language with its own reference and pairs, so that standard errors cover more than "
        "one language.",
    )
    task: Task = LanguageTask()
    model: Model = ScratchModel()
    reference: Reference = Reference()
    label_budgets: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        exclude_if=lambda budgets: budgets == (),
        description="Numbers of labelled pairs: every entry that learns from labels becomes one for each, NAME-NUMBER, "
        "in a group of its name, and the report has the curves of reward over them; none: all pairs.",
    )
    entries: tuple[Entry, ...] = Field(min_length=1)  # behind label_budgets, which it is validated with
    judge: EvaluationJudge = Field(
        RewardModel(),
        description="Text tasks: the judge of the evaluation; a learned one is trained on pairs of its own.",
    )
    generation: Generation = Generation()
    resources: Resources = Resources()
    evaluation: Evaluation = Evaluation()
    tracking: tuple[Tracking, ...] = Field(
        (),
        description="Trackers that show the trainings in addition to their own logs: tensorboard, wandb, mlflow, "
        "trackio.",
    )
    tuned: str | None = Field(
        None,
        description="The tuning.json (a path or a URL) by which `prefarena tune` chose the entries' settings, of which "
        "the report then tells; none: it does not say how they were chosen.",
    )
    tuning: Tuning = Field(Tuning(), description="How `prefarena tune` searches the entries' settings.")

    @property
    def scored_in(self) -> Arithmetic:
        """`resources.scoring.dtype`, decided. The enumerable language is measured exactly, on CPUs, in float32."""
        if self.task.kind == "language":
            return "float32"
        chosen = self.resources.scoring.dtype
        return usual_dtype(self.resources.use_gpu) if chosen == "auto" else chosen

    @property
    def trained_judge(self) -> RewardModel | None:
        """The judge of a text task, if it is one that is trained, on pairs that are set aside for it."""
        return self.judge if self.task.kind == "text" and isinstance(self.judge, RewardModel) else None

    def proxy_of(self, method: Section) -> JudgeSettings | None:
        """The reward that a policy of a text task learned from, where evaluations score the policy by that as well.

        A replay learned from the reward that labelled the pairs of the online entry. None where the comparison's judge
        is that very reward, or gives no scores. An endpoint, which is paid for, is not asked again, and best-of-n picks
        by its reward without learning.
        """
        if isinstance(method, Pairwise) and method.replay is not None:
            return self.proxy_of(next(entry.method for entry in self.entries if entry.name == method.replay))
        keyed, judge = reward_of(method), self.judge
        if keyed is None or isinstance(method, BestOfN) or isinstance(judge, PairwiseJudge):
            return None
        reward = keyed[1]
        if self.task.kind != "text" or not isinstance(reward, RewardModel | FunctionJudge | ClassifierJudge):
            return None
        if isinstance(reward, RewardModel):  # a learned judge is another model, of pairs of its own
            return reward
        return None if is_same_function(reward, judge) or reward == judge else reward

    @field_validator("label_budgets")
    @classmethod
    def _budgets_are_once(cls, budgets: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(budgets)) != len(budgets):
            raise ValueError("a number of pairs is listed twice")
        return budgets

    @field_validator("entries")
    @classmethod
    def _at_every_budget(cls, entries: tuple[Entry, ...], info: ValidationInfo) -> tuple[Entry, ...]:
        return at_budgets(entries, info.data.get("label_budgets", ()))

    @model_validator(mode="after")
    def _check(self) -> Comparison:
        names = [entry.name for entry in self.entries]
        for name in names:
            if names.count(name) > 1 or name == "reference":
                raise ValueError(f"entry name {name!r} is used twice or reserved")
        if len(set(self.tracking)) != len(self.tracking):
            raise ValueError("tracking holds the same tracker twice")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds holds a seed twice")
        for entry in self.entries:
            reward = reward_of(entry.method)
            if reward is not None and reward[1].kind == "gold" and self.task.kind != "language":
                raise ValueError(f"entry {entry.name!r}: {reward[0]} kind gold exists only on the enumerable language")
        if self.judge.kind == "gold" and self.task.kind != "language":
            raise ValueError("judge kind gold exists only on the enumerable language")
        if self.task.kind == "language" and self.resources.scoring.dtype not in ("auto", "float32"):
            raise ValueError(
                f"resources.scoring.dtype: {self.resources.scoring.dtype} is for text tasks; the enumerable language "
                "is measured exactly, in float32"
            )
        if self.evaluation.frontier_samples and self.judge.kind == "pairwise" and self.task.kind != "language":
            raise ValueError(
                "evaluation.frontier_samples: a frontier is estimated from scores, but judge kind pairwise gives "
                "none; set it to 0"
            )
        if self.evaluation.abilities is not None and self.task.kind == "language":
            raise ValueError("evaluation.abilities is for text tasks: the enumerable language has only letters")
        self._check_drawn_pairs()
        self._check_replays()
        self._check_demonstrations()
        self._check_numbers_of_pairs()
        check_devices(self.resources, self.generation)
        for entry in self.entries if self.generation.sleep_mode != "none" else ():
            if isinstance(entry.method, OnPolicy) and entry.method.training.mode == "asynchronous":
                raise ValueError(
                    f"generation.sleep_mode: {self.generation.sleep_mode} has engines sleep while workers learn, and "
                    f"entry {entry.name!r} generates meanwhile (mode: asynchronous); use mode: synchronous"
                )
        if not self.resources.use_gpu:
            for where in _with_value(self, "tf32"):
                raise ValueError(f"{where}: tf32 is a precision of GPUs; it needs resources.use_gpu: true")
        if self.seeds_vary == "task" and self.task.kind != "language":
            raise ValueError("seeds_vary: task is for the enumerable language; a text task has one set of data")
        return self

    def _check_replays(self) -> None:
        methods = {entry.name: entry.method for entry in self.entries}
        for name, method in methods.items():
            if not isinstance(method, Pairwise) or method.replay is None:
                continue
            source = methods.get(method.replay)
            if not isinstance(source, Pairwise) or source.online is None:
                raise ValueError(f"entry {name!r}: replay: {method.replay!r} is not an online entry of this comparison")
            if source.training.precision != method.training.precision:
                raise ValueError(
                    f"entry {name!r}: replay: {method.replay!r} has the reference's log-probs in "
                    f"{source.training.precision}; set training.precision to it"
                )

    def _check_demonstrations(self) -> None:
        given = isinstance(self.task, TextTask) and self.task.demonstration_data is not None
        for entry in self.entries:
            is_own = isinstance(entry.method, OffPolicy | OnPolicy) and entry.method.demonstration_source == "file"
            if is_own and not given:
                raise ValueError(
                    f"entry {entry.name!r}: demonstration_source: file needs task.demonstration_data (text tasks)"
                )

    def _check_numbers_of_pairs(self) -> None:
        """How many pairs a text task has is known when they are prepared; `pipelines/train.py` looks then."""
        if self.trained_judge is not None and self.trained_judge.num_pairs is not None:
            raise ValueError(
                "judge.num_pairs: the judge is trained on all pairs that are set aside for it; leave it out"
            )
        for entry in self.entries:
            for number in all_limits(entry.method):
                if isinstance(self.task, LanguageTask) and number > self.task.num_pairs:
                    raise ValueError(
                        f"entry {entry.name!r} asks for {number:,} pairs (num_pairs, label_budgets), and "
                        f"task.num_pairs is {self.task.num_pairs:,}; raise that, or ask for fewer"
                    )
                if isinstance(self.task, TextTask) and self.task.unpaired_data and isinstance(entry.method, Unpaired):
                    raise ValueError(
                        f"entry {entry.name!r}: num_pairs counts pairs, and with task.unpaired_data it learns from "
                        "single responses; leave one of them out"
                    )

    def _check_drawn_pairs(self) -> None:
        pairs = self.task.pairs if isinstance(self.task, TextTask) else None
        if pairs is None or not any(isinstance(judge, PairwiseJudge) for judge in pairs.judges(self.judge)):
            return
        for entry in self.entries:
            if isinstance(entry.method, Pairwise) and entry.method.needs_scores:
                raise ValueError(
                    f"entry {entry.name!r}: {entry.method.kind} learns from scores of both responses, but a pairwise "
                    f"judge gives none; use another annotator"
                )
        wrong = [("choose", "best_worst"), ("labels", "bradley_terry")]
        given = next((f"{name}: {value}" for name, value in wrong if getattr(pairs, name) == value), None)
        if given is None and any(a.noise > 0 and a.judge is None for a in pairs.annotators):
            given = "noise"
        if given is not None:
            raise ValueError(f"task.pairs.{given} needs scores, but a pairwise judge gives none; use another annotator")
