"""Reference log-probs as data: computed once by Ray Data, shared by every method and seed.

No training worker holds a reference model: pairs carry `ref_chosen_logp` and `ref_rejected_logp` columns. They are
computed in the arithmetic of the training that reads them, so that policy and reference agree before the first step.

The pairs are cut into parts of neighbouring rows, and each part into batches of rows of similar length, before any of
them is dealt out: so the number of actors changes no bit of the result. A part's scores are a file in a cache, named by
a hash of everything that they depend on: the weights, the token ids (and with them the tokenizer), the batches. Whoever
has the same model and pairs finds them, whatever folders they come from, and a run that was killed goes on with the
parts that are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from prefarena.cluster.pools import map_in_pool, through_deaths
from prefarena.config import Resources
from prefarena.data.plan import largest_scored, within_budget
from prefarena.data.tables import read_rows, write_rows
from prefarena.errors import UserError
from prefarena.mirror import bring, push
from prefarena.modeling.arithmetic import Arithmetic, in_weights, named, products_of
from prefarena.modeling.flops import count_model
from prefarena.modeling.load import load_policy, load_settings, load_tokenizer
from prefarena.modeling.logprobs import LogProbs, sequence_logps
from prefarena.modeling.passes import NOTHING, Pass, passed
from prefarena.records import PAIRS, REFERENCED_PAIRS, conformed
from prefarena.stages import costs_of, whole_file, write_manifest

SPLITS = TRAIN, TEST = ("train_pairs", "test_pairs")
PART_ROWS = 1024

_SCORING = 2  # raise it when the same inputs give other scores
_TOKENS = ["prompt_ids", "chosen_ids", "rejected_ids"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a row group of a table of pairs; `scores` is where their scores belong."""

    table: str
    group: int
    start: int
    stop: int
    scores: str

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Read its rows, with all columns or some."""
        bring(self.table)
        group = pq.ParquetFile(self.table).read_row_group(self.group, columns=columns)
        return group.slice(self.start, self.stop - self.start)


@dataclass(frozen=True)
class Scores:
    """log pi(y|x) [N] of both responses, nats; the time that computing them took, and the number of tokens."""

    chosen: NDArray[np.float32]
    rejected: NDArray[np.float32]
    seconds: float
    num_tokens: int


def scoring_options(resources: Resources) -> dict[str, Any]:
    """Ray's options of an actor or a task that scores."""
    scoring, gpus = resources.scoring, 0.0
    if resources.use_gpu:
        gpus = scoring.gpus if scoring.gpus is not None else resources.gpus_per_worker
    options: dict[str, Any] = {"num_cpus": scoring.cpus, "num_gpus": gpus}
    return options | ({"label_selector": dict(scoring.labels)} if scoring.labels else {})


def add_reference_logps(
    pairs: Path,
    reference: str,
    folder: Path,
    *,
    cache: Path,
    resources: Resources,
    max_length: int | None = None,
    part_rows: int = PART_ROWS,
    arithmetic: Arithmetic = "float32",
    scored_in: Arithmetic = "float32",
) -> None:
    """Write train_pairs/ and test_pairs/ with the two columns, and the manifest, to `folder`.

    `max_length`: most tokens of a prompt and its response, where it is known. `arithmetic`: that of the training on
    the training pairs; the test pairs are scored in `scored_in`, as evaluations score policies. Finished parts are kept
    in `cache`, and those found there are used.
    """
    arithmetics: dict[str, Arithmetic] = {TRAIN: arithmetic, TEST: scored_in}
    started = time.perf_counter()
    scored = score_tables(
        pairs, reference, folder, arithmetics,
        cache=cache, resources=resources, max_length=max_length, part_rows=part_rows,
    )  # fmt: skip
    write_manifest(folder, scored.contents(started))


@dataclass(frozen=True)
class Scored:
    """The cost of scoring: device-seconds of all parts, whenever they were computed, and what was computed now."""

    device_seconds: float
    num_tokens: int
    num_flops: float
    num_parts: int
    num_parts_computed: int

    def contents(self, started: float) -> dict[str, Any]:
        """The contents of the manifest of a stage that began at `started`, by `time.perf_counter`."""
        wall = time.perf_counter() - started
        costs = costs_of(wall, self.device_seconds, num_tokens_scored=self.num_tokens, num_flops=self.num_flops)
        return {"costs": costs, "num_parts": self.num_parts, "num_parts_computed": self.num_parts_computed}


def score_tables(
    pairs: Path,
    reference: str,
    folder: Path,
    arithmetics: dict[str, Arithmetic],
    *,
    cache: Path,
    resources: Resources,
    max_length: int | None = None,
    part_rows: int = PART_ROWS,
) -> Scored:
    """Write the tables under `pairs` that `arithmetics` names, each with the two columns, to `folder`."""
    cache.mkdir(parents=True, exist_ok=True)
    model = [_SCORING, weights_digest(reference), *_scorer(resources), largest_scored(resources.device)]
    parts = {
        split: find_parts(pairs / split, cache, [*model, *named(own)], part_rows) for split, own in arithmetics.items()
    }
    wanted = {part.scores: (part, arithmetics[split]) for split in arithmetics for part in parts[split]}
    missing = [(part, own) for part, own in wanted.values() if read_scores(part) is None]
    for own in dict.fromkeys(own for _, own in missing):
        _compute([part for part, its in missing if its == own], reference, resources, max_length, own)
    found = [_write_scored(parts[split], folder / split) for split in arithmetics]
    seconds, num_tokens = sum(one[0] for one in found), sum(one[1] for one in found)
    through = reduce(Pass.plus, (one[2] for one in found), NOTHING)
    flops = count_model(load_settings(reference)).forward(through)
    return Scored(seconds, num_tokens, flops, len(wanted), len(missing))


def score_rows(
    rows: pa.Table,
    split: str,
    reference: str,
    folder: Path,
    arithmetic: Arithmetic,
    *,
    cache: Path,
    resources: Resources,
    max_length: int | None = None,
) -> tuple[pa.Table, Scored]:
    """Score rows (records.PAIRS) that are in no folder yet; returns them as REFERENCED_PAIRS, and what it took.

    They stand in `folder` meanwhile, as tables named `split`, and nothing of them stays there.
    """
    unscored, scored = folder / "unscored", folder / "scored"
    write_rows(rows, unscored / split / "part-0.parquet", PAIRS)
    push(unscored)  # the actors that score may be on other nodes
    found = score_tables(
        unscored, reference, scored, {split: arithmetic}, cache=cache, resources=resources, max_length=max_length
    )
    table = read_rows(scored / split)
    for unneeded in (unscored, scored):
        shutil.rmtree(unneeded)
    return table, found


def find_parts(folder: Path, cache: Path, model: list[Any], part_rows: int) -> list[Part]:
    """The parts of a table of pairs, in its order. `model`: what scores depend on beside the pairs (JSON-able)."""
    bring(folder)
    parts = []
    for path in sorted(folder.glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=_TOKENS)
            for start in range(0, table.num_rows, part_rows):
                rows = table.slice(start, part_rows)
                name = f"{_digest(model, rows)}.npz"
                parts.append(Part(str(path), group, start, start + rows.num_rows, str(cache / name)))
    return parts


def weights_digest(folder: str | Path) -> str:
    """A hash of a model's weights and shape, wherever it lies. Raises UserError where there are no safetensors."""
    bring(folder)
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: there are no safetensors weights in it; save the model by save_pretrained")
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    shape = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_scores(part: Part) -> Scores | None:
    """A part's finished scores; None where there are none, or none that can be read."""
    bring(part.scores)
    try:
        with np.load(part.scores) as saved:
            scores = Scores(saved["chosen"], saved["rejected"], float(saved["seconds"]), int(saved["num_tokens"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("%s is damaged and is computed again (%s)", part.scores, error)
        return None
    return scores


def write_scores(part: Part, scores: Scores) -> None:
    """Write a part's scores so that a reader sees all of them or none."""
    path = Path(part.scores)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        np.savez(temporary, **vars(scores))
    push(path)


class ReferenceLogps:
    """A Ray Data actor: parts in; their scores go to the cache."""

    def __init__(
        self, reference: str, max_length: int | None, device: str, num_threads: int, arithmetic: Arithmetic = "float32"
    ) -> None:
        torch.set_num_threads(num_threads)
        model, self._arithmetic = in_weights(load_policy(reference), arithmetic), arithmetic
        torch.nn.Module.to(model, device)
        self.module = LogProbs(model, max_length)
        self.pad_id = load_tokenizer(reference).pad_token_id

    def __call__(self, batch: pa.Table) -> pa.Table:
        for fields in batch.to_pylist():
            part = Part(**fields)
            write_scores(part, self.score(part.read(_TOKENS).to_pydict()))
        return batch

    def score(self, rows: dict[str, list[list[int]]]) -> Scores:
        """The scores of a part's rows, in their order."""
        started = time.perf_counter()
        lengths = np.array([sum(map(len, row)) for row in zip(*(rows[name] for name in _TOKENS), strict=True)])
        most_tokens = largest_scored(self.module.model.device.type)
        logps = np.empty((2, len(lengths)), np.float32)
        for numbers in within_budget(np.argsort(lengths, kind="stable"), lengths, most_tokens):
            prompts, chosen, rejected = ([rows[name][i] for i in numbers] for name in _TOKENS)
            with products_of(self._arithmetic):
                logps[:, numbers] = pair_logps(self.module, prompts, chosen, rejected, self.pad_id)
        return Scores(logps[0], logps[1], time.perf_counter() - started, int(lengths.sum()))


@torch.no_grad()
def pair_logps(
    module: LogProbs,
    prompts: list[list[int]],
    chosen: list[list[int]],
    rejected: list[list[int]],
    pad_id: int,
) -> np.ndarray:
    """log pi(y|x) [2, N] of the chosen and the rejected responses, nats, in one forward pass."""
    responses = [list(pair) for pair in zip(chosen, rejected, strict=True)]
    logps, _ = sequence_logps(module, prompts, responses, device=module.model.device, pad_id=pad_id)
    return logps.cpu().numpy().reshape(len(prompts), 2).T


def _digest(model: list[Any], rows: pa.Table) -> str:
    digest = hashlib.sha256(json.dumps(model).encode())
    for name in _TOKENS:
        column = rows[name].combine_chunks()
        digest.update(column.value_lengths().to_numpy().astype(np.int64).tobytes())
        digest.update(column.flatten().to_numpy().astype(np.int64).tobytes())
    return digest.hexdigest()[:32]


def _scorer(resources: Resources) -> tuple[str, int]:
    """The device and the number of threads of an actor; both change the last bits of what it computes."""
    return resources.device, max(1, int(resources.scoring.cpus))


def _compute(
    parts: list[Part], reference: str, resources: Resources, max_length: int | None, arithmetic: Arithmetic
) -> None:
    import ray.data

    num_actors = resources.scoring.num_actors or resources.num_workers

    def attempt() -> Iterator[object]:
        missing = [part for part in parts if read_scores(part) is None]  # an actor that died has done some
        # One block a part: when an actor dies, only the part that it was at is done again.
        rows = ray.data.from_items([vars(part) for part in missing], override_num_blocks=len(missing))
        done = map_in_pool(
            rows,
            ReferenceLogps,
            min(num_actors, len(missing)),
            fn_constructor_args=(reference, max_length, *_scorer(resources), arithmetic),
            batch_format="pyarrow",
            batch_size=1,
            **scoring_options(resources),
        )
        yield from done.iter_batches(batch_size=None)

    for _ in through_deaths(attempt, "reference log-probs"):
        pass


def _write_scored(parts: list[Part], folder: Path) -> tuple[float, int, Pass]:
    """Write the parts' rows with their scores as one table. Returns the seconds and the tokens of the scoring, and what
    its passes went through.
    """
    seconds, num_tokens, through = 0.0, 0, NOTHING
    folder.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(folder / "part-0.parquet", REFERENCED_PAIRS) as writer:
        for part in parts:
            scores, rows = read_scores(part), part.read()
            if scores is None:
                raise FileNotFoundError(f"{part.scores}: scores that were just computed are gone")
            for side, logps in (("chosen", scores.chosen), ("rejected", scores.rejected)):
                rows = rows.append_column(f"ref_{side}_logp", pa.array(logps, pa.float32()))
            writer.write_table(conformed(rows, REFERENCED_PAIRS))
            seconds, num_tokens = seconds + scores.seconds, num_tokens + scores.num_tokens
            through = through.plus(_passed(rows))
    return seconds, num_tokens, through


def _passed(rows: pa.Table) -> Pass:
    """The work of passes over both responses to each prompt, which share it."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    prompts, chosen, rejected = (pc.list_value_length(rows[name]).to_numpy() for name in names)
    return passed(prompts, np.stack([chosen, rejected], 1))
