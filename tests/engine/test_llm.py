"""The offline engine completes and scores like a loop that knows no cache, batch or scheduler."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from convserve.cache import CacheManager, CacheSizes, CacheStorage, Copies
from convserve.cache.pools import SequenceId
from convserve.engine import LLM, SamplingParams
from convserve.engine.batch_builder import BatchBuilder
from convserve.engine.core import EngineCore
from convserve.engine.messages import GenerateRequest
from convserve.engine.models import Decoder, load_model
from convserve.engine.plan import StepPlan, Work
from convserve.engine.resolve import ConfigError, Limits
from convserve.engine.sequence import Sequence
from golden import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from torch import Tensor

CPU = torch.device("cpu")
MODELS = ["dynconv_lowrank_qkv", "dynconv_all_linear", "static_qkv", "dynconv_headwise_qkv"]


@functools.cache
def model_of(name: str) -> Decoder:
    return load_model(GOLDEN / "models" / name, torch.float32, CPU)


@functools.cache
def llm_of(name: str) -> LLM:
    return LLM(GOLDEN / "models" / name, memory="32MiB", max_batch_tokens=8, page_size=4)


@torch.inference_mode()
def logits_of(model: Decoder, tokens: list[int]) -> Tensor:
    """Logits of every row of one sequence, computed whole and alone in a fresh cache."""
    sizes = CacheSizes(1, 256, 1, model.state_spec.ring_len())
    cache = CacheManager(sizes)
    state = CacheStorage(model.state_spec, sizes, CPU, poison=True).layers
    cache.admit(SequenceId(1), tokens)
    seq = Sequence(
        id=SequenceId(1),
        request_id="naive",
        index=0,
        params=SamplingParams(),
        tokens=tokens,
        prompt_len=len(tokens),
        max_len=256,
        seed=0,
        priority=0,
        salt="",
        arrival=0,
        arrived_at=0.0,
    )
    work = Work(seq, 0, len(tokens), samples=False, score_rows=len(tokens))
    builder = BatchBuilder(cache, state, 256)
    return model.forward(builder.build(StepPlan((work,), Copies(), work.rows)))


@functools.cache
def naive_greedy(name: str, prompt: tuple[int, ...], count: int) -> list[int]:
    """The whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(model_of(name), tokens)[-1].argmax()))
    return tokens[len(prompt) :]


LONG = tuple(range(100, 131))
# Prefixes cut at a page's end (4 tokens), one before, one after, and W + 1 beyond.
PROMPTS = [(7,), (1, 2), LONG, *((*LONG[:n], 5, 6, n) for n in (3, 4, 5, 8, 15, 16, 17, 21, 27))]


@given(
    name=st.sampled_from(MODELS),
    arrivals=st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.integers(0, 12), st.sampled_from([1, 1, 2])),
        min_size=1,
        max_size=8,
    ),
    aborted=st.sets(st.integers(0, 5), max_size=2),
    budget=st.integers(1, 24),
    num_pages=st.integers(11, 40),
    num_slots=st.integers(1, 6),
    num_tails=st.sampled_from([0, 1, 2, 30]),
    prefix_caching=st.sampled_from([True, True, True, False]),
)
@settings(max_examples=60, deadline=None)
def test_engine_equals_a_naive_loop(
    name: str,
    arrivals: list[tuple[tuple[int, ...], int, int]],
    aborted: set[int],
    budget: int,
    num_pages: int,
    num_slots: int,
    num_tails: int,
    prefix_caching: bool,
) -> None:
    """Whatever shares the batch, is cut, preempted, aborted, forked, found in the prefix cache,
    replayed or restored from a tail: greedy tokens are those of the loop."""
    model = model_of(name)
    sizes = CacheSizes(num_pages, 4, num_slots, model.state_spec.ring_len(), num_tails)
    limits = Limits(sizes, 44, budget, 0)
    core = EngineCore(model, limits, (), CPU, prefix_caching=prefix_caching, poison=True)
    params = {n: SamplingParams(temperature=0, max_tokens=10, n=n) for n in (1, 2)}
    output: dict[tuple[int, int], list[int]] = {}
    step = 0
    while core.has_work or step <= 20:
        for i, (prompt, at, n) in enumerate(arrivals):
            if at == step:
                core.add(GenerateRequest(request_id=str(i), prompt=prompt, params=params[n]))
            if i in aborted and at + 2 == step:
                core.abort(str(i))
        for event in core.step():
            output.setdefault((int(event.request_id), event.index), []).extend(event.token_ids)
        step += 1
    for i, (prompt, _, n) in enumerate(arrivals):
        expected = naive_greedy(name, prompt, 10)
        for index in range(n):
            got = output.get((i, index), [])
            assert got == (expected[: len(got)] if i in aborted else expected)
    core.check_integrity()
    stats = core.stats()
    assert stats.pages_used == stats.slots_used == stats.running == stats.waiting == 0


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_log_probabilities_of_the_tokens(name: str) -> None:
    sequences = [[5], [1, 2, 3], list(range(30, 61))]
    scores = llm_of(name).score(sequences)
    for tokens, got in zip(sequences, scores, strict=True):
        assert got[0] is None
        logprobs = logits_of(model_of(name), tokens).log_softmax(-1)
        expected = [float(logprobs[i, t]) for i, t in enumerate(tokens[1:])]
        assert got[1:] == pytest.approx(expected, abs=1e-4)


def test_generate_takes_text_and_token_ids() -> None:
    llm = llm_of("dynconv_lowrank_qkv")
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    (text,) = llm.generate("hello", params)
    (ids,) = llm.generate([104, 101, 108, 108, 111], params)
    assert (text.text, text.token_ids) == (ids.text, ids.token_ids)
    both = llm.generate(["hello", [1, 2]], params)
    assert both[0].token_ids == text.token_ids
    assert len(both[1].token_ids) == 6
    assert text.text == llm.tokenizer.decode(text.token_ids, skip_special_tokens=True)


def test_stop_strings_end_a_completion() -> None:
    llm = llm_of("dynconv_lowrank_qkv")
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    whole = llm.generate([5, 6, 7], params)[0]
    stop = next(c for c in whole.text if c.isascii() and c.isprintable())
    cut = llm.generate([5, 6, 7], params, stop=[stop])[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"max_seqs": 3}, "max_seqs is not an engine option"), ({"page_size": "x"}, "page_size")],
)
def test_unknown_and_wrong_options_fail(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        LLM(GOLDEN / "models" / "hf_llama", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU cannot do")
def test_what_needs_a_gpu_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^device: "):
        LLM(GOLDEN / "models" / "hf_llama", device="cuda")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("jet_nemotron_tiny", {}, "not for models with recurrent layers"),
        ("hf_llama", {"backend": "reference"}, "not with backend reference"),
    ],
)
def test_what_cannot_be_deterministic_is_refused_by_name(
    name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=f"^deterministic: {words}"):
        LLM(GOLDEN / "models" / name, deterministic=True, **options)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "prompt: 0 tokens"),
        ([999], {}, "token id is outside"),
        ([1] * 600, {}, "prompt: 600 tokens"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_prompts_and_parameters_are_refused_and_leave_nothing(
    prompt: list[int], params: dict[str, Any], words: str
) -> None:
    llm = llm_of("dynconv_lowrank_qkv")
    with pytest.raises(ValueError, match=words):
        llm.generate([[1, 2], prompt], SamplingParams(**params))
    assert not llm._core.has_work
