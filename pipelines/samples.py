"""The policies' responses: kept with every evaluation from samples, and gathered next to the report."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from pipelines.plan import SeedPlan, Trained
from prefarena.data.tables import write_rows
from prefarena.evaluation.pairwise import pair_values
from prefarena.mirror import bring
from prefarena.records import ALL_SAMPLES, SAMPLES, Rollout
from prefarena.report.samples import SAMPLES_FILE
from prefarena.stage_files import GAMES
from prefarena.stages import Stage, whole_file


def write_samples(
    folder: Path, tokenizer: PreTrainedTokenizerBase, rollouts: list[Rollout], scores: np.ndarray | None
) -> None:
    """Keep the responses of an evaluation as text, and their scores if there are any: null where a judge was silent."""
    given = np.full(len(rollouts), np.nan) if scores is None else scores
    columns = {
        "place": range(len(rollouts)),
        "prompt": [tokenizer.decode(rollout.prompt_ids) for rollout in rollouts],
        "response": [tokenizer.decode(rollout.response_ids) for rollout in rollouts],
        "score": pa.array(given, pa.float64(), from_pandas=True),  # from_pandas: nan becomes null
        "num_tokens": [len(rollout.response_ids) for rollout in rollouts],
    }
    write_rows(pa.table(columns), folder / SAMPLES_FILE, SAMPLES)


def gather_samples(plans: list[SeedPlan], folder: Path) -> None:
    """Write the samples of all policies and seeds into the run folder, a policy at a time.

    Nothing is written where no evaluation has any: on the language, and where an earlier version evaluated.
    """
    target = folder / SAMPLES_FILE
    tables = _tables(plans)
    first = next(tables, None)
    if first is None:
        return
    with whole_file(target) as temporary, pq.ParquetWriter(temporary, ALL_SAMPLES, compression="zstd") as writer:
        for policy, seed, table in chain([first], tables):
            named = {"policy": pa.repeat(policy, len(table)), "seed": pa.repeat(seed, len(table))}
            columns = named | {name: table[name] for name in SAMPLES.names}
            writer.write_table(pa.table(columns).cast(ALL_SAMPLES))


def _tables(plans: list[SeedPlan]) -> Iterator[tuple[str, int, pa.Table]]:
    """(policy, seed, samples) of every evaluation that kept its samples; of a pairwise judge with its verdicts."""
    for plan in plans:
        evaluated: list[tuple[str, Stage, Trained | None]] = [("reference", plan.evaluation, None)]
        evaluated += [(one.entry.name, one.evaluation, one) for one in plan.trained if not one.failure]
        for policy, stage, trained in evaluated:
            path = stage.folder / SAMPLES_FILE
            if not stage.finished:
                continue
            bring(path)
            if path.is_file():
                table = pq.read_table(path)
                yield policy, plan.seed, table if trained is None else _with_verdicts(table, trained)


def _with_verdicts(table: pa.Table, trained: Trained) -> pa.Table:
    """The table, with each response's result against the reference's as its score if a pairwise judge compared them."""
    if trained.wins is None or not trained.wins.finished:
        return table
    path = trained.wins.folder / GAMES
    bring(path)
    with np.load(path) as games:
        values = pair_values(games["first"], games["second"])
    return table.set_column(table.schema.get_field_index("score"), "score", pa.array(values, from_pandas=True))
