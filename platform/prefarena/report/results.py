"""The results of a comparison: the typed form of `results.json`, and its reduction over seeds.

KL, entropies and log-probs are in nats per sequence, lengths in tokens, times in seconds, memory in MiB.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, ValidationError

from prefarena.errors import UserError
from prefarena.report.part import Part
from prefarena.report.tuning_results import TuningResults
from prefarena.stages import write_json


def _without_nan(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if not math.isnan(value)}


def _nan_to_none(rows: list[list[float | None]]) -> list[list[float | None]]:
    return [[None if value is None or math.isnan(value) else value for value in row] for row in rows]


#: One evaluation of one trained policy. An absent key is not applicable; a nan (an undefined error) is dropped.
EvalRow = Annotated[dict[str, float], AfterValidator(_without_nan)]
Matrix = Annotated[list[list[float | None]], AfterValidator(_nan_to_none)]


class EntryResult(Part):
    """One entry of the comparison: `seeds` maps the seed, as text, to what its policy measured.

    failures: the seeds whose training failed, and why; they are in `failures` or in `seeds`, never in both.
    """

    name: str
    kind: str
    settings: dict[str, Any] = Field({})
    seeds: dict[str, EvalRow] = Field({})
    failures: dict[str, str] = Field({})

    @property
    def shown_name(self) -> str:
        """The name, and whether the entry failed: with every seed, or with how many."""
        if not self.failures:
            return self.name
        if not self.seeds:
            return f"{self.name} (failed)"
        return f"{self.name} ({len(self.failures)} of {len(self.failures) + len(self.seeds)} seeds failed)"

    @property
    def is_trained(self) -> bool:
        """Whether this is a method's policy, neither the reference nor the optimum."""
        return self.kind not in ("reference", "optimum")

    @property
    def group(self) -> str:
        """The sweep group: `settings["group"]`, else the kind.

        DPO and IPO with a demonstration term are apart, and so are methods that learn from the gold reward, or online.
        """
        named = self.settings.get("group")
        if named:
            return str(named)
        if self.settings.get("reward", {}).get("kind") == "gold":
            return f"{self.kind}+gold"
        has_term = float(self.settings.get("demonstration_weight") or 0) > 0
        kind = f"{self.kind}+eta" if has_term and self.kind != "mpo" else self.kind
        if self.settings.get("replay"):
            return f"{kind} replay"
        return f"{kind} online" if self.settings.get("online") else kind


class WinMatrix(Part):
    """Share of comparisons that the row's policy wins against the column's, ties half; means over seeds."""

    rows: list[str]
    win_rate: Matrix
    stderr: Matrix


class Ability(Part):
    """One metric of one task of lm-eval, of one policy beside the reference on the same items.

    stderr: of the difference, paired by item; none with a single item.
    """

    entry: str
    seed: int
    task: str
    metric: str
    value: float
    reference: float
    difference: float
    stderr: float | None = None
    num_items: int
    higher_is_better: bool = True


class Cost(Part):
    """The cost of one stage. `entry` None: shared by all entries; `seed` None: shared by all seeds."""

    stage: str
    entry: str | None = None
    seed: int | None = None
    wall_seconds: float = 0.0
    device_seconds: float = 0.0
    peak_memory_mib: float | None = None
    predicted_memory_mib: float | None = None
    micro_batch_tokens: int | None = None
    micro_batch_size: int | None = None
    num_tokens_trained: int = 0
    num_tokens_generated: int = 0
    num_flops: float = 0.0
    num_rewards: int = 0
    num_judge_calls: int = 0
    num_judge_calls_reused: int = 0
    num_judge_calls_torn: int = 0
    num_judge_calls_unstructured: int = 0
    reused: bool = False

    @property
    def is_evaluation(self) -> bool:
        """Measuring a policy is not a part of what its method costs."""
        return self.stage.startswith("eval")


class Results(Part):
    """Everything that the report is made from."""

    name: str
    task: dict[str, Any]
    config: dict[str, Any] = Field({})
    versions: dict[str, str] = Field({})
    seeds: list[int]
    notes: list[str] = Field([])
    exact: bool
    data: dict[str, Any] = Field({})
    entries: list[EntryResult]
    frontier: dict[str, dict[str, list[tuple[float, float]]]] | None = Field(
        None, description="seed -> group of prompts -> [KL, best reward] points."
    )
    estimated_frontier: dict[str, list[tuple[float, float, float]]] = Field(
        {}, description="text: seed -> [KL, best reward, its standard error] points, as far as they can be trusted."
    )
    win_matrix: WinMatrix | None = None
    curves: dict[str, dict[str, str]] = Field({}, description="entry -> seed -> path of its metrics.jsonl.")
    trajectories: dict[str, dict[str, list[EvalRow]]] = Field(
        {}, description="entry -> seed -> measures before, during and after training; `step` counts updates."
    )
    best_of_curves: dict[str, dict[str, list[EvalRow]]] = Field(
        {},
        description="entry -> seed -> measures of best-of-n for growing n; `step` is n. Of text `kl` is a bound.",
    )
    kl_agreement: dict[str, dict[str, list[EvalRow]]] = Field(
        {}, description="entry -> seed -> logged KL estimates, with the exact KL of the policy that was sampled."
    )
    costs: list[Cost] = Field([])
    abilities: list[Ability] = Field([], description="what else policies can do, with `evaluation.abilities`.")
    tuning: TuningResults | None = Field(None, description="how the entries' settings were found; none: by hand.")

    def own_costs(self, entry: EntryResult) -> list[Cost]:
        """The costs of the entry's own stages, without those that measure the policy."""
        return [cost for cost in self.costs if cost.entry == entry.name and not cost.is_evaluation]

    def entry(self, name: str) -> EntryResult:
        """The entry of this name. Raises KeyError."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(f"no entry {name!r} among {', '.join(entry.name for entry in self.entries)}")

    def trained(self) -> list[EntryResult]:
        """The methods' entries."""
        return [entry for entry in self.entries if entry.is_trained]

    def reference(self) -> EntryResult | None:
        return next((entry for entry in self.entries if entry.kind == "reference"), None)

    def groups(self) -> dict[str, list[EntryResult]]:
        """The methods' entries by sweep group, in order of first appearance."""
        found: dict[str, list[EntryResult]] = {}
        for entry in self.trained():
            found.setdefault(entry.group, []).append(entry)
        return found

    @property
    def is_sweep(self) -> bool:
        """Whether at least two groups hold a grid of settings."""
        return sum(len(entries) > 1 for entries in self.groups().values()) > 1


class Aggregate(NamedTuple):
    """A mean over seeds. `stderr` None: no error can be given (one exact value, or one value without an error)."""

    mean: float
    stderr: float | None
    num_seeds: int
    over_seeds: bool  # the error is over seeds; False: within the one run, over prompts or pairs


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error s / sqrt(N) with s over N - 1; the error of one value is None."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def aggregate(entry: EntryResult, key: str) -> Aggregate | None:
    """`key` over the entry's seeds: mean ± standard error; None where no seed has it.

    Where all seeds have one value (one seed, or the reference, which seeds share), the error is the run's own
    `<key>_stderr` if there is one. An own error of 0 means that the value is exact, and counts as none.
    """
    rows = [row for row in entry.seeds.values() if key in row]
    if not rows:
        return None
    values = [row[key] for row in rows]
    if len(set(values)) > 1:
        mean, stderr = mean_and_error(values)
        return Aggregate(mean, stderr, len(values), True)
    return Aggregate(values[0], rows[0].get(f"{key}_stderr") or None, len(values), False)


def paired_difference(first: EntryResult, second: EntryResult, key: str) -> Aggregate | None:
    """first - second, paired by seed. With one common seed the runs' own errors are added in squares, if both exist.

    That sum overstates the error of two policies judged on the same prompts: it is on the safe side.
    """
    seeds = [seed for seed, row in first.seeds.items() if key in row and key in second.seeds.get(seed, {})]
    if not seeds:
        return None
    mean, stderr = mean_and_error([first.seeds[seed][key] - second.seeds[seed][key] for seed in seeds])
    if stderr is not None:
        return Aggregate(mean, stderr, len(seeds), True)
    own = [entry.seeds[seeds[0]].get(f"{key}_stderr") or None for entry in (first, second)]
    within = math.sqrt(sum(error**2 for error in own if error)) if None not in own else None
    return Aggregate(mean, within, 1, False)


def kl_key(results: Results) -> str:
    """The key from which policies' KL is read: on text the estimate of least variance that all of them have."""
    rows = [row for entry in results.entries for row in entry.seeds.values() if "kl" in row]
    return "kl_vocabulary" if rows and all("kl_vocabulary" in row for row in rows) else "kl"


def gained(results: Results) -> tuple[str, str]:
    """The measure of what policies are trained to gain: its name and key."""
    if results.exact:
        return "reward", "reward/covered"
    if any(aggregate(entry, "judge_score") for entry in results.trained()):
        return "judge score", "judge_score"
    return "win rate", "win_rate"


def with_gains(results: Results) -> Results:
    """A copy whose rows hold `gain/<group>`: reward above the reference's of the same seed (or of the one it has)."""
    found = results.model_copy(deep=True)
    reference = found.reference()
    if reference is None or not reference.seeds:
        return found
    rewards = {seed: {key: row[key] for key in _reward_keys(row)} for seed, row in reference.seeds.items()}
    default = next(iter(rewards.values()))
    for entry in found.entries:
        for seed, row in entry.seeds.items():
            base = rewards.get(seed, default)
            for key in _reward_keys(row):
                if key in base:
                    row[key.replace("reward/", "gain/", 1)] = row[key] - base[key]
    return found


def _reward_keys(row: dict[str, float]) -> list[str]:
    return [key for key in row if key.startswith("reward/")]


def load_results(path: str | Path) -> Results:
    """Read `results.json` (or the folder that holds it). Raises UserError naming the file and what is wrong."""
    source = Path(path)
    if source.is_dir():
        source = source / "results.json"
    try:
        return Results.model_validate(json.loads(source.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{source}: no such results file; `prefarena compare` writes it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: not valid JSON, line {error.lineno}: {error.msg}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{source}: not a results file: {key}: {problem['msg']}") from None


def save_results(results: Results, path: str | Path) -> Path:
    """Write `results.json` at `path` (a file, or the folder to hold it), all or nothing."""
    target = Path(path)
    if target.suffix != ".json":
        target = target / "results.json"
    write_json(target, results.model_dump(mode="json"))
    return target
