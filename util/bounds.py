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

    def fits(self, value: object) -> bool:
        """Whether the value, parsed from a file, is such a number already."""
        try:
            return type(value) in (int, self.kind) and self.parse(value) == value
        except ValueError:
            return False


COUNT = Bound(int, "a whole number of at least 1", lambda x: x >= 1)
POSITIVE = Bound(float, "a finite number above 0", lambda x: x > 0)
NOT_NEGATIVE = Bound(float, "a finite number of at least 0", lambda x: x >= 0)
FRACTION = Bound(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
YES_OR_NO = Bound(int, "1 (yes) or 0 (no)", lambda x: x in (0, 1))
IMAGE_SIDE = Bound(int, "a whole number from 1 to 10,000", lambda x: 1 <= x <= 10_000)
# With these, images from 0 to 1 that are normalised in float32 stay finite.
MEAN = Bound(float, "a number from 0 to 1,000,000", lambda x: 0 <= x <= 1e6)
STD = Bound(float, "a number from 0.000001 to 1,000,000", lambda x: 1e-6 <= x <= 1e6)
