"""The command line against the mock: worker processes, files, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from convserve.loadtest.cli import app
from convserve.loadtest.compare import compare_servers
from convserve.loadtest.html import html_page
from convserve.loadtest.options import build_scenario
from convserve.loadtest.result import write_json
from convserve.loadtest.run import RunError, Settings, probe, run
from convserve.loadtest.scenario import make_scenario
from convserve.loadtest.sweep import SweepOptions, read_sweep, sweep
from typer.testing import CliRunner


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_run_writes_its_report_and_gates_by_exit_code(mock, tmp_path):
    mock.program(ttft=[0.01], itl=[0.002])
    out = tmp_path / "run"
    common = [mock.url, "-r", 40, "-n", 40, "--prompt-tokens", 8, "--output-tokens", 5, "-q"]
    command = [sys.executable, "-m", "convserve.loadtest", *map(str, common)]
    command += ["--workers", "2", "--out", str(out), "--slo", "ttft.p50<5ms", "--api-key", "secret"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # a gate that fails is 1; on a machine too busy to judge it is 2
    assert done.returncode in (1, 2), done.stdout + done.stderr
    raw = json.loads(out.with_suffix(".json").read_text())
    assert raw["full"]["completed"] == 40
    assert raw["audit"]["workers"] == 2
    assert raw["verdicts"][0]["passed"] is False
    assert "secret" not in out.with_suffix(".json").read_text()
    assert raw["command"][:2] == ["convserve", "loadtest"]
    assert raw["server"]["/version"] == {"version": "mock-1"}
    assert sorted(raw["requests"]["index"]) == list(range(40))
    assert out.with_suffix(".html").stat().st_size > 20_000
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 40
    again = invoke("report", out.with_suffix(".json"), "-o", tmp_path / "again.html")
    assert again.exit_code == 0
    assert "FAIL" in again.output
    same = invoke("compare", out.with_suffix(".json"), out.with_suffix(".json"))
    assert same.exit_code in (0, 2)
    assert "ttft.p50" in same.output


def test_ci_gets_its_files(mock, tmp_path):
    pytest.importorskip("pyarrow")
    mock.program(ttft=[0.01], itl=[0.002])
    out = tmp_path / "run"
    done = invoke(
        *(mock.url, "-c", 2, "-n", 12, "--prompt-tokens", 4, "--output-tokens", 3, "-q"),
        *("--vocab", 1000, "--slo", "error<50%", "--stop-on-slo", "--stop-width", "1%"),
        *("--out", out, "--parquet", "--junit", tmp_path / "gates.xml"),
    )
    # 2 on a machine too busy to judge
    assert done.exit_code in (0, 2), done.output
    assert 'name="error&lt;50%"' in (tmp_path / "gates.xml").read_text()
    assert {p.suffix for p in tmp_path.glob("run.*")} == {".json", ".parquet", ".csv", ".html"}
    scenario = json.loads(out.with_suffix(".json").read_text())["scenario"]
    assert scenario["stop"] == {"width": 0.01, "figures": [], "slo": True}
    refused = invoke(mock.url, "-n", 2, "--stop-on-slo")
    assert refused.exit_code == 2
    assert "stop.slo: needs a gate" in refused.output


async def test_the_canary_is_learned_alone_and_checked_under_load(mock):
    mock.program(ttft=[0.005], itl=[0.001], corrupt_from=20)
    scenario = make_scenario(
        {
            "load": {"concurrency": 4, "max_requests": 30},
            "traffic": [{"prompt_tokens": 5, "output_tokens": 3}],
            "canary": {"every": 5, "max_tokens": 6},
        }
    )
    result, _ = await run(scenario, Settings(url=mock.url))
    assert result.canary.sent == 6
    assert result.canary.mismatched >= 1
    assert result.canary.matched >= 1
    assert result.exit_code == 1


async def test_probes_find_model_ids_and_words(mock):
    mock.program()
    base = {"load": {"max_requests": 1}}
    found = await probe(Settings(url=mock.url), make_scenario(base))
    assert (found.model, found.vendor_fields, found.prompts.kind) == ("mock", True, "ids")
    assert len(found.prompts.ids) >= 64
    chat = make_scenario({**base, "request": {"endpoint": "chat"}})
    found = await probe(Settings(url=mock.url), chat)
    assert found.prompts.kind == "text"
    assert found.prompts.tokens_per_word == pytest.approx(1.25)
    assert found.prompts.overhead == pytest.approx(7)
    mock.program(reject_vendor_fields=True)
    found = await probe(Settings(url=mock.url), make_scenario(base))
    assert found.vendor_fields is False


async def test_calibrated_text_comes_out_at_the_wanted_length(mock):
    mock.program(ttft=[0.001], itl=[0.001])
    scenario = make_scenario(
        {
            "load": {"concurrency": 2, "max_requests": 10},
            "request": {"endpoint": "chat"},
            "traffic": [{"prompt_tokens": 100, "output_tokens": 2}],
        }
    )
    _, records = await run(scenario, Settings(url=mock.url, scrape=False))
    assert all(abs(r.prompt_tokens - 100) <= 2 for r in records)


async def test_nobody_there_is_one_line():
    with pytest.raises(RunError, match=r"127\.0\.0\.1:1"):
        await probe(
            Settings(url="http://127.0.0.1:1"), make_scenario({"load": {"max_requests": 1}})
        )


async def test_a_sweep_finds_the_capacity_of_a_server_with_slots(mock, tmp_path):
    """2 slots of 50 ms carry 40 requests/s, however many arrive."""
    mock.program(ttft=[0.05], itl=[0.001], slots=2, precise=False)
    scenario = make_scenario(
        {
            "load": {"max_requests": 1},
            "traffic": [{"prompt_tokens": 4, "output_tokens": 1}],
            "goodput": ["ttft<100ms"],
        }
    )
    options = SweepOptions(duration=1.0, rates=[10.0, 80.0], bisections=1)
    found = await sweep(scenario, Settings(url=mock.url, scrape=False), options)
    low, high, middle = found.points
    assert low.request_rate == pytest.approx(10, rel=0.5)
    assert high.request_rate < 50
    assert high.ttft_p50 > 3 * low.ttft_p50
    assert high.goodput < 0.7
    assert middle.level == pytest.approx(45 if low.goodput >= 0.99 else 5, abs=40)
    assert found.conclusions
    write_json(found, tmp_path / "sweep.json")
    assert read_sweep(tmp_path / "sweep.json") == found
    assert '"kind":"sweep"' in html_page(found)


async def test_servers_are_compared_in_turn(mock):
    mock.program(ttft=[0.005], itl=[0.002])
    scenario = make_scenario(
        {
            "load": {"concurrency": 2, "max_requests": 40},
            "traffic": [{"prompt_tokens": 4, "output_tokens": 4}],
        }
    )
    order = []
    settings = Settings(url=mock.url, scrape=False)
    found, a, b = await compare_servers(
        scenario, settings, settings, 1, 0.05, on_round=lambda name, _: order.append(name)
    )
    assert order == ["A", "B", "A"]
    assert (len(a), len(b)) == (2, 1)
    assert {row.figure for row in found.rows} >= {"ttft.p50", "itl.p50", "request_rate"}


def test_scenarios_are_listed_and_explained():
    listed = invoke("scenarios")
    assert listed.exit_code == 0
    for name in ("chat", "rag", "code", "burst", "soak", "prefix"):
        assert name in listed.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ftp://x"], "is not http"),
        (["http://x", "--scenario", "nope"], "neither a file nor one of"),
        (["http://x", "--slo", "ttft<3"], "needs a unit"),
        (["http://x", "--slo", "goodput>=99%"], "needs --goodput"),
        (["http://x", "--set", "load.rate"], "is not FIELD=VALUE"),
        (["http://x", "--prefix-tree", "4by2"], "is not NxTOKENS"),
        (["http://x", "--rate", "3", "--concurrency", "4"], "max_in_flight"),
        (["compare", "http://x", "y.json"], "compare two URLs"),
        (["report", "/no/such.json"], "not a sweep"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_flags_change_a_scenario_in_one_way():
    made = build_scenario(
        "code",
        ["traffic.1.weight=9", "request.timeout=5"],
        load={"concurrency": 3, "max_requests": 5},
        traffic={"prompt_tokens": "40"},
    )
    assert made.load.strategy == "concurrent"
    assert made.load.rate is None
    assert made.traffic[1].weight == 9
    assert {t.prompt_tokens for t in made.traffic} == {"40"}
    assert made.request.timeout == 5
    assert build_scenario(None, None, load={"rate": 2.0}).load.strategy == "poisson"
    assert build_scenario(None, None).load.max_duration == 30


def test_a_shipped_load_is_scaled_to_the_machine():
    burst = build_scenario("burst", None).load.stages
    half = build_scenario("burst", None, scale="0.5:0.1").load.stages
    assert [s.duration for s in half] == pytest.approx([s.duration / 10 for s in burst])
    assert [s.level for s in half] == pytest.approx([s.level / 2 for s in burst])
    assert half[2].to == burst[2].to / 2
    prefix = build_scenario("prefix", None, scale="0.1:0.1").load
    assert (prefix.concurrency, prefix.max_requests) == (1, 40)
    # flags are what is meant, whatever the scale
    assert build_scenario("chat", None, load={"rate": 3.0}, scale="0.5").load.rate == 3.0
    for wrong in ("0", "1:0", "x", "1:2:3"):
        with pytest.raises(ValueError, match="is not RATE or RATE:TIME"):
            build_scenario("chat", None, scale=wrong)


async def test_a_load_beyond_the_models_context_is_refused_by_name(mock):
    """Found out in mid-run it would be a report full of errors, and the server's fault."""
    settings = Settings(url=mock.url, scrape=False)
    table = {
        "name": "essays",
        "load": {"max_requests": 3},
        "traffic": [{"name": "long", "prompt_tokens": 4000, "output_tokens": 97}],
    }
    message = "scenario essays: a session of traffic 'long' comes to 4097 tokens in 1 turns, and "
    with pytest.raises(RunError, match=f"{message}mock takes 4096"):
        await run(make_scenario(table), settings)
    # the fields that the server takes were asked for; no load was sent
    assert all(len(entry["prompt"]) < 100 for entry in mock.log())
