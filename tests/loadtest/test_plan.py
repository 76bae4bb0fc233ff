"""What will be sent is fixed before anything is: seeds, schedules, lengths, traces, scenarios."""

from __future__ import annotations

import json

import numpy as np
import pytest
from convserve.loadtest.arrivals import Stage, level_at, parse_duration, schedule
from convserve.loadtest.lengths import Length
from convserve.loadtest.plan import Plan
from convserve.loadtest.prompts import PromptPlan
from convserve.loadtest.scenario import make_scenario, read_scenario, shipped_scenarios
from convserve.loadtest.traces import read_trace
from hypothesis import given
from hypothesis import strategies as st

IDS = PromptPlan(kind="ids", vocab=5000)


def plan(table, prompts=IDS):
    return Plan(make_scenario(table), prompts, "m")


@given(
    st.sampled_from(["constant", "poisson", "gamma"]),
    st.lists(
        st.tuples(st.floats(1, 20), st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=3
    ),
    st.integers(0, 9),
)
def test_arrivals_increase_and_stay_within_their_stages(gaps, spans, seed):
    stages = [Stage(duration=d, level=low, to=high) for d, low, high in spans]
    times = schedule(gaps, stages, np.random.default_rng(seed), burstiness=0.5)
    assert (np.diff(times) >= 0).all()
    assert times.size == 0 or times[0] >= 0
    assert times.size == 0 or times[-1] <= sum(s.duration for s in stages) + 1e-6
    if gaps == "constant":
        area = sum(s.duration * (s.level + s.end_level) / 2 for s in stages)
        assert times.size == pytest.approx(area, abs=1.01)


def test_a_ramp_puts_arrivals_where_the_rate_is():
    stages = [Stage(duration=100, level=0, to=20)]
    times = schedule("poisson", stages, np.random.default_rng(0))
    early, late = np.count_nonzero(times < 50), np.count_nonzero(times >= 50)
    assert early == pytest.approx(250, rel=0.2)
    assert late == pytest.approx(750, rel=0.1)


def test_burstiness_is_the_shape_of_the_gaps():
    stage = [Stage(duration=2000, level=5)]
    spread = {}
    for shape in (0.25, 1.0, 4.0):
        gaps = np.diff(schedule("gamma", stage, np.random.default_rng(0), burstiness=shape))
        assert gaps.mean() == pytest.approx(0.2, rel=0.05)
        spread[shape] = gaps.std() / gaps.mean()
    assert spread[0.25] == pytest.approx(2.0, rel=0.1)
    assert spread[1.0] == pytest.approx(1.0, rel=0.1)
    assert spread[4.0] == pytest.approx(0.5, rel=0.1)


def test_stages_are_read_and_followed():
    stages = Stage.parse_all("30s:5, 1m:5-20")
    assert [(s.duration, s.level, s.to) for s in stages] == [(30, 5, None), (60, 5, 20)]
    assert level_at(stages, 10) == 5
    assert level_at(stages, 60) == 12.5
    assert level_at(stages, 95) == 0
    assert parse_duration("2h") == 7200
    with pytest.raises(ValueError, match="'x:1' is not DURATION:LEVEL"):
        Stage.parse_all("30s:5,x:1")


def test_a_seed_fixes_everything_and_shares_are_disjoint():
    table = {
        "seed": 3,
        "load": {"strategy": "poisson", "rate": 5, "max_duration": 10},
        "traffic": [{"prompt_tokens": "lognormal:50:1", "output_tokens": "uniform:1:9"}],
    }
    one, two = plan(table), plan(table)
    assert (one.offsets == two.offsets).all()
    assert one.session(7) == two.session(7)
    assert one.session(7) != one.session(8)
    assert one.session(7) != one.session(7, warmup=True)
    assert plan({**table, "seed": 4}).session(7) != one.session(7)


def test_prefixes_are_shared_along_the_tree():
    table = {
        "load": {"max_requests": 60},
        "traffic": [
            {
                "prompt_tokens": 5,
                "prefix_tree": [{"fanout": 2, "tokens": 32}, {"fanout": 3, "tokens": 16}],
            }
        ],
    }
    made = plan(table)
    prefixes = [tuple(made.session(k).prefix) for k in range(60)]
    assert {len(p) for p in prefixes} == {48}
    assert len({p[:32] for p in prefixes}) == 2
    assert len(set(prefixes)) == 6
    skewed = {**table, "traffic": [{**table["traffic"][0], "prefix_skew": 4.0}]}
    counts = [tuple(plan(skewed).session(k).prefix) for k in range(60)]
    assert max(counts.count(p) for p in set(counts)) > 40


def test_classes_come_in_proportion():
    table = {
        "load": {"max_requests": 1},
        "traffic": [{"name": "a", "weight": 3}, {"name": "b", "weight": 1}],
    }
    made = plan(table)
    names = [made.session(k).traffic.name for k in range(400)]
    assert names.count("a") == pytest.approx(300, abs=40)


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [
        (128, 128, 128, 128),
        ("uniform:10:20", 10, 20, 15),
        ("lognormal:100:0.5:20:400", 20, 400, 113),
        ("exponential:50", 0, 2000, 50),
    ],
)
def test_lengths_follow_their_distribution(text, low, high, mean):
    length = Length.parse(text, "x")
    drawn = [length.draw_count(np.random.default_rng((1, k))) for k in range(2000)]
    assert min(drawn) >= max(low, 1)
    assert max(drawn) <= high
    assert np.mean(drawn) == pytest.approx(mean, rel=0.1)


def test_lengths_from_a_file(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("3\n5\n9\n")
    length = Length.parse(f"file:{path}", "x")
    assert {length.draw_count(np.random.default_rng(k)) for k in range(50)} == {3, 5, 9}


@pytest.mark.parametrize(
    "text", ["uniform:5", "uniform:9:5", "normal:1:2", "lognormal:1:2:3", "-4", "file:/no/such"]
)
def test_wrong_lengths_name_the_field(text):
    with pytest.raises(ValueError, match=r"^traffic\[0\]\.turns: "):
        Length.parse(text, "traffic[0].turns")


def test_mooncake_traces_keep_their_shared_blocks(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 1000, "input_length": 1100, "output_length": 20, "hash_ids": [1, 2, 3]},
        {"timestamp": 3000, "input_length": 1030, "output_length": 9, "hash_ids": [1, 2, 9]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    made = plan({"load": {"strategy": "trace", "trace": str(path), "speed": 2}})
    assert made.offsets == pytest.approx([0.0, 1.0])
    first, second = (made.session(k).turns[0] for k in range(2))
    assert (len(first.prompt), first.max_tokens) == (1100, 20)
    assert (len(second.prompt), second.max_tokens) == (1030, 9)
    assert first.prompt[:1024] == second.prompt[:1024]
    assert first.prompt[1024:1030] != second.prompt[1024:]


@pytest.mark.parametrize(
    "text",
    [
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.1805900,10,3\n",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,374,44,418,x\n5.25,GPT-4,99,0,99,failed\n5.5,GPT-4,10,3,13,x\n",
    ],
)
def test_azure_and_burstgpt_traces_are_told_apart(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    rows = read_trace(path)
    assert [(r.prompt_tokens, r.output_tokens) for r in rows] == [(374, 44), (10, 3)]
    assert rows[1].time == pytest.approx(0.5)


def test_wrong_traces_name_file_and_line(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"trace\.csv: columns a, b are not those of Azure"):
        read_trace(path)
    path.write_text('{"timestamp": 1, "input_length": "x", "output_length": 1}\n')
    with pytest.raises(ValueError, match=r"trace\.csv: line 1: .*input_length"):
        read_trace(path)


@pytest.mark.parametrize("name", shipped_scenarios())
def test_shipped_scenarios_are_sound(name):
    made = make_scenario(read_scenario(name), name)
    assert made.name == name
    assert made.description
    text = PromptPlan(kind="text")
    prompts = text if made.request.endpoint == "chat" else IDS
    assert Plan(made, prompts, "m").session(0).turns


def test_yaml_and_toml_say_the_same(tmp_path):
    toml, yaml = tmp_path / "s.toml", tmp_path / "s.yaml"
    toml.write_text('[load]\nmax_requests = 3\n[[traffic]]\nprompt_tokens = "uniform:1:2"\n')
    yaml.write_text("load: {max_requests: 3}\ntraffic: [{prompt_tokens: 'uniform:1:2'}]\n")
    assert make_scenario(read_scenario(str(toml))) == make_scenario(read_scenario(str(yaml)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "give max_requests, max_duration or stages"),
        ({"load": {"strategy": "poisson", "max_requests": 1}}, "load.rate: strategy poisson needs"),
        ({"load": {"rate": 2, "max_requests": 1}}, "load.rate: has no meaning for strategy conc"),
        ({"load": {"max_requests": "many"}}, r"Expected `int \| null`, got `str` - at `\$.load"),
        ({"load": {"max_requests": 1, "users": 3}}, "unknown field `users`"),
        ({"load": {"max_requests": 0}}, "load.max_requests: 0"),
        ({"load": {"max_requests": 1}, "traffic": [{"cancel_share": 2}]}, r"traffic\[0\].cancel"),
        ({"load": {"max_requests": 1}, "traffic": [{"turns": "x"}]}, r"traffic\[0\].turns: 'x'"),
        ({"load": {"strategy": "trace"}}, "load.trace"),
        ({"load": {"max_requests": 1, "max_in_flight": 2}}, "only for open loops"),
    ],
)
def test_wrong_scenarios_say_what_and_where(table, message):
    with pytest.raises(ValueError, match=message):
        make_scenario(table, "s.toml")
