"""Numbers that a user gives, and what they may be."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Bound(NamedTuple):
    """What a number may be: its type, int or float; in words; and a test of it. Infinity and NaN it may never be."""

    kind: type
    words: str
    allows: Callable[[float], bool]

    def parse(self, text: str | float) -> float:
        """The number that the text is. Raises ValueError, whose message says what it ought to be."""
        try:
            value = self.kind(text)
            right = value == float(text) and math.isfinite(value) and self.allows(value)
        except (ValueError, OverflowError, TypeError):  # no number; one of hundreds of digits; no text
            right = False
        if not right:
            shown = str(text) if len(str(text)) <= 40 else f"{str(text)[:37]}..."
            raise ValueError(f"{shown} is not {self.words}")
        return value


COUNT = Bound(int, "a whole number of at least 1", lambda x: x >= 1)
POSITIVE = Bound(float, "a finite number above 0", lambda x: x > 0)
NOT_NEGATIVE = Bound(float, "a finite number of at least 0", lambda x: x >= 0)
FRACTION = Bound(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
YES_OR_NO = Bound(int, "1 (yes) or 0 (no)", lambda x: x in (0, 1))
