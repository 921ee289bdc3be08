"""Named hardware: the peaks of cards according to their data sheets, and the share of them that training reaches.

Nothing here was measured by us. Peaks are dense, without sparsity, by the vendor's data sheets. Shares of them are
what others have measured and published:

- `flops`: llm-foundry's training benchmarks (github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md at
  commit 061f2c7), sequences of 512 to 4,096 tokens, FSDP, bfloat16. H100 80 GB: 35 to 46 % of the peak over models of
  760M to 70B on 8 to 64 cards; A100 80 GB: 45 to 64 %. Those passes hold more tokens than ours often do, so the lower
  bound is taken lower. Cards without such a table get what the H100 has.
- `bandwidth`: gpt-fast's table of decoding (github.com/pytorch-labs/gpt-fast, README.md at commit 0f925b5), bfloat16
  weights: 1,397 GB/s of an A100's 2,039 on one card (0.69), and 0.58, 0.47, 0.35 on 2, 4 and 8 for a model of 7B, 0.56
  on 8 for one of 70B.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prefarena.errors import UserError
from prefarena.estimate.interval import Interval
from prefarena.modeling.arithmetic import Arithmetic

_TERA = 1e12


@dataclass(frozen=True)
class Card:
    """Peaks of one card. half, tf32, single: FLOP/s of products in bfloat16, TF32 and float32. memory: bytes/s.

    gib: memory, as torch counts it. link, network: bytes/s each way, to a card of the same node, and of another one.
    flops, bandwidth: the share of the peaks that is reached.
    """

    name: str
    half: float
    tf32: float
    single: float
    memory: float
    gib: float
    link: float
    network: float
    flops: Interval
    bandwidth: Interval

    def products(self, arithmetic: Arithmetic) -> Interval:
        """The FLOP/s that are reached."""
        peak = {"bfloat16": self.half, "tf32": self.tf32, "float32": self.single}[arithmetic]
        return self.flops.times(peak)


_DECODES = Interval(0.35, 0.6, 0.7)
_HOPPER, _AMPERE = Interval(0.2, 0.38, 0.46), Interval(0.25, 0.5, 0.62)
CARDS = {
    card.name: card
    for card in (
        Card("A100", 312 * _TERA, 156 * _TERA, 19.5 * _TERA, 2.04e12, 79.1, 300e9, 25e9, _AMPERE, _DECODES),
        Card("H100", 989 * _TERA, 494 * _TERA, 67 * _TERA, 3.35e12, 79.1, 450e9, 50e9, _HOPPER, _DECODES),
        Card("H200", 989 * _TERA, 494 * _TERA, 67 * _TERA, 4.8e12, 139.8, 450e9, 50e9, _HOPPER, _DECODES),
        Card("L40S", 362 * _TERA, 183 * _TERA, 91.6 * _TERA, 0.864e12, 44.4, 32e9, 12.5e9, _HOPPER, _DECODES),
    )
}
#: Cards in a node.
NODE = 8


@dataclass(frozen=True)
class Cards:
    """A number of cards of one kind; eight make a node."""

    card: Card
    number: int

    def __str__(self) -> str:
        return f"{self.number}x{self.card.name}"

    def wire(self, number: int) -> float:
        """Bytes per second and card when `number` cards communicate; beyond one node, the network is the bottleneck."""
        return self.card.link if number <= NODE else self.card.network


def parse_cards(text: str) -> Cards:
    """Cards from `8xH100`, or from `H100` for a single one. Raises UserError."""
    found = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?([A-Za-z][A-Za-z0-9]*)", text.strip())
    card = CARDS.get(found[2].upper()) if found else None
    if found is None or card is None:
        raise UserError(
            f"--gpus: {text!r} is not known; give a number and a card, such as 8xH100; cards are {', '.join(CARDS)}"
        )
    number = int(found[1] or 1)
    if number < 1:
        raise UserError(f"--gpus: {text!r} means no card at all; to estimate without GPUs, leave the option out")
    return Cards(card, number)
