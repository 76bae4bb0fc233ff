"""Importing GGUF files from a light process: into a folder, or into the cache at most once.

Standard library only, so the server calls this without loading numpy, gguf or torch. The import
itself runs in a process of its own, which gives its memory back when it ends.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

FORMAT = 1
"""Part of each cache key; raised when the importer would write something different."""


class GGUFImportError(ValueError):
    """A GGUF file cannot be imported; the message is one line naming the file and the reason."""


def cache_folder() -> Path:
    """The folder of everything cached: CONVSERVE_CACHE, or `convserve` in the user's cache."""
    if override := os.environ.get("CONVSERVE_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convserve"


def imported_folder(sha256: str) -> Path:
    """Where the import of the GGUF file with this hash lives, whether or not it is there yet."""
    return cache_folder() / f"gguf-{sha256[:32]}-v{FORMAT}"


def is_imported(sha256: str) -> bool:
    """Folders appear by rename, whole or not at all, so one file shows that all are there."""
    return (imported_folder(sha256) / "config.json").is_file()


def import_cached(file: Path, progress: bool = False) -> Path:
    """The Hugging Face folder made from `file`, imported now unless its content was before.

    Raises:
        GGUFImportError: the file cannot be read or is of a kind that is not supported.
    """
    try:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise GGUFImportError(f"{file}: {error.strerror}") from error
    folder = imported_folder(sha256)
    if not is_imported(sha256):
        try:
            import_file(file, folder, progress)
        except GGUFImportError:
            if not is_imported(sha256):  # or else another process was first
                raise
    return folder


def import_file(file: Path, out: Path, progress: bool = False) -> None:
    """Writes the Hugging Face folder of `file` to the new folder `out`.

    Raises:
        GGUFImportError: as `import_cached`; also that `out` exists or cannot be written.
    """
    command = [sys.executable, "-m", "convserve.engine.models.gguf_import", str(file), str(out)]
    done = subprocess.run(
        [*command, "--progress"] if progress else command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        lines = done.stdout.splitlines() or [f"{file}: import ended with code {done.returncode}"]
        raise GGUFImportError(lines[-1])
