"""`prefarena tune`: the same budget of trials for every entry, and then the winners side by side on fresh seeds.

batch of trials ─▶ first seed of the selection ─▶ the better ones of each entry ─▶ its other seeds ─▶ next batch
                                                                          … ─▶ winners ─▶ prefarena compare
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from pipelines.checks import check_input
from pipelines.claims import only_once
from pipelines.compare import all_stages
from pipelines.evaluate import evaluate
from pipelines.plan import SeedPlan, make_plan
from pipelines.prepare import prepare
from pipelines.session import checked_session
from pipelines.tracking import tracking
from pipelines.train import train
from pipelines.trials import Found, Proposal, described, read, selection, spaces_of
from prefarena.config import Comparison, Entry, Method, dump_config
from prefarena.config.changed import with_settings
from prefarena.mirror import push, root_of, shown
from prefarena.report.tuning import shown_settings
from prefarena.report.tuning_results import FILE, TrialResult, TunedEntry, TuningResults, save_tuning
from prefarena.settings.search import Space, Value
from prefarena.stages import Stage, forget_failure, write_text
from prefarena.tuning.ranking import Measured, Outcome, best_of, going_on, mean_value
from prefarena.tuning.study import Sampling, Study, check_installed

TUNED = "tuned.yaml"


@dataclass
class Tuned:
    """An entry under search. outcomes: those of its trials so far, by number."""

    entry: Entry
    study: Study
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def device_seconds(self) -> float:
        """The device-seconds that its trials have taken."""
        return sum(outcome.device_seconds for outcome in self.outcomes)


def tune(config: Comparison, console: Console, *, retry_failed: bool = False) -> Path:
    """Run every trial that is not finished, and write tuning.json and tuned.yaml. Returns the folder of both.

    A run that was killed goes on where it was: it proposes the same trials, and finds their stages. Raises UserError
    before Ray is started for what cannot be used, and where another process is tuning this.
    """
    check_installed()
    spaces = spaces_of(config)
    whole = selection(config, config.entries, config.tuning.seeds)
    check_input(whole)
    plans = make_plan(whole)
    folder = tuning_folder(config, plans)
    with only_once(f"{config.name} (tuning)", folder):
        folder.mkdir(parents=True, exist_ok=True)
        sampling = Sampling(config.tuning.sampler, config.tuning.seed, config.tuning.batch_size)
        tuned = [
            Tuned(entry, Study(entry.name, spaces[entry.name], sampling))
            for entry in config.entries
            if entry.name in spaces
        ]
        _say_start(config, spaces, console)
        with checked_session(whole, plans):
            while batch := _ask(config, tuned):
                _run_batch(config, tuned, batch, folder, console, retry_failed)
                save_tuning(results_of(config, tuned), folder)
        results = save_winners(config, tuned, folder)
        _say_winners(results, folder, console)
        push(folder)
    return folder


def tuning_folder(config: Comparison, plans: list[SeedPlan]) -> Path:
    """Where tuning.json and tuned.yaml go: named by the configuration and the data, as a run folder is.

    plans: of the selection.
    """
    said = dump_config(config, without={"tracking"})
    key = Stage.at("", "tuning", config.name, [said, [plan.logps.key for plan in plans]]).key
    return root_of(config.output, config.resources.cache_dir) / f"{config.name}-tuning-{key[-12:-4]}"


# ------------------------------------------------------------------------------------------------------ a batch


def _ask(config: Comparison, tuned: Sequence[Tuned]) -> list[Proposal]:
    """The next trials of every entry that has budget left."""
    tuning, batch = config.tuning, list[Proposal]()
    for one in tuned:
        done = len(one.outcomes)
        if tuning.device_seconds is not None and one.device_seconds >= tuning.device_seconds:
            continue
        proposed = one.study.ask(min(tuning.batch_size, tuning.num_trials - done))
        batch += [Proposal(one.entry, done + i, settings) for i, settings in enumerate(proposed)]
    return batch


def _run_batch(
    config: Comparison,
    tuned: Sequence[Tuned],
    batch: Sequence[Proposal],
    folder: Path,
    console: Console,
    retry_failed: bool,
) -> None:
    """Train and measure a batch: all with the first seed, the better ones of each entry with the others; tell it."""
    first, *others = config.tuning.seeds
    limit, found = config.tuning.kl_limit, dict[str, dict[int, Found]]()
    _run(config, batch, [first], folder, found, console, retry_failed)
    kept: list[Proposal] = []
    for one in tuned:
        own = [proposal for proposal in batch if proposal.entry == one.entry]
        values = [_value(found[proposal.name], limit) for proposal in own]
        kept += [p for p, goes_on in zip(own, going_on(values, config.tuning.kept_share), strict=True) if goes_on]
    if others:
        _run(config, kept, others, folder, found, console, retry_failed)
    for one in tuned:
        own = [proposal for proposal in batch if proposal.entry == one.entry]
        if own:
            outcomes = [_outcome(p, found[p.name], p in kept or not others, limit) for p in own]
            one.study.tell(outcomes)
            one.outcomes += outcomes
            _say_best(config, one, console)


def _run(
    config: Comparison,
    batch: Sequence[Proposal],
    seeds: Sequence[int],
    folder: Path,
    found: dict[str, dict[int, Found]],
    console: Console,
    retry_failed: bool,
) -> None:
    """Train and measure the trials with these seeds, as a comparison, and add the results to `found` by name."""
    if not batch:
        return
    trials = selection(config, [proposal.as_entry() for proposal in batch], seeds)
    plans = make_plan(trials)
    if retry_failed:
        for stage in all_stages(plans):
            forget_failure(stage.folder)
    with tracking(trials, plans, folder.name, console) as trackers:
        for step in (prepare, train, evaluate):
            step(trials, plans, console)
        for note in trackers.catch_up():
            console.print(note, markup=False)
    for plan in plans:
        for proposal, trained in zip(batch, plan.trained, strict=True):
            found.setdefault(proposal.name, {})[plan.seed] = read(plan, trained)


def _value(found: dict[int, Found], kl_limit: float) -> float | None:
    """The value that trials are ranked by; None where one of the seeds failed."""
    measured = {seed: one.measured for seed, one in found.items() if one.measured is not None}
    return mean_value(measured, kl_limit) if len(measured) == len(found) else None


def _outcome(proposal: Proposal, found: dict[int, Found], went_on: bool, kl_limit: float) -> Outcome:
    value = _value(found, kl_limit)
    measured: dict[int, Measured] = {seed: one.measured for seed, one in found.items() if one.measured is not None}
    seconds = sum(one.device_seconds for one in found.values())
    if value is None:
        reason = next(one.reason for one in found.values() if one.measured is None)
        return Outcome(proposal.settings, "failed", measured, None, reason, seconds)
    return Outcome(proposal.settings, "complete" if went_on else "stopped", measured, value, None, seconds)


# ---------------------------------------------------------------------------------------------------- the winners


def results_of(config: Comparison, tuned: Sequence[Tuned]) -> TuningResults:
    """All trials so far, and each entry's best."""
    tuning = config.tuning
    return TuningResults(
        name=config.name,
        criterion=f"the reward gained over the reference, among trials with a KL of at most {tuning.kl_limit:g} nats",
        kl_limit=tuning.kl_limit,
        selection=described(config),
        selection_seeds=list(tuning.seeds),
        seed=tuning.seed,
        num_trials=tuning.num_trials,
        batch_size=tuning.batch_size,
        sampler=tuning.sampler,
        device_seconds=tuning.device_seconds,
        trials=[_trial(one.entry, number, outcome) for one in tuned for number, outcome in enumerate(one.outcomes)],
        entries=[_tuned_entry(one) for one in tuned],
    )


def _tuned_entry(one: Tuned) -> TunedEntry:
    """An entry's budget and winner; without settings where all trials failed."""
    best = best_of(one.outcomes)
    won: Mapping[str, Value] = {} if best is None else one.outcomes[best].settings
    return TunedEntry(
        name=one.entry.name,
        kind=one.entry.method.kind,
        group=one.entry.group,
        num_trials=len(one.outcomes),
        device_seconds=one.device_seconds,
        best=best,
        settings=dict(won),
        method={} if best is None else _winning(one.entry, won).model_dump(mode="json"),
    )


def _winning(entry: Entry, settings: Mapping[str, Value]) -> Method:
    """An entry's method with the settings that won."""
    return with_settings(entry.method, settings, f"entry {entry.name!r}")


def _trial(entry: Entry, number: int, outcome: Outcome) -> TrialResult:
    return TrialResult(
        entry=entry.name,
        number=number,
        settings=dict(outcome.settings),
        state=outcome.state,
        rewards={str(seed): one.gain for seed, one in outcome.measured.items()},
        kls={str(seed): one.kl for seed, one in outcome.measured.items()},
        value=outcome.value,
        reason=outcome.reason,
        device_seconds=outcome.device_seconds,
    )


def save_winners(config: Comparison, tuned: Sequence[Tuned], folder: Path) -> TuningResults:
    """Write tuning.json, and tuned.yaml: the comparison with the winners' settings. An entry whose trials all failed
    keeps the settings that it had.
    """
    results = results_of(config, tuned)
    save_tuning(results, folder)
    winners = with_winners(config, results).model_copy(update={"tuned": shown(folder / FILE)})
    write_text(folder / TUNED, dump_config(winners))
    return results


def with_winners(config: Comparison, results: TuningResults) -> Comparison:
    """The comparison with the settings that won."""
    won = {entry.name: entry.settings for entry in results.entries if entry.best is not None}
    entries = [
        entry.model_copy(update={"method": _winning(entry, won[entry.name])}) if entry.name in won else entry
        for entry in config.entries
    ]
    return config.model_copy(update={"entries": tuple(entries)})


# --------------------------------------------------------------------------------------------------------- saying


def _say_start(config: Comparison, spaces: dict[str, Space], console: Console) -> None:
    tuning = config.tuning
    console.print(
        f"tuning {len(spaces)} entries with {tuning.num_trials} trials each, {tuning.batch_size} at a time, "
        f"on {described(config)}; the best is the one with the highest reward at a KL of at most {tuning.kl_limit:g} "
        "nats",
        markup=False,
    )
    for name, space in spaces.items():
        console.print(f"  {name}: {', '.join(space)}", markup=False)
    for entry in config.entries:
        if entry.name not in spaces:
            console.print(f"  {entry.name}: nothing to search", markup=False)


def _say_best(config: Comparison, one: Tuned, console: Console) -> None:
    best, tried = best_of(one.outcomes), len(one.outcomes)
    start = f"[green]✓[/green] {escape(one.entry.name)}: {tried} of {config.tuning.num_trials} trials"
    if best is None:
        console.print(f"{start}, all of which failed: {escape(str(one.outcomes[-1].reason))}")
        return
    outcome = one.outcomes[best]
    console.print(f"{start}, best t{best}: {outcome.value:.3f} ({escape(shown_settings(outcome.settings, 4))})")


def _say_winners(results: TuningResults, folder: Path, console: Console) -> None:
    for entry in results.entries:
        states = [trial.state for trial in results.of(entry.name)]
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "stopped", "failed"))
        won = f"t{entry.best}: {shown_settings(entry.settings, 4)}" if entry.best is not None else "all trials failed"
        console.print(f"{entry.name} ({counts}; {entry.device_seconds:.0f} device-seconds): {won}", markup=False)
    console.print(f"all trials: {shown(folder / FILE)}; the winners: {shown(folder / TUNED)}", markup=False)
