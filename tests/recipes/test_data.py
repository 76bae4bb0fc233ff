"""A corpus whose held-out documents were trained on, or a recall task with wrong answers, makes
every figure that follows a lie."""

from __future__ import annotations

import json
import sys
import zipfile
from typing import TYPE_CHECKING

import corpus
import numpy as np
import pytest
import recall
import torch

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ("convolution", "filter", "token", "window", "prefix", "state", "page", "ring", "slot", "x")


def document(number: int) -> str:
    return " ".join(WORDS[(number * (i + 3) + i) % len(WORDS)] for i in range(80)) + f" {number}\n"


def test_documents_are_split_and_none_is_in_two_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "pip_tiny==1.0"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        for i in range(150):
            wheel.writestr(f"tiny/{i}.py", document(i))
        wheel.writestr("tiny/again.py", document(3))
        wheel.writestr("tiny/short.py", "x = 1\n")
        wheel.writestr("tiny/skip/no.py", document(1000))
    sources = tmp_path / "sources.toml"
    sources.write_text(
        '[[package]]\nname = "pip:tiny==1.0"\nlicence = "MIT"\nfiles = ["tiny/**/*.py"]\n'
        'exclude = ["*/skip/*"]\n'
    )
    flags = [tmp_path / "tokenizer.json", tmp_path / "out", "--vocab", 300]
    flags += ["--cache", tmp_path / "cache", "--sources", sources]
    monkeypatch.setattr(sys, "argv", ["corpus.py", *map(str, flags)])
    corpus.main()
    record = json.loads((tmp_path / "out" / "corpus.json").read_text())
    [package] = record["packages"]
    assert (package["version"], package["documents"]) == ("1.0", 150)
    tokenizer = corpus.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    seen: list[set[str]] = []
    for name in ("train", "held-out"):
        ids = np.load(tmp_path / "out" / f"{name}.npy")
        assert ids.dtype == np.uint16
        assert record["tokens"][name] == len(ids)
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        seen.append(set(text.strip().split(corpus.END)) - {""})
    assert not seen[0] & seen[1]
    assert len(seen[0]) + len(seen[1]) == 150
    assert 0 < len(seen[1]) < 15


def test_pages_become_text_without_navigation() -> None:
    page = (
        "<html><head><title>no</title></head><body><div class='sphinxsidebar'><div>no</div>no"
        "</div><h1>Yes</h1><p>one\n  two</p><pre>a\n  b</pre><script>no</script></body></html>"
    )
    text = corpus.html_text(page)
    assert "no" not in text
    assert text.split() == ["Yes", "one", "two", "a", "b"]
    assert "a\n  b" in text


def test_every_asked_key_has_the_value_it_was_given() -> None:
    flags = "out --pairs 5 --length 40 --vocab 64 --batch 16 --device cpu"
    args = recall.arguments().parse_args(flags.split())
    tokens, targets = recall.make_batch(args, torch.Generator().manual_seed(0))
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        values = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(values) == 5
        asked = {i: value for i, value in enumerate(wanted) if value >= 0}
        assert len(asked) == 5
        assert min(asked) >= 10
        assert all(values[row[i]] == value for i, value in asked.items())


def test_recall_is_learnt_and_recorded(tmp_path: Path) -> None:
    flags = f"{tmp_path} --kinds none static --layers 1 --seeds 0 --pairs 2 --length 12 --vocab 16"
    flags += " --hidden 16 --inner 16 --batch 16 --steps 40 --device cpu --no-compile"
    recall.main(recall.arguments().parse_args(flags.split()))
    lines = (tmp_path / "recall.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 20
