"""A loss that the user supplies as a Python function, found by its name."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from prefarena.errors import EntryError, UserError
from prefarena.functions import NAME, load_function, own_traceback, source_digest
from prefarena.objectives.preference import PairLogps
from prefarena.settings.off_policy import Pairwise

_ARGUMENTS = ("policy", "reference", "labels", "num_tokens")
#: What the prediction of memory asks of torch, and does without where shapes depend on numbers: no fault of a function.
_CANNOT_BE_PREDICTED = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


class Custom(Pairwise):
    """A loss of yours on pairs: a Python function by its name.

    `objective(policy, reference, labels, num_tokens, **settings)` returns (losses, h), both [B], one number a pair: the
    loss, and what the metrics call the margin. policy, reference, num_tokens: `PairLogps`, which have `.chosen` and
    `.rejected`, [B]; log-probs are nats per sequence. labels: P(chosen > rejected), [B].
    """

    kind: Literal["custom"] = "custom"
    objective: str = Field(
        pattern=NAME, description="`module:function`, importable where workers run, e.g. from the working directory."
    )
    settings: dict[str, bool | int | float | str] = Field({}, description="Passed on to the function, by name.")

    #: Not in a table of formulas: it is the user's.
    formula: ClassVar[str] = ""

    def address(self) -> dict[str, Any]:
        return super().address() | {"source": source_digest(self.objective)}

    def check(self) -> None:
        _try(self)

    def pair_losses(
        self, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps
    ) -> tuple[Tensor, Tensor]:
        try:
            function = self.load()
        except UserError as error:  # it was there before any work was done; another node may not have it
            raise EntryError(str(error)) from None
        try:
            found = function(policy, reference, labels, num_tokens, **self.settings)
        except _CANNOT_BE_PREDICTED:
            raise
        except Exception as error:  # the user's function: whatever it raises is shown as it was raised
            raise EntryError(f"objective {self.objective} raised an error:\n{own_traceback(error)}") from None
        problem = _not_losses(found, len(labels))
        if problem is not None:
            raise EntryError(f"objective {self.objective}: {problem}")
        losses, h = found
        return losses, h

    def load(self) -> Any:
        """Return the function. Raises UserError where it does not exist, or cannot be called with these settings."""
        return _loaded(self.objective, tuple(self.settings))


@cache
def _loaded(name: str, settings: tuple[str, ...]) -> Any:
    return load_function(name, "objective", _ARGUMENTS, dict.fromkeys(settings))


def _not_losses(found: object, size: int) -> str | None:
    """Say what is wrong with the value that a function returned for `size` pairs; None if nothing is."""
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        return f"it must return two tensors, the losses and h, not {type(found).__name__} {found!r:.60}"
    for what, values in zip(("losses", "h"), found, strict=True):
        if not isinstance(values, Tensor):
            return f"the {what} it returns must be a tensor, not {type(values).__name__} {values!r:.60}"
        if values.shape != (size,):
            return (
                f"the {what} it returns must have one number for each of {size} pairs, not shape {list(values.shape)}"
            )
        if not values.is_floating_point():
            return f"the {what} it returns must be floating-point numbers, not {values.dtype}"
    return None


# ------------------------------------------------------------------------------------- before any work


def _try(method: Custom) -> None:
    """Call the function with a few pairs. Raises UserError where training with it would not work."""
    policy, reference, labels, num_tokens = _pairs()
    losses = _tried(method, policy, reference, labels, num_tokens)
    if not losses.requires_grad:
        raise UserError(
            f"objective {method.objective}: its losses have no gradient with respect to the policy's log-probs; do "
            f"not detach them"
        )
    leaves = (policy.chosen, policy.rejected)
    gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
    if not all(bool(torch.isfinite(values).all()) for values in (losses, *gradients)):
        raise UserError(
            f"objective {method.objective}: its losses or their gradients were not finite when it was tried on "
            f"{len(labels)} ordinary pairs"
        )
    parts = [
        _tried(method, _cut(policy, rows), _cut(reference, rows), labels[rows], _cut(num_tokens, rows))
        for rows in (slice(0, 1), slice(1, None))
    ]
    if not torch.allclose(torch.cat(parts), losses, rtol=1e-4, atol=1e-5):
        raise UserError(
            f"objective {method.objective}: the loss of a pair changes with the other pairs of the batch, so it would "
            "depend on micro-batches and the number of workers; each pair's loss must be its own"
        )


def _tried(method: Custom, policy: PairLogps, reference: PairLogps, labels: Tensor, num_tokens: PairLogps) -> Tensor:
    """Return the function's losses. Raises UserError where it raises an error, or returns something else."""
    function = method.load()
    try:
        found = function(policy, reference, labels, num_tokens, **method.settings)
    except Exception as error:  # the user's function: whatever it raises, it cannot be used
        raise UserError(
            f"objective {method.objective}: it raised {error!r} when it was tried on {len(labels)} pairs"
        ) from None
    problem = _not_losses(found, len(labels))
    if problem is not None:
        raise UserError(f"objective {method.objective}: {problem}")
    losses: Tensor = found[0]
    return losses


def _pairs() -> tuple[PairLogps, PairLogps, Tensor, PairLogps]:
    """Three pairs that the policy and the reference order differently, with one label of each sort."""
    policy = PairLogps(
        torch.tensor([-3.0, -2.5, -6.0], requires_grad=True), torch.tensor([-4.0, -1.5, -5.0], requires_grad=True)
    )
    reference = PairLogps(torch.tensor([-3.5, -2.0, -6.5]), torch.tensor([-3.75, -1.75, -4.5]))
    num_tokens = PairLogps(torch.tensor([2.0, 1.0, 4.0]), torch.tensor([3.0, 1.0, 2.0]))
    return policy, reference, torch.tensor([1.0, 0.25, 0.0]), num_tokens


def _cut(values: PairLogps, rows: slice) -> PairLogps:
    return PairLogps(values.chosen[rows], values.rejected[rows])
