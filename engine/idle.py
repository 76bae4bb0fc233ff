"""How long the device stands idle while there is work: the time between the end of what it was last
given and the beginning of what it is given next. Knows nothing of steps; on a CPU nothing is
measured, since there the host is the device.

A stamp on the stream costs the device a microsecond or two, so the beginning is stamped only where
the device is found to have run out: a gap of less than a launch takes is not seen.
"""

from __future__ import annotations

from collections import deque

import torch


class IdleClock:
    """Adds up idle time from pairs of events on the device's stream."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        """Idle time so far, of what the device has passed."""
        self._is_measured = device.type == "cuda"
        self._stopped: torch.cuda.Event | None = None
        self._gaps: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def resume(self) -> None:
        """Work is launched from here on."""
        if self._stopped is not None and self._stopped.query():
            self._gaps.append((self._stopped, self._now()))
        self._stopped = None

    def stop(self) -> torch.cuda.Event | None:
        """All there is to do has been launched; the event says when it is done."""
        if self._is_measured:
            self._stopped = self._now()
        return self._stopped

    def rest(self) -> None:
        """Nobody wants anything: what follows until the next launch is no idle time."""
        self._stopped = None

    def settle(self) -> None:
        """Counts the gaps that the device has passed, without waiting for it."""
        while self._gaps and self._gaps[0][1].query():
            stopped, resumed = self._gaps.popleft()
            self.seconds += stopped.elapsed_time(resumed) / 1e3

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
