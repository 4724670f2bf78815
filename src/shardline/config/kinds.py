"""The kinds of value a key can hold: whole numbers, numbers, dtypes, lists of names, and sections of keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, WithJsonSchema
from pydantic.fields import FieldInfo

__all__ = [
    "Betas",
    "Dtype",
    "Integer",
    "Model",
    "Number",
    "OptionalInteger",
    "PerGroup",
    "Section",
    "Strings",
    "adapter",
    "key",
    "left_out",
    "section_of",
]

OWN = "Shardline's own key."

DTYPE_SPELLINGS = {
    **dict.fromkeys(("fp32", "float32", "torch.float32"), "fp32"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16", "torch.half"), "fp16"),
}


def _whole(value: Any) -> Any:
    """JSON has one kind of number: Python reads 5e8 and 1e5 as floats, and users mean integers."""
    counts = isinstance(value, float) and value.is_integer() and abs(value) < 2**63
    return int(value) if counts else value


def _infinite_is_none(value: Any) -> Any:
    return None if isinstance(value, float) and math.isinf(value) else _whole(value)


def _dtype(value: Any) -> Any:
    return DTYPE_SPELLINGS.get(value, value) if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Integer = Annotated[int, BeforeValidator(_whole)]
OptionalInteger = Annotated[int | None, BeforeValidator(_infinite_is_none)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Dtype = Annotated[
    Literal["fp32", "bf16", "fp16"],
    BeforeValidator(_dtype),
    WithJsonSchema({"enum": list(DTYPE_SPELLINGS)}),
]
Strings = Annotated[tuple[str, ...], BeforeValidator(_listed)]
PerGroup = Annotated[
    float | tuple[float, ...],
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "number"}}]}),
]
Betas = Annotated[
    tuple[float, float],
    BeforeValidator(_listed),
    WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}),
]


class Section(BaseModel):
    """A JSON object of the configuration: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())

    open_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that hold an object whose keys depend on a neighbouring value (``params`` on ``type``)."""

    @classmethod
    def model_of(cls, field: str, raw: Mapping[str, Any]) -> Model | None:
        """The model of an open field in ``raw``, an object of this section as written; None where it is not known."""
        return None


Model = type[Section]


def left_out(value: object) -> bool:
    """Whether a section written as ``value`` is as good as not written: null, or false; 0 is neither."""
    return value is None or value is False


def key(default: Any, description: str, *, own: bool = False, **limits: Any) -> Any:
    """A key with its default, what it means, whether DeepSpeed lacks it, and limits such as ``ge`` (``...``: required).

    A section class as the default stands for that section with its own defaults.
    """
    text = f"{description} {OWN}" if own else description
    if isinstance(default, type):
        return Field(default_factory=default, description=text, **limits)
    return Field(default, description=text, **limits)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section class of a field declared as ``S`` or ``S | None``, None for a field that holds a plain value."""
    annotation = field.annotation
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


@cache
def adapter(section: type[Section], name: str) -> TypeAdapter[Any]:
    """The validator of one plain field, limits included, as a section would apply it."""
    field = section.model_fields[name]
    annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return TypeAdapter(annotation)
