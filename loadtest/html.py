"""Writes a run, a sweep or a comparison as one HTML file that needs no network.

Puts data, style and script of `assets/` into a single page; the script draws. Measures nothing.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .compare import Comparison
from .result import Result

if TYPE_CHECKING:
    from .sweep import Sweep

_ASSETS = Path(__file__).parent / "assets"
_MAX_REQUESTS = 20_000


def _thinned(result: Result) -> dict[str, Any]:
    """A run as plain data, with at most 20,000 requests (evenly chosen) for the drawings."""
    data = msgspec.to_builtins(result)
    columns = data["requests"]
    count = len(columns["intended"])
    if count > _MAX_REQUESTS:
        keep = [round(k * (count - 1) / (_MAX_REQUESTS - 1)) for k in range(_MAX_REQUESTS)]
        data["requests"] = {name: [column[k] for k in keep] for name, column in columns.items()}
        data["requests_shown"] = f"{_MAX_REQUESTS:,} of {count:,} requests, evenly chosen"
    return data


def html_page(subject: Result | Sweep | Comparison) -> str:
    """The page's text."""
    data = _thinned(subject) if isinstance(subject, Result) else msgspec.to_builtins(subject)
    # "<" never appears inside the script, so no string of the data can end or open a tag
    payload = msgspec.json.encode(data).decode().replace("<", "\\u003c")
    name = "comparison" if isinstance(subject, Comparison) else subject.scenario.name
    page = (_ASSETS / "report.html").read_text()
    for mark, text in (
        ("%TITLE%", escape(f"convserve loadtest: {name}")),
        ("%STYLE%", (_ASSETS / "report.css").read_text()),
        ("%CHARTS%", (_ASSETS / "charts.js").read_text()),
        ("%SCRIPT%", (_ASSETS / "report.js").read_text()),
        ("%DATA%", payload),
    ):
        page = page.replace(mark, text)
    return page


def write_html(subject: Result | Sweep | Comparison, path: Path) -> None:
    path.write_text(html_page(subject), encoding="utf-8")
