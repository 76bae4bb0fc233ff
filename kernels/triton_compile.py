"""Compiling many kernels at once: steps are walked through without launching anything.

Which kernels a step needs, and for which constants and alignments, is known to the code that
launches them alone. So that code runs as it is, but each launch of a kernel that is not there yet
hands it to a pool of compilers; most of their work is done outside of Python. Kernels that lie in
Triton's cache on disk are read from it.
"""

from __future__ import annotations

import inspect
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from collections.abc import Generator


MOST_THREADS = 32

EXPECTED = ("self", "key", "signature", "device", "constexprs", "options", "attrs", "warmup")
"""What Triton's own function takes that is stood in for; nobody promises that it stays so."""


def can_compile_ahead() -> bool:
    """Whether this Triton is one that `compiling` knows."""
    compile_now = getattr(JITFunction, "_do_compile", None)
    return compile_now is not None and tuple(inspect.signature(compile_now).parameters) == EXPECTED


@contextmanager
def compiling() -> Generator[bool]:
    """Inside, Triton kernels are compiled, one a core at a time, and not launched; what they would
    have written is left as it was. On leaving, all of them are ready.

    Triton's own asynchronous mode prepares a kernel anew at every launch until it is compiled, a
    millisecond each. For the thread that starts up: nobody else may launch kernels meanwhile.

    Yields:
        False, and does nothing, with a Triton that works differently.
    """
    if not can_compile_ahead():
        yield False
        return
    launch, compile_now = JITFunction.run, JITFunction._do_compile
    started: list[tuple[dict[Any, Any], Any, Future[Any]]] = []

    def only_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        return launch(self, *args, **{**kwargs, "warmup": True})

    def compile_later(
        self: Any,
        key: Any,
        signature: Any,
        device: Any,
        constexprs: Any,
        options: Any,
        attrs: Any,
        warmup: Any,
    ) -> Any:
        kernels, _, target, _, _ = self.device_caches[device]
        source = self.ASTSource(self, signature, constexprs, attrs)
        kernels[key] = pool.submit(self.compile, source, target=target, options=options.__dict__)
        started.append((kernels, key, kernels[key]))
        return kernels[key]

    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        JITFunction.run, JITFunction._do_compile = only_compile, compile_later
        try:
            yield True
            for kernels, key, compiled in started:
                kernels[key] = compiled.result()
        finally:
            JITFunction.run, JITFunction._do_compile = launch, compile_now
            for kernels, key, _ in started:
                if isinstance(kernels[key], Future):
                    del kernels[key]
