"""Random lengths and times, written in one line: `128`, `uniform:64:512`, `lognormal:256:0.8`.

One grammar for scenario files and flags. Knows nothing of what is measured in these numbers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import numpy as np

GRAMMAR = (
    "NUMBER, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA[:MIN:MAX], exponential:MEAN[:MIN:MAX] "
    "or file:PATH"
)


class Length(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed distribution; `draw` samples it."""

    kind: str
    numbers: tuple[float, ...] = ()
    low: float = 0.0
    high: float = math.inf

    @classmethod
    def parse(cls, text: str | float, field: str) -> Length:
        """Reads the grammar above.

        Raises:
            ValueError: `field: what is wrong`.
        """
        try:
            return cls(kind="fixed", numbers=(_number(text),))
        except ValueError:
            pass
        kind, _, rest = str(text).partition(":")
        try:
            if kind == "file":
                return cls(kind="file", numbers=_read_numbers(Path(rest)))
            parts = tuple(_number(part) for part in rest.split(":"))
            if kind == "uniform" and len(parts) == 2 and parts[0] <= parts[1]:
                return cls(kind=kind, numbers=parts)
            fixed = {"lognormal": 2, "exponential": 1}.get(kind)
            if fixed is not None and len(parts) in (fixed, fixed + 2):
                low, high = parts[fixed:] or (0.0, math.inf)
                if low <= high:
                    return cls(kind=kind, numbers=parts[:fixed], low=low, high=high)
        except (ValueError, OSError, msgspec.DecodeError) as error:
            raise ValueError(f"{field}: {text!r}: {error}") from error
        raise ValueError(f"{field}: {text!r} is not {GRAMMAR}")

    def draw(self, generator: np.random.Generator) -> float:
        """One sample (for `file`, one of its numbers at random)."""
        if self.kind == "fixed":
            return self.numbers[0]
        if self.kind == "file":
            return self.numbers[int(generator.integers(len(self.numbers)))]
        if self.kind == "uniform":
            return float(generator.uniform(self.numbers[0], self.numbers[1]))
        if self.kind == "lognormal":
            value = self.numbers[0] * math.exp(self.numbers[1] * float(generator.standard_normal()))
        else:
            value = float(generator.exponential(self.numbers[0]))
        return min(max(value, self.low), self.high)

    def draw_count(self, generator: np.random.Generator) -> int:
        """One sample rounded, at least 1."""
        if self.kind == "uniform":
            low, high = (round(number) for number in self.numbers)
            return max(int(generator.integers(low, high + 1)), 1)
        return max(round(self.draw(generator)), 1)


def _number(text: str | float) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{text} is not a finite number >= 0")
    return value


def _read_numbers(path: Path) -> tuple[float, ...]:
    raw = path.read_text()
    items = msgspec.json.decode(raw) if raw.lstrip().startswith("[") else raw.split()
    numbers = tuple(_number(item) for item in items)
    if not numbers:
        raise ValueError("the file holds no numbers")
    return numbers
