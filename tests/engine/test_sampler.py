"""Sampling is what the user asked for: each filter keeps exactly its set, penalties move exactly
their tokens, and reported log-probabilities are the model's own."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from convserve.cache import Copies
from convserve.cache.pools import SequenceId
from convserve.engine.messages import SamplingParams
from convserve.engine.output import Output
from convserve.engine.plan import Sampled, StepPlan, Work
from convserve.engine.sampler import Sampler
from convserve.engine.sequence import Sequence
from convserve.kernels.ops import Ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

EOS = 0


def sequence(
    params: SamplingParams, prompt: list[int], output: list[int] | None = None, seed: int = 1
) -> Sequence:
    return Sequence(
        id=SequenceId(1),
        request_id="r",
        index=0,
        params=params,
        tokens=[*prompt, *(output or [])],
        prompt_len=len(prompt),
        max_len=1000,
        seed=seed,
        priority=0,
        salt="",
        arrival=0,
        arrived_at=0.0,
        num_computed=len(prompt) + len(output or []) - 1,
    )


def sample(logits: Tensor, *seqs: Sequence) -> list[Sampled]:
    works = tuple(Work(s, len(s.tokens) - 1, 1, samples=True) for s in seqs)
    output = Output(logits, Ops().argmax(logits), by_sequence=False)
    sampler = Sampler(
        (EOS,), slot=lambda _seq: 0, feed=lambda _slots, _tokens: None, draw=Ops().sample
    )
    return sampler.launch(output, StepPlan(works, Copies(), sum(w.rows for w in works))).read()


def pick(logits: list[float], params: SamplingParams, **sequence_fields: list[int]) -> int:
    fields = {"prompt": [1], "output": [], **sequence_fields}
    seq = sequence(params, fields["prompt"], fields["output"])
    token = sample(torch.tensor([logits]), seq)[0].token_id
    assert token is not None
    return token


def support(logits: Tensor, params: SamplingParams, draws: int = 400) -> Counter[int]:
    """Tokens drawn under many seeds."""
    seqs = [sequence(params, [1], seed=seed) for seed in range(draws)]
    results = sample(logits.expand(draws, -1), *seqs)
    return Counter(r.token_id for r in results if r.token_id is not None)


def test_greedy_takes_the_best() -> None:
    assert pick([0, 3, 1, 2], SamplingParams(temperature=0)) == 1


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = support(probs.log(), SamplingParams(temperature=1.0), draws=4000)
    for token, p in enumerate(probs.tolist()):
        assert abs(counts[token] / 4000 - p) < 0.03
    flat = support(probs.log(), SamplingParams(temperature=2.0), draws=4000)
    softened = probs.sqrt() / probs.sqrt().sum()
    for token, p in enumerate(softened.tolist()):
        assert abs(flat[token] / 4000 - p) < 0.03


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.9}, {0, 1, 2}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 0.05}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # 0.5 + 0.3 of the 0.95 that top-k leaves
        ({"top_k": -1}, {0, 1, 2, 3}),
        ({"allowed_token_ids": (2, 3)}, {2, 3}),
    ],
)
def test_filters_keep_exactly_their_set(params: dict[str, object], kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    chosen = SamplingParams(**params)  # pyright: ignore[reportArgumentType]
    assert set(support(logits, chosen)) == kept


@given(st.integers(0, 2**32), st.floats(0.01, 0.999))
@settings(max_examples=40, deadline=None)
def test_top_p_over_a_flat_large_vocabulary(seed: int, top_p: float) -> None:
    """More tokens than the candidate list holds are needed: everything is sorted."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(5000, generator=generator)
    ranks = logits.argsort(descending=True).argsort()
    allowed = (logits.softmax(0).sort(descending=True).values.cumsum(0) < top_p).sum() + 1
    drawn = support(logits, SamplingParams(top_p=top_p), draws=50)
    assert all(ranks[token] < allowed for token in drawn)


def test_a_row_is_not_changed_by_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3000, generator=generator)
    kinds = [
        {"temperature": 0.0},
        {"top_p": 0.99},
        {"top_k": 5, "min_p": 0.01},
        {},
        {"top_p": 0.3, "repetition_penalty": 1.3},
        {"temperature": 0.3},
    ]
    seqs = [
        sequence(SamplingParams(**kind), [1, 2], [3], seed=i)  # pyright: ignore[reportArgumentType]
        for i, kind in enumerate(kinds)
    ]
    together = [r.token_id for r in sample(logits, *seqs)]
    alone = [sample(logits[i : i + 1], s)[0].token_id for i, s in enumerate(seqs)]
    assert together == alone


def test_penalties() -> None:
    logits = [2.0, 1.9, -1.0, 0.0]
    greedy: dict[str, Any] = {"temperature": 0.0}
    penalised = SamplingParams(**greedy, repetition_penalty=1.2)
    assert pick(logits, penalised, prompt=[0]) == 1  # prompt tokens count
    assert pick(logits, SamplingParams(**greedy, presence_penalty=0.2), prompt=[0]) == 0
    assert pick(logits, SamplingParams(**greedy, presence_penalty=0.2), output=[0]) == 1
    thrice = [0, 0, 0]
    assert pick(logits, SamplingParams(**greedy, frequency_penalty=0.02), output=thrice) == 0
    assert pick(logits, SamplingParams(**greedy, frequency_penalty=0.04), output=thrice) == 1
    assert pick(logits, SamplingParams(**greedy, repetition_penalty=0.1), prompt=[2, 3]) == 0


def test_biases_and_bans() -> None:
    logits = [2.0, 1.9, -1.0, 0.0]
    assert pick(logits, SamplingParams(temperature=0, logit_bias={3: 5.0})) == 3
    assert pick(logits, SamplingParams(temperature=0, bad_token_ids=((0,),))) == 1
    pair = SamplingParams(temperature=0, bad_token_ids=((1, 0),))
    assert pick(logits, pair, output=[2]) == 0
    assert pick(logits, pair, output=[2, 1]) == 1
    assert pick(logits, pair, prompt=[1]) == 0  # only the output counts


def test_min_tokens_bans_eos_and_stop_tokens() -> None:
    logits = [2.0, 1.9, -1.0, 0.0]  # eos is 0
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(1,))
    assert pick(logits, params, output=[2]) == 3
    assert pick(logits, params, output=[2, 2]) == EOS


def test_logprobs_are_the_models_own() -> None:
    """Before temperature and penalties, and the chosen token's figure equals its entry on top."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
    params = SamplingParams(temperature=0, logprobs=2, logit_bias={1: 9.0})
    result = sample(logits, sequence(params, [1]))[0]
    assert result.logprobs is not None
    expected = logits[0].log_softmax(0).tolist()
    assert result.logprobs.token_id == 1
    assert result.logprobs.rank == 2
    assert result.logprobs.top[1] == (1, result.logprobs.logprob)
    assert [token for token, _ in result.logprobs.top] == [0, 1]
    assert math.isclose(result.logprobs.logprob, expected[1], rel_tol=1e-6)
    none = SamplingParams(temperature=0, logprobs=0)
    report = sample(logits, sequence(none, [1]))[0].logprobs
    assert report is not None
    assert report.top == ()


def test_rows_that_are_not_finite_are_broken_alone() -> None:
    logits = torch.tensor([[torch.nan, 1.0], [1.0, 2.0], [torch.inf, 0.0]])
    hot = [sequence(SamplingParams(), [1]) for _ in range(3)]
    results = sample(logits, *hot)
    assert [r.problem is not None for r in results] == [True, False, True]
    assert results[1].token_id is not None
