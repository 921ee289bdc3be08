"""Settings to start from, by the size of a model: learning rates from published recipes, each with its source."""

from __future__ import annotations

from typing import NamedTuple

_SMOLLM2 = "SmolLM2's recipe (huggingface/alignment-handbook, recipes/smollm2)"
_TLDR = "RLHF on TL;DR with Pythia 1B to 6.9B (arXiv 2403.17031)"
_TULU_2 = "Tulu 2, 7B to 70B (arXiv 2311.10702)"
_TULU_25 = "PPO and reward model of Tulu 2.5 13B (arXiv 2406.09279)"
_TULU_3 = "Tulu 3 70B (arXiv 2411.15124)"

#: Adapters take a higher rate: 5e-6 against 5e-7 in the two recipes of Zephyr 7B.
LORA_FACTOR = 10
LORA_SOURCE = "ten times the rate for all weights, as in alignment-handbook's two recipes of Zephyr 7B"


class Rate(NamedTuple):
    """A learning rate for training all weights, and who used it."""

    value: float
    source: str


class StartingPoint(NamedTuple):
    """Learning rates for models of up to so many parameters: fine-tuning, methods on pairs, the reward model, PPO."""

    up_to: float
    sft: Rate
    preference: Rate
    reward_model: Rate
    on_policy: Rate


_BY_SIZE = (
    StartingPoint(
        1e9,
        Rate(3e-4, f"{_SMOLLM2}: 1.7B; 1e-3 for 135M and 360M, on far more data than pairs are"),
        Rate(1e-6, f"{_SMOLLM2}: 135M and 360M, with beta 0.5"),
        Rate(1e-5, "TRL's example of a reward model, on Qwen2 0.5B"),
        Rate(3e-6, f"{_TLDR}; smaller models were not in it"),
    ),
    StartingPoint(
        4e9,
        Rate(2e-5, "Zephyr 7B (arXiv 2310.16944); SmolLM2 1.7B had 3e-4, on far more data than pairs are"),
        Rate(1e-6, f"{_SMOLLM2}: 1.7B; DPO's own paper on Pythia 2.8B (arXiv 2305.18290)"),
        Rate(3e-6, _TLDR),
        Rate(3e-6, _TLDR),
    ),
    StartingPoint(
        2e10,
        Rate(2e-5, "Zephyr 7B (arXiv 2310.16944)"),
        Rate(5e-7, f"Zephyr 7B (arXiv 2310.16944); {_TULU_2}"),
        Rate(3e-6, f"{_TLDR}; Tulu 2.5 13B had 1e-5"),
        Rate(1e-6, _TULU_25),
    ),
    StartingPoint(
        float("inf"),
        Rate(1e-5, f"the 70B model of {_TULU_2}"),
        Rate(2e-7, _TULU_3),
        Rate(3e-6, f"{_TLDR}; no larger one is known to us"),
        Rate(1e-7, f"{_TULU_3}, where it learnt from rewards that can be checked"),
    ),
)


def starting_point(num_parameters: int) -> StartingPoint:
    """The starting point for a model of this size."""
    return next(point for point in _BY_SIZE if num_parameters <= point.up_to)
