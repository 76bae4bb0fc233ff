"""Limits in one line: `ttft<200ms` for each request, `ttft.p99<200ms` or `error<0.1%` for a run.

Knows the names of figures; knows nothing of how they are measured.
"""

from __future__ import annotations

import operator
import re
from typing import Literal

import msgspec

_LATENCIES = ("ttft", "ttft_service", "e2e", "e2e_service", "tpot", "ntpot", "itl_max", "send_gap")
RATES = ("request_rate", "output_token_rate", "prompt_token_rate", "goodput_rate")
_RATIOS = ("error", "goodput")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "%": 0.01, "": 1.0}
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_SHAPE = re.compile(
    r"\s*([a-z0-9_]+)(?:\.([a-z0-9.]+))?\s*(<=|>=|<|>)\s*([0-9.eE+-]+)\s*(us|ms|s|%|)\s*"
)


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """A comparison of one figure with a number (seconds, per second, or a share 0..1)."""

    text: str
    figure: str
    statistic: str | None
    comparison: Literal["<", "<=", ">", ">="]
    bound: float

    def allows(self, value: float) -> bool:
        return bool(_COMPARE[self.comparison](value, self.bound))


def _parse(text: str, field: str) -> Limit:
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise ValueError(f"{field}: {text!r} is not FIGURE[.STATISTIC] < NUMBER[us|ms|s|%]")
    figure, statistic, comparison, number, unit = match.groups()
    timed = figure in _LATENCIES or figure == "itl"
    if timed and unit not in ("us", "ms", "s"):
        raise ValueError(f"{field}: {text!r} needs a unit: us, ms or s")
    if not timed and unit not in ("%", ""):
        raise ValueError(f"{field}: {text!r}: {figure} is not a time")
    try:
        bound = float(number) * _UNITS[unit]
    except ValueError as error:
        raise ValueError(f"{field}: {text!r}: {number!r} is not a number") from error
    return Limit(
        text=text.strip(),
        figure=figure,
        statistic=statistic,
        comparison=comparison,  # pyright: ignore[reportArgumentType] one of four by the pattern
        bound=bound,
    )


def _split(texts: list[str]) -> list[str]:
    return [part for text in texts for part in re.split(r"[,\s]+(?=[a-z])", text.strip()) if part]


def parse_limits(texts: list[str]) -> list[Limit]:
    """Per-request limits, for goodput. Raises ValueError."""
    limits = [_parse(text, "goodput") for text in _split(texts)]
    for limit in limits:
        if limit.figure not in _LATENCIES or limit.statistic is not None:
            raise ValueError(f"goodput: {limit.text!r}: limit one of {', '.join(_LATENCIES)}")
    return limits


def parse_gates(texts: list[str]) -> list[Limit]:
    """Gates of a whole run. Raises ValueError."""
    gates = [_parse(text, "slo") for text in _split(texts)]
    for gate in gates:
        if gate.figure in _LATENCIES or gate.figure == "itl":
            if not re.fullmatch(r"mean|max|min|p(50|75|90|95|99|99\.9)", gate.statistic or ""):
                raise ValueError(
                    f"slo: {gate.text!r}: give {gate.figure}. mean, min, max, p50, p75, p90, p95, "
                    "p99 or p99.9"
                )
        elif gate.figure not in (*RATES, *_RATIOS) or gate.statistic is not None:
            allowed = ", ".join((*_LATENCIES, "itl", *RATES, *_RATIOS))
            raise ValueError(f"slo: {gate.text!r}: gate one of {allowed}")
    return gates
