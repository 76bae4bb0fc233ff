"""What may follow a projection: a convolution of one of three kinds, or a LoRA as a control.

A *site* is a module called with the projection's output and the generator's input, both
[B, T, channels]. Knows nothing of where it stands. Parameters are cast to the activations' dtype
where they are used, so float32 parameters train in bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """A projection, without bias unless the model has them."""

    def __init__(self, outputs: int, inputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x))


def _earlier(y: Tensor, steps: int) -> Tensor:
    """y[:, t - steps], zero before the start. [B, T, D]"""
    return y if steps == 0 else F.pad(y, (0, 0, steps, 0))[:, : y.shape[1]]


class StaticConv(nn.Module):
    """y[t] = x[t] + sum_w k[w] x[t-w] + bias. Starts as the identity. Stored oldest tap first."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, width))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        width = self.weight.shape[-1]
        taps = self.weight[:, 0].to(x.dtype)
        y = x + self.bias.to(x.dtype)
        for w in range(width):
            y = y + taps[:, width - 1 - w] * _earlier(x, w)
        return y


class LowRankConv(nn.Module):
    """Filters of time t are U(A g[t]) + bias, of each channel its own. Starts as the identity."""

    def __init__(self, channels: int, inputs: int, width: int, rank: int) -> None:
        super().__init__()
        self.width = width
        self.proj_in = Linear(rank, inputs)
        self.proj_out = nn.Parameter(torch.zeros(rank, width * channels))
        self.proj_out_bias = nn.Parameter(torch.zeros(width, channels))

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        taps = self.proj_in(g) @ self.proj_out.to(x.dtype)
        taps = taps.unflatten(-1, (self.width, -1)) + self.proj_out_bias.to(x.dtype)
        y = x
        for w in range(self.width):
            y = y + taps[:, :, w] * _earlier(x, w)
        return y


class HeadwiseConv(nn.Module):
    """Filters of time t are linear in g[t], shared by `head_size` channels. Starts as identity."""

    def __init__(self, channels: int, inputs: int, width: int, head_size: int) -> None:
        super().__init__()
        self.width, self.head_size = width, head_size
        self.weight_proj = Linear(channels // head_size * width, inputs)
        nn.init.zeros_(self.weight_proj.weight)
        self.static_w = nn.Parameter(torch.zeros(width, channels))

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        taps = self.weight_proj(g).unflatten(-1, (-1, 1, self.width))  # [B, T, H, 1, W]
        y = x
        for w in range(self.width):
            dynamic = taps[..., w].expand(*taps.shape[:3], self.head_size).flatten(2)
            y = y + (dynamic + self.static_w[w].to(x.dtype)) * _earlier(x, w)
        return y


class LoRA(nn.Module):
    """A low-rank weight update: the control without convolution. Merged when it is saved."""

    def __init__(self, channels: int, inputs: int, rank: int) -> None:
        super().__init__()
        self.down = Linear(rank, inputs)
        self.up = Linear(channels, rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return x + self.up(self.down(g))
