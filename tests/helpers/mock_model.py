"""A model whose next token is a hash of its whole prefix, read back from the cache.

It stores token ids where keys would stand and raw inputs would wait in conv rings. A page, a slot
or a row that is addressed wrongly, shared wrongly or overwritten changes every later token.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from convserve.cache import AttentionSpec, CacheSizes, ConvSpec, LayerSpec, StateSpec
from convserve.engine.core import EngineCore
from convserve.engine.messages import EngineInfo, GenerateRequest, SamplingParams
from convserve.engine.resolve import Limits

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
    """See the module."""

    def __init__(self) -> None:
        layer = LayerSpec(AttentionSpec(1, 1), {"qkv": ConvSpec(1, WIDTH)})
        self.state_spec = StateSpec((layer,), torch.float64, 2 * (WIDTH - 1))
        self.broken_after: int | None = None
        """Prefixes of this length or more give logits that are not finite."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Stores the step's tokens, then reads each wanted row's prefix back."""
        flat, layer = batch.flat, batch.state[0]
        assert flat.spans is not None
        assert layer.k_pages is not None
        page_size = layer.k_pages.shape[2]
        keys, ring = layer.k_pages.view(-1), layer.rings["qkv"].view(-1)
        self._check_windows(batch, ring)
        tokens = batch.token_ids.double()
        keys[flat.kv_rows] = tokens
        kept = flat.ring_rows >= 0
        ring[flat.ring_rows[kept]] = tokens[kept]
        logits = torch.zeros(len(batch.logit_rows), VOCAB)
        for i, row in enumerate(batch.logit_rows.tolist()):
            position = int(flat.positions[row])
            p = torch.arange(position + 1)
            pages = flat.pages[int(flat.row_seq[row])].long()
            prefix = keys[pages[p // page_size] * page_size + p % page_size]
            assert not prefix.isnan().any(), "a position was read that was never written"
            logits[i, next_token(prefix.tolist())] = 1.0
            if self.broken_after is not None and position + 1 >= self.broken_after:
                logits[i] = torch.nan
        return logits

    def _check_windows(self, batch: ForwardBatch, ring: Tensor) -> None:
        """The ring holds the last W - 1 tokens before each sequence's first row."""
        flat, keys = batch.flat, batch.state[0].k_pages
        assert keys is not None
        assert flat.spans is not None
        page_size = keys.shape[2]
        for s, (start, _) in enumerate(flat.spans):
            for p in range(max(0, start - WIDTH + 1), start):
                page = int(flat.pages[s, p // page_size])
                stored = ring[int(flat.slots[s]) * flat.ring_len + p % flat.ring_len]
                assert stored == keys[page, 0, p % page_size, 0], "a conv window is not its own"


def mock_core(
    model: MockModel | None = None,
    *,
    num_pages: int = 64,
    page_size: int = 4,
    num_slots: int = 8,
    max_batch_tokens: int = 16,
    max_model_len: int | None = None,
    eos: tuple[int, ...] = (),
) -> EngineCore:
    """An engine over the mock model, its cache poisoned."""
    model = model or MockModel()
    sizes = CacheSizes(num_pages, page_size, num_slots, model.state_spec.ring_len())
    length = max_model_len or sizes.capacity
    limits = Limits(sizes, length, max_batch_tokens, 0)
    return EngineCore(model, limits, eos, torch.device("cpu"), poison=True)


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
    return GenerateRequest(
        request_id=request_id,
        prompt=tuple(prompt),
        params=SamplingParams(**fields),  # pyright: ignore[reportArgumentType]
        priority=priority,
    )
