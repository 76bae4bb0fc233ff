"""Text that comes out of tokens: no piece shows half a code point or a beginning stop string, and
however tokens are grouped the pieces add up to one text.

Breaks for: every streaming client (garbled or doubled characters, leaked stop strings), and for
servers whose cost per token grows with the output.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from convserve.engine.text import OutputText, StopStrings, TextTokenizer
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[1] / "data" / "tokenizer"
TOKENIZER = TextTokenizer.from_folder(FOLDER)
LIBRARY = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
EOS = 257

broken_utf8 = st.lists(
    st.one_of(st.text(max_size=4).map(str.encode), st.binary(max_size=4)), max_size=12
).map(b"".join)
token_ids = st.lists(
    st.one_of(broken_utf8.map(list), st.just([EOS]), st.just([300])), max_size=4
).map(lambda groups: [token for group in groups for token in group])


def pieces(output: OutputText, ids: list[int]) -> list[str]:
    return [*[output.push(token_id) for token_id in ids], output.finish()]


@given(token_ids)
def test_pieces_add_up_to_what_the_library_decodes(ids: list[int]) -> None:
    for skip in (True, False):
        output = OutputText(TOKENIZER, skip_special_tokens=skip)
        known = [token_id for token_id in ids if token_id < 259]
        assert "".join(pieces(output, ids)) == LIBRARY.decode(known, skip_special_tokens=skip)


@given(st.text(max_size=30))
def test_valid_text_never_shows_a_replacement_character(text: str) -> None:
    shown = pieces(OutputText(TOKENIZER), list(text.encode()))
    assert "".join(shown) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in shown)


def test_an_incomplete_code_point_shows_once_at_the_end() -> None:
    assert pieces(OutputText(TOKENIZER), list("€".encode()[:2])) == ["", "", "\ufffd"]


@pytest.mark.parametrize(
    ("prompt", "said", "text"),
    [
        (b"a\xe2", b"\x82\xacb", "€b"),
        (b"a\xe2\x82", b"\xacb", "€b"),
        (b"\xf0\x9f\x98", b"\x80", "😀"),
        (b"a\xe2", b"bc", "bc"),  # not continued: nothing of the prompt may leak
        (b"a\xff", b"\x82c", "\ufffdc"),
        ("a€".encode(), b"\xacb", "\ufffdb"),
    ],
)
def test_an_output_completes_the_code_point_its_prompt_began(
    prompt: bytes, said: bytes, text: str
) -> None:
    output = OutputText(TOKENIZER, prompt=list(prompt))
    assert "".join(pieces(output, list(said))) == text


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(end, stop) of the match that ends first; of those, the longest. The naive way."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


@given(
    st.text("ab€", max_size=20),
    st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=4),
    st.booleans(),
)
def test_stop_strings_cut_where_a_search_of_the_whole_text_would(
    text: str, stops: list[str], include: bool
) -> None:
    output = OutputText(TOKENIZER, stops=StopStrings(stops), include_stop=include)
    shown = ""
    for token_id in text.encode():
        shown += output.push(token_id)
        assert include or not any(stop in shown for stop in stops)
    shown += output.finish()
    found = first_stop(text, stops)
    if found is None:
        assert (shown, output.stop) == (text, None)
    else:
        end, stop = found
        assert output.stop == stop
        assert shown == text[: end if include else end - len(stop)]


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=4))
def test_what_is_held_back_could_begin_a_stop_string(text: str, stop: str) -> None:
    output = OutputText(TOKENIZER, stops=StopStrings([stop]))
    shown = ""
    for place, token_id in enumerate(text.encode(), 1):
        shown += output.push(token_id)
        if output.stop is not None:
            break
        held = text[len(shown) : place]
        assert stop.startswith(held)


def test_a_stop_string_before_min_tokens_does_not_stop() -> None:
    output = OutputText(TOKENIZER, stops=StopStrings(["ab"]), min_tokens=3)
    assert "".join(pieces(output, list(b"abab-ab!"))) == "abab-"
    # the second `ab` begins within the first three tokens, the third does not
    assert output.stop == "ab"


def test_a_hidden_token_counts_but_says_nothing() -> None:
    output = OutputText(TOKENIZER, skip_special_tokens=False)
    assert output.push(65) + output.push(EOS, hidden=True) + output.finish() == "A"
    assert output.num_tokens == 2


class CountingTokenizer(TextTokenizer):
    calls = 0

    def token_bytes(self, token_id: int) -> bytes:
        self.calls += 1
        return super().token_bytes(token_id)


@pytest.mark.parametrize("said", [b"\xff", b"\x80", b"a", "\u20ac".encode()])
def test_work_per_token_does_not_grow_with_the_output(said: bytes) -> None:
    counting = CountingTokenizer((FOLDER / "tokenizer.json").read_text())
    stops = StopStrings(["\ufffd" * 5 + "!", "aaaaab"])
    output = OutputText(counting, stops=stops)
    steps = 0
    step = stops._step

    def counted(state: int, char: str) -> int:
        nonlocal steps
        steps += 1
        return step(state, char)

    stops._step = counted  # type: ignore[method-assign]
    for _ in range(2000):
        for token_id in said:
            output.push(token_id)
    output.finish()
    assert counting.calls == 2000 * len(said)
    assert steps == output.num_chars <= 2000


def test_special_tokens_in_text_can_be_plain() -> None:
    assert TOKENIZER.encode("a<|eos|>") == [97, EOS]
    assert TOKENIZER.encode_plain("a<|eos|>") == list(b"a<|eos|>")


def test_tokens_have_distinct_names() -> None:
    assert [TOKENIZER.token_text(t) for t in (65, 0xE2, EOS)] == ["A", "bytes:\\xe2", "<|eos|>"]
    assert len({TOKENIZER.token_text(t) for t in range(259)}) == 259


def sentencepiece() -> TextTokenizer:
    vocab = [["<unk>", 0.0], *[[f"<0x{b:02X}>", -9.0] for b in range(256)], ["▁the", -1.0]]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True},
    }
    return TextTokenizer(json.dumps(definition))


def test_sentencepiece_tokens_are_bytes_too() -> None:
    output = OutputText(sentencepiece())
    ids = [257, *[1 + byte for byte in "€".encode()], 257]
    assert pieces(output, ids) == [" the", "", "", "€", " the", ""]


def test_an_unusable_tokenizer_is_one_line_naming_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        TextTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer definition"):
        TextTokenizer.from_folder(tmp_path)
    definition = json.loads((FOLDER / "tokenizer.json").read_text())
    definition["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ValueError, match="decoder WordPiece is not supported"):
        TextTokenizer.from_folder(tmp_path)
