"""What people install is a wheel, away from this tree: a data file or folder left out of it works
for everyone here and for nobody else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("server", "engine", "kernels", "cache", "loadtest")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building leaves folders beside the sources."""
    tree = tmp_path_factory.mktemp("tree")
    for room in ROOMS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / room, tree / room, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=tree)
    (built,) = (tree / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, to be put first on the import path."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", site, wheel, cwd=site)
    return site


def test_every_file_of_the_rooms_is_in_the_wheel(wheel: Path) -> None:
    there = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.removeprefix("convserve/") for name in archive.namelist()}
    assert there - packed == set()
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_nothing_else_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"convserve"}


def test_it_imports_from_another_folder(installed: Path, tmp_path: Path) -> None:
    script = "import convserve.server.cli as cli; print(cli.__file__)"
    found = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(found.strip()) == installed / "convserve" / "server" / "cli.py"


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"]])
def test_its_command_line_answers(installed: Path, tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "convserve.server", *arguments]
    assert "serve" in run(*command, cwd=tmp_path, PYTHONPATH=str(installed))


def test_the_readme_and_makefile_name_the_same_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in ("serve", "test"):
        assert f"make {target}" in readme
        assert f"\n{target}: env\n" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()
