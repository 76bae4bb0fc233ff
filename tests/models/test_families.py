"""Every family through the whole engine: what is shared, preempted, forked, aborted or cut changes
no token. State that is carried wrongly shows as another text."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from convserve.cache import CacheSizes
from convserve.engine.core import EngineCore
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.models import Decoder, ModelError, load_model
from convserve.engine.models.config import parse_config
from convserve.engine.resolve import Limits
from golden import GOLDEN
from tiny_canon import CANON, write_canon
from tiny_models import config_of, write_model

if TYPE_CHECKING:
    from collections.abc import Sequence

CPU = torch.device("cpu")
GOLDEN_FAMILIES = ("hf_lfm2", "hf_mamba2", "hf_qwen3_next", "jet_nemotron_tiny")
FAMILIES = (*GOLDEN_FAMILIES, "canon", "lowrank all", "delta lowrank", "mamba2 headwise")
RECURRENT = ("hf_mamba2", "hf_qwen3_next", "jet_nemotron_tiny", "delta lowrank", "mamba2 headwise")


@functools.cache
def loaded(family: str) -> Decoder:
    if family in GOLDEN_FAMILIES:
        return load_model(GOLDEN / "models" / family, torch.float64, CPU, backend="reference")
    with tempfile.TemporaryDirectory() as folder:
        if family == "canon":
            write_canon(Path(folder) / "m", CANON)
        else:
            write_model(Path(folder) / "m", config_of(family))
        return load_model(Path(folder) / "m", torch.float64, CPU, backend="reference")


def core_of(family: str, **options: Any) -> EngineCore:
    model = loaded(family)
    pages, slots = options.pop("num_pages", 64), options.pop("num_slots", 4)
    tails, budget = options.pop("num_tails", 8), options.pop("budget", 64)
    sizes = CacheSizes(pages, 4, slots, model.state_spec.ring_len(), tails)
    return EngineCore(model, Limits(sizes, 80, budget, 0), (), CPU, poison=True, **options)


def generate(
    core: EngineCore, prompts: Sequence[Sequence[int]], count: int, n: int = 1
) -> dict[tuple[str, int], list[int]]:
    """Greedy tokens of every choice of every prompt, all at once."""
    params = SamplingParams(temperature=0, max_tokens=count, n=n)
    tokens: dict[tuple[str, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        core.add(GenerateRequest(request_id=str(i), prompt=tuple(prompt), params=params))
    while core.has_work:
        for event in core.step():
            assert event.error is None
            tokens.setdefault((event.request_id, event.index), []).extend(event.token_ids)
        core.check_integrity()
    assert core.stats().pages_used == core.stats().slots_used == 0
    return tokens


@functools.cache
def alone(family: str, prompt: tuple[int, ...], count: int) -> list[int]:
    """The tokens of a request that nobody shares anything with."""
    core = core_of(family, prefix_caching=False, overlap=False)
    return generate(core, [prompt], count)["0", 0]


def prompts_of(seed: int) -> list[tuple[int, ...]]:
    """Prompts with common beginnings, some of which end where others go on."""
    rng = random.Random(seed)
    trunk = [rng.randrange(64) for _ in range(30)]
    fork = [*trunk[:18], *(rng.randrange(64) for _ in range(9))]
    ends = (trunk[:1], trunk[:17], trunk, fork, [*trunk, 5, 6, 7], [*fork, 9], trunk[:25])
    return [tuple(p) for p in ends]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_crowd_through_a_small_pool_gets_what_each_gets_alone(family: str, overlap: bool) -> None:
    """Chunks of all sizes, pages for little more than one, tails that are evicted all the time."""
    prompts = prompts_of(1)
    preempted = 0
    for budget, tails, pages in ((5, 2, 22), (64, 8, 22), (9, 0, 40)):
        core = core_of(family, budget=budget, num_tails=tails, num_pages=pages, overlap=overlap)
        got = generate(core, prompts, 12)
        preempted += core.stats().preemptions
        for i, prompt in enumerate(prompts):
            assert got[str(i), 0] == alone(family, prompt, 12)
    # Windowed models give pages back and need no preemption.
    assert preempted > 0 or loaded(family).state_spec.window is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_prefixes_change_no_token(family: str) -> None:
    """Once cold, once warm, then as a conversation goes on."""
    core = core_of(family, num_tails=16)
    for prompts in (prompts_of(2), prompts_of(2)):
        before = core.stats().prefix_hits
        got = generate(core, prompts, 10)
        for i, prompt in enumerate(prompts):
            assert got[str(i), 0] == alone(family, prompt, 10)
    assert core.stats().prefix_hits - before > 60
    turn = prompts_of(2)[2]
    turn = (*turn, *alone(family, turn, 10), 3, 4)
    before = core.stats().prefix_hits
    assert generate(core, [turn], 10)["0", 0] == alone(family, turn, 10)
    assert core.stats().prefix_hits - before >= 28


@pytest.mark.parametrize("family", RECURRENT)
def test_without_tails_a_recurrent_model_computes_every_prompt(family: str) -> None:
    core = core_of(family, num_tails=0)
    for _ in range(2):
        generate(core, prompts_of(3)[2:4], 3)
    assert core.stats().prefix_hits == core.stats().replayed_tokens == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("caching", [True, False])
def test_choices_of_one_prompt_agree(family: str, caching: bool) -> None:
    """Forks start before the last prompt token, also where the leader's prompt was all cached."""
    prompts = [prompts_of(4)[k] for k in (0, 1, 2, 2)]
    for budget in (3, 64):
        core = core_of(family, budget=budget, prefix_caching=caching)
        for prompt in prompts:
            got = generate(core, [prompt], 8, n=3)
            assert [got["0", i] for i in range(3)] == [alone(family, prompt, 8)] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_an_abort_leaves_nothing_behind(family: str) -> None:
    """Its slot goes to the next request, which reads none of what is in it."""
    core = core_of(family, num_slots=1, budget=7)
    first, second = prompts_of(5)[2:4]
    params = SamplingParams(temperature=0, max_tokens=20)
    for steps in (1, 4, 9):
        core.add(GenerateRequest(request_id="gone", prompt=first, params=params))
        for _ in range(steps):
            core.step()
        core.abort("gone")
        assert generate(core, [second], 6)["0", 0] == alone(family, second, 6)


def jet(**changes: Any) -> dict[str, Any]:
    options = {"num_heads": 2, "head_dim": 16, "norm_eps": "1e-5", "conv_size": 4, **changes}
    return {"jet": options, "swa": {"window_size": 8}}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("hf_lfm2", {"conv_dim": 96}, "conv_dim 96"),
        ("hf_lfm2", {"layer_types": ["conv", "mamba", "conv"]}, "layer_types.*mamba"),
        ("hf_lfm2", {"conv_L_cache": 9}, "conv_L_cache 9"),
        ("hf_mamba2", {"time_step_limit": [0.01, 1.0]}, "time_step_limit"),
        ("hf_mamba2", {"rms_norm": False}, "rms_norm False"),
        ("hf_mamba2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("hf_mamba2", {"num_heads": 5}, "expand 2"),
        ("hf_mamba2", {"n_groups": 4}, "n_groups 4"),
        ("hf_qwen3_next", {"attention_bias": True}, "attention_bias True"),
        ("hf_qwen3_next", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("hf_qwen3_next", {"linear_num_key_heads": 3}, "linear_num_key_heads 3"),
        ("jet_nemotron_tiny", {"layer_types": "['jet'] * 4"}, "is not a list"),
        ("jet_nemotron_tiny", {"efficient_attention_config": jet(gate=1)}, "jet.gate"),
        ("jet_nemotron_tiny", {"efficient_attention_config": jet(expand_v=1.55)}, "expand_v 1.55"),
    ],
)
def test_options_that_are_not_served_are_named(
    name: str, changes: dict[str, Any], words: str
) -> None:
    raw = json.loads((GOLDEN / "models" / name / "config.json").read_text())
    parse_config(raw)
    with pytest.raises(ModelError, match=words):
        parse_config({**raw, **changes})


@pytest.mark.parametrize(
    ("variant", "kind", "changes", "words"),
    [
        ("delta", "gated_delta_net", {"head_dim": 8}, "gated_delta_net.head_dim is not a known"),
        ("delta", "gated_delta_net", {"num_key_heads": 3}, "num_key_heads 3 does not divide"),
        ("delta", "gated_delta_net", {"value_head_dim": 0}, "value_head_dim must be a positive"),
        ("mamba2", "mamba2", {"conv": None}, "mamba2.conv is missing"),
        ("mamba2", "mamba2", {"conv": {"kind": "static"}}, "mamba2.conv.width must be"),
        (
            "mamba2",
            "mamba2",
            {"conv": {"kind": "static", "width": 4, "placement": ["q"]}},
            "mamba2.conv.placement must list some of xbc",
        ),
        (
            "delta",
            "gated_delta_net",
            {"conv": {"kind": "static", "width": 4, "placement": ["q"], "activation": None}},
            "gated_delta_net.conv.activation None",
        ),
    ],
)
def test_mixers_of_a_dynconv_config_are_checked(
    variant: str, kind: str, changes: dict[str, Any], words: str
) -> None:
    raw = config_of(variant)
    parse_config(raw)
    with pytest.raises(ModelError, match=words):
        parse_config({**raw, kind: {**raw[kind], **changes}})
    with pytest.raises(ModelError, match=f"{kind} must be an object"):
        parse_config({key: value for key, value in raw.items() if key != kind})


@pytest.mark.parametrize("family", ["delta lowrank", "mamba2 headwise"])
def test_a_model_of_windows_alone_generates_past_its_page_pool(family: str) -> None:
    """Its sliding windows of 7 need few pages however much it says."""
    core = core_of(family, num_pages=40, prefix_caching=False)
    prompt = prompts_of(6)[1]
    params = SamplingParams(temperature=0, max_tokens=60)
    core.add(GenerateRequest(request_id="0", prompt=prompt, params=params))
    tokens: list[int] = []
    while core.has_work:
        tokens += [t for event in core.step() for t in event.token_ids]
        if len(tokens) > 20:
            assert core.stats().pages_used <= 5
    assert tokens == alone(family, prompt, 60)
