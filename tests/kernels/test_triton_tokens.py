"""Token ids in and out: a wrong id here is a wrong word for the client, with no other symptom."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from convserve.kernels import Ops, triton_sampling
from convserve.kernels.triton_ops import TritonOps
from triton_cases import DEVICE, make_layout, normal

REFERENCE, TRITON = Ops(), TritonOps()
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("vocab", [1, 50, 8192, 20_011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_greedy_takes_the_first_of_the_best(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    # Rounded to few values, so that every row has equals, in its own part and in others.
    logits = (normal(5, vocab + 3) * 4).round().clamp(-4, 4).to(dtype)[:, :vocab]
    truth = (logits.cpu() == logits.cpu().amax(1, keepdim=True)).int().argmax(1)
    for ops in (REFERENCE, TRITON):
        ids = ops.argmax(logits)
        assert ids.dtype == torch.int64
        assert ids.tolist() == truth.tolist()


def test_rows_without_a_finite_best_are_marked() -> None:
    logits = normal(7, 9000)
    logits[0, 8500] = NAN
    logits[1] = -INF
    logits[2, 3] = INF
    logits[3, :-1] = -INF  # one token allowed
    logits[4] = NAN
    logits[5, :8990] = -INF
    for ops in (REFERENCE, TRITON):
        ids = ops.argmax(logits).tolist()
        assert ids[:5] == [-1, -1, -1, 8999, -1]
        assert ids[5:] == [int(row.argmax()) for row in logits[5:]]


@pytest.mark.parametrize("width", [1, 48, 2048, 2050])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embed_gathers_rows(width: int, dtype: torch.dtype) -> None:
    table = normal(7, width, dtype=dtype)
    ids = torch.tensor([3, 0, 6, 3], device=DEVICE)
    assert torch.equal(TRITON.embed(ids, table), table[ids])
    assert torch.equal(TRITON.embed(ids, TRITON.pack_linear(table, None)), table[ids])


def test_embed_of_a_row_that_belongs_to_nobody_reads_nothing() -> None:
    """A broken row's id is -1 and feeds the next step of a graph before the host sees it."""
    table = normal(7, 40)
    out = TRITON.embed(torch.tensor([-1, 2, 7], device=DEVICE), table)
    assert torch.equal(out[1], table[2])
    assert not out[[0, 2]].any()


LENS = [(5, 1), (0, 3), (9, 1), (2, 2)] * 40
"""Contexts and rows: 280 rows, more than one program looks at, beside 5 that belong to nobody."""


@pytest.mark.parametrize("ops", [REFERENCE, TRITON], ids=["reference", "triton"])
def test_an_unknown_token_is_the_last_one_of_its_own_slot(ops: Ops) -> None:
    layout = make_layout(LENS, padding_rows=5)
    batch, last = layout.batch, torch.randint(0, 1000, (layout.num_slots,))
    last[int(batch.slots[2])] = -1  # its logits were broken
    ids = torch.randint(0, 1000, (len(batch.positions),))
    ids[::3] = -1
    slots = batch.slots.tolist()
    truth = [
        token if token >= 0 else max(0, int(last[slots[seq]]))
        for token, seq in zip(ids.tolist(), batch.row_seq.tolist(), strict=True)
    ]
    known = ids.clone().to(DEVICE)
    assert ops.fed_tokens(known, last.to(DEVICE), batch).tolist() == truth
    assert known.tolist() == ids.tolist()


@pytest.mark.parametrize("ops", [REFERENCE, TRITON], ids=["reference", "triton"])
def test_a_slot_keeps_what_its_last_row_chose(ops: Ops) -> None:
    """Rows of a scored prompt have choices too, which are nobody's next token."""
    layout = make_layout(LENS, padding_rows=5)
    batch = layout.batch
    ends = batch.offsets[1:].long() - 1
    for rows in (ends, torch.arange(int(batch.offsets[-1]), device=DEVICE), ends[:0]):
        chosen = torch.randint(0, 1000, (len(rows),), device=DEVICE)
        last = torch.full((layout.num_slots,), 7777, device=DEVICE)
        ops.keep_tokens(chosen, rows, last, batch)
        by_row = dict(zip(rows.tolist(), chosen.tolist(), strict=True))
        truth = [by_row.get(end, 7777) for end in ends.tolist()]
        assert last[batch.slots.long()].tolist() == truth


def test_a_batch_of_nobody_keeps_nothing() -> None:
    """A captured step's first run: the row before the first must lead to no address."""
    batch = make_layout([(0, 1)]).batch
    # What lies before the fields of such a batch, where a row of -1 would look.
    before = torch.tensor([-1, 0], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    nobody = replace(batch, row_seq=before[1:], slots=slots[1:], offsets=batch.offsets * 0)
    last = torch.full((4,), 7777, device=DEVICE)
    rows = torch.tensor([-1], device=DEVICE)
    TRITON.keep_tokens(torch.tensor([5], device=DEVICE), rows, last, nobody)
    assert last.tolist() == [7777] * 4


@pytest.mark.parametrize("width", [1, 48, 2050])
def test_rows_are_taken_as_they_are(width: int) -> None:
    table = normal(9, width)
    table[8] = NAN
    rows = torch.tensor([3, 0, -1, 7, 3], device=DEVICE)
    wanted = table[rows.clamp_min(0)]
    for ops in (REFERENCE, TRITON):
        taken = ops.take_rows(table, rows)
        assert torch.equal(taken[[0, 1, 3, 4]], wanted[[0, 1, 3, 4]])
        assert not taken.isnan().any()
        # Rotations of a model without attention.
        assert ops.take_rows(table[:, :0], rows).shape == (len(rows), 0)


FILTERS = [
    (0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (30, 0.8, 0.01), (10**6, 0.05, 0.5),
]  # fmt: skip


@pytest.mark.parametrize(
    ("vocab", "filters"),
    [*((v, f) for v in (40, 300) for f in FILTERS[:: 1 if v == 300 else 2]), (5000, FILTERS[4])],
)
def test_draws_are_the_references(vocab: int, filters: tuple[int, float, float]) -> None:
    torch.manual_seed(3)
    top_k, top_p, min_p = filters
    logits = normal(4, vocab) * 3
    logits[0], logits[1, :5] = 1.5, 9.0  # every token equal; five best ones
    logits[2] = -INF
    logits[2, 3] = 0.0
    rows = torch.ones(4, device=DEVICE)
    settings = (
        torch.tensor([0.3, 1.0, 2.0, 1.0], device=DEVICE), (rows * top_k).int(), rows * top_p,
        rows * min_p, torch.rand(4, dtype=torch.float64).to(DEVICE),
    )  # fmt: skip
    truth = REFERENCE.sample(logits, *settings)
    for parts in (0, 1, 2, 7) if DEVICE.type == "cuda" else (0, 1):
        got = triton_sampling.sample(logits, *settings, parts=parts)
        assert got.dtype == torch.int64
        assert got.tolist() == truth.tolist()


def test_every_row_has_its_own_settings_and_faults() -> None:
    torch.manual_seed(4)
    logits = normal(6, 200, dtype=torch.bfloat16)
    logits[1, 7], logits[4] = NAN, -INF
    settings = (
        torch.tensor([0.0, 1.0, 0.5, 1.5, 1.0, 1e-9], device=DEVICE),
        torch.tensor([3, 0, 1, 20, 0, 0], dtype=torch.int32, device=DEVICE),
        torch.tensor([0.5, 1.0, 1.0, 0.9, 1.0, 1.0], device=DEVICE),
        torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.0], device=DEVICE),
        torch.tensor([0.9, 0.5, 0.99, 0.3, 0.1, 0.7], dtype=torch.float64, device=DEVICE),
    )
    got = TRITON.sample(logits, *settings).tolist()
    assert got == REFERENCE.sample(logits, *settings).tolist()
    assert got[1] == got[4] == -1
    best = logits.float().argmax(1).tolist()
    assert [got[i] for i in (0, 2, 5)] == [best[i] for i in (0, 2, 5)]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="several programs a row at once")
@pytest.mark.parametrize("filters", FILTERS[::2])
def test_parts_of_a_row_agree(filters: tuple[int, float, float]) -> None:
    """A row's programs wait for each other; how many there are must not change a token."""
    torch.manual_seed(5)
    top_k, top_p, min_p = filters
    for rows, vocab in ((1, 100_352), (2, 50_000), (9, 100_352)):
        logits = normal(rows, vocab, dtype=torch.bfloat16) * 2
        ones = torch.ones(rows, device=DEVICE)
        u = torch.rand(rows, dtype=torch.float64).to(DEVICE)
        settings = (ones, (ones * top_k).int(), ones * top_p, ones * min_p, u)
        usual = TRITON.sample(logits, *settings).tolist()
        for parts in (13, 13, 14):
            assert triton_sampling.sample(logits, *settings, parts=parts).tolist() == usual
        assert usual == REFERENCE.sample(logits, *settings).tolist()


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]], device=DEVICE).expand(16, 4)
    u = (torch.arange(16, dtype=torch.float64) / 16).to(DEVICE)
    ones = torch.ones(16, device=DEVICE)
    ids = TRITON.sample(logits, ones, ones.int() * 0, ones, ones * 0, u).cpu()
    share = torch.softmax(logits[0].cpu(), 0)
    assert (ids.bincount(minlength=4) / 16 - share).abs().max() < 1 / 16
    assert (ids.diff() >= 0).all()
