"""Synthetic prompts of a wanted number of tokens, without a tokenizer.

Either token ids, exact by construction (ids below a vocabulary size, or ids that the server's
/tokenize gave for common words), or text whose words per token were measured from the server's
`usage.prompt_tokens`. Knows nothing of schedules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from .client import ENDPOINTS
from .http import ConnectError, ConnectionLostError, Pool, ProtocolError

if TYPE_CHECKING:
    from .scenario import RequestShape

_TEXT = (
    "the of and to in that was his he it with is for as had you not be her on at by which have or "
    "from this him but all she they were my are me one their so an said them we who would been "
    "will no when there if more out up into do any your what has man could other than our some "
    "very time upon about may its only now like little then can made should did us such great "
    "before must two these see know over much down after first good men own never most old shall "
    "day where those came come himself way work life without go make well through being long say "
    "might how am too even again many back here think every people went same last thought away "
    "under take found hand eyes still place while just also young yet though against things get "
    "ever give god years off face nothing right once another left part saw house world head three "
    "took new love always mrs put night each king between tell mind heart few because thing whom "
    "far seemed looked called whole having heard done find morning small children light water "
    "city river road table window letter paper music garden summer winter north south power state "
)
WORDS = tuple(_TEXT.split())


class PromptPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How prompts are made; measured once, shared by all workers, kept in the result."""

    kind: Literal["ids", "text"]
    ids: tuple[int, ...] = ()
    """Ids to draw from, or empty for 0 .. vocab-1."""
    vocab: int = 0
    tokens_per_word: float = 1.0
    overhead: float = 0.0
    """Tokens a prompt has beyond its words (chat template, start token)."""

    def tokens(self, generator: np.random.Generator, count: int) -> list[int]:
        """Random token ids."""
        if self.ids:
            pool = np.asarray(self.ids)
            return pool[generator.integers(len(pool), size=count)].tolist()
        return generator.integers(self.vocab, size=count).tolist()

    def text(self, generator: np.random.Generator, count: float) -> str:
        """Random words that come to about `count` tokens, overhead not included."""
        words = max(round(count / self.tokens_per_word), 1)
        return " ".join(WORDS[i] for i in generator.integers(len(WORDS), size=words))


class CalibrationError(RuntimeError):
    """The server would not answer the questions asked before the load."""


async def make_prompt_plan(
    pool: Pool, model: str, shape: RequestShape, extra: dict[str, Any]
) -> PromptPlan:
    """Decides between ids and text and measures what the choice needs.

    Raises:
        CalibrationError: the server refused the probes.
    """
    if shape.endpoint == "completions" and shape.prompts != "text":
        if shape.vocab:
            return PromptPlan(kind="ids", vocab=shape.vocab)
        ids = await _tokenize(pool, model)
        if len(ids) >= 64:
            return PromptPlan(kind="ids", ids=ids)
        if shape.prompts == "ids":
            raise CalibrationError("prompts of ids need --vocab: the server has no /tokenize")
    elif shape.prompts == "ids":
        raise CalibrationError("prompts of ids need the completions endpoint")
    few, many = 20, 120
    low = await _count(pool, model, shape, " ".join(WORDS[:few]), extra)
    high = await _count(pool, model, shape, " ".join(WORDS[:many]), extra)
    per_word = (high - low) / (many - few)
    if per_word <= 0:
        raise CalibrationError(f"usage.prompt_tokens did not grow with the prompt ({low}, {high})")
    return PromptPlan(
        kind="text", tokens_per_word=per_word, overhead=max(low - few * per_word, 0.0)
    )


async def _tokenize(pool: Pool, model: str) -> tuple[int, ...]:
    body = msgspec.json.encode(
        {"model": model, "prompt": " ".join(WORDS), "add_special_tokens": False}
    )
    try:
        status, _, answer = await pool.fetch("POST", "/tokenize", body)
    except (ConnectError, ConnectionLostError, ProtocolError) as error:
        raise CalibrationError(f"/tokenize: {error}") from error
    if status != 200:
        return ()
    try:
        tokens = msgspec.json.decode(answer)["tokens"]
        return tuple(sorted({int(token) for token in tokens}))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return ()


def prompt_body(endpoint: str, prompt: str) -> dict[str, Any]:
    """The body field that carries a text prompt."""
    if endpoint == "chat":
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"prompt": prompt}


async def _count(
    pool: Pool, model: str, shape: RequestShape, prompt: str, extra: dict[str, Any]
) -> int:
    body = {"model": model, "max_tokens": 1, **extra, **prompt_body(shape.endpoint, prompt)}
    try:
        status, _, answer = await pool.fetch(
            "POST", ENDPOINTS[shape.endpoint], msgspec.json.encode(body)
        )
    except (ConnectError, ConnectionLostError, ProtocolError) as error:
        raise CalibrationError(f"{ENDPOINTS[shape.endpoint]}: {error}") from error
    if status != 200:
        raise CalibrationError(
            f"{ENDPOINTS[shape.endpoint]}: HTTP {status}: {answer[:200].decode('utf-8', 'replace')}"
        )
    try:
        return int(msgspec.json.decode(answer)["usage"]["prompt_tokens"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise CalibrationError("the answer has no usage.prompt_tokens") from error
