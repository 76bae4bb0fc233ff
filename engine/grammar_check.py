"""Compiles grammars that clients wrote, in a process of its own: `python -m ...grammar_check`.

A hostile grammar may take for ever, all memory or more stack than there is, in native code that
nothing can interrupt. So the server first has it compiled here, where dying of it costs nothing
else; what passes has less stack and memory here than in the engine. Knows nothing of the model: the
tokens are bytes.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from .grammar import compiled, vocabulary
from .messages import Grammar
from .wire import LENGTH

if TYPE_CHECKING:
    import llguidance

STACK = 512 * 1024
MEMORY = 2**30
COMPILE_SECONDS = 2.0
"""Of the processor's time, which a busy machine does not stretch."""
MASK_SECONDS = 0.05
"""The same, for one mask: in the engine it would hold everybody's step up."""
STEPS = 64
"""Tokens of an output that is tried, for what only shows when masks are made."""
_EOS = 256


def main(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Writes an empty frame when ready, then answers each frame that holds a Grammar by one that
    says what is wrong with it, or nothing. Returns when `stdin` ends.
    """
    tokenizer = vocabulary(
        [*(bytes([byte]) for byte in range(256)), b"<end>"],
        special=[_EOS],
        eos_token_ids=[_EOS],
        encode=lambda text: list(text.encode()),
    )
    stdout.write(LENGTH.pack(0))  # ready
    stdout.flush()
    while len(header := stdin.read(LENGTH.size)) == LENGTH.size:
        body = stdin.read(LENGTH.unpack(header)[0])
        problem = check(msgspec.msgpack.decode(body, type=Grammar), tokenizer).encode()
        stdout.write(LENGTH.pack(len(problem)) + problem)
        stdout.flush()


def check(grammar: Grammar, tokenizer: llguidance.LLTokenizer) -> str:
    """What is wrong with a grammar, in one line; empty if it compiles and an output can begin."""
    started = time.thread_time()
    try:
        matcher = compiled(grammar, tokenizer)
    except ValueError as error:
        return str(error)
    if time.thread_time() - started > COMPILE_SECONDS:
        return "grammar: it is too complex"
    draw = random.Random(0)
    for _ in range(STEPS):
        started = time.thread_time()
        mask = matcher.compute_bitmask()
        if matcher.is_error() or time.thread_time() - started > MASK_SECONDS:
            return "grammar: it is too complex"
        allowed = [token for token in range(_EOS + 1) if mask[token // 8] >> token % 8 & 1]
        if not allowed:
            return "grammar: no output can follow it"
        token = draw.choice(allowed)
        if token == _EOS:
            break
        matcher.consume_token(token)
    return ""


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    # Signals to a whole process group reach this process too; the server decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _limit_memory()
    threading.stack_size(STACK)
    worker = threading.Thread(target=main, args=(sys.stdin.buffer, sys.stdout.buffer))
    worker.start()
    worker.join()
