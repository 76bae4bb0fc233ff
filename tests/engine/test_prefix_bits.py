"""With `deterministic`, every row of logits an engine makes has the bits that its request gets
alone, uncut and without a prefix cache: whoever compares two runs, or looks for the cause of a
changed answer, can leave batch, cache and scheduler out."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from convserve.cache import CacheSizes, CacheStorage
from convserve.engine.core import EngineCore
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.models import load_model
from convserve.engine.resolve import Limits
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import config_of, write_model

if TYPE_CHECKING:
    from convserve.cache import Copies
    from convserve.engine.models import Decoder, ForwardBatch
    from torch import Tensor

CPU = torch.device("cpu")
PAGE, WIDTH, NEW = 4, 4, 6
CONVOLVED = ["lowrank qkv", "lowrank all", "lowrank k v", "some layers", "static all", "headwise"]
VARIANTS = [*CONVOLVED, "plain", "norm first", "experts"]
LONG = tuple(i * 7 % 61 for i in range(45))
MOST = len(LONG) + WIDTH + 2 + NEW

Rows = set[tuple[int, bytes]]


@functools.cache
def model_of(variant: str, dtype: torch.dtype = torch.float32) -> Decoder:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "m", config_of(variant))
        return load_model(Path(folder) / "m", dtype, CPU, "deterministic")


class Recorded:
    """A model that notes the position and the bits of every row of logits it makes."""

    def __init__(self, model: Decoder) -> None:
        self.rows: Rows = set()
        self._model = model
        self.state_spec = model.state_spec
        self.ops = model.ops

    def forward(self, batch: ForwardBatch) -> Tensor:
        """See `Decoder`."""
        logits = self._model.forward(batch)
        bits = logits.view(torch.uint8).numpy()
        for position, row in zip(
            batch.flat.positions[batch.logit_rows].tolist(), bits, strict=True
        ):
            self.rows.add((position, row.tobytes()))
        return logits


PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=NEW),
    "twice": SamplingParams(temperature=0, max_tokens=NEW, n=2),
    "drawn": SamplingParams(temperature=1.2, top_p=0.9, seed=3, max_tokens=NEW),
}
Request = tuple[tuple[int, ...], str]
"""A prompt and the name of its parameters."""


class Run:
    """An engine over a recorded model, and what each choice of each request got."""

    def __init__(
        self,
        model: Decoder,
        *,
        budget: int = 64,
        pages: int = 64,
        slots: int = 4,
        tails: int = 0,
        prefix_caching: bool = True,
    ) -> None:
        self.model = Recorded(model)
        sizes = CacheSizes(pages, PAGE, slots, model.state_spec.ring_len(), tails)
        limits = Limits(sizes, -(-MOST // PAGE) * PAGE, budget, 0)
        self.core = EngineCore(
            self.model, limits, (), CPU, prefix_caching=prefix_caching, poison=True
        )
        self.tokens: dict[tuple[int, int], list[int]] = {}

    def add(self, number: int, request: Request) -> None:
        prompt, params = request
        self.core.add(GenerateRequest(request_id=str(number), prompt=prompt, params=PARAMS[params]))

    def step(self) -> None:
        for event in self.core.step():
            key = int(event.request_id), event.index
            self.tokens.setdefault(key, []).extend(event.token_ids)

    def finish(self) -> None:
        while self.core.has_work:
            self.step()
        self.core.check_integrity()


@functools.cache
def alone(
    variant: str, request: Request, dtype: torch.dtype = torch.float32
) -> tuple[Rows, dict[int, list[int]]]:
    """The rows and tokens of a request alone, uncut, without a cache."""
    run = Run(model_of(variant, dtype), prefix_caching=False)
    run.add(0, request)
    run.finish()
    return run.model.rows, {index: tokens for (_, index), tokens in run.tokens.items()}


# Prefixes cut one before a page's end, there, and 1 .. W + 1 beyond; then they part.
cut_prompts = st.builds(
    lambda pages, beyond, end: (*LONG[: pages * PAGE + beyond], *end),
    st.integers(1, 10),
    st.integers(-1, WIDTH + 1),
    st.lists(st.integers(0, 1), min_size=1, max_size=2),
)


@given(
    variant=st.sampled_from(VARIANTS),
    arrivals=st.lists(
        st.tuples(
            cut_prompts | st.just(LONG),
            st.sampled_from(["greedy", *PARAMS]),
            st.integers(0, 8),
        ),
        min_size=2,
        max_size=6,
    ),
    aborted=st.sets(st.integers(0, 5), max_size=1),
    budget=st.sampled_from([*range(1, WIDTH + 2), 64]),
    pages=st.integers(-(-MOST // PAGE), 40),
    slots=st.integers(1, 5),
    tails=st.sampled_from([0, 1, 3, 30]),
)
@settings(max_examples=30, deadline=None)
def test_bits_with_the_cache_are_those_without(
    variant: str,
    arrivals: list[tuple[tuple[int, ...], str, int]],
    aborted: set[int],
    budget: int,
    pages: int,
    slots: int,
    tails: int,
) -> None:
    """Found prefixes, tails, replays, chunks, neighbours, preemption, forks and aborts: no bit."""
    run = Run(model_of(variant), budget=budget, pages=pages, slots=slots, tails=tails)
    for step in range(12):
        for i, (prompt, params, at) in enumerate(arrivals):
            if at == step:
                run.add(i, (prompt, params))
            if i in aborted and at + 2 == step:
                run.core.abort(str(i))
        run.step()
    run.finish()
    allowed: Rows = set()
    for i, (prompt, params, _) in enumerate(arrivals):
        rows, tokens = alone(variant, (prompt, params))
        allowed |= rows
        if i not in aborted:
            assert {n: run.tokens[i, n] for n in range(PARAMS[params].n)} == tokens
            assert rows <= run.model.rows
    assert run.model.rows <= allowed


def hits_at_each_offset(variant: str, tails: int, dtype: torch.dtype = torch.float32) -> int:
    """Checks the bits of prompts that leave a cached one at each place; tokens run again."""
    run = Run(model_of(variant, dtype), tails=tails)
    expected: Rows = set()
    for i, cut in enumerate((45, *range(37, 45), *range(37, 45))):
        request = ((*LONG[:cut], *([i] if cut < 45 else [])), "greedy")
        run.add(i, request)
        run.finish()
        rows, tokens = alone(variant, request, dtype)
        assert run.tokens[i, 0] == tokens[0], "other tokens"
        expected |= rows
    assert run.model.rows == expected, "other bits"
    assert run.core.stats().prefix_hits > 400
    return run.core.stats().replayed_tokens


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *((variant, torch.float32) for variant in CONVOLVED),
        ("lowrank qkv", torch.bfloat16),
        ("headwise", torch.bfloat16),
    ],
)
def test_a_hit_at_each_offset_has_the_bits_of_none(variant: str, dtype: torch.dtype) -> None:
    """From tails and from replays alike: after its N tokens a window has the very bits."""
    replayed = {tails: hits_at_each_offset(variant, tails, dtype) for tails in (0, 8)}
    assert replayed[8] < replayed[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_has_the_same_bits_whole_in_chunks_and_in_company(
    variant: str, dtype: torch.dtype
) -> None:
    model = model_of(variant, dtype)
    request = (LONG, "greedy")
    runs: list[Rows] = []
    for budget in (64, 1, 3, 17):
        run = Run(model, budget=budget, prefix_caching=False)
        run.add(0, request)
        run.finish()
        runs.append(run.model.rows)
    company = Run(model, budget=23, prefix_caching=False)
    for i, prompt in enumerate((LONG[5:20], LONG, LONG[::-1])):
        company.add(i, (prompt, "greedy"))
    company.finish()
    assert len(runs[0]) == NEW
    assert all(rows == runs[0] for rows in runs)
    assert runs[0] <= company.model.rows


@pytest.fixture
def windows_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail loaded on a hit is zero."""
    apply = CacheStorage.apply

    def faulty(self: CacheStorage, copies: Copies) -> None:
        apply(self, copies)
        for _, slot, _ in copies.loads:
            for layer in self.layers:
                for ring in layer.rings.values():
                    ring[slot] = 0

    monkeypatch.setattr(CacheStorage, "apply", faulty)


@pytest.mark.usefixtures("windows_are_lost")
@pytest.mark.parametrize("variant", CONVOLVED)
def test_a_window_that_is_lost_on_a_hit_is_noticed(variant: str) -> None:
    """What other engines got wrong in silence fails the comparison above."""
    with pytest.raises(AssertionError, match=r"^other (tokens|bits)"):
        hits_at_each_offset(variant, tails=8)
