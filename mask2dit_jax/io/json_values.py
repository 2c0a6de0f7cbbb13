"""Values of a config.json that another library wrote: an absent key means that library's default."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from mask2dit_jax.errors import UserError

_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def read_value(raw: Mapping[str, Any], key: str, kind: type, default: Any, file: str) -> Any:
    """Return the value of a key as `kind`, or the default if the key is absent.

    Args:
        raw: contents of the file.
        key: name of the value.
        kind: bool, int or float.
        default: what the class that wrote the file takes for an absent key.
        file: name of the file in messages.

    Raises:
        UserError: the value is of another kind, such as null, or not finite.
    """
    value = raw.get(key, default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{file}: {key}={value!r} is not {_KINDS[kind]}; download the file again")
    return value


def read_fields(
    raw: Mapping[str, Any],
    fields: Iterable[dataclasses.Field],
    file: str,
    names: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the values of dataclass fields, by field name.

    Args:
        raw: contents of the file.
        fields: fields to read; their types are bool, int or float.
        file: name of the file in messages.
        names: key of each field; a field that is not among them has its own name as key.
        defaults: the other library's defaults where they are not those of the fields.

    Raises:
        UserError: see `read_value`.
    """
    names, defaults = names or {}, defaults or {}
    return {
        field.name: read_value(
            raw, names.get(field.name, field.name), field.type, defaults.get(field.name, field.default), file
        )
        for field in fields
    }
