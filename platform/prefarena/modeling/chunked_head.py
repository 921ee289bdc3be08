"""Log-probs and entropies of given tokens, and divergences of two models, from hidden states without their logits.

The vocabulary's projection is done tile by tile (tokens x vocabulary) with a running log-sum-exp, and again tile by
tile in the backward pass; so memory does not grow with tokens x vocabulary. Tiles are computed and summed in at least
float32, whatever the precision of the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

#: A tile. On CPU few columns: what is done to each of its elements is then done in the caches.
TOKENS, VOCABULARY = 1024, 2048
_TOKENS_CUDA, _VOCABULARY_CUDA = 2048, 16384

#: Over the tiles so far, [m] each: the largest z, the sum of exp(z - max), and that of (z - max) exp(z - max).
Running = tuple[Tensor, Tensor, Tensor | None]


def chunked_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return log p(target), and if asked for the entropy of p, [M] each, nats, at least float32.

    p = softmax((hidden W^T + b) / temperature). hidden: [M, D]; weight: [V, D]; bias: [V]; targets: [M]. Gradients flow
    to hidden, weight and bias, through the entropy too. Products are of numbers of hidden's kind, summed in at least
    float32.
    """
    logps, entropies = _ChunkedHead.apply(hidden, weight, bias, targets, 1.0 / temperature, entropy)
    return logps, entropies if entropy else None


class Head(NamedTuple):
    """A linear map to the vocabulary: weight [V, D], bias [V] or none."""

    weight: Tensor
    bias: Tensor | None


class Compared(NamedTuple):
    """For two models' distributions p and q at M places: KL(p || q), KL(q || p), log p(target), log q(target).

    [M] each, nats, float64; divergences are exact sums over the vocabulary.
    """

    kl: Tensor
    reverse_kl: Tensor
    logps: Tensor
    other_logps: Tensor


@torch.no_grad()
def chunked_comparison(
    hidden: Tensor, head: Head, other_hidden: Tensor, other_head: Head, targets: Tensor, *, temperature: float = 1.0
) -> Compared:
    """Compare two models at M places: their divergences there, and the log-prob that each gives the targets [M].

    p and q are softmax((hidden W^T + b) / temperature), of one model's hidden states [M, D] and head, and of the
    other's. Log-ratios are taken before they are summed, so two models with equal outputs are exactly 0 apart.
    """
    if len(head.weight) != len(other_head.weight):
        raise ValueError(f"vocabularies of {len(head.weight)} and {len(other_head.weight)} tokens have no divergence")
    width, (token_tile, vocabulary_tile) = _wide(hidden.dtype), _tiles(hidden)
    found = Compared(*hidden.new_zeros(4, len(hidden), dtype=torch.float64))
    for rows in _slices(len(hidden), token_tile):
        sides: list[Running | None] = [None, None]
        for columns in _slices(len(head.weight), vocabulary_tile):
            tiles = [
                _logits(
                    states[rows],
                    own.weight[columns],
                    None if own.bias is None else own.bias[columns],
                    1 / temperature,
                    width,
                )
                for states, own in ((hidden, head), (other_hidden, other_head))
            ]
            for picked, tile in zip(found[2:], tiles, strict=True):
                picked[rows] += _picked(tile, targets[rows] - columns.start)
            ratio = tiles[0] - tiles[1]
            sides = [_merge_ratios(side, tile, ratio) for side, tile in zip(sides, tiles, strict=True)]
        (top, total, ratios), (other_top, other_total, other_ratios) = (_known(side) for side in sides)
        own, other = top + total.log(), other_top + other_total.log()
        found.kl[rows] = ratios / total - (own - other)
        found.reverse_kl[rows] = (own - other) - other_ratios / other_total
        found.logps[rows] -= own
        found.other_logps[rows] -= other
    return found


def _merge_ratios(running: Running | None, logits: Tensor, ratio: Tensor) -> Running:
    """Merge in one more tile, in float64; the third is the sum of exp(z - max) times the ratio of logits."""
    top = logits.amax(1).double()
    if running is not None:
        top = torch.maximum(top, running[0])
    exponentials = (logits - top[:, None].to(logits.dtype)).exp_()
    total, weighted = exponentials.sum(1).double(), exponentials.mul_(ratio).sum(1).double()
    if running is None or running[2] is None:
        return top, total, weighted
    factor = (running[0] - top).exp()
    return top, total + running[1] * factor, weighted + running[2] * factor


def _known(running: Running | None) -> tuple[Tensor, Tensor, Tensor]:
    assert running is not None and running[2] is not None
    return running[0], running[1], running[2]


class _ChunkedHead(torch.autograd.Function):
    """The autograd function: forward keeps only inputs and [M] vectors; backward computes each tile's logits again."""

    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        wants_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        target_logit, log_normaliser, entropy = _walk(hidden, weight, bias, targets, scale, wants_entropy)
        context.save_for_backward(hidden, weight, bias, targets, log_normaliser, entropy)
        context.scale = scale
        context.set_materialize_grads(False)
        return target_logit - log_normaliser, entropy

    @staticmethod
    def backward(context: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_normaliser, entropy = context.saved_tensors
        logp_gradient, entropy_gradient = gradients
        if logp_gradient is None and entropy_gradient is None:
            return (None,) * 6
        scale, width = context.scale, _wide(hidden.dtype)
        needs_hidden, needs_weight, needs_bias = context.needs_input_grad[:3]
        hidden_gradient = torch.zeros_like(hidden, dtype=width) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=width) if needs_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=width) if needs_bias and bias is not None else None
        token_tile, vocabulary_tile = _tiles(hidden)
        for rows in _slices(len(hidden), token_tile):
            own = hidden[rows]
            for columns in _slices(len(weight), vocabulary_tile):
                head = weight[columns]
                tile = _logits(own, head, None if bias is None else bias[columns], scale, width)
                tile.sub_(log_normaliser[rows, None])  # log p
                tile = _tile_gradient(
                    tile,
                    targets[rows] - columns.start,
                    None if logp_gradient is None else logp_gradient[rows],
                    None if entropy_gradient is None else entropy_gradient[rows],
                    entropy[rows],
                ).mul_(scale)
                if bias_gradient is not None:
                    bias_gradient[columns] += tile.sum(0)
                tile = tile.to(own.dtype)
                if hidden_gradient is not None:
                    _add_product(hidden_gradient[rows], tile, head.to(own.dtype))
                if weight_gradient is not None:
                    _add_product(weight_gradient[columns], tile.t(), own)
        given = ((hidden_gradient, hidden), (weight_gradient, weight), (bias_gradient, bias))
        return *(None if gradient is None else gradient.to(like.dtype) for gradient, like in given), None, None, None


def _walk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, wants_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Each target's logit, the log of the normaliser, and the entropy (zeros where it is not wanted), [M]."""
    width, (token_tile, vocabulary_tile) = _wide(hidden.dtype), _tiles(hidden)
    target_logit, log_normaliser, entropy = (hidden.new_zeros(len(hidden), dtype=width) for _ in range(3))
    for rows in _slices(len(hidden), token_tile):
        running: Running | None = None
        for columns in _slices(len(weight), vocabulary_tile):
            logits = _logits(hidden[rows], weight[columns], None if bias is None else bias[columns], scale, width)
            target_logit[rows] += _picked(logits, targets[rows] - columns.start)
            running = _merge(running, logits, wants_entropy)
        assert running is not None
        top, total, weighted = running
        log_normaliser[rows] = top + total.log()
        if weighted is not None:
            entropy[rows] = total.log() - weighted / total
    return target_logit, log_normaliser, entropy


def _tile_gradient(
    log_probs: Tensor, targets: Tensor, logp_gradient: Tensor | None, entropy_gradient: Tensor | None, entropy: Tensor
) -> Tensor:
    """The gradient at a tile's logits [m, v]. d log p_t / dz = 1_t - p; dH / dz = -p (log p + H)."""
    probs = log_probs.exp()
    if entropy_gradient is None:
        gradient = probs.mul_(-logp_gradient[:, None]) if logp_gradient is not None else probs.zero_()
    else:
        gradient = log_probs.add_(entropy[:, None]).mul_(probs).mul_(-entropy_gradient[:, None])
        if logp_gradient is not None:
            gradient.sub_(probs.mul_(logp_gradient[:, None]))
    if logp_gradient is not None:
        inside = (targets >= 0) & (targets < gradient.shape[1])
        column = targets.clamp(0, gradient.shape[1] - 1)[:, None]
        gradient.scatter_add_(1, column, (logp_gradient * inside).to(gradient.dtype)[:, None])
    return gradient


def _merge(running: Running | None, logits: Tensor, wants_weighted: bool) -> Running:
    """Merge one more tile into those so far. Overwrites `logits`."""
    top = logits.amax(1) if running is None else torch.maximum(logits.amax(1), running[0])
    logits.sub_(top[:, None])
    if not wants_weighted:
        total = logits.exp_().sum(1)
        return (top, total, None) if running is None else (top, total + running[1] * (running[0] - top).exp(), None)
    exponentials = logits.exp()
    total, weighted = exponentials.sum(1), logits.mul_(exponentials).sum(1)
    if running is None or running[2] is None:
        return top, total, weighted
    shift = running[0] - top
    factor = shift.exp()
    return top, total + running[1] * factor, weighted + factor * (running[2] + shift * running[1])


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, width: torch.dtype) -> Tensor:
    """The logits of a tile [m, v], in at least float32."""
    logits = _product(hidden, weight.to(hidden.dtype).t(), width)
    if bias is not None:
        logits.add_(bias.to(width))
    return logits if scale == 1.0 else logits.mul_(scale)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _product(left: Tensor, right: Tensor, width: torch.dtype) -> Tensor:
    """Return left @ right in `width`: on a GPU a product of half-precision numbers is summed in float32 anyway."""
    if _on_gpu(left) and left.dtype != width:
        return torch.mm(left, right, out_dtype=width)
    return torch.mm(left.to(width), right.to(width))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total += left @ right, summed in total's precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(_product(left, right, total.dtype))


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    """The targets' logits [m]; zero where a target lies in another tile."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    return logits.gather(1, targets.clamp(0, logits.shape[1] - 1)[:, None])[:, 0] * inside


def _tiles(hidden: Tensor) -> tuple[int, int]:
    return (_TOKENS_CUDA, _VOCABULARY_CUDA) if _on_gpu(hidden) else (TOKENS, VOCABULARY)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype
