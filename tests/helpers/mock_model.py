"""A model whose next token is a hash of its whole prefix, read back from the cache.

It stores token ids where keys would stand and raw inputs would wait in conv rings. A page, a slot
or a row that is addressed wrongly, shared wrongly or overwritten changes every later token.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from convserve.cache import AttentionSpec, CacheSizes, ConvSpec, LayerSpec, StateSpec
from convserve.cache.residence import PAGE_TIME_EDGES
from convserve.engine.core import EngineCore
from convserve.engine.messages import EngineInfo, GenerateRequest, SamplingParams
from convserve.engine.models import PADDING
from convserve.engine.resolve import Limits
from convserve.kernels.ops import Ops

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from convserve.engine.models import ForwardBatch
    from torch import Tensor

VOCAB = 97
WIDTH = 4


def next_token(prefix: Sequence[int]) -> int:
    """The one token that may follow a prefix."""
    digest = hashlib.blake2b(repr([int(t) for t in prefix]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB


def continuation(prompt: Sequence[int], count: int, stops: Iterable[int] = ()) -> list[int]:
    """What a one-sequence loop generates, an ending stop token included."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(tokens))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


class MockModel:
    """See the module. Two convolutions in series, so that a window forgets what it held before
    only after 2 * (WIDTH - 1) tokens, as a real model's does."""

    ops = Ops()
    replay_length: int | None = 2 * (WIDTH - 1)

    def __init__(self) -> None:
        layer = LayerSpec(
            AttentionSpec(1, 1), {"first": ConvSpec(1, WIDTH), "second": ConvSpec(1, WIDTH)}
        )
        self.state_spec = StateSpec((layer,), torch.float64, self.replay_length)
        self.broken_after: int | None = None
        """Prefixes of this length or more give logits that are not finite."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Stores the step's tokens, then reads each wanted row's prefix back."""
        flat, layer = batch.flat, batch.state[0]
        assert flat.spans is not None
        assert layer.k_pages is not None
        page_size = layer.k_pages.shape[2]
        keys = layer.k_pages.view(-1)
        written = flat.kv_rows >= 0
        keys[flat.kv_rows[written]] = batch.token_ids[written].double()
        wanted = {row: i for i, row in enumerate(batch.logit_rows.tolist())}
        logits = torch.zeros(len(wanted), VOCAB)
        row = 0
        for s, (start, rows) in enumerate(flat.spans):
            for position in range(start, start + rows):
                second = self._convolve(batch, s, row, position)
                if row in wanted:
                    p = torch.arange(position + 1)
                    pages = flat.pages[s].long()
                    prefix = keys[pages[p // page_size] * page_size + p % page_size].tolist()
                    assert second == true_window(prefix), "a conv window is not its own"
                    logits[wanted[row], next_token(prefix)] = 1.0
                    if self.broken_after is not None and position + 1 >= self.broken_after:
                        logits[wanted[row]] = torch.nan
                row += 1
        return logits

    def _convolve(self, batch: ForwardBatch, s: int, row: int, position: int) -> float:
        """Both convolutions at one row, through the rings. -> the second one's output."""
        flat, rings = batch.flat, batch.state[0].rings
        base = int(flat.slots[s]) * flat.ring_len
        assert flat.ring_rows[row] in (PADDING, base + position % flat.ring_len)
        value = float(batch.token_ids[row])
        for name in ("first", "second"):
            ring = rings[name].view(-1)
            ring[base + position % flat.ring_len] = value
            value = sum(
                (tap + 1) * float(ring[base + (position - tap) % flat.ring_len])
                for tap in range(WIDTH)
                if position >= tap
            )
        return value


def true_window(prefix: Sequence[float]) -> float:
    """What the second convolution gives after a prefix."""

    def convolve(values: Sequence[float]) -> list[float]:
        return [
            sum((tap + 1) * values[p - tap] for tap in range(WIDTH) if p >= tap)
            for p in range(len(values))
        ]

    return convolve(convolve(prefix[-2 * WIDTH + 1 :]))[-1] if len(prefix) else 0.0


def mock_core(
    model: MockModel | None = None,
    *,
    num_pages: int = 64,
    page_size: int = 4,
    num_slots: int = 8,
    max_batch_tokens: int = 16,
    max_model_len: int | None = None,
    num_tails: int = 0,
    prefix_caching: bool = True,
    eos: tuple[int, ...] = (),
    overlap: bool = False,
) -> EngineCore:
    """An engine over the mock model, its cache poisoned."""
    model = model or MockModel()
    ring_len = model.state_spec.ring_len()
    sizes = CacheSizes(num_pages, page_size, num_slots, ring_len, num_tails)
    length = max_model_len or sizes.capacity
    limits = Limits(sizes, length, max_batch_tokens, 0)
    device = torch.device("cpu")
    return EngineCore(
        model, limits, eos, device, prefix_caching=prefix_caching, overlap=overlap, poison=True
    )


def mock_info(core: EngineCore) -> EngineInfo:
    """What an engine over the mock model says of itself."""
    sizes = core.limits.sizes
    return EngineInfo(
        model="mock",
        model_type="mock",
        vocab_size=VOCAB,
        max_model_len=core.limits.max_model_len,
        max_num_seqs=sizes.num_slots,
        page_size=sizes.page_size,
        num_pages=sizes.num_pages,
        page_time_edges=PAGE_TIME_EDGES,
        eos_token_ids=(),
        device="cpu",
        dtype="float64",
        kv_bytes_per_token=8,
        conv_bytes_per_sequence=8,
        page_pool_bytes=0,
        weight_bytes=0,
        replay_length=6,
        conv="mock",
    )


def request(
    request_id: str, prompt: Sequence[int], max_tokens: int = 8, **params: object
) -> GenerateRequest:
    """A greedy request."""
    fields: dict[str, object] = {"temperature": 0.0, "max_tokens": max_tokens, **params}
    priority = int(str(fields.pop("priority", 0)))
    salt = str(fields.pop("cache_salt", ""))
    return GenerateRequest(
        request_id=request_id,
        prompt=tuple(prompt),
        params=SamplingParams(**fields),  # pyright: ignore[reportArgumentType]
        priority=priority,
        cache_salt=salt,
    )
