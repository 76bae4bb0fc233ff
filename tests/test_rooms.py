"""The import law: each room may import what it stands on and nothing else, so that the server can
be read without tensors, a kernel without the engine, and the load test drives any server.

Imports inside functions and under TYPE_CHECKING count: they are dependencies all the same.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("server", "engine", "engine.models", "kernels", "cache", "loadtest")

OURS = {
    "kernels": {"kernels"},
    "cache": {"cache"},
    "engine.models": {"engine.models", "kernels", "cache.specs"},
    "engine": {"engine", "engine.models", "cache"},
    "server": {"server"},
    "loadtest": {"loadtest"},
}
"""Rooms or modules of ours that a room may import; a room stands for all that is in it, except
that `engine` does not stand for `engine.models`."""

PUBLIC_ENGINE = {
    "engine",
    "engine.client",
    "engine.config",
    "engine.gguf_cache",
    "engine.grammar_checker",
    "engine.inspection",
    "engine.messages",
    "engine.process",
    "engine.sampling_checks",
    "engine.text",
}
"""What the server may import of the engine; none of it loads torch."""

THEIRS = {"kernels": {"torch", "triton", "numpy"}, "cache": {"torch"}}
"""Libraries a room may import; a room that is not named may import any."""

NEVER = {
    "server": {"torch", "triton", "numpy", "safetensors", "gguf"},
    "loadtest": {"torch", "triton", "transformers"},
}
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@dataclass(frozen=True)
class Import:
    """One name that a module imports, with modules of ours spelled without `convserve.`."""

    module: str
    """The importing module, dotted, from its room."""
    target: str
    is_ours: bool
    line: int

    def __str__(self) -> str:
        return f"{self.module} (line {self.line}) imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for room in ROOMS
    if "." not in room
    for path in sorted((ROOT / room).rglob("*.py"))
}
TREES = {
    module: ast.parse(path.read_text(), filename=str(path)) for module, path in SOURCES.items()
}


def room_of(module: str) -> str:
    inside = [room for room in ROOMS if module == room or module.startswith(room + ".")]
    return max(inside, key=len, default=module)


def imports_of(module: str) -> list[Import]:
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
    found: list[Import] = []
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ("convserve." + package).split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *base.split(".")]).strip(
                    "."
                )
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            target = name.removeprefix("convserve.")
            is_ours = target != name
            if is_ours and target not in SOURCES:  # a name in a module, not a module
                target = target.rpartition(".")[0]
            found.append(Import(module, target, is_ours, node.lineno))
    return found


IMPORTS = [found for module in SOURCES for found in imports_of(module)]


def is_allowed(found: Import) -> bool:
    room = room_of(found.module)
    if not found.is_ours:
        top = found.target.split(".")[0]
        known = top in sys.stdlib_module_names or top in THEIRS.get(room, {top})
        return known and top not in NEVER.get(room, set())
    if room == "server" and found.target in PUBLIC_ENGINE:
        return True
    if (found.module, found.target) == ("server.cli", "loadtest.cli"):
        return True
    return bool({found.target, room_of(found.target)} & OURS[room])


def test_every_room_is_read() -> None:
    assert {room_of(module) for module in SOURCES} == set(ROOMS)
    unknown = [str(found) for found in IMPORTS if found.is_ours and found.target not in SOURCES]
    assert not unknown, "\n".join(unknown)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_stands_on(room: str) -> None:
    broken = [f for f in IMPORTS if room_of(f.module) == room and not is_allowed(f)]
    assert not broken, "\n".join(map(str, broken))


def test_no_module_needs_itself() -> None:
    graph: dict[str, set[str]] = {module: set() for module in SOURCES}
    for found in IMPORTS:
        if found.is_ours:
            graph[found.module].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(reversed(error.args[1])))


def test_nothing_reads_pickles() -> None:
    broken = [str(f) for f in IMPORTS if f.target.split(".")[0] in UNSAFE]
    for module, tree in TREES.items():
        broken += [
            f"{module} (line {node.lineno}) uses torch.load"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr == "load"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "target", "is_ours"),
    [
        ("engine.core", "kernels", True),
        ("engine.core", "kernels.ops", True),
        ("engine.models.layers", "cache.manager", True),
        ("engine.models.layers", "engine.messages", True),
        ("server.app", "engine.scheduler", True),
        ("server.app", "engine.models", True),
        ("server.app", "loadtest.cli", True),
        ("server.app", "torch", False),
        ("loadtest.client", "engine.messages", True),
        ("cache.pools", "numpy", False),
        ("kernels.ops", "engine", True),
    ],
)
def test_the_law_forbids(module: str, target: str, is_ours: bool) -> None:
    assert not is_allowed(Import(module, target, is_ours, line=1))
