"""A preference term whose pairs are, from some step on, those of the policy in training.

Steps are cut into blocks of `every`. The first block is trained on the pairs of the data; at the first step of every
other one its pairs are drawn (drawing.py) to the prompts that the data's batch plan has for it, and kept in the stage,
`drawn/STEP.parquet`, before anything is learned from them. So a run that is killed goes on with the very pairs, and
buys no label twice. With `every` as large as the number of steps nothing is drawn, and training is the same as without
drawing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from prefarena.data.plan import BatchPlan
from prefarena.data.tables import read_rows, write_rows
from prefarena.mirror import bring
from prefarena.objectives.output import Mean, ObjectiveOutput, mean_of
from prefarena.records import ONLINE_PAIRS, REFERENCED_PAIRS, conformed
from prefarena.settings.judges import is_model
from prefarena.settings.off_policy import Pairwise
from prefarena.stage_files import DRAWN_PAIRS
from prefarena.stages import whole_file
from prefarena.training.drawing import PairDrawer
from prefarena.training.jobs import OffPolicyJob
from prefarena.training.learner import Learner
from prefarena.training.storage import full_disk_named, retried
from prefarena.training.terms import Pairs, PreferenceTerm, Shares
from prefarena.training.worker import Worker

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class BlockPlan(BatchPlan):
    """The plan of a block's own table, whose rows stand in the order of their steps."""

    first_step: int = 0

    def rows(self, step: int) -> Rows:
        """Row numbers [batch_size] of an optimizer step within the block, sorted by length."""
        start = (step - self.first_step) * self.batch_size
        rows = np.arange(start, start + self.batch_size)
        return rows[np.argsort(self.lengths[rows], kind="stable")]


class OnlineTerm(PreferenceTerm):
    """A preference objective on pairs of the data, and then on what is drawn in their place."""

    def __init__(
        self, job: OffPolicyJob, method: Pairwise, shares: Shares, pad_id: int, worker: Worker, drawer: PairDrawer
    ) -> None:
        if job.drawing is None:
            raise TypeError(f"{job.name} draws nothing")
        self._table = read_rows(job.pairs, first=method.num_pairs)
        super().__init__(self._table, method, shares, pad_id)
        self.drawer, self._worker, self._shares = drawer, worker, shares
        self._every, self._folder = job.drawing.every, Path(job.stage_dir) / DRAWN_PAIRS
        self._data_plan, self._reward = self.plan, job.drawing.reward.settings
        training = method.training
        self.num_steps = training.num_steps or self.plan.num_steps(training.num_epochs)
        self._block, self._step = 0, 0
        self._drawn_at: Rows = np.zeros(len(self._table), np.int64)
        self._num_tokens = dict[int, int]()

    def num_models_beside(self) -> int:
        """Count the reference, and the judge if it is a model."""
        return 1 + is_model(self._reward) if self._every < self.num_steps else 0

    def begin(self, step: int, learner: Learner, worker: Worker) -> None:
        """Get this step's pairs: at the first step of a block they are drawn, or read if drawn before."""
        self._step = step
        if step // self._every != self._block:
            self._open(step // self._every, learner)
        self._num_tokens[step] = super().num_tokens(step)

    def num_tokens(self, step: int) -> int:
        """Tokens that went, or before the step would go, through the model in it."""
        return self._num_tokens.get(step) or super().num_tokens(step)

    def __call__(self, module: nn.Module, rows: Rows, device: torch.device) -> ObjectiveOutput:
        output = super().__call__(module, rows, device)
        drawn_at = torch.from_numpy(self._drawn_at[rows]).to(device, torch.float32)
        seen: dict[str, Mean] = {
            "online/age": mean_of(self._step - drawn_at),
            "online/own": mean_of((drawn_at > 0).float()),
        }
        return ObjectiveOutput(output.loss, output.metrics | seen)

    def _open(self, block: int, learner: Learner) -> None:
        """Replace the current pairs with the block's."""
        first = block * self._every
        table = self._kept(first)
        if table is None:
            rows = [self._data_plan.rows(step) for step in range(first, min(first + self._every, self.num_steps))]
            data = self._table.take(pa.array(np.concatenate(rows)))
            table = self.drawer.draw(first, data, first * self._data_plan.batch_size, learner)
            self._keep(table, first)
        self.pairs = self.table(table, self.method)
        plan = replace(self.pairs.plan(self._shares), micro_batch_tokens=self.plan.micro_batch_tokens)
        self.plan = BlockPlan(**{one.name: getattr(plan, one.name) for one in fields(BatchPlan)}, first_step=first)
        self._drawn_at = table["drawn_at"].to_numpy().astype(np.int64)
        self._block = block

    # ----------------------------------------------------------------------------------------------- the stage

    def _path(self, step: int) -> Path:
        return self._folder / _name(step)

    def _kept(self, step: int) -> pa.Table | None:
        """The pairs that this attempt or an earlier one drew at this step; None if there are none."""
        table = None
        if self._worker.rank == 0 and self._path(step).is_file():
            table = _read(self._path(step))
        return self._worker.share(table)

    def _keep(self, table: pa.Table, step: int) -> None:
        """Write the file, which appears whole; no worker continues before it is there."""
        if self._worker.rank == 0:
            self._worker.stage_log.check_current()
            path = self._path(step)

            def write() -> None:
                with whole_file(path) as temporary:
                    write_rows(table, temporary, ONLINE_PAIRS)

            with full_disk_named(f"{self._worker.stage_dir.name}: drawn pairs", self._folder):
                retried(write, self._worker.storage_retry_s, str(path))
        self._worker.gathered(None)

    def origin(self, num_steps: int) -> dict[str, Any]:
        """Labels and age of the pairs that were trained on, and what drawing them cost, from the stage's files."""
        own, data = trained_on(self._table, self._data_plan, self._folder, self._every, num_steps)
        batch_size, total = self._data_plan.batch_size, self._data_plan.batch_size * num_steps
        ages = own["place"].to_numpy() // batch_size - own["drawn_at"].to_numpy()
        first = sum(range(min(self._every, num_steps))) * batch_size
        return {
            "num_pairs_trained": total,
            **_labels(own, data),
            "num_judged": int(pc.sum(own["num_judged"]).as_py() or 0),
            "num_tokens_generated": int(pc.sum(own["num_tokens"]).as_py() or 0),
            "mean_age": (int(ages.sum()) + first) / total,
        }


class ReplayTerm(PreferenceTerm):
    """A preference objective on all pairs that another job was trained on, in its own order."""

    def __init__(self, job: OffPolicyJob, method: Pairwise, shares: Shares, pad_id: int) -> None:
        source = job.replayed
        if source is None:
            raise TypeError(f"{job.name} replays nothing")
        table, training = read_rows(job.pairs, first=source.num_pairs), source.training
        plan = Pairs(table).plan(replace(shares, training=training))
        num_steps = training.num_steps or plan.num_steps(training.num_epochs)
        folder = Path(source.stage_dir) / DRAWN_PAIRS
        bring(folder)
        self._own, self._data = trained_on(table, plan, folder, source.every, num_steps)
        both = [conformed(table, REFERENCED_PAIRS) for table in (self._data, self._own)]
        super().__init__(pa.concat_tables(both), method, shares, pad_id)

    def origin(self, num_steps: int) -> dict[str, Any]:
        """The labels of the pairs; their age means nothing here."""
        return {"num_pairs_trained": num_steps * self.plan.batch_size, **_labels(self._own, self._data)}


def trained_on(table: pa.Table, plan: BatchPlan, folder: Path, every: int, num_steps: int) -> tuple[pa.Table, pa.Table]:
    """The pairs of an online training, in its order: those drawn, as ONLINE_PAIRS, and those of `table` before them."""
    own = [_read(folder / _name(step)) for step in range(every, num_steps, every)]
    rows = np.concatenate([plan.rows(step) for step in range(min(every, num_steps))])
    return pa.concat_tables(own) if own else ONLINE_PAIRS.empty_table(), table.take(pa.array(rows))


def _labels(own: pa.Table, data: pa.Table) -> dict[str, int]:
    """Count different pairs of the data, pairs that were drawn, and pairs of the data kept because none was drawn."""
    kept = own.filter(pc.equal(own["drawn_at"], 0))
    labels = {*data["id"].to_pylist(), *kept["id"].to_pylist()}
    return {"num_data_labels": len(labels), "num_own_labels": len(own) - len(kept), "num_kept": len(kept)}


def _name(step: int) -> str:
    return f"{step:07d}.parquet"


def _read(path: Path) -> pa.Table:
    """The rows, in the order in which they are trained on."""
    return pq.read_table(path, schema=ONLINE_PAIRS).sort_by("place").combine_chunks()
