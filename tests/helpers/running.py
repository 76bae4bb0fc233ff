"""A server process, as those who put clients on it see it.

Knows how to start one and when it is ready; knows nothing of clients.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READY_SECONDS = 120


class Served(NamedTuple):
    """A server and what it serves."""

    url: str
    model: str
    folder: Path


@contextlib.contextmanager
def serving(
    folder: Path, log: Path, *flags: str, model: str | None = None, core: int | None = None
) -> Iterator[Served]:
    """A server of a model folder, which must still be there at the end.

    Args:
        folder: holds the tokenizer, and the model unless `model` says otherwise.
        log: takes what the server says.
        model: what to serve in place of the folder; "" for the default model as it is shipped.
        core: the only processor core that it may use.
    """
    named = str(folder) if model is None else model
    command = [sys.executable, "-m", "convserve.server", "serve", *([named] if named else [])]
    with log.open("w") as stderr:
        process = subprocess.Popen([*command, "--port", "0", *flags], stderr=stderr)
    try:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        deadline = time.monotonic() + READY_SECONDS
        while (found := re.search(r"serves (\S+) at (http://127\S+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Served(found[2], found[1], folder)
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(30)
