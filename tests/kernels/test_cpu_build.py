"""Native kernels are compiled where they can be, never loaded from where others can write, and
whoever has no compiler is served by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from convserve.kernels import native_build
from convserve.kernels.cpu import CpuOps
from convserve.kernels.native_build import FLAGS, build
from convserve.kernels.native_ops import cpu_ops

if TYPE_CHECKING:
    from pathlib import Path


def test_no_compiler_means_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native_build.load.cache_clear()
    assert type(cpu_ops()) is CpuOps
    native_build.load.cache_clear()


def test_native_code_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSERVE_NATIVE", "0")
    native_build.load.cache_clear()
    assert type(cpu_ops()) is CpuOps
    monkeypatch.setenv("CONVSERVE_NATIVE", "maybe")
    native_build.load.cache_clear()
    with pytest.raises(ValueError, match="CONVSERVE_NATIVE is 'maybe'; allowed are 0"):
        cpu_ops()
    native_build.load.cache_clear()


def test_a_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if native_build.compiler() is None:
        pytest.skip("needs a C compiler")
    monkeypatch.setattr(native_build, "SOURCES", tmp_path)
    (tmp_path / "broken.c").write_text("int f(void) { return nothing; }")
    with pytest.raises(OSError, match=r"could not compile the kernels: .*error"):
        build(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_libraries_others_can_write_are_not_loaded(tmp_path: Path) -> None:
    """A planted library in a shared cache folder would run as the user who serves."""
    if native_build.compiler() is None:
        pytest.skip("needs a C compiler")
    tmp_path.chmod(0o777)
    build(tmp_path, (*FLAGS, "-O0"))
    assert not list(tmp_path.iterdir())
