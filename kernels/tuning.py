"""Launch shapes measured offline on an H100 and committed: nothing is tuned while serving.

Keys are row counts and widths, never sequence lengths. Knows no kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .filters import ConvFilter


@dataclass(frozen=True)
class ConvTile:
    """Rows x channels of one program of a convolution, and how it makes low-rank filters."""

    rows: int
    channels: int
    warps: int
    generate: str = "dot"
    """See `triton_filters`. "runs", for long runs alone: `triton_runs`, rows x channels a multiple
    of 256 x warps, and of low-rank filters `triton_lowrank_runs`."""
    repeat: int = 1
    """Row tiles that one program takes in turn, with the weights kept in registers."""
    stages: int = 1
    """Steps of "runs" of low-rank filters whose inputs are on their way or in use."""
    registers: int = 0
    """Most registers of a thread of "runs"; 0: as many as it likes."""


def conv_tile(rows: int, filters: ConvFilter, run: int) -> ConvTile:
    """The tile of `Ops.conv` for `rows` rows of the flat batch.

    `run`: rows a sequence on average if some runs are long and the kernel of "runs" takes them.
    """
    if rows > 512:
        sizes = [s.stop - s.start for s in filters.streams]
        if filters.kind != "lowrank" and run >= 8:
            wide = all(size % 512 == 0 for size in sizes)
            return ConvTile(8, 512, 2, "runs") if wide else ConvTile(8, 256, 1, "runs")
        if run >= 64:
            channels = next((n for n in (128, 64) if all(size % n == 0 for size in sizes)), 32)
            size = _stretch(filters.channels // 128 * rows)
            return ConvTile(size, channels, channels // 32, "runs", stages=3, registers=168)
    if filters.kind == "lowrank" and filters.rank <= 16 and 1 < rows <= 512:
        if rows <= 8:
            return ConvTile(2, 64, 2, "fma")
        few = rows <= 32 and filters.channels <= 4096
        return ConvTile(16, 32, 1, "swap") if few else ConvTile(16, 64, 4)
    return pair_tile(rows, filters)


def pair_tile(rows: int, filters: ConvFilter) -> ConvTile:
    """The tile of kernels that convolve two channel ranges at once."""
    if filters.kind == "lowrank":
        if filters.rank > 16:
            return ConvTile(16, 64, 4)
        if rows == 1:
            return ConvTile(1, 32, 1, "fma")
        return ConvTile(16, 64, 4) if rows <= 16 else ConvTile(64, 32, 4, "swap")
    if rows <= 64:
        return ConvTile(1, 128, 1)
    return ConvTile(4, 128, 4) if rows <= 512 else ConvTile(8, 128, 4)


def qkv_tile(rows: int, filters: ConvFilter | None, run: int, half: int) -> ConvTile:
    """The tile of `Ops.qkv_rope_write`; `channels` counts pairs, of half a head at most.

    `run`: as in `conv_tile`. `half`: pairs of a head.
    """
    if rows > 512 and filters is not None:
        if filters.kind != "lowrank" and run >= 8:
            # Two rows a thread; a stretch has at least width - 1.
            size = max(512 // half, 4 if filters.width <= 5 else 8)
            return ConvTile(size, half, 1, "runs", registers=128)
        if run >= 64:
            size = _stretch(filters.channels // (2 * half) * rows)
            return ConvTile(size, half, half // 16, "runs", stages=2, registers=168)
    if filters is None:
        return ConvTile(8, 64, 4) if rows <= 512 else ConvTile(16, 64, 4)
    if filters.kind != "lowrank":
        return ConvTile(1, 64, 1) if rows <= 64 else ConvTile(8, 64, 4)
    if rows == 1 and filters.rank <= 16:
        return ConvTile(1, 64, 4, "fma")
    return ConvTile(16, 64, 4) if rows <= 512 else ConvTile(64, 32, 4, "swap")


def _stretch(programs: int) -> int:
    """Rows of a program of low-rank "runs": many, as long as enough programs remain.

    `programs`: how many there would be of one row, of 128 channels each. 396 run at once.
    """
    size = 512
    while size > 64 and programs < 350 * size:
        size //= 2
    return size


@dataclass(frozen=True)
class SplitTile:
    """Split-KV attention: keys a tile, parts a sequence's context is cut into."""

    keys: int
    splits: int
    warps: int
    stages: int


SHORT_RUN = 8
"""Most rows of one sequence that the split-KV kernel takes."""


def split_tile(heads: int, max_len: int) -> SplitTile:
    """`heads` = sequences x kv heads; `max_len` bounds the contexts."""
    splits = max(1, min(528 // heads, -(-max_len // 64), 32))
    return SplitTile(64, splits, 8 if splits > 1 else 4, 2)


def split_early(tile: SplitTile, heads: int, max_len: int) -> bool:
    """Whether a part's first keys wait in registers: where they are most of it, and the programs,
    which are larger so, still run all at once. Arguments as `split_tile`'s."""
    few = heads * tile.splits * tile.warps <= 132 * 16
    return few and max_len <= 2 * tile.keys * tile.splits


@dataclass(frozen=True)
class DecodeTile:
    """Attention of one row without groups: keys that a group of lanes takes at a time, parts a
    sequence's context is cut into."""

    keys: int
    splits: int
    warps: int
    ahead: int
    """Tiles on their way while one is used."""


def decode_tile(heads: int, max_len: int) -> DecodeTile | None:
    """As `split_tile`; None where that one's tile is as fast."""
    if heads > 256:
        return None
    most = -(-max_len // 32)
    if 64 < heads <= 132:
        # A program a multiprocessor, and nothing to combine.
        return DecodeTile(2, 1, 16, 1)
    # As many programs as run at once.
    if heads <= 32:
        return DecodeTile(4, max(1, min(924 // heads, most, 32)), 2, 2)
    return DecodeTile(4, max(1, min(528 // heads, most)), 4, 1)


@dataclass(frozen=True)
class ChunkTile:
    """Chunk attention: query rows and keys of a tile."""

    rows: int
    keys: int
    warps: int
    stages: int


def chunk_tile(element_size: int, head_dim: int) -> ChunkTile:
    """The same for every length: others win by 4 % here and lose as much there."""
    if element_size > 2:
        return ChunkTile(32, 32, 4, 2)
    return ChunkTile(64, 64, 4, 3 if head_dim <= 128 else 2)


@dataclass(frozen=True)
class LinearTile:
    """A small linear layer: most rows of x (under 8 a GEMV), outputs and depth of a tile."""

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int
    """0: all weights are fetched before x is waited for."""
    slices: int = 1
    """Pieces of the depth that are multiplied side by side and summed at the end."""
    early: int = 0
    """Steps of depth whose weights are fetched before x is waited for."""
    parts: int = 1
    """Parts of the depth that programs of their own take; see `triton_linear.linear_parts`."""


EXACT: dict[tuple[int, int], dict[int, LinearTile]] = {
    (17920, 1536): {8: LinearTile(8, 16, 512, 4, 2, 4, 1), 64: LinearTile(64, 64, 64, 4, 4)},
    (8864, 1536): {1: LinearTile(1, 4, 512, 4, 1), 8: LinearTile(8, 16, 512, 4, 2, 4, 1)},
    (1536, 8960): {1: LinearTile(1, 1, 1024, 4, 1)},
    (151936, 1536): {1: LinearTile(1, 4, 512, 4, 1)},
    (1536, 3072): {1: LinearTile(1, 2, 512, 2, 1)},
    (2048, 8192): {1: LinearTile(1, 1, 1024, 4, 1)},
    (3072, 2048): {32: LinearTile(32, 32, 256, 4, 3)},
}
"""Layers of Jet-Nemotron-2B and LFM2-1.2B whose outputs make too many or too few programs for 132
multiprocessors by the rules below: (outputs, inputs) -> most rows -> tile."""


def linear_tile(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype, *, gated: bool = False
) -> LinearTile | None:
    """None: cuBLAS is as fast. `gated`: with the SiLU product that follows in the same launch."""
    if dtype.itemsize != 2:
        return None
    most = rows if rows < 3 else 8 if rows <= 8 else 1 << (rows - 1).bit_length()
    exact = EXACT.get((out_features, in_features), {}).get(most)
    if exact is not None:
        return exact
    deep, wide = in_features > 4096, out_features >= 6000
    # A GEMV holds its weights in registers: at most 256 a thread.
    warps = 1 << (-(-in_features // 8192) - 1).bit_length()
    if rows == 1:
        return LinearTile(1, 1, 512 * warps, warps, 1) if deep else LinearTile(1, 1, 1024, 2, 1)
    if rows == 2:
        if deep or 8000 <= out_features < 50_000:
            return LinearTile(2, 1, 2048, max(warps, 2), 1)
        if out_features >= 50_000:
            return LinearTile(2, 1, 1024, 2, 1)
        return LinearTile(2, 2, 2048, 4, 1) if wide else LinearTile(2, 2, 1024, 2, 1)
    if rows > 128 or (wide and deep):
        return None
    if rows > 64:
        return LinearTile(128, 64, 64, 4, 4) if gated and wide else None
    if rows > 32:
        if 8000 <= out_features < 50_000:
            return LinearTile(64, 64, 128, 4, 3)
        return LinearTile(64, 64, 64, 4, 8 if out_features < 8000 else 4) if wide else None
    if wide:
        if rows <= 8 and out_features >= 50_000:
            return LinearTile(8, 16, 512, 4, 4, 4)
        if rows <= 8 and out_features >= 8000:
            return LinearTile(8, 64, 128, 4, 3, early=4)
        if 8 < rows <= 16 and 8000 <= out_features < 50_000:
            return LinearTile(16, 64, 128, 4, 3, early=2)
        if rows > 8 and out_features < 8000:
            return LinearTile(most, 64, 256, 4, 3)
        if rows > 16:
            head = out_features >= 50_000
            return (
                LinearTile(32, 128, 128, 8, 3) if head else LinearTile(32, 64, 128, 4, 3, early=1)
            )
        return LinearTile(most, 64, 128, 4, 4)
    if rows > 16:
        return LinearTile(32, 16, 512, 4, 4, 4)
    if rows > 8:
        return LinearTile(16, 16, 512, 8, 5, 8)
    return LinearTile(8, 16, 512, 8, 6, 8, early=2) if deep else LinearTile(8, 16, 1024, 4, 0, 4)


def parts_tile(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype
) -> LinearTile | None:
    """For a layer whose output a norm reads and can add up. None: a whole `linear` is as fast."""
    parts = min(8, 8192 // out_features)
    if dtype.itemsize != 2 or not 32 < rows <= 128 or parts < 2 or in_features <= 4096:
        return None
    if rows > 64:
        return LinearTile(128, 64, 64, 4, 6, parts=parts)
    return LinearTile(64, 64, 128, 4, 4, parts=parts)


@dataclass(frozen=True)
class ExpertTile:
    """Products of a mixture of experts: pairs of one expert, outputs and depth of a tile."""

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int


def expert_tile(element_size: int, pairs: int = 1, experts: int = 1) -> ExpertTile:
    """`pairs` = rows x experts a row."""
    if element_size > 2:
        return ExpertTile(16, 32, 32, 4, 2)
    if pairs <= 16 * experts:
        return ExpertTile(16, 32, 256, 4, 3)
    return (
        ExpertTile(64, 64, 64, 4, 3) if pairs <= 128 * experts else ExpertTile(128, 128, 64, 8, 3)
    )
