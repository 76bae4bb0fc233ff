"""Everything a route needs, made once per app: engine client, text, defaults, figures, bounds.

Knows nothing of routes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..engine.grammar_checker import GrammarChecker
from ..engine.text import TextTokenizer
from .chat import ChatTemplate
from .errors import ApiError, bad_request, overloaded
from .lifecycle import Lifecycle
from .metrics import Metrics
from .parity import ParityChecks
from .prompts import PromptReader
from .sampling import GenerationDefaults
from .settings import GRAMMAR_SECONDS, MAX_GRAMMAR_CHECKS

if TYPE_CHECKING:
    from pathlib import Path

    from ..engine.client import EngineClient
    from .settings import ServerSettings
    from .structured import Structure

COUNTED_ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/v1/tokenize",
    "/v1/detokenize",
)


class Service:
    """One served model."""

    def __init__(self, client: EngineClient, folder: Path, settings: ServerSettings) -> None:
        """Reads tokenizer, chat template and generation defaults from the model's `folder`.

        Raises:
            ValueError: one line naming the file that is not usable.
        """
        self.client = client
        self.settings = settings
        self.info = client.info
        self.model = settings.model_names[0]
        self.created = int(time.time())
        self.tokenizer = TextTokenizer.from_folder(folder)
        template = ChatTemplate.from_folder(folder, self.tokenizer, 2 * settings.max_body)
        self.prompts = PromptReader(
            self.tokenizer, template, self.info.vocab_size, self.info.max_model_len
        )
        self.defaults = GenerationDefaults.from_folder(folder)
        self._grammar_checker = GrammarChecker(GRAMMAR_SECONDS)
        self._checks = 0
        self.lifecycle = Lifecycle(client, settings.max_queue, settings.stale_seconds)
        self.metrics = Metrics(
            client,
            self.model,
            vllm=settings.vllm_metrics,
            routes=COUNTED_ROUTES,
            live=lambda: self.lifecycle.live,
        )
        self.parity = ParityChecks(client, self.metrics, settings.parity_check)

    async def close(self) -> None:
        """Ends what it started."""
        await self.parity.close()
        await self._grammar_checker.close()

    async def check_structure(self, structure: Structure | None) -> None:
        """Raises ApiError 400, naming the field, for a grammar that cannot be used, or 429 where
        too many wait to be checked."""
        if structure is None:
            return
        if self._checks >= MAX_GRAMMAR_CHECKS:
            raise overloaded(retry_after=int(GRAMMAR_SECONDS))
        self._checks += 1
        try:
            await self._grammar_checker.check(structure.grammar)
        except ValueError as error:
            raise bad_request(structure.field, str(error).partition(": ")[2]) from None
        finally:
            self._checks -= 1

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not served here."""
        if name is not None and name not in self.settings.model_names:
            shown = name if len(name) <= 80 else name[:77] + "..."
            raise ApiError(
                404, f"model: {shown!r} is not served here", param="model", code="model_not_found"
            )
