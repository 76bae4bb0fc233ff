"""From records to verdicts: gates, comparisons, sweeps, files. No server."""

from __future__ import annotations

import asyncio
import csv
import json
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from convserve.loadtest.audit import audit
from convserve.loadtest.compare import compare_results
from convserve.loadtest.html import html_page
from convserve.loadtest.junit import write_junit
from convserve.loadtest.limits import parse_gates, parse_limits
from convserve.loadtest.parquet import write_parquet
from convserve.loadtest.records import (
    AuditSample,
    jsonl_row,
)
from convserve.loadtest.result import read_result, write_csv, write_json, write_jsonl
from convserve.loadtest.sweep import Saturation, knee_of
from convserve.loadtest.terminal import print_comparison, print_result
from convserve.loadtest.worker import Progress
from made_runs import QUIET, records, result
from rich.console import Console


def test_figures_follow_their_formulas():
    made = records()
    found = result(made).full
    ttft = np.array([r.first_token - r.intended for r in made])
    assert found.latency["ttft"].percentiles["p99"].value == pytest.approx(np.quantile(ttft, 0.99))
    tpot = np.array([(r.last_token - r.first_token) / 7 for r in made])
    assert found.latency["tpot"].mean.value == pytest.approx(tpot.mean())
    assert found.latency["ntpot"].mean.value == pytest.approx(
        np.mean([(r.end - r.intended) / 8 for r in made])
    )
    assert found.latency["itl"].count == 600 * 7
    assert found.latency["itl"].mean.value == pytest.approx(tpot.mean(), rel=1e-3)
    assert found.rates["request_rate"].value == pytest.approx(600 / found.end)
    assert found.rates["output_token_rate"].value == pytest.approx(4800 / found.end)
    assert (found.prompt_tokens, found.cached_tokens) == (6000, 3000)
    busy = sum(r.end - r.dispatched for r in made) / found.end
    assert found.concurrency.value == pytest.approx(busy, rel=0.1)


def test_the_steady_state_leaves_out_a_slow_beginning():
    made = records()
    for k, record in enumerate(made[:60]):
        shift = 0.5 * (1 - k / 60)
        for field in ("first_byte", "first_token", "last_token", "end"):
            setattr(record, field, getattr(record, field) + shift)
    found = result(made)
    assert found.steady is not None
    assert found.steady_note == "found"
    assert 3.0 < found.steady.start < 12.0
    assert found.steady.latency["ttft"].mean.value < found.full.latency["ttft"].mean.value
    assert found.steady.latency["ttft"].mean.value == pytest.approx(0.0523, rel=0.1)


def test_growing_queues_have_no_steady_state():
    made = records()
    for k, record in enumerate(made):
        for field in ("first_byte", "first_token", "last_token", "end"):
            setattr(record, field, getattr(record, field) + 0.05 * k)
    found = result(made)
    assert found.steady is None or "beyond the server's capacity" in found.steady_note


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        ("ttft.p99<200ms", True),
        ("ttft.p50<20ms", False),
        ("itl.p99<0.013s", True),
        ("error<0.1%", True),
        ("output_token_rate>1000", False),
        ("goodput>=99%", False),
        ("e2e.p99.9<10s", None),
        ("e2e.max<10s", True),
    ],
)
def test_gates_decide_the_exit_code(gate, passed):
    found = result(records(), slo=[gate], goodput=["ttft<60ms,e2e<1s"])
    assert found.verdicts[0].passed is passed
    assert found.exit_code == {True: 0, False: 1, None: 2}[passed]


def test_goodput_is_the_share_within_every_limit():
    made = records(fail=0.2)
    found = result(made, goodput=["ttft<50ms", "tpot<20ms"]).full
    good = sum(r.outcome == "ok" and r.first_token - r.intended < 0.05 for r in made)
    assert found.goodput_ratio.value == pytest.approx(good / 600)
    assert found.goodput_ratio.low < good / 600 < found.goodput_ratio.high
    assert found.rates["goodput_rate"].value == pytest.approx(good / found.end)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["ttft.p99<200"], "needs a unit"),
        (["ttft<200ms"], "give ttft"),
        (["speed<3"], "gate one of"),
        (["ttft.p99=3ms"], "is not FIGURE"),
        (["ttft.p98<3ms"], "give ttft"),
        (["error<3ms"], "error is not a time"),
    ],
)
def test_wrong_gates_are_explained(texts, message):
    with pytest.raises(ValueError, match=message):
        parse_gates(texts)


def test_limits_are_read_from_one_string_or_many():
    assert [x.figure for x in parse_limits(["ttft<200ms, tpot<20ms", "e2e<=3s"])] == [
        "ttft",
        "tpot",
        "e2e",
    ]
    with pytest.raises(ValueError, match="limit one of"):
        parse_limits(["ttft.p99<3ms"])


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (AuditSample(loop_lag=[0.02] * 50, wall_seconds=1), "event loop was late"),
        (AuditSample(cpu_seconds=0.95, wall_seconds=1), "95% of a core"),
    ],
)
def test_a_client_at_its_limit_invalidates_the_run(sample, reason):
    found = result(records(), sample=sample, slo=["ttft.p99<200ms"])
    assert not found.audit.valid
    assert reason in found.audit.reasons[0]
    assert found.exit_code == 2
    late = [msgspec.structs.replace(r, dispatched=r.intended + 0.02) for r in records(100)]
    assert "sends were late" in audit(late, [QUIET]).reasons[0]
    assert "no request was sent" in audit([], [QUIET]).reasons


def test_a_wrong_canary_fails_the_run():
    made = records(100)
    for match in (True, False):
        canary = msgspec.structs.replace(made[0], kind="canary", canary_match=match)
        assert result([*made, canary]).exit_code == (0 if match else 1)


def test_a_run_is_the_same_as_itself_and_a_slower_one_is_worse():
    base, twin, slow = result(records()), result(records(seed=1)), result(records(scale=1.3))
    same = compare_results([base], [twin])
    assert {row.verdict for row in same.rows} <= {"same", "unclear"}
    assert same.exit_code == 0
    worse = compare_results([base], [slow])
    verdicts = {row.figure: row.verdict for row in worse.rows}
    assert verdicts["ttft.p50"] == verdicts["tpot.p50"] == verdicts["itl.p50"] == "worse"
    row = next(row for row in worse.rows if row.figure == "tpot.p50")
    assert row.low < 0.3 < row.high or row.change == pytest.approx(0.3, abs=0.02)
    assert worse.exit_code == 1
    better = compare_results([slow], [base])
    assert {r.verdict for r in better.rows if r.figure.startswith("e2e")} == {"better"}


def test_interleaved_rounds_count_the_difference_between_rounds():
    """Five runs that differ from day to day must not prove a small difference."""
    a = [result(records(scale=s, seed=k)) for k, s in enumerate((1.0, 1.2, 0.85, 1.1))]
    b = [result(records(scale=s, seed=9 + k)) for k, s in enumerate((1.15, 0.9, 1.05))]
    rows = {row.figure: row for row in compare_results(a, b).rows}
    assert rows["tpot.p50"].verdict == "unclear"
    assert rows["tpot.p50"].noise > 0.15
    assert rows["tpot.p50"].low < 0 < rows["tpot.p50"].high


def test_comparisons_warn_of_what_makes_them_unfair():
    invalid = result(records(200), sample=AuditSample(loop_lag=[1.0], wall_seconds=1))
    found = compare_results([result(records(200, fail=0.1), seed=4)], [invalid])
    text = " ".join(found.notes)
    assert "INVALID" in text
    assert "failed requests" in text
    assert "different scenarios" in text
    assert "ttft.p99 not compared: needs 368" in text
    assert found.exit_code == 2


def test_files_hold_what_was_measured(tmp_path):
    made = records(120, fail=0.1)
    found = result(made, goodput=["ttft<50ms"])
    write_json(found, tmp_path / "r.json")
    raw = json.loads((tmp_path / "r.json").read_text())
    assert raw["schema"] == "convserve.loadtest/1"
    assert raw["full"]["latency"]["ttft"]["percentiles"]["p99"]["reason"].startswith("needs 368")
    again = read_result(tmp_path / "r.json")
    assert again.full == found.full
    assert again.itl_batches == found.itl_batches
    write_jsonl(made, tmp_path / "r.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(lines) == 120
    assert lines[3]["chunk_tokens"] == [1] * 8
    assert lines[3]["chunk_times"][0] == pytest.approx(
        made[3].first_token - made[3].intended, abs=1e-6
    )
    write_csv(found, tmp_path / "r.csv")
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    p50 = next(r for r in rows if (r["figure"], r["statistic"]) == ("ttft", "p50"))
    assert float(p50["value"]) == found.full.latency["ttft"].percentiles["p50"].value
    (tmp_path / "r.json").write_text('{"schema": "convserve.loadtest/9"}')
    with pytest.raises(ValueError, match=r"schema 'convserve\.loadtest/9'"):
        read_result(tmp_path / "r.json")


def test_a_table_of_requests_holds_what_the_lines_hold(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    made = records(50, fail=0.2)
    made[7].cached_tokens = None
    write_parquet(made, tmp_path / "r.parquet")
    table = parquet.read_table(tmp_path / "r.parquet")
    assert table.to_pylist() == [jsonl_row(record) for record in made]
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds["first_token"] == "double"
    assert kinds["message"] == "string"
    assert kinds["output_tokens"] == "int64"
    assert kinds["reused"] == "bool"
    assert kinds["chunk_times"].startswith("list<")


def test_ci_sees_which_gate_failed_and_which_cannot_be_told(tmp_path):
    made = records()
    canary = msgspec.structs.replace(made[0], kind="canary", canary_match=False)
    gates = ["ttft.p50<20ms", "ttft.p99<200ms", "e2e.p99.9<10s"]
    write_junit(result([*made, canary], slo=gates), tmp_path / "r.xml")
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert [suite.get(name) for name in ("tests", "failures", "errors")] == ["5", "2", "1"]
    told = {case.get("name"): [child.tag for child in case] for case in suite}
    assert told == {
        "fast enough to judge the server": [],
        "ttft.p50<20ms": ["failure"],
        "ttft.p99<200ms": [],
        "e2e.p99.9<10s": ["error"],
        "answers stay the same under load": ["failure"],
    }
    failure = suite.find(".//failure")
    assert failure is not None
    assert "measured 0.0" in failure.get("message", "")
    late = AuditSample(loop_lag=[1.0], wall_seconds=1)
    write_junit(result(made, sample=late), tmp_path / "late.xml")
    assert ElementTree.parse(tmp_path / "late.xml").getroot().get("errors") == "1"


def test_the_page_needs_no_network_and_escapes_what_servers_say():
    found = result(records(80, fail=0.2))
    found.server = {"/version": "</script><script>alert(1)</script>"}
    page = html_page(found)
    assert "alert(1)</script>" not in page
    assert page.count("<script>") == 1
    for outside in ("src=", "href=", "@import", "url(", "fetch("):
        assert outside not in page
    payload = page.split("const DATA = ", 1)[1].split(";\n", 1)[0]
    assert json.loads(payload)["full"]["requests"] == 80


def test_tables_can_be_printed():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        print_result(result(records(fail=0.1), slo=["error<1%"], goodput=["ttft<50ms"]), console)
        print_comparison(compare_results([result(records())], [result(records(300))]), console)
    text = console.export_text()
    for part in ("TTFT", "steady state", "truncated", "FAIL", "goodput", "noise"):
        assert part in text


def test_the_knee_is_where_the_curve_bends():
    rates = [1.0, 2, 4, 6, 8, 9, 10]
    latencies = [0.1 / (1 - r / 10.5) for r in rates]
    assert 6 <= knee_of(rates, latencies) <= 9
    assert knee_of(rates, [0.1] * 7) is None
    assert knee_of(rates[:3], latencies[:3]) is None


async def test_a_hopeless_load_is_called_off():
    stop = asyncio.Event()
    watch = Saturation(stop)
    generator = np.random.default_rng(0)
    for k in range(80):
        watch.update(Progress(time=k / 4, in_flight=int(generator.poisson(8))), 0)
    assert not watch.found
    rising = Saturation(stop)
    for k in range(80):
        rising.update(Progress(time=k / 4, in_flight=5 + 2 * k), 0)
    assert rising.found
    assert stop.is_set()
