"""A retrofit starts as the model it was made from: identity filters change nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from convserve.engine import LLM
from golden import GOLDEN

if TYPE_CHECKING:
    from types import ModuleType

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("placement", [["q", "k", "v"], ["q", "k", "v", "o", "gate", "up", "down"]])
def test_identity_filters_change_nothing(tmp_path: Path, placement: list[str]) -> None:
    plain, tokens = GOLDEN / "models" / "hf_llama", list(range(40, 80))
    add = recipe("add_convolutions").add_convolutions
    add(plain, tmp_path / "same", placement, 15, 4)
    add(plain, tmp_path / "other", placement, 15, 4, noise=0.1)
    before, same, other = (
        LLM(folder, memory="16MiB").score([tokens])[0]
        for folder in (plain, tmp_path / "same", tmp_path / "other")
    )
    assert same[1:] == pytest.approx(before[1:], abs=1e-5)
    assert other[1:] != pytest.approx(before[1:], abs=1e-2)
