"""Checks of the fields of a dataclass: their types, and their ranges."""

import dataclasses
import math
from typing import Any, get_args, get_origin

import numpy as np

_TYPE_NAMES = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a string"}


def check_types(section: Any) -> None:
    """Check every field of a frozen dataclass against its annotation, for use in `__post_init__`.

    Annotations may be bool, int, float, str, tuples `tuple[X, ...]` of these, and dataclasses. NumPy scalars become
    Python's, whole numbers of float fields become floats, lists become tuples; nothing else is converted.

    Raises:
      ValueError: a value is not of its field's type, or a number is infinite or not a number.
    """
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        object.__setattr__(section, field.name, _checked(field.name, value, field.type))


def check_at_least(section: Any, bound: float, *names: str) -> None:
    """Raise a ValueError unless each of the fields `names` is `bound` or more."""
    for name in names:
        value = getattr(section, name)
        if not value >= bound:
            raise ValueError(f"{name}={value} must be at least {bound}.")


def check_positive(section: Any, *names: str) -> None:
    """Raise a ValueError unless each of the fields `names` is greater than 0."""
    for name in names:
        value = getattr(section, name)
        if not value > 0:
            raise ValueError(f"{name}={value} must be greater than 0.")


def check_below(section: Any, bound: float, *names: str) -> None:
    """Raise a ValueError unless each of the fields `names` is less than `bound`."""
    for name in names:
        value = getattr(section, name)
        if not value < bound:
            raise ValueError(f"{name}={value} must be less than {bound}.")


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value as the type `kind` holds it."""
    if get_origin(kind) is tuple:
        (element, _) = get_args(kind)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}={value!r} must be a tuple, each element {_TYPE_NAMES[element]}.")
        return tuple(_checked(f"{name}[{i}]", x, element) for i, x in enumerate(value))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, kind):
            raise ValueError(f"{name}={value!r} must be a {kind.__name__}.")
        return value
    scalar = value.item() if isinstance(value, np.generic) else value
    accepted = int | float if kind is float else kind
    if not isinstance(scalar, accepted) or isinstance(scalar, bool) != (kind is bool):
        raise ValueError(f"{name}={value!r} must be {_TYPE_NAMES[kind]}.")
    try:
        scalar = kind(scalar)
    except OverflowError:  # an int past the largest float
        scalar = math.inf
    if kind is float and not math.isfinite(scalar):
        raise ValueError(f"{name}={value!r} must be {_TYPE_NAMES[kind]}.")
    return scalar
