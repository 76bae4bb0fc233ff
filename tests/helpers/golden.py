"""Reference numbers made by other people's code (tests/data/golden; its README says by whose)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

if TYPE_CHECKING:
    from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "data" / "golden"


@functools.cache
def cases(kind: str) -> list[dict[str, Any]]:
    """All cases of a kind, such as `op.lowrank`."""
    index = json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))
    found = [case for case in index["cases"] if case["kind"] == kind]
    assert found, f"no golden case of kind {kind}"
    return found


@functools.cache
def _file(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name)


def tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an op case, by their short names."""
    prefix = case["prefix"]
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in _file(case["file"]).items()
        if name.startswith(prefix)
    }


def tolerance(case: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `torch.testing.assert_close`."""
    return {"atol": case["tolerance"]["atol"], "rtol": case["tolerance"]["rtol"]}
