"""A GGUF file read through the `gguf` library: metadata by key, tensors by their published names.

It knows the format's conventions (names, reversed shapes, permuted rows) and nothing of tokenizers
or of where the result is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

from .errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt
    from gguf.gguf_reader import ReaderTensor

T = TypeVar("T")

CHUNK_ELEMENTS = 1 << 22
"""Most elements held as float32 at once (16 MiB)."""

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORM_NAMES = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


class _StrictReader(GGUFReader):
    """Reading past the end is an error; the library would go on with empty arrays, and loop for
    as long as a damaged count says."""

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("the file ends early")
        return super()._get(offset, dtype, count, override_order)


class GGUFFile:
    """One open, memory-mapped GGUF file.

    Raises:
        ModelError: not a GGUF file, truncated, damaged, or one part of several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                magic = stream.read(4)
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from error
        if magic != b"GGUF":
            raise self.error("not a GGUF file (it does not begin with GGUF)")
        try:
            self._reader = _StrictReader(path)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            reason = str(error) or type(error).__name__
            raise self.error(f"truncated or damaged GGUF file ({reason})") from error
        if self._reader.byte_order != "I":
            raise self.error("byte order differs from this machine's")
        if self.read("split.count", int, 1) > 1:
            raise self.error("one part of a split model; join the parts into one file first")

    def error(self, reason: str) -> ModelError:
        """One line: names out of a damaged file may hold anything."""
        line = "".join(char if char.isprintable() else "?" for char in reason)
        return ModelError(f"{self.path}: {line}")

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._reader.fields)

    @property
    def tensors(self) -> list[ReaderTensor]:
        return self._reader.tensors

    def find(self, key: str) -> Any:
        """The value of a metadata key, or None."""
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError) as error:
            raise self.error(f"truncated or damaged metadata key {key}") from error

    def read(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of a metadata key, of the type asked for."""
        value = self.find(key)
        if value is None:
            if default is None:
                raise self.error(f"metadata key {key} is missing")
            return default
        if not isinstance(value, kind):
            raise self.error(f"metadata key {key} is {type(value).__name__}, not {kind.__name__}")
        return value

    def read_list(self, key: str, kind: type[T]) -> list[T]:
        """The value of a metadata key that holds a list, every item of the type asked for."""
        values: list[Any] = self.read(key, list)
        if not all(isinstance(value, kind) for value in values):
            raise self.error(f"metadata key {key} is not a list of {kind.__name__}")
        return values


@dataclass(frozen=True)
class ImportedTensor:
    """One tensor under its published name, still in the file's encoding."""

    name: str
    shape: tuple[int, ...]
    """[out, in] or [channels]."""
    source: ReaderTensor
    interleaved_heads: int = 0
    """Heads whose rows the format stores in interleaved RoPE pairs; 0 for rows in order."""

    @property
    def bytes_as_bfloat16(self) -> int:
        return 2 * int(np.prod(self.shape))

    def bfloat16_chunks(self) -> Iterator[bytes]:
        """The values in order, as little-endian bfloat16, a bounded piece at a time.

        Raises:
            NotImplementedError: the library cannot decode this encoding.
            ValueError: a value is not finite.
        """
        kind = self.source.tensor_type
        rows = self.source.data if len(self.shape) == 2 else self.source.data[None]
        if self.interleaved_heads:
            # Rows of a head are stored as pairs (i, i + half); blocks of a quantised row never
            # cross rows, so whole encoded rows can be put back in order before decoding.
            pairs = rows.reshape(self.interleaved_heads, -1, 2, rows.shape[-1])
            rows = pairs.swapaxes(1, 2).reshape(rows.shape)
        step = max(1, CHUNK_ELEMENTS // self.shape[-1])
        for start in range(0, len(rows), step):
            with np.errstate(invalid="ignore", over="ignore"):
                values = dequantize(rows[start : start + step], kind).astype(np.float32)
            if not np.isfinite(values).all():
                raise ValueError("not finite")
            yield quantize(values, GGMLQuantizationType.BF16).tobytes()


def imported_tensors(
    file: GGUFFile, heads: int, kv_heads: int, interleaved: bool, qk_norm: bool
) -> list[ImportedTensor]:
    """Every tensor of the file but RoPE factors, renamed.

    Raises:
        ModelError: a tensor that the architecture does not have, or of an odd shape.
    """
    layer_names = LAYER_NAMES | (QK_NORM_NAMES if qk_norm else {})
    row_heads = {"attn_q": heads, "attn_k": kv_heads} if interleaved else {}
    found: list[ImportedTensor] = []
    for source in file.tensors:
        if source.name == "rope_freqs.weight":
            continue
        shape = tuple(int(size) for size in reversed(source.shape.tolist()))
        if len(shape) not in (1, 2) or 0 in shape:
            raise file.error(f"tensor {source.name} has the shape {list(shape)}")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", source.name)
        if source.name in GLOBAL_NAMES:
            found.append(ImportedTensor(GLOBAL_NAMES[source.name], shape, source))
        elif layer and layer[2] in layer_names:
            name = f"model.layers.{int(layer[1])}.{layer_names[layer[2]]}.weight"
            pair_heads = row_heads.get(layer[2], 0)
            if pair_heads and shape[0] % (2 * pair_heads):
                raise file.error(f"tensor {source.name}: {shape[0]} rows for {pair_heads} heads")
            found.append(ImportedTensor(name, shape, source, pair_heads))
        else:
            raise file.error(f"tensor {source.name} is not supported")
    return found
