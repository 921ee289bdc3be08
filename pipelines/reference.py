"""Reference log-probs as data: computed once by Ray Data, shared by every method and seed.

No training worker holds a reference model: pairs carry `ref_chosen_logp` and `ref_rejected_logp` columns.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from prefarena.config import Resources
from prefarena.data.tables import read_rows
from prefarena.evaluation.sampled import response_logps
from prefarena.modeling.load import load_policy, load_tokenizer
from prefarena.records import REFERENCED_PAIRS
from prefarena.stages import write_manifest


class ReferenceLogps:
    """A Ray Data actor: batches of pairs in, the same rows with the reference's log-probs out."""

    def __init__(self, reference: str, batch_size: int, use_gpu: bool, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.model = load_policy(reference)
        torch.nn.Module.to(self.model, "cuda" if use_gpu else "cpu")
        self.pad_id = load_tokenizer(reference).pad_token_id
        self.batch_size = batch_size

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pydict()
        for side in ("chosen", "rejected"):
            logps = response_logps(self.model, rows["prompt_ids"], rows[f"{side}_ids"], self.pad_id, self.batch_size)
            batch = batch.append_column(f"ref_{side}_logp", pa.array(logps, pa.float32()))
        return pa.Table.from_pydict({name: batch[name] for name in REFERENCED_PAIRS.names}, schema=REFERENCED_PAIRS)


def scoring_options(resources: Resources) -> dict[str, Any]:
    """Ray's options of an actor or a task that scores."""
    scoring, gpus = resources.scoring, 0.0
    if resources.use_gpu:
        gpus = scoring.gpus if scoring.gpus is not None else resources.gpus_per_worker
    options: dict[str, Any] = {"num_cpus": scoring.cpus, "num_gpus": gpus}
    return options | ({"label_selector": dict(scoring.labels)} if scoring.labels else {})


def add_reference_logps(pairs: Path, reference: str, folder: Path, *, resources: Resources, batch_size: int) -> None:
    """Write train_pairs/ and test_pairs/ with the two columns, and the manifest, to `folder`."""
    import ray.data
    from ray.data import SaveMode

    started = time.perf_counter()
    scoring, use_gpu = resources.scoring, resources.use_gpu
    num_actors = scoring.num_actors or resources.num_workers
    num_tokens = 0
    for split in ("train_pairs", "test_pairs"):
        dataset = (
            ray.data.read_parquet(str(pairs / split))
            .repartition(num_actors)
            .map_batches(
                ReferenceLogps,
                fn_constructor_args=(reference, batch_size, use_gpu, max(1, int(scoring.cpus))),
                batch_format="pyarrow",
                batch_size=1024,
                compute=ray.data.ActorPoolStrategy(size=num_actors),
                **scoring_options(resources),
            )
        )
        dataset.write_parquet(str(folder / split), mode=SaveMode.OVERWRITE)
        table = read_rows(folder / split)
        num_tokens += sum(len(ids) for name in ("chosen_ids", "rejected_ids") for ids in table[name].to_pylist())
    wall = time.perf_counter() - started
    costs = {"wall_seconds": wall, "device_seconds": wall * num_actors, "num_tokens_scored": num_tokens}
    write_manifest(folder, {"costs": costs})
