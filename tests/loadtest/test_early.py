"""Loads that end before their time: not too soon, not without saying why."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from convserve.loadtest.early import EarlyStop, check_stop, interval
from convserve.loadtest.histogram import Histogram
from convserve.loadtest.limits import parse_gates
from convserve.loadtest.run import Settings, run
from convserve.loadtest.scenario import make_scenario
from convserve.loadtest.stats import percentile
from convserve.loadtest.worker import Progress


def scenario(**fields):
    load = {"strategy": "poisson", "rate": 10, "max_duration": 600}
    return make_scenario({"load": load, **fields})


def progress(values, failed=0):
    found = Histogram.of(values).to_sparse()
    return Progress(
        time=0.0,
        completed=len(values),
        failed={"reset": failed} if failed else {},
        latency={"ttft": found, "itl": found, "e2e": found},
    )


def feed(watch, pieces):
    """How many messages it took to end the load; None if it goes on."""
    for number, values in enumerate(pieces):
        watch.update(progress(values), 0)
        if watch.reason is not None:
            return number + 1
    return None


def noisy(generator, wander=0.0):
    """Pieces of 20 latencies around 100 ms whose middle wanders slowly."""
    middle = 0.0
    while True:
        middle = 0.9 * middle + wander * generator.normal()
        yield np.exp(0.2 * generator.normal(size=20) + middle) * 0.1


def test_intervals_of_histograms_are_those_of_the_report():
    generator = np.random.default_rng(0)
    pieces = [next(noisy(generator)) for _ in range(100)]
    slices = [dict(Histogram.of(piece).to_sparse()) for piece in pieces]
    for q in (0.5, 0.9, 0.99):
        found = interval(slices, q)
        assert found is not None
        value, low, high = found
        exact = percentile(np.concatenate(pieces), q)
        assert value == pytest.approx(exact.value, rel=0.005)
        assert high - low == pytest.approx(exact.high - exact.low, rel=0.6)
    assert interval(slices[:3], 0.5) is None
    assert interval(slices[:30], 0.999) is None


def test_a_load_ends_when_its_intervals_are_tight():
    """A wandering server needs a longer look than a steady one; a tighter interval too."""
    took = {}
    for width, wander in ((0.05, 0.0), (0.02, 0.0), (0.05, 0.05)):
        watch = EarlyStop(scenario(stop={"width": width}))
        pieces = noisy(np.random.default_rng(1), wander)
        took[width, wander] = feed(watch, (next(pieces) for _ in range(2000)))
    assert 20 < took[0.05, 0.0] < took[0.02, 0.0]
    assert took[0.05, 0.0] < (took[0.05, 0.05] or 2000)


def test_a_lost_gate_ends_a_load_and_a_kept_one_does_not():
    pieces = noisy(np.random.default_rng(2))
    values = [next(pieces) for _ in range(300)]
    rule = {"stop": {"slo": True}}
    assert feed(EarlyStop(scenario(slo=["ttft.p90<300ms"], **rule)), values) is None
    lost = EarlyStop(scenario(slo=["error<50%", "ttft.p90<80ms"], **rule))
    assert feed(lost, values) == 22
    assert lost.reason == "ttft.p90<80ms is lost"
    assert feed(EarlyStop(scenario(slo=["ttft.p90<80ms"])), values) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": {"figures": ["speed.p50"]}}, "stop.figures: 'speed.p50'"),
        ({"stop": {"width": 2}}, "stop.width: 2"),
        ({"stop": {"slo": True}}, "stop.slo: needs a gate"),
        ({"stop": {"slo": True}, "slo": ["request_rate>3"]}, "stop.slo: needs a gate"),
    ],
)
def test_rules_that_could_never_hold_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_stop(scenario(**fields))


async def test_what_is_in_flight_is_awaited(mock):
    """Giving requests up would count them as failures of the server."""
    mock.program(ttft=[0.05], itl=[0.02], fail_every=2, fail="status:500")
    made = scenario(
        load={"concurrency": 4, "max_duration": 60},
        traffic=[{"prompt_tokens": 4, "output_tokens": 5}],
        request={"vocab": 1000},
        slo=["error<1%"],
        stop={"slo": True},
    )
    assert parse_gates(made.slo)
    async with asyncio.timeout(20):
        result, records = await run(made, Settings(url=mock.url, workers=2, scrape=False))
    assert result.stopped == "error<1% is lost"
    assert result.verdicts[0].passed is False
    assert {record.outcome for record in records} == {"ok", "http_error"}
    assert not result.interrupted
