"""Where a run was made: enough to repeat it, nothing secret.

Knows how to ask the machine and the server's public routes; knows nothing of the load.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import msgspec

from .http import ConnectError, ConnectionLostError, ProtocolError

if TYPE_CHECKING:
    from .http import Pool

_ROUTES = ("/version", "/v1/models", "/server_info")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip() or None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def client_environment() -> dict[str, Any]:
    """This machine and this program."""
    gpus = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "gpus": gpus.splitlines() if gpus else [],
        "python": platform.python_version(),
        "convserve": _version("convserve"),
        "numpy": _version("numpy"),
        "uvloop": _version("uvloop"),
        "git": _output("git", "rev-parse", "HEAD"),
    }


async def server_environment(pool: Pool) -> dict[str, Any]:
    """What the server says of itself on its public routes."""
    told: dict[str, Any] = {}
    for route in _ROUTES:
        try:
            status, headers, body = await pool.fetch("GET", route)
            if status == 200:
                told[route] = msgspec.json.decode(body)
            if "server" in headers:
                told["server"] = headers["server"]
        except (ConnectError, ConnectionLostError, ProtocolError, msgspec.DecodeError):
            continue
    return told


def served_model(told: dict[str, Any]) -> str | None:
    """The first model that /v1/models names."""
    try:
        return str(told["/v1/models"]["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        return None
