# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
"""Programmatic dependent launch: a kernel starts while the one before it on the stream still runs.

On Hopper and later the kernels of this room are launched so. The law that makes it safe: a kernel
calls `wait_previous` in every program, and before that touches nothing but what no kernel of the
step writes: weights, the step's batch (uploaded before it, which waits for all kernels before), and
keys, values and ring rows of earlier steps. It waits there until the kernel before has finished and
its writes are visible; that one waited for its own predecessor, so all of the stream's past is.
Launch, ramp-up and such reading thus overlap with the kernels before. Capture in a CUDA graph keeps
it. Calls that share state are steps of their own: without an upload, something else must part them.

Also what a device's shared memory allows. Knows no kernel.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton import knobs

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def start_next(PDL: tl.constexpr):
    """Lets the next kernel start as soon as every program of this one has called this."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_previous(PDL: tl.constexpr):
    """Waits until the previous kernel is done and what it wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@lru_cache(maxsize=64)
def can_overlap(device: torch.device) -> bool:
    """Whether kernels on `device` may be launched so."""
    if device.type != "cuda" or torch.version.hip is not None or knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def stages_that_fit(most: int, stage_bytes: int, x: Tensor, other_bytes: int = 0) -> int:
    """`most` pipeline stages, or as many as x's device has shared memory for, perhaps none.

    Shapes are tuned on a device with 227 KiB; others have less.
    """
    room = _shared_memory(x.device) - other_bytes - 2048
    return max(0, min(most, room // stage_bytes))


def overlapped(x: Tensor) -> dict[str, bool]:
    """Launch arguments for a kernel on x's device: its PDL constant, and the launch attribute."""
    return {"PDL": True, "launch_pdl": True} if can_overlap(x.device) else {"PDL": False}
