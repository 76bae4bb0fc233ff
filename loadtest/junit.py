"""A run's verdicts as JUnit XML, the form in which CI systems show tests.

One test case for the client's own fitness, one for each gate, one for the canary. What cannot be
decided is an error, not a failure. Knows results; judges nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

if TYPE_CHECKING:
    from pathlib import Path

    from .result import Result


def write_junit(result: Result, path: Path) -> None:
    """Writes one `testsuite`."""
    suite = Element("testsuite", name=f"convserve loadtest: {result.scenario.name}")
    _case(suite, "client", "fast enough to judge the server", "; ".join(result.audit.reasons), True)
    for verdict in result.verdicts:
        told = "not measured" if verdict.value is None else f"measured {verdict.value:.6g}"
        if verdict.low is not None and verdict.high is not None:
            told += f" [{verdict.low:.6g} .. {verdict.high:.6g}]"
        told += f" ({verdict.note})" if verdict.note else ""
        _case(suite, "slo", verdict.gate, "" if verdict.passed else told, verdict.passed is None)
    canary = result.canary
    if canary is not None:
        wrong = canary.mismatched or canary.failed
        told = f"{canary.mismatched} wrong, {canary.failed} failed, of {canary.sent}"
        _case(suite, "canary", "answers stay the same under load", told if wrong else "", False)
    for attribute, tags in (("tests", "testcase"), ("failures", "failure"), ("errors", "error")):
        suite.set(attribute, str(len(list(suite.iter(tags)))))
    suite.set("time", f"{result.full.end:.3f}")
    suite.set("timestamp", result.started.partition("+")[0])
    suite.set("hostname", result.target)
    indent(suite)
    ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def _case(suite: Element, group: str, name: str, problem: str, undecided: bool) -> None:
    case = SubElement(suite, "testcase", classname=f"loadtest.{group}", name=name)
    if problem:
        SubElement(case, "error" if undecided else "failure", message=problem)
