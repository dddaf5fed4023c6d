"""Sizes of models, from the config files that lie beside their weights."""

from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def from_sizes(kind: type[T], sizes: dict[str, Any]) -> T:
    """The dataclass `kind` with the sizes of a whole config file; what else the file says is passed over."""
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in sizes.items() if name in known})
