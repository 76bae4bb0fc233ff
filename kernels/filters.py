"""Weights of a short convolution over one tensor: the filter that `conv` generates and applies.

One internal convention, converted to by the checkpoint loader and known to nobody else: tap `w`
multiplies `x[t - w]` (tap 0 is the current token), and filters are laid out [W, D].

    f[t, w, d] = dynamic[t, w, d] + static[w, d]
    y[t, d]    = act( scale * ( sum_w f[t, w, d] * x[t - w, d] + bias[d] ) )

    low-rank   dynamic[t, w, d] = sum_r z[t, r] * up[r, w, d]        (arXiv 2606.03825, low-rank)
    head-wise  dynamic[t, w, d] = z[t, (d // head_size) * W + w]     (arXiv 2606.03825, head-wise)
    static     dynamic = 0

A residual connection is 1 added to `static[0]`, in float32, by whoever builds the filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

FilterKind = Literal["static", "lowrank", "headwise"]


@dataclass(frozen=True)
class Stream:
    """Consecutive channels of the convolved tensor whose filters come from the same z columns.

    Fused q, k, v is one tensor with three streams, each with its own generator.
    """

    start: int
    """First channel of the stream in the convolved tensor."""
    stop: int
    """One past its last channel."""
    z_start: int
    """First z column of the stream (0 for static filters)."""


@dataclass(frozen=True)
class ConvFilter:
    """The filter of one convolution site.

    The site's tensor has C channels, of which the streams cover D in ascending order without
    overlap; channels that no stream covers pass through unchanged. Filter weights and the ring
    hold the D covered channels side by side.
    """

    kind: FilterKind
    width: int
    """W, 2..8."""
    streams: tuple[Stream, ...]
    static: Tensor
    """[W, D] float32."""
    up: Tensor | None = None
    """[R, W, D], low-rank only, in the activation dtype."""
    head_size: int = 0
    """Channels that share a filter, head-wise only."""
    bias: Tensor | None = None
    """[D] float32 or None."""
    scale: float = 1.0
    activation: Literal["silu"] | None = None

    @property
    def channels(self) -> int:
        """D, the number of convolved channels."""
        return sum(s.stop - s.start for s in self.streams)

    @property
    def rank(self) -> int:
        """R, z columns per stream of a low-rank filter."""
        return 0 if self.up is None else self.up.shape[0]
