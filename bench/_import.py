"""Makes `import convserve` work from a checkout that is not installed.

The rooms stand at the repository root; the package is a temporary folder of links to them.
Importing this module is enough.
"""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("server", "engine", "kernels", "cache", "loadtest")


def link_rooms() -> None:
    """Puts a `convserve` package of links to the rooms on `sys.path`, unless one is installed."""
    if importlib.util.find_spec("convserve") is not None:
        return
    folder = Path(tempfile.mkdtemp(prefix="convserve-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = folder / "convserve"
    package.mkdir()
    for room in ROOMS:
        if (ROOT / room).is_dir():
            (package / room).symlink_to(ROOT / room)
    sys.path.insert(0, str(folder))


link_rooms()
