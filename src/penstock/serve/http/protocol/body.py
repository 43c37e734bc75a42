"""What all bodies of requests have in common. No type is bent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator

from penstock.core.errors import nearest

#: Larger numbers are refused where a number counts something.
LARGEST = 2**31 - 1

Token = Annotated[int, Field(ge=0, le=LARGEST)]

Count = Annotated[int, Field(ge=1, le=LARGEST)]


def _token_in_digits(key: str) -> str:
    if not re.fullmatch("[0-9]{1,9}", key):
        raise ValueError(f"{key[:20]!r} is no token: its number is wanted, in digits")
    return key


#: A token as the key of an object.
TokenKey = Annotated[
    str, AfterValidator(_token_in_digits), WithJsonSchema({"type": "string", "pattern": "^[0-9]{1,9}$"})
]


class Body(BaseModel):
    """Base of all of them. Fields that are not known are kept apart: :func:`unknown` names them. Clients write null for
    a field that they leave out: it has its default then."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        if value is not None or field.is_required():
            return value
        return field.get_default(call_default_factory=True, validated_data={})


def unknown(body: BaseModel) -> Iterator[tuple[str, str]]:
    """The fields of ``body``, and of what is in it, that are not known, each with a word about the nearest that are."""
    known = {field.alias or name for name, field in type(body).model_fields.items()}
    if isinstance(body, Body):
        yield from ((name, nearest(name, known)) for name in body.model_extra or {})
    for name, field in type(body).model_fields.items():
        value = getattr(body, name)
        for place, each in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(each, BaseModel):
                prefix = f"{field.alias or name}." + ("" if place is None else f"{place}.")
                yield from ((prefix + inner, near) for inner, near in unknown(each))
