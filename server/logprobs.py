"""Log-probabilities as clients read them: the completions form, the chat form, the prompt's.

Knows nothing of requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .objects import ChatLogprob, ChatLogprobs, CompletionLogprobs, PromptLogprob, TopLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..engine.messages import Logprobs
    from ..engine.text import TextTokenizer
    from .objects import PromptLogprobs

_FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class LogprobWriter:
    """Writes log-probabilities for one request."""

    def __init__(self, tokenizer: TextTokenizer, *, as_token_ids: bool) -> None:
        """`as_token_ids` names tokens `token_id:123` instead of by their text."""
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids

    def completion(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[Logprobs | None],
        offsets: Sequence[int],
    ) -> CompletionLogprobs:
        """One entry per token; None for a token nothing came before."""
        return CompletionLogprobs(
            tokens=[self._name(token_id) for token_id in token_ids],
            token_logprobs=[None if entry is None else _json(entry.logprob) for entry in logprobs],
            top_logprobs=[None if entry is None else self._rivals(entry) for entry in logprobs],
            text_offset=list(offsets),
        )

    def chat(self, logprobs: Sequence[Logprobs | None]) -> ChatLogprobs:
        """One record per token."""
        return ChatLogprobs(
            [
                ChatLogprob(
                    token=self._name(entry.token_id),
                    logprob=_json(entry.logprob),
                    bytes=list(self._tokenizer.token_bytes(entry.token_id)),
                    top_logprobs=[
                        TopLogprob(
                            self._name(token_id),
                            _json(logprob),
                            list(self._tokenizer.token_bytes(token_id)),
                        )
                        for token_id, logprob in entry.top
                    ],
                )
                for entry in logprobs
                if entry is not None
            ]
        )

    def prompt(self, logprobs: Sequence[Logprobs | None]) -> PromptLogprobs:
        """By position, the prompt's token and its rivals, keyed by token id."""
        return [None if entry is None else self._candidates(entry) for entry in logprobs]

    def _candidates(self, entry: Logprobs) -> dict[str, PromptLogprob]:
        ranked = [
            (token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, 1)
        ]
        chosen = (entry.token_id, entry.logprob, entry.rank)
        return {
            str(token_id): PromptLogprob(_json(logprob), rank, self._tokenizer.token_text(token_id))
            for token_id, logprob, rank in [*ranked, chosen]
        }

    def _rivals(self, entry: Logprobs) -> dict[str, float]:
        rivals: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            # best first: where two tokens have one text, the better one stays
            rivals.setdefault(self._name(token_id), _json(logprob))
        return rivals

    def _name(self, token_id: int) -> str:
        return (
            f"token_id:{token_id}" if self._as_token_ids else self._tokenizer.token_text(token_id)
        )


def _json(logprob: float) -> float:
    return logprob if logprob > _FLOOR else _FLOOR  # a NaN is not more than anything
