"""Results with samples for the tests of report.html, and a browser that is on this machine."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prefarena.records import ALL_SAMPLES
from prefarena.report.results import Cost, EntryResult, Results

#: What a model may say that a page must show as text.
HOSTILE = "<script>alert(1)</script> </SCRIPT> <!-- <img src=x onerror=alert(2)> \u2028 & </script"
NAMES = ("reference", "dpo", "rlhf")


def browser_path() -> str | None:
    """A Chromium of this machine; none is ever downloaded."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


def why_no_browser() -> str | None:
    """Why the page cannot be driven here; None where it can."""
    if importlib.util.find_spec("playwright") is None:
        return "the package playwright is not installed"
    if importlib.util.find_spec("plotly") is None:
        return "the package plotly is not installed"
    return None if browser_path() else "there is no Chromium on this machine"


def scored_results(folder: Path, num_samples: int = 25, seeds: tuple[int, ...] = (0, 1)) -> Results:
    """Two methods judged on text, with logs and samples in `folder`, and a third that failed.

    Scores of place p: reference 0, dpo p/10, rlhf -p/10; so the last places disagree most, by p/5. dpo's response of
    place 0 is hostile, and has no score.
    """
    entries, curves, costs = [], dict[str, dict[str, str]](), []
    for place, name in enumerate(NAMES):
        kl = 1.5 * place
        row = {
            "judge_score": 0.4 * place,
            "judge_score_stderr": 0.05,
            "kl": kl,
            "kl_stderr": 0.1,
            "win_rate": 0.5 + kl / 10,
        }
        row |= {"win_rate_stderr": 0.02, "preference_accuracy": 0.55, "response_length": 40.0 + place}
        entries.append(EntryResult(name=name, kind=name, seeds={str(s): row | {"kl": kl + s / 10} for s in seeds}))
    entries.append(EntryResult(name="ipo", kind="ipo", failures={str(s): "its memory ran out" for s in seeds}))
    for name in NAMES[1:]:
        for seed in seeds:
            path = folder / f"{name}-{seed}.jsonl"
            path.write_text("".join(json.dumps(_metrics(name, step)) + "\n" for step in range(40)), encoding="utf-8")
            curves.setdefault(name, {})[str(seed)] = path.name
            costs.append(Cost(stage="training", entry=name, seed=seed, wall_seconds=10.0 + len(name)))
    write_samples(folder, num_samples, seeds)
    return Results(
        name="pages", task={"kind": "text"}, seeds=list(seeds), exact=False, entries=entries, curves=curves,
        costs=costs, notes=["All numbers are made up."], data={"num_train_pairs": 4096}, versions={"torch": "1"},
    )  # fmt: skip


def _metrics(name: str, step: int) -> dict[str, float]:
    progress = 1 - math.exp(-step / 10)
    if name == "dpo":
        return {"step": step, "loss": 0.7 - progress / 2, "preference/accuracy": 0.5 + progress / 3}
    return {"step": step, "reward/mean": progress, "reward/judge": progress / 2, "kl/k1": 2 * progress}


def write_samples(folder: Path, num_samples: int, seeds: tuple[int, ...] = (0, 1)) -> Path:
    columns: dict[str, list] = {name: [] for name in ALL_SAMPLES.names}
    for name, sign in zip(NAMES, (0, 1, -1), strict=True):
        for seed in seeds:
            for place in range(num_samples):
                is_hostile = name == "dpo" and place == 0
                response = f"{HOSTILE} {seed}" if is_hostile else f"{name} answers {place} of seed {seed}"
                score = None if is_hostile else sign * place / 10
                values = (name, seed, place, f"question {place}?", response, score, len(response.split()))
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
    path = folder / "samples.parquet"
    pq.write_table(pa.table(columns).cast(ALL_SAMPLES), path)
    return path
