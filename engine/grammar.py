"""Structured output: which tokens may come next where an output must follow a grammar.

A matcher's state is a fact about tokens: it is advanced over a sequence's output when a mask is
wanted, so preemption, several choices and replays need nothing. Grammars are compiled in a thread
and kept. Knows nothing of tensors (masks are bits written to an address) or of requests' fields.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

import llguidance
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from .messages import JSON_WHITESPACE
from .text import TextTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Rows
    from pathlib import Path

    from .messages import Grammar
    from .sequence import Sequence

T = TypeVar("T")

MAX_COMPILED = 512
"""Compiled grammars kept."""
COMPILE_STACK = 64 * 2**20
"""Bytes of stack for compiling: recursion is as deep as a grammar's rules refer to each other."""

_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
_MAX_LINE = 200
"""Characters kept of one line of an error; it may quote a whole expression."""


class Grammars:
    """The grammars of one engine's requests, over its tokenizer."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Rows[int]) -> None:
        """Begins to read the tokenizer in `folder`; one that cannot be read fails the requests.

        Args:
            vocab_size: columns of the logits.
        """
        self._tokenizer = _in_thread(lambda: _vocabulary(folder, vocab_size, eos_token_ids))
        self._compiled: OrderedDict[Grammar, Future[llguidance.LLMatcher]] = OrderedDict()
        self._matchers: WeakKeyDictionary[Sequence, _Progress] = WeakKeyDictionary()
        self._executor: llguidance.LLExecutor | None = None
        self._one_at_a_time = threading.Lock()

    def prepare(self, grammar: Grammar) -> Future[llguidance.LLMatcher]:
        """Begins to compile a grammar, unless it is there."""
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = _in_thread(lambda: self._compile(grammar))
            self._compiled[grammar] = compiled
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return compiled

    def write_masks(self, seqs: Rows[Sequence], address: int, row_bytes: int) -> dict[int, str]:
        """Writes for each sequence, all of which have a grammar, which tokens may come next.

        Args:
            address: of zeroed memory for len(seqs) rows of `row_bytes` each. Bit t % 8 of byte
                t // 8 is token t; the end tokens' are set where the grammar can end.

        Returns:
            Why there is no mask, by row.
        """
        problems: dict[int, str] = {}
        ready: list[tuple[llguidance.LLMatcher, int]] = []
        for row, seq in enumerate(seqs):
            try:
                ready.append((self._advanced(seq), row))
            except ValueError as error:
                problems[row] = str(error)
        if len(ready) == 1:
            matcher, row = ready[0]
            matcher.unsafe_compute_mask_ptr(address + row * row_bytes, row_bytes)
        elif ready:
            if self._executor is None:
                self._executor = llguidance.LLExecutor()
            self._executor.unsafe_compute_mask_ptr(ready, address, row_bytes, len(seqs))
        for matcher, row in ready:
            if matcher.is_error():
                problems[row] = _problem(matcher.get_error())
        return problems

    def _advanced(self, seq: Sequence) -> llguidance.LLMatcher:
        """The sequence's matcher after all of its output."""
        progress = self._matchers.get(seq)
        if progress is None:
            assert seq.params.grammar is not None
            progress = _Progress(self.prepare(seq.params.grammar).result().deep_copy())
            self._matchers[seq] = progress
        assert progress.consumed <= seq.num_output, "known tokens are never taken back"
        first = seq.prompt_len + progress.consumed
        progress.consumed = seq.num_output
        if not progress.matcher.consume_tokens(seq.tokens[first:]):
            raise ValueError(_problem(progress.matcher.get_error()))
        return progress.matcher

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        with self._one_at_a_time:
            return compiled(grammar, self._tokenizer.result())


class _Progress:
    """One sequence's matcher and how many output tokens it has seen."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher
        self.consumed = 0


def compiled(grammar: Grammar, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """The matcher of a grammar at the beginning of an output.

    Raises:
        ValueError: `grammar: ` and in one line what is wrong with it.
    """
    try:
        match grammar.kind:
            case "json_schema":
                source = llguidance.LLMatcher.grammar_from_json_schema(
                    grammar.source, overrides={"whitespace_pattern": JSON_WHITESPACE}
                )
            case "regex":
                source = llguidance.LLMatcher.grammar_from_regex(grammar.source)
            case "lark":
                source = llguidance.LLMatcher.grammar_from_lark(grammar.source)
            case "gbnf":
                source = llguidance.LLMatcher.grammar_from_lark(gbnf_to_lark(grammar.source))
    except RecursionError:
        raise ValueError("grammar: it is nested too deeply") from None
    except (ValueError, GbnfToLarkError) as error:
        raise ValueError(_problem(str(error))) from None
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise ValueError(_problem(matcher.get_error()))
    return matcher


def vocabulary(
    tokens: Rows[bytes],
    special: Rows[int],
    eos_token_ids: Rows[int],
    encode: Callable[[str], list[int]],
) -> llguidance.LLTokenizer:
    """What grammars are matched over.

    Args:
        tokens: bytes of each token id; empty for one that is never chosen.
        special: ids that match no text.
        encode: how the model was taught to cut text that only one continuation is left for.
    """
    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Tokens(tokens, special, eos_token_ids, encode)),
        eos_token=list(eos_token_ids),
    )


class _Tokens:
    """A vocabulary as llguidance asks for it."""

    def __init__(
        self,
        tokens: Rows[bytes],
        special: Rows[int],
        eos_token_ids: Rows[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None
        self._encode = encode
        plain = set(range(len(tokens))) - set(special)
        self._ids = {tokens[token_id]: token_id for token_id in plain if tokens[token_id]}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: bytes) -> list[int]:
        """Token ids whose bytes are `text`, or the beginning of it that can be said."""
        token_ids = self._encode(text.decode("utf-8", "replace"))
        known = max(token_ids, default=0) < len(self.tokens)
        if known and b"".join([self.tokens[token_id] for token_id in token_ids]) == text:
            return token_ids
        # A tokenizer that puts a space first, or half a code point: the longest tokens, then.
        token_ids, position = [], 0
        while position < len(text):
            for size in range(self._longest, 0, -1):
                token_id = self._ids.get(text[position : position + size])
                if token_id is not None:
                    token_ids.append(token_id)
                    position += size
                    break
            else:
                break
        return token_ids


def _vocabulary(folder: Path, vocab_size: int, eos_token_ids: Rows[int]) -> llguidance.LLTokenizer:
    try:
        tokenizer = TextTokenizer.from_folder(folder)
    except ValueError:
        raise ValueError("grammar: this model has no tokenizer that can be read") from None
    ids = range(vocab_size)
    return vocabulary(
        [tokenizer.token_bytes(token_id) for token_id in ids],
        [t for t in ids if tokenizer.is_special(t) or t in eos_token_ids],
        eos_token_ids,
        tokenizer.encode_plain,
    )


def _problem(message: str) -> str:
    """llguidance's words on one line, without its indented copies of the grammar."""
    lines = [line[:_MAX_LINE] for line in message.splitlines() if line[:1] not in (" ", "<")]
    return "grammar: " + " ".join(lines)


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Runs `work` in a daemon thread with a deep stack."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # raised to whoever asks for the result
            future.set_exception(error)

    before = threading.stack_size(COMPILE_STACK)
    try:
        threading.Thread(target=run, name="grammar", daemon=True).start()
    finally:
        threading.stack_size(before)
    return future
