"""GuideLLM and AIPerf finish a run, and count what our own load test counts.

Breaks for: whoever compares servers with the tools they know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from load_tools import Measured, Shape, aiperf, guidellm, ours

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from running import Served


@pytest.mark.parametrize("name", ["ours", "guidellm", "aiperf"])
def test_a_closed_loop_is_answered_in_full(
    server: Served, tool: Callable[..., str], tmp_path: Path, name: str
) -> None:
    shape = Shape(
        server.url, server.model, server.folder, requests=8, prompt_tokens=64, output_tokens=16
    )
    runs: dict[str, Callable[[], Measured]] = {
        "ours": lambda: ours(shape),
        "guidellm": lambda: guidellm(tool("guidellm"), shape, tmp_path),
        "aiperf": lambda: aiperf(tool("aiperf"), shape, tmp_path),
    }
    measured = runs[name]()
    assert measured.output_tokens == [16] * 8
    for ttft, tpot, e2e in zip(measured.ttft, measured.tpot, measured.e2e, strict=True):
        assert 0 < ttft < e2e
        assert ttft + 15 * tpot == pytest.approx(e2e, rel=0.02, abs=0.01)
