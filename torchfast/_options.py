"""The options of an op as one object: a dataclass, whose fields are the op's arguments after its tensors.

The dispatcher knows numbers and no objects. So the object gives the text of the schema, becomes the arguments
(``flat``), and is made of them again (``as_object``) for whoever serves the op: a reference, a fake, a launcher.
Nobody changes one, so that it may be hashed. It is not frozen all the same, because that makes it three times slower to
make, and a loss of a few rows would feel it.
"""

from __future__ import annotations  # it keeps a field's type as the text that a schema wants

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Options:
    """What the dataclasses of options have in common. Their fields are of type int, float or bool."""

    @classmethod
    def schema(cls) -> str:
        return ", ".join(f"{field.type} {field.name}" for field in dataclasses.fields(cls))

    @property
    def flat(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in self.__match_args__])  # type: ignore[var-annotated]


def as_object(function: Callable[..., Any], options: type[Options] | None, at: int) -> Callable[..., Any]:
    """Makes a function that takes the options as its argument ``at`` one that the op can call, with each field."""
    if options is None:
        return function
    end = at + len(options.__match_args__)

    @functools.wraps(function)
    def flat(*arguments: Any) -> Any:
        return function(*arguments[:at], options(*arguments[at:end]), *arguments[end:])

    return flat
