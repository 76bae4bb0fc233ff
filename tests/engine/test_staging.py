"""A padded batch must hold the same step and nothing else: what a kernel reads of a row or sequence
that is nobody's may not lead it to anybody's state."""

from __future__ import annotations

import torch
from convserve.cache import CacheManager, CacheSizes, CacheStorage
from convserve.engine.batch_builder import FED, BatchBuilder
from convserve.engine.graphs import chunks, ladder, shapes
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.models import PADDING, ForwardBatch
from convserve.engine.resolve import Limits
from convserve.engine.scheduler import Scheduler
from convserve.engine.staging import Staging, StepShape, shape_of
from hypothesis import given
from hypothesis import strategies as st
from mock_model import MockModel

CPU = torch.device("cpu")
SIZES = CacheSizes(64, 4, 8, 4)


def batch_of(prompts: list[int]) -> ForwardBatch:
    """A step of prompts of these lengths, and of one sequence fed by the step before."""
    cache = CacheManager(SIZES)
    scheduler = Scheduler(cache, 64, 64, ())
    for i, length in enumerate([3, *prompts]):
        params = SamplingParams(temperature=0, max_tokens=4)
        scheduler.add(GenerateRequest(request_id=str(i), prompt=(5,) * length, params=params))
        if i == 0:
            scheduler.plan()
    layers = CacheStorage(MockModel().state_spec, SIZES, CPU).layers
    return BatchBuilder(cache, layers, 64).build(scheduler.plan())


def tensors(batch: ForwardBatch) -> dict[str, torch.Tensor]:
    flat = {k: v for k, v in vars(batch.flat).items() if isinstance(v, torch.Tensor)}
    return {**flat, "token_ids": batch.token_ids, "logit_rows": batch.logit_rows}


@given(prompts=st.lists(st.integers(1, 9), max_size=5))
def test_an_unpadded_batch_arrives_as_it_was(prompts: list[int]) -> None:
    batch = batch_of(prompts)
    arrived = Staging(CPU).upload(batch)
    for name, value in tensors(batch).items():
        assert torch.equal(tensors(arrived)[name], value), name
        assert tensors(arrived)[name].dtype == value.dtype
    assert arrived.flat.spans == batch.flat.spans
    assert FED in batch.token_ids


@given(
    prompts=st.lists(st.integers(1, 9), max_size=5),
    more_rows=st.integers(0, 9),
    more_seqs=st.integers(0, 3),
    more_columns=st.integers(0, 3),
)
def test_padding_belongs_to_nobody(
    prompts: list[int], more_rows: int, more_seqs: int, more_columns: int
) -> None:
    batch = batch_of(prompts)
    own = shape_of(batch)
    seqs = own.seqs + more_seqs
    shape = StepShape(
        own.rows + more_rows, seqs, own.columns + more_columns, seqs, 16, 64, own.ring_len
    )
    staging = Staging(CPU)
    block = torch.full((shape.num_bytes,), 0x5A, dtype=torch.uint8)
    for _ in range(3):  # both host blocks, and one of them again
        staging.upload_padded(batch, shape, block)
        padded = shape.batch(block, batch.state)
        flat, live = padded.flat, batch.flat
        for name in ("positions", "kv_rows", "ring_rows"):
            assert torch.equal(getattr(flat, name)[: own.rows], getattr(live, name))
            assert (getattr(flat, name)[own.rows :] == PADDING).all()
        assert torch.equal(padded.token_ids[: own.rows], batch.token_ids)
        assert torch.equal(flat.row_seq[: own.rows], live.row_seq)
        assert torch.equal(flat.pages[: own.seqs, : own.columns], live.pages)
        for name in ("starts", "slots"):
            assert torch.equal(getattr(flat, name)[: own.seqs], getattr(live, name))
        assert not flat.slots[own.seqs :].any()
        assert not flat.pages[own.seqs :].any()
        assert (flat.offsets[own.seqs :] == own.rows).all()
        assert torch.equal(padded.logit_rows[: own.seqs], live.offsets[1:].long() - 1)


def test_every_step_within_the_limits_has_a_graph() -> None:
    limits = Limits(SIZES, 48, 40, 0)
    found = shapes(limits)
    mixed = {(s.rows, s.seqs) for s in found if s.max_rows > 1}
    assert (40, 8) in mixed
    assert all((rows, 1) in mixed for rows in chunks(40))
    decode = {(s.rows, s.max_len) for s in found if s.max_rows == 1}
    assert decode == {(size, 48) for size in ladder(8)}
    assert len(found) == len(set(found))
