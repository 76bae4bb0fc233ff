"""Which implementation of the ops a device gets: decided once, when a model is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .cpu_fixed import fixed_cpu_ops
from .native_ops import cpu_ops
from .ops import Ops

if TYPE_CHECKING:
    import torch

Backend = Literal["auto", "reference", "triton", "deterministic"]


def select_ops(device: torch.device, backend: Backend = "auto") -> Ops:
    """The ops for `device`; `backend` forces one (tests, debugging).

    "auto" is Triton on a CUDA device, the CPU's own ops on a CPU and the reference elsewhere.
    "triton" on a CPU works under Triton's interpreter only (`TRITON_INTERPRET=1` before Triton is
    first imported). "deterministic" gives a row the same bits whatever else is in the batch: on a
    CPU ops of its own, elsewhere Triton with one way to multiply and attend.
    """
    if backend == "auto" and device.type == "cpu":
        return cpu_ops()
    if backend == "deterministic" and device.type == "cpu":
        return fixed_cpu_ops()
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):
        return Ops()
    # Imported only where it runs: Triton exists for Linux alone.
    if backend == "deterministic":
        from .triton_fixed import FixedTritonOps

        return FixedTritonOps()
    from .triton_ops import TritonOps

    return TritonOps()
