"""The tensors behind page, slot and tail ids. Contents are written by kernels and by `apply`.

Layers of one shape are one tensor, so that a copy is a few operations however many layers there
are; each layer sees its own part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .specs import LayerState

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from .copies import Copies
    from .records import CacheSizes
    from .specs import ConvSpec, RecurrentSpec, StateSpec


class CacheStorage:
    """Pages, rings, recurrent states and tails of every layer, reserved page 0 and slot 0 included.

    Contents start uninitialised: nothing that was not written is ever read, so on a CPU the memory
    is not even touched until it is used.
    """

    def __init__(
        self, spec: StateSpec, sizes: CacheSizes, device: torch.device, poison: bool = False
    ) -> None:
        """`poison` fills everything with NaN, to prove the sentence above."""
        self._device = device
        self._page_groups: list[Tensor] = []  # [layers, pages, kv heads, page_size, head_dim]
        self._conv_groups: list[tuple[Tensor, Tensor, int]] = []  # rings, tails, width
        self._recurrent_groups: list[tuple[Tensor, Tensor]] = []  # states, tails
        pages: dict[Hashable, list[int]] = {}
        convs: dict[tuple[str, ConvSpec], list[int]] = {}
        recurrent: dict[RecurrentSpec, list[int]] = {}
        for i, layer in enumerate(spec.layers):
            if layer.attention is not None:
                kind = (layer.attention.kv_heads, layer.attention.head_dim)
                pages.setdefault(kind, []).append(i)
            for name, conv in layer.convs.items():
                convs.setdefault((name, conv), []).append(i)
            if layer.recurrent is not None:
                recurrent.setdefault(layer.recurrent, []).append(i)

        def tensor(*shape: int, dtype: torch.dtype = spec.dtype) -> Tensor:
            if poison:
                return torch.full(shape, torch.nan, dtype=dtype, device=device)
            return torch.empty(shape, dtype=dtype, device=device)

        kv: dict[int, tuple[Tensor, Tensor]] = {}
        rings: dict[int, dict[str, Tensor]] = {}
        for layers in pages.values():
            attention = spec.layers[layers[0]].attention
            assert attention is not None
            shape = (sizes.num_pages + 1, attention.kv_heads, sizes.page_size, attention.head_dim)
            k, v = tensor(len(layers), *shape), tensor(len(layers), *shape)
            self._page_groups += (k, v)
            kv |= {layer: (k[j], v[j]) for j, layer in enumerate(layers)}
        for (name, conv), layers in convs.items():
            count, width = len(layers), conv.width
            ring = tensor(count, sizes.num_slots + 1, sizes.ring_len, conv.channels)
            tails = tensor(count, sizes.num_tails, width - 1, conv.channels)
            self._conv_groups.append((ring, tails, width))
            for j, layer in enumerate(layers):
                rings.setdefault(layer, {})[name] = ring[j]
        states: dict[int, Tensor] = {}
        for state, layers in recurrent.items():
            shape = (state.heads, state.key_dim, state.value_dim)
            dtype = spec.recurrent_dtype
            live = tensor(len(layers), sizes.num_slots + 1, *shape, dtype=dtype)
            tails = tensor(len(layers), sizes.num_tails, *shape, dtype=dtype)
            self._recurrent_groups.append((live, tails))
            states |= {layer: live[j] for j, layer in enumerate(layers)}
        self.layers: tuple[LayerState, ...] = tuple(
            LayerState(*kv.get(i, (None, None)), rings.get(i, {}), states.get(i))
            for i in range(len(spec.layers))
        )
        """What each layer is handed with a batch."""

    def apply(self, copies: Copies) -> None:
        """Makes a step's copies, before the step.

        In this order: partial pages; tails saved from slots, which may belong to sequences that
        have ended; whole slots; tails loaded into slots, which may have been saved just now.
        Within each, every source is read before any target is written.
        """
        if copies.pages:
            source, target = self._columns(copies.pages)
            for pages in self._page_groups:
                pages[:, target] = pages[:, source]
        for ring, tails, width in self._conv_groups:
            if copies.saves:
                slot, position, tail = self._columns(copies.saves)
                tails[:, tail] = ring[:, slot[:, None], _rows(position, width, ring.shape[2])]
            if copies.slots:
                source, target = self._columns(copies.slots)
                ring[:, target] = ring[:, source]
            if copies.loads:
                tail, slot, position = self._columns(copies.loads)
                ring[:, slot[:, None], _rows(position, width, ring.shape[2])] = tails[:, tail]
        for live, tails in self._recurrent_groups:
            if copies.saves:
                slot, _, tail = self._columns(copies.saves)
                tails[:, tail] = live[:, slot]
            if copies.slots:
                source, target = self._columns(copies.slots)
                live[:, target] = live[:, source]
            if copies.loads:
                tail, slot, _ = self._columns(copies.loads)
                live[:, slot] = tails[:, tail]

    def _columns(self, moves: Sequence[tuple[int, ...]]) -> list[Tensor]:
        # Not `device=`: that would wait for the device.
        return list(torch.tensor(moves).to(self._device, non_blocking=True).unbind(1))


def _rows(position: Tensor, width: int, ring_len: int) -> Tensor:
    """Ring rows of the inputs at position - width + 1 .. position - 1. -> [n, width - 1]."""
    back = torch.arange(1 - width, 0, device=position.device)
    return (position[:, None] + back).remainder(ring_len)
