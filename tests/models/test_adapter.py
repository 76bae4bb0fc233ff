"""An adapter is laid over the one base it was trained on: with another, or with tensors that do not
fit, a model would answer and be wrong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from convserve.engine import LLM
from convserve.engine.config import EngineConfig
from convserve.engine.inspection import inspect_model
from convserve.engine.models import ModelError
from convserve.engine.models.adapter import base_identity, write_adapter
from safetensors.torch import load_file, save_file
from tiny_models import config_of, write_model

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = list(range(3, 40))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(whole, base): one model, with and without its convolutions."""
    folder = tmp_path_factory.mktemp("adapter")
    whole, base = folder / "whole", folder / "base"
    # bfloat16 is what adapters are stored in.
    weights = {n: t.bfloat16() for n, t in write_model(whole, config_of("lowrank all")).items()}
    save_file(weights, whole / "model.safetensors")
    base.mkdir()
    plain = {n: t for n, t in weights.items() if "dynamic_conv" not in n}
    save_file(plain, base / "model.safetensors")
    config = config_of("lowrank all") | {"model_type": "llama"}
    del config["conv"], config["qk_norm"]
    (base / "config.json").write_text(json.dumps(config))
    return whole, base


@pytest.fixture
def adapter(parts: tuple[Path, Path], tmp_path: Path) -> Path:
    whole, base = parts
    weights = load_file(whole / "model.safetensors")
    conv = {k: v for k, v in config_of("lowrank all")["conv"].items() if v is not None}
    filters = {n: t for n, t in weights.items() if "dynamic_conv" in n}
    write_adapter(tmp_path / "adapter", base, conv, filters)
    return tmp_path / "adapter"


def score(model: Path, **options: Any) -> list[float | None]:
    return LLM(model, memory="16MiB", dtype="float32", **options).score([TOKENS])[0]


def test_base_and_adapter_are_the_whole_model(parts: tuple[Path, Path], adapter: Path) -> None:
    whole, base = parts
    assert score(base, conv_adapter=adapter)[1:] == pytest.approx(score(whole)[1:], abs=1e-6)
    assert score(base)[1:] != pytest.approx(score(whole)[1:], abs=1e-1)


def test_inspection_counts_its_state_and_parameters(
    parts: tuple[Path, Path], adapter: Path
) -> None:
    whole, base = parts
    config = EngineConfig(model=str(base), conv_adapter=str(adapter), dtype="float32")
    with_adapter = inspect_model(base, config).splitlines()
    alone = inspect_model(whole, EngineConfig(model=str(whole), dtype="float32")).splitlines()
    for line in ("convolutions", "parameters", "conv state", "replay length"):
        [expected] = [x for x in alone if x.startswith(line)]
        assert expected in with_adapter


def test_another_base_is_refused(parts: tuple[Path, Path], adapter: Path, tmp_path: Path) -> None:
    _, base = parts
    other = tmp_path / "other"
    other.mkdir()
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors")
    (other / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(ModelError, match=r"adapter\.json: is for a base with weights \w{16}, and"):
        score(other, conv_adapter=adapter)


def test_the_identity_is_of_the_tensors_not_of_the_files(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    _, base = parts
    weights = load_file(base / "model.safetensors")
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in shards.items():
        save_file({n: weights[n] for n in some}, tmp_path / file, metadata={"format": "pt"})
    index = {"weight_map": {n: file for file, some in shards.items() for n in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert base_identity(tmp_path) == base_identity(base)


def test_a_base_with_convolutions_is_refused(parts: tuple[Path, Path], adapter: Path) -> None:
    whole, _ = parts
    with pytest.raises(ModelError, match="has convolutions of its own"):
        score(whole, conv_adapter=adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.dynamic_conv_up.proj_out"), "up.proj_out is missing"),
        (lambda t: t.update(extra=torch.ones(2)), "tensor extra is not part of this model"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(24)}),
            "model.norm.weight is part of the base already",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.dynamic_conv_up.proj_out": torch.ones(2, 160)}),
            r"up.proj_out has shape \[2, 160\], expected \[3, 160\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    parts: tuple[Path, Path], adapter: Path, change: Any, message: str
) -> None:
    file = adapter / "adapter.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=message):
        score(parts[1], conv_adapter=adapter)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "adapter.json: Expecting"),
        ("{}", "format None is not supported"),
        ('{"format": "convserve-conv-adapter-1"}', "needs base_sha256"),
        (None, "not a conv adapter"),
    ],
)
def test_a_description_that_is_none_is_refused(
    parts: tuple[Path, Path], adapter: Path, text: str | None, message: str
) -> None:
    if text is None:
        (adapter / "adapter.json").unlink()
    else:
        (adapter / "adapter.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        score(parts[1], conv_adapter=adapter)


def test_a_convolution_that_does_not_fit_is_named(parts: tuple[Path, Path], adapter: Path) -> None:
    path = adapter / "adapter.json"
    raw = json.loads(path.read_text())
    raw["conv"]["layers"] = [0, 7]
    path.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"adapter\.json: conv\.layers must list layers in 0\.\.2"):
        score(parts[1], conv_adapter=adapter)
