"""Pairs for the enumerable language: drawn from the reference policy, labelled by the gold reward.

The reference is enumerated exactly, so a draw from that table is a draw from the policy. The stage keeps the table
(`exact.npz`): rewards are standardised under it, and every evaluation measures against it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from prefarena.config import LanguageTask
from prefarena.data.tables import write_rows
from prefarena.evaluation.enumeration import enumerate_responses
from prefarena.mirror import bring, workspace
from prefarena.modeling.load import load_policy
from prefarena.records import DEMONSTRATIONS, PAIRS
from prefarena.stage_files import EXACT, GOLD
from prefarena.stages import costs_of, write_manifest
from prefarena.tasks.gold import GoldReward
from prefarena.tasks.language import EOS_ID, Language
from prefarena.tasks.pairs import reference_samples, sample_pairs

_SAMPLES_PER_PROMPT = 16  # of the reference, on every prompt: what reward models are normalised on


@dataclass(frozen=True)
class ExactReference:
    """ref_logps, rewards: [P, N] of every prompt and response; lengths [N] in tokens, covered [P]."""

    ref_logps: np.ndarray
    rewards: np.ndarray
    lengths: np.ndarray
    covered: np.ndarray

    @staticmethod
    def load(path: str | Path) -> ExactReference:
        bring(path)
        with np.load(path, allow_pickle=False) as arrays:
            return ExactReference(*(arrays[name] for name in ("ref_logps", "rewards", "lengths", "covered")))


def annotate_language(task: LanguageTask, reference: str, folder: Path) -> None:
    """Write train_pairs/, test_pairs/, reference_samples/, gold.json, exact.npz and the manifest to `folder`."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    workspace(folder)
    language = Language(task)
    exact = enumerate_responses(load_policy(reference), language.prompt_ids, task.response_limit, EOS_ID)
    gold = GoldReward.fit(task, language.prompt_ids, exact.sequences, exact.logps)
    gold.save(folder / GOLD)
    rewards = gold.table(language.prompt_ids, exact.sequences)
    for split, number in (("train", task.num_pairs), ("test", task.num_test_pairs)):
        table = sample_pairs(
            language.prompt_ids,
            language.covered,
            exact.sequences,
            exact.logps,
            rewards,
            num_pairs=number,
            labels=task.labels,
            temperature=task.label_temperature,
            seed=task.seed,
            split="train" if split == "train" else "test",
        )
        write_rows(table, folder / f"{split}_pairs" / "part-0.parquet", PAIRS)
    samples = reference_samples(language.prompt_ids, exact.sequences, exact.logps, _SAMPLES_PER_PROMPT, task.seed)
    write_rows(samples, folder / "reference_samples" / "part-0.parquet", DEMONSTRATIONS)
    np.savez(folder / EXACT, ref_logps=exact.logps, rewards=rewards, lengths=exact.lengths, covered=language.covered)
    wall = time.perf_counter() - started
    counts: dict[str, float] = {"num_train_pairs": task.num_pairs, "num_test_pairs": task.num_test_pairs}
    counts |= {"num_prompts": len(language.prompt_ids), "num_covered_prompts": int(language.covered.sum())}
    counts |= {"num_responses_enumerated": int(exact.logps.shape[1])}
    source = language.source_logps(exact.sequences)
    mass = np.exp(source)
    divergence = np.where(mass > 0, mass * (np.where(mass > 0, source, 0) - exact.logps), 0).sum(1).mean()
    counts["kl_source_to_reference"] = float(divergence)
    write_manifest(folder, {"data": counts, "costs": costs_of(wall)})
