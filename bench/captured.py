"""Calls in a CUDA graph, and which kernels they are made of."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of all calls, one after another; the first is made once before, to compile it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def report_kernels(title: str, run: Callable[[], object], turns: int) -> None:
    """What each kernel, told apart by its grid, adds to the time of `run`: from the end of the one
    before it to its own, since kernels overlap."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(turns):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [e for e in events if e.get("cat") == "kernel"]
    events.sort(key=lambda e: e["ts"] + e["dur"])
    totals: dict[tuple[str, str], list[float]] = {}
    last = -math.inf
    for event in events:
        end = event["ts"] + event["dur"]
        key = (event["name"], str(event["args"].get("grid")))
        totals.setdefault(key, []).append(min(end - last, event["dur"]))
        last = end
    total = sum(map(sum, totals.values())) / turns
    print(f"kernels of {title}: {total:.0f} us in {len(events) / turns:.0f} launches", flush=True)
    for (name, grid), times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:18]:
        count = len(times) / turns
        each = sum(times) / len(times)
        text = f"{each * count:8.1f} us = {count:5.1f} x {each:7.2f}"
        print(f"  {text}  {name[:44]} {grid}", flush=True)
