"""Triton's interpreter for the kernel tests where there is no GPU, and the CPU's native ops as
compiled for this machine and for older ones.

Triton reads `TRITON_INTERPRET` when a kernel is decorated. Its own library (`tl.sum`, ...) is
decorated when Triton is first imported, which another test module may have done before this file
is read; those functions are wrapped again here. Its `tl.dot` multiplies the bit patterns of
bfloat16 operands; they are widened first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from convserve.kernels import native_build
from convserve.kernels.native_ops import NativeOps

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
    from triton.runtime.jit import JITFunction

    for module in [m for name, m in sys.modules.items() if name.startswith("triton.language")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))
    assert not isinstance(tl.sum, JITFunction)

    multiply = InterpreterBuilder.create_dot  # pyright: ignore[reportAttributeAccessIssue]

    def widened_dot(self, a, b, *rest):
        a, b = (
            self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return multiply(self, a, b, *rest)

    InterpreterBuilder.create_dot = widened_dot  # pyright: ignore[reportAttributeAccessIssue]

TARGETS = {
    "this machine": native_build.FLAGS,
    "avx2": (*native_build.FLAGS, "-march=haswell"),
}


@pytest.fixture(scope="module", params=TARGETS)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    """The native ops."""
    if native_build.compiler() is None or not {"avx2", "fma"} <= native_build.cpu_features():
        pytest.skip("needs a C compiler and an x86 CPU with AVX2")
    folder = native_build.cache_folder()
    return NativeOps(native_build.build(folder, TARGETS[request.param]))
