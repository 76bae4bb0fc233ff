"""Text to token ids and back: tokenizer loading, streaming detokenisation, stop strings.

Knows nothing of HTTP, of requests or of tensors; the server and the offline `LLM` share it.

Text comes out of token *bytes*, not out of repeated calls to a tokenizer's `decode`: every token
id stands for a fixed byte string, so a growing output costs time linear in its length, and a code
point is shown once its last byte is there. A byte sequence that never becomes one shows as U+FFFD.
"""

from __future__ import annotations

import codecs
import functools
import json
from typing import TYPE_CHECKING, Any, Self

import tokenizers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_SPIECE_SPACE = "\u2581"


class TextTokenizer:
    """A tokenizer.json with the bytes of each of its tokens. Safe to share by threads."""

    def __init__(self, definition: str) -> None:
        """`definition` is the text of a tokenizer.json.

        Raises:
            ValueError: it is not one, or its decoder does not map each token to fixed bytes.
        """
        self._definition = definition
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
            kinds = set(_decoder_kinds(json.loads(definition).get("decoder")))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer definition: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if "ByteLevel" in kinds:
            to_bytes = _byte_level_bytes
        elif kinds & {"ByteFallback", "Metaspace"}:
            to_bytes = _sentencepiece_bytes
        else:
            raise ValueError(
                f"decoder {'+'.join(sorted(kinds)) or 'null'} is not supported "
                "(ByteLevel, ByteFallback or Metaspace)"
            )
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        """One more than the highest token id."""
        self._bytes: list[bytes] = [b""] * self.vocab_size
        for token, token_id in vocab.items():
            self._bytes[token_id] = to_bytes(token)
        self.max_token_bytes = max(map(len, self._bytes), default=1) or 1
        """Bytes of the longest token: a text of k bytes has at least k / max_token_bytes tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {
            token.content: token_id for token_id, token in added.items() if token.special
        }
        """Text of each special token to its id."""
        self._special_ids = frozenset(self.special_tokens.values())

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Reads `folder`/tokenizer.json.

        Raises:
            ValueError: one line naming the file, if it is missing or not usable.
        """
        path = folder / "tokenizer.json"
        try:
            return cls(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; a model folder needs one") from None
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in it become those tokens."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of `text` in which nothing is special: `<|eos|>` is seven characters."""
        return self._plain.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        # `encode_special_tokens` is state of the tokenizer, so it needs one of its own.
        plain = tokenizers.Tokenizer.from_str(self._definition)
        plain.no_padding()
        plain.no_truncation()
        plain.encode_special_tokens = True
        return plain

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The whole text of `token_ids`."""
        output = OutputText(self, skip_special_tokens=skip_special_tokens)
        return "".join([output.push(token_id) for token_id in token_ids]) + output.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the text; empty for an id the tokenizer does not have."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """A name of one token: its text, or `bytes:\\xe2\\x82` where that is not UTF-8 by itself,
        so that tokens of different bytes have different names."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join([f"\\x{byte:02x}" for byte in data])

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves this token out."""
        return token_id in self._special_ids


class StopStrings:
    """Finds the first of several strings in a text that arrives in pieces (Aho-Corasick).

    Which match wins does not depend on how the text was cut: the one that ends first, and of those
    that end together the longest. Immutable; a reader keeps its own integer state, from 0.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        """`stops` must not hold an empty string (ValueError)."""
        self._next: list[dict[str, int]] = [{}]
        self._fail: list[int] = [0]
        self._match: list[str | None] = [None]
        self.depth: list[int] = [0]
        """By state: how many last characters of the text may begin a stop string."""
        for stop in stops:
            if not stop:
                raise ValueError("stop: an empty string cannot be a stop string")
            self._insert(stop)
        self._link()

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._next[node].get(char)
            if child is None:
                child = len(self._next)
                self._next[node][char] = child
                self._next.append({})
                self._fail.append(0)
                self._match.append(None)
                self.depth.append(self.depth[node] + 1)
            node = child
        self._match[node] = stop

    def _link(self) -> None:
        queue = list(self._next[0].values())
        for node in queue:  # grows while it is walked: breadth first
            for char, child in self._next[node].items():
                self._fail[child] = self._step(self._fail[node], char)
                queue.append(child)
            if self._match[node] is None:
                self._match[node] = self._match[self._fail[node]]

    def _step(self, state: int, char: str) -> int:
        while True:
            following = self._next[state].get(char)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self._fail[state]

    def scan(self, state: int, text: str) -> tuple[int, int, str | None]:
        """Reads on from `state`; returns (new state, characters read, stop string found there)."""
        for position, char in enumerate(text):
            state = self._step(state, char)
            stop = self._match[state]
            if stop is not None:
                return state, position + 1, stop
        return state, len(text), None


class OutputText:
    """The text of one choice as its tokens arrive.

    Every `push` returns what may be shown now: whole code points that cannot be the beginning of a
    stop string. The pieces, with `finish`, concatenate to one text however tokens were grouped.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        stops: StopStrings | None = None,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        prompt: Sequence[int] = (),
    ) -> None:
        """A stop string counts only in text of tokens after the first `min_tokens`.

        `prompt` is what the output continues. If it ends inside a code point that the output
        completes, the output's text begins with that code point whole.
        """
        self._tokenizer = tokenizer
        self._stops = stops
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._min_tokens = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._carried = _open_code_point(tokenizer, prompt)
        self._state = 0
        self._held = ""
        self.num_tokens = 0
        """Tokens pushed."""
        self.num_chars = 0
        """Characters decoded, shown or held back."""
        self.stop: str | None = None
        """The stop string that was found; what is pushed after it has no text."""

    def push(self, token_id: int, *, hidden: bool = False) -> str:
        """Takes one token; `hidden` counts it but leaves out its text (an ending eos)."""
        self.num_tokens += 1
        if hidden or (self._skip_special and self._tokenizer.is_special(token_id)):
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._carried and data:
            if data[0] & 0xC0 == 0x80:
                data = self._carried + data
            self._carried = b""
        return self._show(self._utf8.decode(data))

    def finish(self) -> str:
        """The rest: held-back text, and U+FFFD for a code point that stayed incomplete."""
        rest = self._show(self._utf8.decode(b"", final=True))
        if self.stop is None:
            rest += self._held
        self._held = ""
        return rest

    def _show(self, text: str) -> str:
        self.num_chars += len(text)
        if self._stops is None or self.num_tokens <= self._min_tokens:
            return text
        if self.stop is not None or not text:
            return ""
        held = len(self._held)
        self._state, read, self.stop = self._stops.scan(self._state, text)
        text = self._held + text
        if self.stop is None:
            end = len(text) - self._stops.depth[self._state]
            self._held = text[end:]
            return text[:end]
        end = held + read
        self.num_chars -= len(text) - end
        return text[: end if self._include_stop else end - len(self.stop)]


def _decoder_kinds(decoder: dict[str, Any] | None) -> Iterable[str]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _decoder_kinds(part)
    else:
        yield decoder["type"]


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE writes bytes as."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + rank): byte for rank, byte in enumerate(others)
    }


def _byte_level_bytes(token: str) -> bytes:
    table = _byte_of_char()
    try:
        return bytes([table[char] for char in token])
    except KeyError:  # an added token is its own text
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(_SPIECE_SPACE, " ").encode()


def _open_code_point(tokenizer: TextTokenizer, prompt: Sequence[int]) -> bytes:
    """The bytes at the end of `prompt` that begin a code point without ending it."""
    tail = b""
    for token_id in reversed(prompt[-8:]):
        tail = tokenizer.token_bytes(token_id) + tail
        if len(tail) >= 3:
            break
    for size in (1, 2, 3):
        if size > len(tail):
            break
        lead = tail[-size]
        if lead & 0xC0 != 0x80:
            needed = 2 if lead >> 5 == 0b110 else 3 if lead >> 4 == 0b1110 else 4
            return tail[-size:] if 0xC2 <= lead < 0xF5 and needed > size else b""
    return b""
