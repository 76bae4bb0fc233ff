"""An output that must follow a grammar does, whatever happens to its sequence on the way.

Breaks for: whoever parses what a model wrote; and for everybody, if one hostile grammar could stop
the engine or the server.
"""

from __future__ import annotations

import functools
import io
import json
import re
import struct
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from convserve.cache import CacheSizes
from convserve.engine import LLM, Grammar, SamplingParams
from convserve.engine.core import EngineCore
from convserve.engine.grammar import Grammars, compiled, vocabulary
from convserve.engine.grammar_check import check, main
from convserve.engine.grammar_checker import GrammarChecker
from convserve.engine.messages import GenerateRequest, TokenEvent
from convserve.engine.models import Decoder, load_model
from convserve.engine.resolve import Limits
from convserve.engine.sampling_checks import MAX_GRAMMAR_CHARS, check_sampling
from convserve.engine.text import TextTokenizer
from golden import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = torch.device("cpu")
FOLDER = GOLDEN / "models" / "dynconv_lowrank_qkv"
EOS, VOCAB = 257, 260
TEXT = TextTokenizer.from_folder(FOLDER)

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"enum": [1, 22, 333]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON = Grammar("json_schema", json.dumps(SCHEMA))
WORD = Grammar("regex", "(yes|no|maybe){1,3}")
LIST = Grammar("lark", 'start: "<" item ("," item){0,3} ">"\nitem: /[0-9]{1,3}/ | "é" | start')
EBNF = Grammar("gbnf", 'root ::= "a" [0-9]+ ("b" | "c")')


def follows(grammar: Grammar, text: str) -> bool:
    if grammar is PERSON:
        value = json.loads(text)
        return list(value) == ["name", "age"] and value["age"] in (1, 22, 333)
    if grammar is WORD:
        return re.fullmatch(WORD.source, text) is not None
    if grammar is EBNF:
        return re.fullmatch("a[0-9]+[bc]", text) is not None
    return text[0] == "<" and text[-1] == ">" and text.count("<") == text.count(">")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other over such small products cost a busy machine minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def model() -> Decoder:
    return load_model(FOLDER, torch.float32, CPU)


@functools.cache
def shared() -> Grammars:
    return Grammars(FOLDER, VOCAB, (EOS,))


def engine(
    num_pages: int = 64, num_slots: int = 8, budget: int = 16, grammars: Grammars | None = None
) -> EngineCore:
    sizes = CacheSizes(num_pages, 4, num_slots, model().state_spec.ring_len(), 4)
    limits = Limits(sizes, min(200, sizes.capacity), budget, 0)
    return EngineCore(model(), limits, (EOS,), CPU, poison=True, grammars=grammars or shared())


def request(name: str, grammar: Grammar | None, **params: Any) -> GenerateRequest:
    fields = {"max_tokens": 60, "temperature": 1.0, "grammar": grammar, **params}
    return GenerateRequest(
        request_id=name, prompt=tuple(name.encode()), params=SamplingParams(**fields)
    )


class Outcome:
    """What one choice said."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.last: TokenEvent | None = None

    @property
    def text(self) -> str:
        return TEXT.decode(self.tokens, skip_special_tokens=True)

    @property
    def finish(self) -> str | None:
        return self.last.finish_reason if self.last else None


def run(core: EngineCore, *requests: GenerateRequest) -> dict[tuple[str, int], Outcome]:
    outcomes: dict[tuple[str, int], Outcome] = {}
    for one in requests:
        core.add(one)
    while core.has_work:
        for event in core.step():
            outcome = outcomes.setdefault((event.request_id, event.index), Outcome())
            outcome.tokens += event.token_ids
            outcome.last = event
    core.check_integrity()
    return outcomes


@pytest.mark.parametrize("grammar", [PERSON, WORD, LIST, EBNF], ids=lambda g: g.kind)
def test_every_output_that_ends_follows_its_grammar(grammar: Grammar) -> None:
    outcomes = run(engine(), request("one", grammar, n=8, seed=1, max_tokens=120))
    ended = [outcome for outcome in outcomes.values() if outcome.finish == "stop"]
    assert ended
    for outcome in ended:
        assert outcome.tokens.pop() == EOS
        assert follows(grammar, outcome.text), outcome.text
    assert len({outcome.text for outcome in outcomes.values()}) > 1


@functools.cache
def alone(i: int, grammar: Grammar | None, n: int) -> dict[tuple[str, int], Outcome]:
    return run(engine(), numbered(i, grammar, n))


def numbered(i: int, grammar: Grammar | None, n: int) -> GenerateRequest:
    return request(f"request {i}", grammar, n=n, seed=i, max_tokens=30)


@settings(max_examples=12, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.sampled_from([None, PERSON, WORD, LIST]), st.integers(1, 2)),
        min_size=1,
        max_size=4,
    ),
    num_pages=st.integers(12, 30),
    num_slots=st.integers(1, 5),
    budget=st.integers(1, 12),
)
def test_what_shares_the_engine_changes_no_output(
    asked: list[tuple[Grammar | None, int]], num_pages: int, num_slots: int, budget: int
) -> None:
    """Preempted, forked, cut into chunks, beside others with other grammars or none: the same."""
    wanted = [numbered(i, grammar, n) for i, (grammar, n) in enumerate(asked)]
    together = run(engine(num_pages, num_slots, budget), *wanted)
    for i, (grammar, n) in enumerate(asked):
        for key, outcome in alone(i, grammar, n).items():
            assert together[key].tokens == outcome.tokens


def test_length_and_stop_tokens_end_an_output_before_its_grammar_does() -> None:
    brace = ord("}")
    outcomes = run(
        engine(),
        request("short", PERSON, max_tokens=5),
        request("stopped", PERSON, stop_token_ids=(ord("{"),)),
        request("closed", PERSON, stop_token_ids=(brace,), seed=3, max_tokens=150),
    )
    assert outcomes["short", 0].finish == "length"
    assert (outcomes["stopped", 0].tokens, outcomes["stopped", 0].finish) == ([ord("{")], "stop")
    assert outcomes["closed", 0].tokens[-1] == brace
    assert follows(PERSON, outcomes["closed", 0].text)


def test_logprobs_are_those_of_the_model_not_of_the_grammar() -> None:
    asked = request("a", WORD, temperature=0.0, logprobs=3, max_tokens=1)
    [outcome] = run(engine(), asked).values()
    assert outcome.last is not None
    [entry] = outcome.last.logprobs
    assert entry.token_id in b"ynm"
    assert entry.rank > 1
    assert entry.logprob < entry.top[0][1]


def test_biases_and_penalties_choose_among_what_the_grammar_allows() -> None:
    bias = {ord("n"): 100.0, ord("x"): 100.0}
    [outcome] = run(
        engine(), request("a", WORD, temperature=0.0, logit_bias=bias, repetition_penalty=1.3)
    ).values()
    assert outcome.text.startswith("no")
    assert follows(WORD, outcome.text)


def test_a_grammar_that_fails_ends_its_request_alone() -> None:
    broken = Grammar("regex", "(unclosed")
    heavy = Grammar("regex", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}")
    wanted = request("canary", PERSON, seed=5)
    long = request("heavy", heavy, logit_bias={ord("a"): 100.0})
    outcomes = run(engine(), request("broken", broken, n=2), wanted, long)
    for key in (("broken", 0), ("broken", 1), ("heavy", 0)):
        event = outcomes[key].last
        assert event is not None
        assert event.finish_reason == "error"
        assert (event.error or "").startswith("grammar: ")
    assert outcomes["canary", 0].tokens == run(engine(), wanted)["canary", 0].tokens


class SlowGrammars(Grammars):
    """Compiles when it is told to."""

    def __init__(self) -> None:
        super().__init__(FOLDER, VOCAB, (EOS,))
        self.may_compile = threading.Event()

    def _compile(self, grammar: Grammar) -> Any:
        assert self.may_compile.wait(30)
        return super()._compile(grammar)


def test_no_step_waits_for_a_grammar_to_compile() -> None:
    slow = SlowGrammars()
    core = engine(grammars=slow)
    core.add(request("held", WORD, n=2, seed=1))
    core.add(request("left", WORD, n=2))
    core.add(request("half", WORD, n=2, seed=2))
    core.abort("left", 0)
    core.abort("left", 1)
    core.abort("half", 0)
    assert core.stats().waiting == 3
    others = run_until(core, request("other", None, max_tokens=9), "other")
    assert len(others["other", 0].tokens) > 0
    assert core.stats().waiting == 3
    assert core.has_work
    assert core.step() == []  # a moment, and on to the next command
    slow.may_compile.set()
    outcomes = run(core)
    assert set(outcomes) == {("held", 0), ("held", 1), ("half", 1)}
    expected = run(engine(), request("held", WORD, n=2, seed=1))
    for key in (("held", 0), ("held", 1)):
        assert outcomes[key].tokens == expected[key].tokens
    slow.may_compile.clear()
    core.add(request("last", Grammar("regex", "another"), n=2))
    assert core.abort_all() == ["last"]
    assert not core.has_work
    slow.may_compile.set()


def run_until(
    core: EngineCore, asked: GenerateRequest, name: str
) -> dict[tuple[str, int], Outcome]:
    core.add(asked)
    outcomes: dict[tuple[str, int], Outcome] = {}
    while (name, 0) not in outcomes or outcomes[name, 0].finish is None:
        for event in core.step():
            outcome = outcomes.setdefault((event.request_id, event.index), Outcome())
            outcome.tokens += event.token_ids
            outcome.last = event
    return outcomes


def test_an_engine_without_text_fails_the_request() -> None:
    core = engine()
    core._sampler._grammars = None
    [outcome] = run(core, request("a", WORD)).values()
    assert outcome.last is not None
    assert outcome.last.error == "grammar: this engine has no tokenizer"


def test_the_offline_engine_takes_grammars() -> None:
    llm = LLM(FOLDER, memory="32MiB")
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=100, grammar=WORD)
    [completion] = llm.generate("a", params)
    assert completion.finish_reason == "stop"
    assert follows(WORD, completion.text)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"min_tokens": 1}, "min_tokens: cannot be combined with a grammar"),
        ({"ignore_eos": True}, "ignore_eos: "),
        ({"allowed_token_ids": (1,)}, "allowed_token_ids: "),
        ({"bad_token_ids": ((1,),)}, "bad_token_ids: "),
        ({"grammar": Grammar("regex", "a" * (MAX_GRAMMAR_CHARS + 1))}, "grammar: 65537 characters"),
    ],
)
def test_what_a_grammar_excludes(params: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_sampling(SamplingParams(**{"grammar": WORD, **params}), VOCAB, (EOS,))


def test_a_model_that_cannot_end_has_no_grammars() -> None:
    with pytest.raises(ValueError, match="no token to end"):
        check_sampling(SamplingParams(grammar=WORD), VOCAB, ())


def test_words_that_a_tokenizer_would_cut_otherwise() -> None:
    """A tokenizer that puts a space first, as SentencePiece does, and tokens of several bytes."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>", b" yes", b"ye", b"maybe"]
    tokenizer = vocabulary(tokens, [256], [256], lambda text: [257] if text == "yes" else [])
    matcher = compiled(WORD, tokenizer)
    mask = matcher.compute_bitmask()
    allowed = {i for i in range(260) if mask[i // 8] >> i % 8 & 1}
    assert allowed == {*b"ynm", 258, 259}
    assert matcher.consume_tokens([258, ord("s")])
    assert matcher.is_accepting()


DEEP = "start: T0\n" + "\n".join(f'T{i}: T{i + 1} "a"' for i in range(3000)) + '\nT3000: "b"'
BAD = [
    ("json_schema", "{", "EOF while parsing"),
    ("json_schema", "[]", "Expecting object"),
    ("json_schema", '{"type": "strin"}', "strin"),
    ("json_schema", '{"not": {"type": "string"}}', "not"),
    ("json_schema", '{"$ref": "http://127.0.0.1/x"}', "not present in a registry"),
    ("json_schema", '{"$ref": "#"}', "too complex"),
    ("json_schema", '{"items":' * 3000 + "{}" + "}" * 3000, "recursion limit"),
    ("regex", "(a", "unclosed group"),
    ("regex", "(" * 30_000 + "a" + ")" * 30_000, "regex"),
    ("lark", "start: missing", "missing"),
    ("lark", "start: " + "(" * 9000 + '"a"' + ")" * 9000, "nested"),
    ("gbnf", "root ::= ((", "Expected"),
    ("gbnf", "root ::= " + "(" * 9000 + '"a"' + ")" * 9000, "nested"),
]


@functools.cache
def byte_tokenizer() -> Any:
    return vocabulary(
        [*(bytes([byte]) for byte in range(256)), b"<end>"], [256], [256], lambda t: [*t.encode()]
    )


@pytest.mark.parametrize(("kind", "source", "words"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_with_a_grammar_is_one_short_line(kind: Any, source: str, words: str) -> None:
    problem = check(Grammar(kind, source), byte_tokenizer())
    assert problem.startswith("grammar: ")
    assert words in problem
    assert len(problem) < 700
    assert "\n" not in problem


def test_the_check_process_answers_in_order() -> None:
    frames = b""
    for grammar in (WORD, Grammar("regex", "(a"), PERSON):
        body = msgspec.msgpack.encode(grammar)
        frames += struct.pack("<I", len(body)) + body
    written = io.BytesIO()
    main(io.BytesIO(frames), written)
    data, answers = written.getvalue(), []
    while data:
        size = struct.unpack("<I", data[:4])[0]
        answers.append(data[4 : 4 + size].decode())
        data = data[4 + size :]
    assert answers[:2] == ["", ""]  # ready, WORD
    assert "unclosed" in answers[2]
    assert answers[3:] == [""]


async def test_a_grammar_that_kills_its_check_is_refused_and_the_next_is_not() -> None:
    checker = GrammarChecker(10.0)
    try:
        await checker.check(WORD)
        for _ in range(2):
            with pytest.raises(ValueError, match="grammar: it is too complex"):
                await checker.check(Grammar("lark", DEEP))
        with pytest.raises(ValueError, match="unclosed group"):
            await checker.check(Grammar("regex", "(a"))
        await checker.check(PERSON)
    finally:
        await checker.close()


async def test_a_check_that_does_not_start_is_nobodys_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checker = GrammarChecker(10.0)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        await checker.check(WORD)
    assert checker._process is None


async def test_a_grammar_that_takes_too_long_is_refused() -> None:
    checker = GrammarChecker(0.0)
    try:
        with pytest.raises(ValueError, match="did not compile in 0 s"):
            await checker.check(WORD)
        assert checker._process is None
    finally:
        await checker.close()
