"""The base of every group of settings, and number types that several groups share."""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

#: The type of the error that a truth value makes where a number is wanted; its context names the field.
TRUTH_VALUE = "truth_value"
#: Adam's decay rates of the two moments.
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


def is_none(value: object) -> bool:
    """`exclude_if` of a setting that came later: while it is none, dumps and addresses of stages are as they were."""
    return value is None


class Section(BaseModel):
    """A frozen group of settings; unknown keys are errors, and so are infinite numbers and truth values as numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_as_a_number(cls, given: Any) -> Any:
        """YAML reads `yes`, `on` and `true` as a truth value, which pydantic would take for the number 1."""
        for name in cls.model_fields.keys() & (given if isinstance(given, dict) else {}):
            values = given[name] if isinstance(given[name], (list, tuple)) else [given[name]]
            wanted = _types(cls.model_fields[name].annotation)
            if any(isinstance(value, bool) for value in values) and bool not in wanted and wanted & {int, float}:
                raise PydanticCustomError(TRUTH_VALUE, "a truth value stands for a number", {"field": name})
        return given

    @model_validator(mode="before")
    @classmethod
    def _whole_number_as_its_default(cls, given: Any) -> Any:
        """A default that is a whole number stays one where it is written out, as in a run's own config.yaml.

        Read as any number it would be 1.0 and not 1, also in the addresses of stages, which are hashes of text.
        """
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if not cls._is_whole_default(name, value)}

    @classmethod
    def _is_whole_default(cls, name: str, value: Any) -> bool:
        field = cls.model_fields.get(name)
        if field is None or type(field.default) is not int or type(value) not in (int, float):
            return False
        return float in _types(field.annotation) and bool(value == field.default)


def _types(annotation: Any) -> set[Any]:
    """The plain types in an annotation, those inside unions and tuples included."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType, tuple, list):
        return {found for arm in get_args(annotation) for found in _types(arm)}
    return {annotation}
