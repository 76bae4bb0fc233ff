"""Gates of a run, judged by its figures: passed, failed, or not to be told from so few samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from .limits import RATES

if TYPE_CHECKING:
    from .figures import Figures
    from .limits import Limit


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One gate, judged."""

    gate: str
    passed: bool | None
    """None: the run cannot tell (too few samples)."""
    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


def judge(gate: Limit, figures: Figures) -> Verdict:
    """Compares a gate with a run."""
    if gate.figure == "error":
        low, high = figures.error_ratio_low, figures.error_ratio_high
        return _verdict(gate, figures.error_ratio, low, high)
    if gate.figure == "goodput":
        share = figures.goodput_ratio
        if share is None:
            return Verdict(gate=gate.text, passed=None, value=None, note="no --goodput limits set")
        return _verdict(gate, share.value, share.low, share.high)
    if gate.figure in RATES:
        rate = figures.rates.get(gate.figure)
        if rate is None:
            return Verdict(gate=gate.text, passed=None, value=None, note="not measured")
        return _verdict(gate, rate.value, rate.low, rate.high)
    measured = figures.latency.get(gate.figure)
    if measured is None:
        note = figures.refused.get(gate.figure, "no request has this figure")
        return Verdict(gate=gate.text, passed=None, value=None, note=note)
    statistic = gate.statistic or ""
    if statistic == "mean":
        return _verdict(gate, measured.mean.value, measured.mean.low, measured.mean.high)
    if statistic in ("min", "max"):
        return _verdict(gate, getattr(measured, statistic), None, None)
    point = measured.percentiles[statistic]
    if point.value is None:
        return Verdict(gate=gate.text, passed=None, value=None, note=point.reason or "")
    return _verdict(gate, point.value, point.low, point.high)


def _verdict(gate: Limit, value: float, low: float | None, high: float | None) -> Verdict:
    note = ""
    if low is not None and high is not None and low <= gate.bound <= high:
        note = "the interval includes the limit"
    return Verdict(
        gate=gate.text, passed=gate.allows(value), value=value, low=low, high=high, note=note
    )
