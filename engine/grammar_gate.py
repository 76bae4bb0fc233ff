"""Requests whose grammar is being compiled: they wait here, so that no step waits for them.

Knows nothing of what grammars say, nor of sequences: a request passes on before it becomes any.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, wait
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .grammar import Grammars
    from .messages import GenerateRequest

_MOMENT = 0.01
"""Seconds; commands are read in between."""


class GrammarGate:
    """Holds requests back until their grammars are ready, or known to be unusable."""

    def __init__(self, grammars: Grammars | None) -> None:
        """Without `grammars` nothing is held: such requests fail when they would sample."""
        self._grammars = grammars
        self._held: dict[str, tuple[GenerateRequest, Future[Any]]] = {}
        self._aborted: dict[str, set[int]] = {}
        """Choices of held requests that nobody wants any more."""

    @property
    def num_waiting(self) -> int:
        """Choices of the requests held."""
        gone = sum(map(len, self._aborted.values()))
        return sum(request.params.n for request, _ in self._held.values()) - gone

    def hold(self, request: GenerateRequest) -> bool:
        """Takes a request that must wait; false for one that need not."""
        if request.params.grammar is None or self._grammars is None:
            return False
        compiled = self._grammars.prepare(request.params.grammar)
        if compiled.done():
            return False
        self._held[request.request_id] = request, compiled
        return True

    def release(self, *, may_wait: bool) -> list[tuple[GenerateRequest, set[int]]]:
        """Gives up the requests that are ready, each with its choices that were aborted.

        Args:
            may_wait: there is nothing else to do; a moment may pass until one is ready.
        """
        if not self._held:
            return []
        if may_wait:
            wait([compiled for _, compiled in self._held.values()], _MOMENT, FIRST_COMPLETED)
        ready = [name for name, (_, compiled) in self._held.items() if compiled.done()]
        return [(self._held.pop(name)[0], self._aborted.pop(name, set())) for name in ready]

    def abort(self, request_id: str, index: int | None) -> bool:
        """Drops a request or one choice of it; false if it is not here."""
        if request_id not in self._held:
            return False
        gone = self._aborted.setdefault(request_id, set())
        choices = self._held[request_id][0].params.n
        gone |= set(range(choices)) if index is None else {index}
        if len(gone) == choices:
            del self._held[request_id], self._aborted[request_id]
        return True

    def abort_all(self) -> list[str]:
        """Drops everything; returns the requests' ids."""
        ids = list(self._held)
        self._held.clear()
        self._aborted.clear()
        return ids
