"""tokenizer.json and tokenizer_config.json rebuilt from the metadata of a GGUF file.

Only byte-level BPE is rebuilt, and only with pre-tokenizers whose rule is known exactly: a wrong
rule gives token ids that are nearly right, which no error would ever show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

if TYPE_CHECKING:
    from .gguf_file import GGUFFile

CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type` that stand for whole strings in the text."""


def _words(digits: str) -> PreTokenizer:
    """Words with at most one leading mark, runs of digits, runs of marks, runs of white space."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    parts = [Split(Regex(pattern), "isolated"), ByteLevel(False, use_regex=False)]
    return Sequence(parts)


@dataclass(frozen=True)
class PreTokenization:
    """What one name in `tokenizer.ggml.pre` stands for."""

    pre_tokenizer: PreTokenizer
    nfc: bool = False
    ignore_merges: bool = False
    """A word that is a token is that token, whatever the merges make of it."""
    add_bos: bool = False
    """Unless the file says otherwise."""


PRE_TOKENIZATIONS = {
    "gpt-2": PreTokenization(ByteLevel(False)),
    "llama-bpe": PreTokenization(_words(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True),
    "qwen2": PreTokenization(_words(r"\p{N}"), nfc=True),
    "smollm": PreTokenization(Sequence([Digits(individual_digits=True), ByteLevel(False)])),
}


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer that the file describes.

    Raises:
        ModelError: not byte-level BPE, an unknown pre-tokenizer, or inconsistent metadata.
    """
    model = file.read("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise file.error(f"tokenizer model {model} is not supported (supported: gpt2)")
    pre = file.read("tokenizer.ggml.pre", str)
    if pre not in PRE_TOKENIZATIONS:
        allowed = ", ".join(PRE_TOKENIZATIONS)
        raise file.error(f"pre-tokenizer {pre} is not supported (supported: {allowed})")
    rule = PRE_TOKENIZATIONS[pre]
    if file.read("tokenizer.ggml.add_eos_token", bool, False):
        raise file.error("metadata key tokenizer.ggml.add_eos_token is true, must be false")
    tokens = file.read_list("tokenizer.ggml.tokens", str)
    types = file.read_list("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise file.error(f"tokenizer has {len(tokens)} tokens but {len(types)} token types")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise file.error("metadata key tokenizer.ggml.tokens repeats a token")
    merges: list[tuple[str, str]] = []
    for merge in file.read_list("tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise file.error(f"tokenizer merge {merge!r} does not join two tokens into one")
        merges.append((left, right))

    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = rule.pre_tokenizer
    tokenizer.decoder = ByteLevelDecoder()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    if file.read("tokenizer.ggml.add_bos_token", bool, rule.add_bos):
        bos = special_tokens(file).get("bos_token")
        if bos is None:
            raise file.error("metadata key tokenizer.ggml.bos_token_id is missing")
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer


def special_tokens(file: GGUFFile) -> dict[str, str]:
    """bos_token, eos_token, pad_token and unk_token, as far as the file names them."""
    tokens = file.read_list("tokenizer.ggml.tokens", str)
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    found: dict[str, str] = {}
    for name, key in keys.items():
        index = file.read(f"tokenizer.ggml.{key}_token_id", int, -1)
        if index >= len(tokens):
            raise file.error(f"metadata key tokenizer.ggml.{key}_token_id is {index}, not a token")
        if index >= 0:
            found[name] = tokens[index]
    return found


def tokenizer_config(file: GGUFFile) -> dict[str, Any]:
    """The contents of tokenizer_config.json; the chat template stands as it is in the file."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    } | special_tokens(file)
    if template := file.find("tokenizer.chat_template"):
        config["chat_template"] = template
    return config
