"""Counters of the decode kernels of the 1.42 B shape, each launched once and cold.

    ncu --clock-control none --cache-control all --profile-from-start off --csv --page raw \
        --metrics METRICS python bench/counters.py > counters.csv
    python bench/counters.py counters.csv

METRICS is what `python bench/counters.py --metrics` prints. The second command prints a table, a
kernel a row in the order of the labels.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import _import  # noqa: F401
import torch
from convserve.kernels import triton_attention, triton_linear, triton_mlp, triton_norm
from convserve.kernels.triton_compile import compiling
from convserve.kernels.triton_qkv import qkv_rope_write
from kernel_cases import DIM, HEADS, INNER, QKV, VOCAB, H, make_batch, make_filter, normal

if TYPE_CHECKING:
    from collections.abc import Callable

CONTEXT = 1024
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM%",
    "dram__bytes_read.sum": "read",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2%",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue%",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps%",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "memory",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "barrier",
    "launch__registers_per_thread": "regs",
    "launch__waves_per_multiprocessor": "waves",
    "launch__grid_size": "grid",
    "launch__block_size": "block",
}

Calls = dict[str, "Callable[[], object]"]


def linears(rows: int) -> Calls:
    """The linear layers of a step, as the table in `tuning` has them."""

    def layer(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        return normal(rows, in_features), normal(out_features, in_features)

    qkv, o, gated = layer(3 * H, H), layer(H, H), layer(2 * INNER, H)
    down, head = layer(H, INNER), layer(VOCAB, H)
    return {
        f"q, k, v {rows}": lambda: triton_linear.linear(*qkv, None),
        f"o {rows}": lambda: triton_linear.linear(*o, None),
        f"gate, up, SiLU {rows}": lambda: triton_linear.silu_linear(*gated, None),
        f"down {rows}": lambda: triton_linear.linear(*down, None),
        f"head {rows}": lambda: triton_linear.linear(*head, None),
    }


def attention(rows: int) -> Calls:
    """One query for each of so many sequences."""
    batch = make_batch(rows, 1, CONTEXT - 1, 16)
    q = normal(rows, HEADS, DIM)
    k, v = (normal(int(batch.pages.max()) + 1, HEADS, 16, DIM) for _ in range(2))
    return {
        f"attention {rows}": lambda: triton_attention.attention(q, k, v, batch, DIM**-0.5, None)
    }


def convolutions(rows: int) -> Calls:
    """q, k and v with RoPE and KV write, after o with the norm, after gate and up with SiLU."""
    batch = make_batch(rows, 1, CONTEXT - 1, 16)
    k, v = (normal(int(batch.pages.max()) + 1, HEADS, 16, DIM) for _ in range(2))
    rope, norm = torch.randn(rows, DIM, device="cuda"), normal(H)
    residual = normal(rows, H)
    qkv, qkv_z = make_filter("lowrank", QKV)
    o, o_z = make_filter("lowrank", [(0, H)])
    gated, gated_z = make_filter("lowrank", [(0, INNER), (INNER, 2 * INNER)])

    def inputs(channels: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return normal(rows, channels), normal(rows, columns), normal(rows + 1, 4, channels)

    x, z, ring = inputs(3 * H, qkv_z)
    y, y_z, y_ring = inputs(H, o_z)
    g, g_z, g_ring = inputs(2 * INNER, gated_z)
    return {
        f"q, k, v convolved {rows}": lambda: qkv_rope_write(
            x, z, qkv, ring, None, rope, k, v, batch
        ),
        f"o convolved, norm {rows}": lambda: triton_norm.conv_add_rms_norm(
            y, y_z, o, y_ring, residual, norm, 1e-5, batch
        ),
        f"gate, up convolved, SiLU {rows}": lambda: triton_mlp.conv_silu_mul(
            g, g_z, gated, g_ring, batch
        ),
    }


def launch() -> None:
    """Every call once between the profiler's marks, its label printed before it."""
    calls = linears(8) | linears(64) | convolutions(32) | convolutions(1)
    for rows in (8, 32, 64):
        calls |= attention(rows)
    with compiling():
        for call in calls.values():
            call()
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for label, call in calls.items():
        print("LABEL", label, flush=True)
        call()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def table(path: Path) -> None:
    """What ncu wrote, a kernel a row."""
    lines = path.read_text().splitlines()
    print("; ".join(line.removeprefix("LABEL ") for line in lines if line.startswith("LABEL")))
    head, units, *rows = csv.reader(line for line in lines if line.startswith('"'))
    places = [(head.index(name), short) for name, short in METRICS.items() if name in head]
    print("kernel".ljust(24), *(short.rjust(8) for _, short in places))
    print("".ljust(24), *(units[place][:8].rjust(8) for place, _ in places))
    name = head.index("Kernel Name")
    for row in rows:
        cells = (row[place].replace(",", "")[:8].rjust(8) for place, _ in places)
        print(row[name][:24].ljust(24), *cells)


if __name__ == "__main__":
    if sys.argv[1:] == ["--metrics"]:
        print(",".join(METRICS))
    elif len(sys.argv) > 1:
        table(Path(sys.argv[1]))
    else:
        launch()
