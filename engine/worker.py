"""The engine process: joined to its client by a unix socket, gone when the client is.

Started by `process.ProcessClient` as `python -m convserve.engine.worker SOCKET`.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading

from .loop import run_loop
from .messages import EngineCommand, EngineFailed, Shutdown
from .models.errors import ModelError
from .resolve import ConfigError
from .start import start_engine
from .wire import command_decoder, config_decoder, frame, receive_frame


def main(path: str) -> int:
    """Connects, takes the config, starts, serves. Returns the exit code."""
    # Signals to a whole process group reach the engine too; the server decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        body = receive_frame(sock)
        if body is None:
            return 1
        try:
            core, info = start_engine(config_decoder.decode(body))
        except (ModelError, ConfigError, MemoryError) as error:
            sock.sendall(frame(EngineFailed(str(error))))
            return 1
        inbox: queue.SimpleQueue[EngineCommand] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(sock, inbox), daemon=True).start()
        sock.sendall(frame(info))
        run_loop(core, info, inbox, lambda reply: sock.sendall(frame(reply)))
    return 0


def _read(sock: socket.socket, inbox: queue.SimpleQueue[EngineCommand]) -> None:
    """Fills the inbox until the client is gone; then nobody is left to serve."""
    while (body := receive_frame(sock)) is not None:
        command = command_decoder.decode(body)
        inbox.put(command)
        if isinstance(command, Shutdown):
            return
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
