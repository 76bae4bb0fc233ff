"""A GGUF import that is nearly right gives a fluent model that is quietly worse, so weights and
token ids are compared with known ones; a file that cannot be imported rightly must be refused by
name and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from convserve.engine.gguf_cache import GGUFImportError, cache_folder, import_cached
from convserve.engine.models import load_model
from convserve.engine.models.errors import ModelError
from convserve.engine.models.gguf_import import import_gguf
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_gguf import HEAD_DIM, KV_HEADS, LAYERS, TEMPLATE, TOKENS, TinyGGUF, write_gguf
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path


def imported(tmp_path: Path, tiny: TinyGGUF) -> Path:
    write_gguf(tmp_path / "tiny.gguf", tiny)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    "tiny",
    [
        TinyGGUF(),
        TinyGGUF(arch="qwen3", pre="qwen2", tied=False),
        TinyGGUF(weight_type=GGMLQuantizationType.F16),
        TinyGGUF(weight_type=GGMLQuantizationType.BF16, tied=False),
    ],
    ids=["llama-q4_1", "qwen3-untied", "f16", "bf16"],
)
def test_weights_are_the_originals_in_bfloat16(tmp_path: Path, tiny: TinyGGUF) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", tiny)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(
            weights[name], torch.from_numpy(values.copy()).bfloat16(), rtol=0, atol=0
        )


def test_large_tensors_are_written_in_pieces_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convserve.engine.models.gguf_file.CHUNK_ELEMENTS", 200)  # 3 rows
    test_weights_are_the_originals_in_bfloat16(tmp_path, TinyGGUF())


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_the_engine_loads_what_the_import_writes(tmp_path: Path, arch: str) -> None:
    model = load_model(imported(tmp_path, TinyGGUF(arch)), torch.float32, torch.device("cpu"))
    assert model is not None


def test_config_has_the_numbers_people_wrote_not_their_float32_neighbours(tmp_path: Path) -> None:
    folder = imported(tmp_path, TinyGGUF(metadata={"tokenizer.ggml.eot_token_id": 0}))
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000.0
    assert config["vocab_size"] == len(TOKENS)
    assert (config["num_hidden_layers"], config["num_key_value_heads"]) == (LAYERS, KV_HEADS)
    assert config["tie_word_embeddings"] is True
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == TEMPLATE
    assert (tokenizer["bos_token"], tokenizer["eos_token"]) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", " hello 1234", "Ġhello Ġ 1 2 3 4"),
        ("gpt-2", " hello 1234", "Ġhello Ġ 1234"),
        ("qwen2", " hello 1234", "Ġhello Ġ 1 2 3 4"),
        ("llama-bpe", " hello 1234", "<|im_start|> Ġhello Ġ 123 4"),
        ("smollm", "<|im_start|>hello<|im_end|>\n", "<|im_start|> hello <|im_end|> Ċ"),
        ("qwen2", "e\u0301", "Ã ©"),
        ("smollm", "e\u0301", "e Ì ģ"),
    ],
)
def test_text_becomes_the_tokens_the_model_was_trained_on(
    tmp_path: Path, pre: str, text: str, tokens: str
) -> None:
    tokenizer = Tokenizer.from_file(str(imported(tmp_path, TinyGGUF(pre=pre)) / "tokenizer.json"))
    assert tokenizer.encode(text).tokens == tokens.split(" ")


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = imported(tmp_path_factory.mktemp("smollm"), TinyGGUF())
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(st.text())
def test_any_text_survives_encoding(smollm: Tokenizer, text: str) -> None:
    assert smollm.decode(smollm.encode(text).ids, skip_special_tokens=False) == text


def test_a_file_may_turn_the_leading_bos_off(tmp_path: Path) -> None:
    tiny = TinyGGUF(pre="llama-bpe", metadata={"tokenizer.ggml.add_bos_token": False})
    tokenizer = Tokenizer.from_file(str(imported(tmp_path, tiny) / "tokenizer.json"))
    assert tokenizer.encode("hello").tokens == ["hello"]


def llama3_divisors(factor: float, head_dim: int, theta: float) -> np.ndarray:
    """As llama.cpp's converter computes them."""
    divisors = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered_from_its_divisors(tmp_path: Path, factor: float) -> None:
    divisors = llama3_divisors(factor, HEAD_DIM, 500000.0)
    assert len(set(divisors.tolist())) >= 3  # a case of each branch
    tiny = TinyGGUF(
        hyperparameters={"rope.freq_base": 500000.0}, tensors={"rope_freqs.weight": divisors}
    )
    config = json.loads((imported(tmp_path, tiny) / "config.json").read_text())
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_yarn_is_carried_over(tmp_path: Path) -> None:
    scaling = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
    }
    config = json.loads(
        (imported(tmp_path, TinyGGUF(hyperparameters=scaling)) / "config.json").read_text()
    )
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }


REFUSED = {
    "architecture gemma3": TinyGGUF(arch="gemma3"),
    "tokenizer model llama": TinyGGUF(metadata={"tokenizer.ggml.model": "llama"}),
    "pre-tokenizer deepseek-llm": TinyGGUF(pre="deepseek-llm"),
    "tokenizer.ggml.pre is missing": TinyGGUF(metadata={"tokenizer.ggml.pre": None}),
    "tokenizer.ggml.tokens is not a list of str": TinyGGUF(
        metadata={"tokenizer.ggml.tokens": [1, 2]}
    ),
    "tokenizer merge 'x'": TinyGGUF(metadata={"tokenizer.ggml.merges": ["x"]}),
    "eos_token_id is 70000": TinyGGUF(metadata={"tokenizer.ggml.eos_token_id": 70000}),
    "llama.attention.sliding_window is not": TinyGGUF(
        hyperparameters={"attention.sliding_window": 64}
    ),
    "llama.block_count is missing": TinyGGUF(hyperparameters={"block_count": None}),
    "llama.block_count is str": TinyGGUF(hyperparameters={"block_count": "two"}),
    "llama.rope.dimension_count is 8": TinyGGUF(hyperparameters={"rope.dimension_count": 8}),
    "RoPE scaling longrope": TinyGGUF(hyperparameters={"rope.scaling.type": "longrope"}),
    "rope_freqs.weight is not": TinyGGUF(
        tensors={"rope_freqs.weight": np.full(HEAD_DIM // 2, 3, np.float32)}
    ),
    "tensor blk.0.attn_q.bias is not": TinyGGUF(
        tensors={"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    ),
    "blk.7.ffn_up.weight has the unsupported type I32": TinyGGUF(
        tensors={"blk.7.ffn_up.weight": np.zeros((64, 64), np.int32)}
    ),
    "tensor output_norm.weight has a value that is not finite": TinyGGUF(
        spoil={"output_norm.weight"}
    ),
    "one part of a split model": TinyGGUF(metadata={"split.count": 2}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_imported_rightly_is_refused_by_name(tmp_path: Path, reason: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", REFUSED[reason])
    with pytest.raises(ModelError) as caught:
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'tiny.gguf'}: ")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_other_files_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(b"\0" * 100)
    (tmp_path / "empty").touch()
    for name, reason in [("zeros", "not a GGUF"), ("empty", "not a GGUF"), ("none", "No such")]:
        with pytest.raises(ModelError, match=f"{name}: {reason}"):
            import_gguf(tmp_path / name, tmp_path / "out")


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match="exists already"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


@given(share=st.floats(0, 0.999))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, whole: bytes, share: float) -> None:
    (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"truncated|not a GGUF"):
        import_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@given(share=st.floats(0, 1), value=st.integers(0, 255))
@settings(max_examples=60)
def test_a_damaged_header_is_refused_in_one_line_or_imported(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, share: float, value: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    damaged = bytearray(whole)
    damaged[4 + int(share * whole.index(b"output_norm"))] = value
    (folder / "damaged.gguf").write_bytes(damaged)
    with contextlib.suppress(ModelError):
        import_gguf(folder / "damaged.gguf", folder / "out")
    assert (folder / "out" / "config.json").exists() or len(list(folder.iterdir())) == 1


class TestCache:
    """`serve model.gguf` imports once, then starts from the cache."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("CONVSERVE_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def test_the_same_content_is_imported_once(self, tmp_path: Path, cache: Path) -> None:
        write_gguf(tmp_path / "a.gguf")
        folder = import_cached(tmp_path / "a.gguf")
        assert folder.parent == cache
        assert (folder / "model.safetensors").is_file()
        inode = folder.stat().st_ino
        (tmp_path / "a.gguf").rename(tmp_path / "b.gguf")
        assert import_cached(tmp_path / "b.gguf") == folder
        assert folder.stat().st_ino == inode

    def test_the_reason_comes_back_from_the_process_that_imports(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "a.gguf", TinyGGUF(arch="gemma3"))
        with pytest.raises(GGUFImportError, match="architecture gemma3 is not supported"):
            import_cached(tmp_path / "a.gguf")

    def test_it_lives_where_the_desktop_keeps_caches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CONVSERVE_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert str(cache_folder()) == "/somewhere/convserve"
