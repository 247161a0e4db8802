"""Whole numbers as they are typed after a flag: `200_000`, `2e5`."""

from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from tokenenv.errors import InvalidArgument
from tokenenv.safety.values import fit

NUMBERS = ConstructorRegistry()
"""The rule for whole numbers. `with NUMBERS:` around `tyro.cli` makes tyro use it."""


@NUMBERS.primitive_rule
def _whole(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=_number,
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def _number(args: list[str]) -> int:
    try:
        return fit("value", args[0], int)
    except InvalidArgument as error:
        raise ValueError(f"invalid literal for a whole number: {args[0]!r}") from error
