"""Sampling parameters that would overflow, index outside the vocabulary or leave nothing to choose
are refused with a sentence naming the field.

Breaks for: everybody who shares the engine with the request that carried them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from convserve.engine.messages import SamplingParams
from convserve.engine.sampling_checks import check_sampling
from hypothesis import given
from hypothesis import strategies as st

VOCAB = 50


@pytest.mark.parametrize(
    "good",
    [
        {},
        {"temperature": 0, "max_tokens": 1, "min_tokens": 1},
        {"temperature": 1e-5},
        {"temperature": 100, "n": 128},
        {"top_k": -1, "top_p": 1e-300, "min_p": 1.0},
        {"seed": -(2**63), "logprobs": 0, "prompt_logprobs": 20},
        {"logit_bias": {0: -100.0, 49: 100}, "stop_token_ids": (0, 49)},
        {"allowed_token_ids": (3,), "bad_token_ids": ((3, 3),)},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 0.01},
    ],
)
def test_what_is_in_range_passes(good: dict[str, Any]) -> None:
    check_sampling(SamplingParams(**good), VOCAB)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("n", "3"),
        ("n", 1.0),
        pytest.param("n", 10**5000, id="n-of-5000-digits"),
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 1e-6),
        ("temperature", 101),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        pytest.param("temperature", 10**400, id="temperature-of-400-digits"),
        ("top_p", 0.0),
        ("top_p", -0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 2.0),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e308),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -math.inf),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 21),
        ("logit_bias", {50: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
        ("stop_token_ids", (50,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (2**63,)),
        ("stop_token_ids", (0,) * 129),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (50,)),
        ("allowed_token_ids", (0,) * 51),
        ("bad_token_ids", ((),)),
        ("bad_token_ids", ((50,),)),
        ("bad_token_ids", ((0,) * 65,)),
        ("bad_token_ids", ((0,),) * 1025),
        ("bad_token_ids", tuple((token,) for token in range(VOCAB))),
    ],
)
def test_what_is_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: ") as caught:
        check_sampling(SamplingParams(**{field: value}), VOCAB)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"allowed_token_ids": (1, 2), "bad_token_ids": ((1,), (2,))}, "allowed_token_ids"),
        ({"allowed_token_ids": (7,), "min_tokens": 1}, "min_tokens"),
        ({"allowed_token_ids": (1,), "stop_token_ids": (1,), "min_tokens": 1}, "min_tokens"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        check_sampling(SamplingParams(**fields), VOCAB, eos_token_ids=(7,))


anything = st.one_of(
    st.none(),
    st.integers(),
    st.sampled_from([2**31, 2**63, -(2**63), 2**64, -1, 0]),
    st.floats(),
    st.text(max_size=3),
)
FIELDS = [name for name in SamplingParams.__struct_fields__ if name not in ("logit_bias",)]


@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4))
def test_any_value_passes_or_is_refused_by_value_error(fields: dict[str, Any]) -> None:
    listed = ("stop_token_ids", "allowed_token_ids", "bad_token_ids")
    fields = {k: v for k, v in fields.items() if k not in listed}
    params = SamplingParams(**fields)
    named = "n"
    try:
        check_sampling(params, VOCAB)
    except ValueError as error:
        named = str(error).partition(":")[0]
    assert named in FIELDS
