"""Compiling ahead stands in for a function of Triton's: the pinned one must be as expected."""

from __future__ import annotations

import pytest
from convserve.kernels import Ops, triton_compile
from convserve.kernels.triton_ops import TritonOps
from triton.runtime.jit import JITFunction


def test_the_pinned_triton_is_known() -> None:
    """Otherwise a start on an empty cache takes a minute longer, and nobody is told why."""
    assert triton_compile.can_compile_ahead()


def test_another_triton_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_compile, "EXPECTED", ("self", "source"))
    launch = JITFunction.run
    with TritonOps().compiling() as is_walk:
        assert not is_walk
        assert JITFunction.run is launch


def test_what_is_stood_in_for_comes_back_after_an_error() -> None:
    launch, compile_now = JITFunction.run, JITFunction._do_compile

    def start() -> None:
        with TritonOps().compiling() as is_walk:
            assert is_walk
            assert JITFunction.run is not launch
            raise ValueError("a model")

    with pytest.raises(ValueError, match="a model"):
        start()
    assert JITFunction.run is launch
    assert JITFunction._do_compile is compile_now


def test_other_backends_compile_nothing() -> None:
    with Ops().compiling() as is_walk:
        assert not is_walk
