"""JSON from files, and checks of its values, made where they enter."""

import json
import math
from collections.abc import Callable, Collection
from typing import Any

Check = Callable[[Any], bool]

LONGEST = 2000  # characters of a name


def loads(text: str | bytes) -> Any:
    """The value that the JSON text holds. Raises ValueError where it is no JSON, or holds NaN or an infinite number."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite, parse_int=_of_a_float)
        _ensure_shallow(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _ensure_shallow(value: Any, levels: int = 50) -> None:
    """Raise RecursionError where more lists and dicts are in each other than any of ours."""
    if levels == 0:
        raise RecursionError
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _ensure_shallow(part, levels - 1)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _of_a_float(text: str) -> int:
    if len(text) > 300:
        raise ValueError(f"{text[:40]}... is more than a float can hold")
    return int(text)


def number(low: float = -1e300, high: float = 1e300) -> Check:
    """Whether a value is a number from low to high; True and False are none."""
    # Compared, as a whole number of hundreds of digits can't become a float.
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def whole(low: int, high: int = 10**15) -> Check:
    """Whether a value is a whole number from low to high."""
    return lambda value: type(value) is int and low <= value <= high


def text(value: Any) -> bool:
    """Whether it is text of at most LONGEST characters."""
    return isinstance(value, str) and len(value) <= LONGEST


def a_dict(value: Any) -> bool:
    """Whether it is a dict."""
    return isinstance(value, dict)


def list_of(check: Check, least: int = 1, most: int = 1_000_000) -> Check:
    """Whether a value is a list of least to most values that the check allows."""
    return lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(check, value))


def flaw(values: dict[str, Any], checks: dict[str, Check], needed: Collection[str] = ()) -> str:
    """The first key of the checks that is needed and missing, or whose value fails its check; "" where none is."""
    found = (
        name for name, check in checks.items() if not (check(values[name]) if name in values else name not in needed)
    )
    return next(found, "")
