"""Compiles the native CPU kernels once per user and machine, and loads them.

The sources in `native/` are plain C with a plain C interface, so that whatever C compiler the
machine has builds them in a few seconds and no Python or torch header is needed. The library lands
in the user's cache folder under a name that hashes sources, compiler and CPU features. Knows
nothing of what the kernels compute.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
SWITCH = "CONVSERVE_NATIVE"
"""Environment variable: 0 turns the native kernels off."""

_NEEDED_FEATURES = ({"avx512f"}, {"avx2", "fma"})


@cache
def load() -> ctypes.CDLL | None:
    """The compiled kernels, ready to call; None where they cannot run, with the reason logged."""
    reason = _unsupported()
    if reason is None:
        try:
            return build(cache_folder())
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("native CPU kernels are off: %s", error)
            return None
    logger.info("native CPU kernels are off: %s", reason)
    return None


def compiler() -> str | None:
    """Path of the C compiler: $CC, else the first of cc, gcc and clang that is installed."""
    named = os.environ.get("CC")
    for name in (named,) if named else ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path is not None:
            return path
    return None


def cpu_features() -> frozenset[str]:
    """Instruction-set flags of this CPU as Linux names them; empty where they are not told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), ":")
    return frozenset(flags.partition(":")[2].split())


def cache_folder() -> Path:
    """Where compiled kernels are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "convserve" / "native"


def _unsupported() -> str | None:
    setting = os.environ.get(SWITCH, "1")
    if setting not in ("0", "1"):
        raise ValueError(f"{SWITCH} is {setting!r}; allowed are 0 (off) and 1 (on where possible)")
    if setting == "0":
        return f"{SWITCH}=0"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"{platform.system()} on {platform.machine()} (they are written for Linux on x86_64)"
    if not any(needed <= cpu_features() for needed in _NEEDED_FEATURES):
        return "this CPU has neither AVX-512 nor AVX2"
    return None


def build(folder: Path, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """Loads the kernels from `folder`, compiling them first if they are not there.

    Raises:
        OSError: no compiler, or it failed, or the system refused the result; one line.
    """
    path = compiler()
    if path is None:
        raise OSError("no C compiler (cc, gcc or clang) is installed")
    sources = sorted(SOURCES.glob("*.[ch]"))
    version = subprocess.run([path, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256()
    for part in (path.encode(), version, " ".join((*flags, *sorted(cpu_features()))).encode()):
        key.update(part + b"\0")
    for source in sources:
        key.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    name = f"ops-{key.hexdigest()[:20]}.so"
    if _is_ours(folder):
        built = folder / name
        if not built.exists():
            _compile((path, *flags), sources, built)
        return ctypes.CDLL(str(built))
    with tempfile.TemporaryDirectory(prefix="convserve-") as private:
        _compile((path, *flags), sources, Path(private) / name)
        return ctypes.CDLL(str(Path(private) / name))


def _is_ours(folder: Path) -> bool:
    """Whether libraries can be kept in `folder`: code that others could write is never loaded."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        logger.info("compiled kernels are not kept: %s", error)
        return False
    if status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return os.access(folder, os.W_OK)
    logger.warning("compiled kernels are not kept: %s is writable by other users", folder)
    return False


def _compile(command: tuple[str, ...], sources: list[Path], built: Path) -> None:
    """Compiles into a file of its own and renames it, so that nobody sees half a library."""
    with tempfile.TemporaryDirectory(dir=built.parent, prefix="build-") as scratch:
        partial = Path(scratch) / built.name
        units = [str(s) for s in sources if s.suffix == ".c"]
        line = [*command, *units, "-o", str(partial), "-lm"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            first = next(
                (line for line in done.stderr.splitlines() if "error" in line), "no message"
            )
            raise OSError(f"{command[0]} could not compile the kernels: {first}")
        os.replace(partial, built)
