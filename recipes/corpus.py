"""Makes a corpus of token ids from packages, by name.

    python recipes/corpus.py TOKENIZER_JSON OUT_FOLDER [--cache FOLDER] [--vocab 4096]

Reads `corpus.toml`: documentation and sources under free licences, from Debian and PyPI. Documents
are cleaned (HTML to text), repeated ones dropped, and every fiftieth, by the hash of its text, held
out. OUT holds `train.npy`, `held-out.npy` and one file per evaluation set, all uint16 with the
tokenizer's end-of-text between documents, and `corpus.json` with versions, licences and counts.
With `--vocab` the tokenizer is first trained on the training text and written to TOKENIZER_JSON.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
HELD_OUT = 50
"""One document in so many is held out."""
SHORTEST, LONGEST = 300, 400_000
"""Characters of a document that is used, and where a longer one is cut."""


@dataclass
class Package:
    """One entry of corpus.toml, and what was found of it."""

    name: str
    licence: str
    files: list[str]
    exclude: list[str] = field(default_factory=list)
    role: str = "train"
    version: str = ""
    documents: int = 0
    characters: int = 0


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("corpus-packages"))
    parser.add_argument("--sources", type=Path, default=Path(__file__).with_name("corpus.toml"))
    parser.add_argument("--vocab", type=int, default=0, help="train a tokenizer of this size")
    args = parser.parse_args()
    entries = tomllib.loads(args.sources.read_text())["package"]
    packages = [Package(**entry) for entry in entries]
    texts = collect(packages, args.cache)
    if args.vocab:
        train_tokenizer(texts["train"], args.vocab).save(str(args.tokenizer))
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    args.out.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for name, documents in texts.items():
        ids = tokenize(tokenizer, documents, name)
        np.save(args.out / f"{name}.npy", ids)
        counts[name] = len(ids)
    record = {"packages": [asdict(p) for p in packages], "tokens": counts}
    (args.out / "corpus.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(counts))


def collect(packages: list[Package], cache: Path) -> dict[str, list[str]]:
    """Cleaned documents of every set, in an order that depends on their text alone."""
    seen: set[str] = set()
    sets: dict[str, list[tuple[str, str]]] = {"train": [], "held-out": []}
    for package in track(packages, "Reading packages"):
        root = unpack(package, cache)
        for path in sorted({p for pattern in package.files for p in root.glob(pattern)}):
            if not path.is_file() or any(fnmatch(str(path), skip) for skip in package.exclude):
                continue
            text = read_clean(path)
            digest = hashlib.sha256(text.encode()).hexdigest()
            if len(text) < SHORTEST or digest in seen:
                continue
            seen.add(digest)
            package.documents += 1
            package.characters += len(text)
            role = package.role
            if role == "train" and int(digest[:8], 16) % HELD_OUT == 0:
                role = "held-out"
            sets.setdefault(role, []).append((digest, text))
    return {name: [text for _, text in sorted(documents)] for name, documents in sets.items()}


def unpack(package: Package, cache: Path) -> Path:
    """Downloads and unpacks a package, once; notes its version."""
    source, _, name = package.name.partition(":")
    folder = cache / re.sub(r"[^\w.=-]", "_", package.name)
    folder.mkdir(parents=True, exist_ok=True)
    pattern = "*.deb" if source == "deb" else "*.whl"
    if not list(folder.glob(pattern)):
        command = ["apt-get", "download", name]
        if source == "pip":
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", name]
        subprocess.run(command, cwd=folder, check=True)
    [archive] = folder.glob(pattern)
    package.version = archive.name.split("_" if source == "deb" else "-")[1].replace("%3a", ":")
    files = folder / "files"
    if not files.is_dir():
        if source == "deb":
            subprocess.run(["dpkg-deb", "-x", archive, files], check=True)
        else:
            zipfile.ZipFile(archive).extractall(files)
    return files


def read_clean(path: Path) -> str:
    """The text of a file: HTML stripped, no trailing spaces, at most one empty line in a row."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    text = data.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\t", "    ")
    if path.suffix == ".html":
        text = html_text(text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()[:LONGEST]


class _Text(HTMLParser):
    """Text of the body; blocks end lines, `pre` keeps its own, navigation is dropped."""

    BLOCKS = frozenset(("p", "div", "br", "li", "tr", "dt", "dd", "pre", "table", "ul", "ol", "dl"))
    DROPPED = frozenset(("script", "style", "head", "nav", "footer", "header", "form"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._pre = 0
        self._dropped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = " ".join(v or "" for k, v in attrs if k in ("class", "id", "role"))
        hidden = re.search(r"\b(nav\w*|sidebar|sphinxsidebar|related|headerlink|toc)\b", named)
        if tag in self.DROPPED or (hidden and tag in ("div", "table", "ul", "a", "section")):
            self._dropped.append(tag)
        elif self._dropped and tag == self._dropped[-1]:
            self._dropped.append(tag)  # the same tag inside: its end is not ours
        self._pre += tag == "pre"
        if tag in self.BLOCKS or re.fullmatch(r"h[1-6]", tag):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if self._dropped and tag == self._dropped[-1]:
            self._dropped.pop()
        self._pre -= tag == "pre" and self._pre > 0
        if tag in ("p", "pre", "h1", "h2", "h3"):
            self.parts.append("\n\n")
        elif tag in self.BLOCKS or re.fullmatch(r"h[4-6]", tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._dropped:
            self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))


def html_text(text: str) -> str:
    """An HTML page as plain text."""
    parser = _Text()
    parser.feed(text)
    return re.sub(r"\n +(?=\n)", "\n", "".join(parser.parts))


def train_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of this size, digits apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents[::4], trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, documents: list[str], name: str) -> np.ndarray:
    """Documents as one array of ids, END after each. -> [tokens] uint16"""
    end = tokenizer.token_to_id(END)
    pieces: list[np.ndarray] = []
    for start in track(range(0, len(documents), 64), f"Tokenising {name}"):
        for encoded in tokenizer.encode_batch(documents[start : start + 64]):
            pieces.append(np.array([*encoded.ids, end], dtype=np.uint16))
    return np.concatenate(pieces)


if __name__ == "__main__":
    main()
