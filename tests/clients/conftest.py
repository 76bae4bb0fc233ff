"""One running `convserve serve` with the default model, and the programs that are put on it.

The programs live in an environment of their own, which `make test-clients` builds; tests of what
is not there are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from convserve.engine import LLM
from convserve.server.default_model import default_model_folder
from golden import GOLDEN
from running import Served, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
CLIENTS = Path(os.environ.get("CONVSERVE_CLIENTS", ROOT / ".venv" / "clients" / "bin"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.clients)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def folder() -> Path:
    """The default model's folder."""
    return default_model_folder(progress=False)


@pytest.fixture(scope="session")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    name = "SmolLM2-135M-Instruct"
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(folder, log, "--served-model-name", name) as served:
        yield served


@pytest.fixture
def tiny_server(tmp_path: Path) -> Iterator[Served]:
    """A model that answers at once, and never at length."""
    folder = GOLDEN / "models" / "dynconv_lowrank_qkv"
    flags = ("--threads", "1", "--memory", "64MiB", "--max-model-len", "48")
    with serving(folder, tmp_path / "log", *flags) as served:
        yield served


@pytest.fixture(scope="session")
def offline(folder: Path) -> LLM:
    """The same model in this process."""
    return LLM(folder, memory="512MiB")


@pytest.fixture(scope="session")
def tool() -> Callable[..., str]:
    """tool(name): the path of an installed program; skips the test where there is none."""

    def found(name: str) -> str:
        path = shutil.which(name, path=str(CLIENTS))
        if path is None:
            pytest.skip(f"{name} is not in {CLIENTS}: make test-clients installs it")
        return path

    return found


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., str]:
    """run_tool(arguments, cwd, **environment): its output; the test fails if it does."""

    def run(arguments: list[str], cwd: Path | None = None, **environment: str) -> str:
        done = subprocess.run(
            arguments,
            cwd=cwd,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    return run
