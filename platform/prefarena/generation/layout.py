"""Names and layouts of a model's weights: in its state dict, which training sends, and in its checkpoints.

An engine reads checkpoints, so it is sent what a checkpoint would hold. Where the two differ (experts that transformers
fuses when it loads them), tensors are taken apart first. No Ray, no vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from prefarena.generation.interface import WeightUpdateError
from prefarena.generation.weights import check_complete, check_known
from prefarena.mirror import bring


@dataclass(frozen=True)
class Layout:
    """One tensor of the state dict.

    name: in a checkpoint; None where a checkpoint holds it in parts. transposed: stored as [in, out] (GPT-2's Conv1D),
    where engines hold [out, in]. tied_to: the tensor that a tied head is, by its name in a checkpoint.
    """

    shape: tuple[int, ...]
    name: str | None
    transposed: bool = False
    tied_to: str | None = None

    @property
    def held_shape(self) -> tuple[int, ...]:
        """The shape in which an engine holds it."""
        return self.shape[::-1] if self.transposed else self.shape


class ModelLayout:
    """The tensors of a model's state dict, a tied head included. Reads the config, and no weights."""

    def __init__(self, model_path: str) -> None:
        bring(model_path)
        config: Any = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(config)
        modules = self._model.named_modules(remove_duplicate=False)
        transposed = {f"{path}.weight" for path, module in modules if isinstance(module, Conv1D)}
        first: dict[int, str] = {}
        parameters = self._model.named_parameters(remove_duplicate=False)
        owners = {name: first.setdefault(id(parameter), name) for name, parameter in parameters}
        names = {name: self._checkpoint_name(name, tensor) for name, tensor in self._model.state_dict().items()}
        self.tensors = {
            name: Layout(
                tuple(tensor.shape),
                names[name],
                name in transposed,
                names[owners[name]] if owners.get(name, name) != name else None,
            )
            for name, tensor in self._model.state_dict().items()
        }
        self._converted = any(name != stored for name, stored in names.items())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: layout.shape for name, layout in self.tensors.items()}

    @property
    def transposed(self) -> frozenset[str]:
        """Tensors that an engine holds transposed."""
        return frozenset(name for name, layout in self.tensors.items() if layout.transposed)

    def as_checkpoint(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Convert a state dict, or a part of one, to the names and parts of a checkpoint, a tied head included."""
        return revert_weight_conversion(self._model, dict(tensors)) if self._converted else tensors

    def to_send(self, tensors: Mapping[str, Tensor], merged_heads: Collection[str]) -> Mapping[str, Tensor]:
        """Convert a whole state dict to what an engine is sent: `as_checkpoint` without heads that it has no layer for.

        merged_heads: those of `tied`. Raises WeightUpdateError unless names and shapes are those of the model.
        """
        check_complete({name: tuple(tensor.shape) for name, tensor in tensors.items()}, self.shapes)
        return self.as_sent(tensors, merged_heads)

    def as_sent(self, tensors: Mapping[str, Tensor], merged_heads: Collection[str]) -> Mapping[str, Tensor]:
        """Convert a part of a state dict to what an engine is sent."""
        return {name: tensor for name, tensor in self.as_checkpoint(tensors).items() if name not in merged_heads}

    def one_by_one(
        self, named_tensors: Iterable[tuple[str, Tensor]], merged_heads: Collection[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Convert a whole state dict, in its own order, to what an engine is sent; none of its tensors is kept.

        Raises WeightUpdateError as soon as a tensor of the model is left out, or is another than the model's.
        """
        expected = iter(self.tensors)
        for name, tensor in named_tensors:
            check_known({name: tuple(tensor.shape)}, self.shapes)
            self._check_next(name, next(expected, None))
            yield from self.as_sent({name: tensor}, merged_heads).items()
            del tensor
        self._check_next(None, next(expected, None))

    @staticmethod
    def _check_next(name: str | None, expected: str | None) -> None:
        if name != expected:
            wrong = f"missing: {expected}" if expected else f"sent twice: {name}"
            raise WeightUpdateError(f"a weight update must hold every tensor of the model in its order; {wrong}")

    def sent_shapes(self, merged_heads: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what `one_by_one` gives, in its order."""
        sent = self.one_by_one(self._model.state_dict().items(), merged_heads)
        return {name: tuple(tensor.shape) for name, tensor in sent}

    @property
    def tied(self) -> frozenset[str]:
        """Tied heads, by their names in a checkpoint."""
        return frozenset(each.name for each in self.tensors.values() if each.tied_to and each.name)

    def _checkpoint_name(self, name: str, tensor: Tensor) -> str | None:
        parts = revert_weight_conversion(self._model, {name: tensor})
        [(first, part), *rest] = parts.items()
        return None if rest or part.shape != tensor.shape else first
