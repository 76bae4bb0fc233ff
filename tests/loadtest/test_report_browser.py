"""Reports in a real browser: each draws itself, without an error and without a network.

Breaks for: whoever opens a report that was sent to them. Skipped where there is no chromium.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
from convserve.loadtest.compare import compare_results
from convserve.loadtest.html import write_html
from convserve.loadtest.sweep import Point, Sweep, SweepOptions
from made_runs import records, result

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no chromium", allow_module_level=True)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


def made_sweep() -> Sweep:
    run = result(records(100))
    points = [
        Point(
            label=f"{rate}/s", kind=kind, level=rate, requests=50, request_rate=rate,
            output_token_rate=8.0 * rate, ttft_p50=0.05, ttft_p99=None, e2e_p50=0.1 + 0.02 * rate,
            e2e_p99=None, tpot_p50=0.01, goodput=0.99, goodput_low=0.9, error_ratio=0.0,
            valid=True, saturated=False,
        )
        for kind in ("closed", "open") for rate in (1, 2, 4, 8)
    ]  # fmt: skip
    return Sweep(
        started=run.started, command=run.command, target=run.target, model=run.model,
        scenario=run.scenario, options=SweepOptions(), environment={}, server={}, points=points,
        capacity=8.0, knee=4.0, slo_rate=2.0, conclusions=["capacity: 8 requests/s"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("subject", "headings", "charts"),
    [
        (
            lambda: result(records(400, fail=0.1), slo=["error<1%"], goodput=["ttft<50ms"]),
            {"Latency", "Distributions", "Over time", "Requests", "Failures", "To repeat this"},
            9,
        ),
        (made_sweep, {"Latency against throughput", "Points"}, 4),
        (lambda: compare_results([result(records())], [result(records(seed=1))]), {"Figures"}, 8),
    ],
    ids=["run", "sweep", "comparison"],
)
@pytest.mark.parametrize("colors", ["light", "dark"])
def test_a_report_draws_itself_offline(
    browser: Any, tmp_path: Path, subject: Any, headings: set[str], charts: int, colors: str
) -> None:
    write_html(subject(), tmp_path / "report.html")
    context = browser.new_context(color_scheme=colors, offline=True)
    page = context.new_page()
    wrong: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    shown = page.locator("h2").evaluate_all("all => all.map(h => h.firstChild.textContent)")
    assert headings <= set(shown)
    assert page.locator("svg").count() >= charts
    assert not page.locator("body").inner_text().count("NaN")
    assert page.evaluate("document.body.scrollWidth <= window.innerWidth")
    assert [wrong, len(asked)] == [[], 1]
    context.close()
