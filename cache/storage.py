"""The tensors behind page and slot ids. Contents are written by kernels and by `apply_copies`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .specs import LayerState

if TYPE_CHECKING:
    from .manager import CacheSizes, Copies
    from .specs import LayerSpec, StateSpec


def allocate(
    spec: StateSpec, sizes: CacheSizes, device: torch.device, poison: bool = False
) -> tuple[LayerState, ...]:
    """Allocates pages and rings for every layer, reserved page 0 and slot 0 included.

    Contents are uninitialised: nothing that was not written is ever read, so on a CPU the memory
    is not even touched until it is used. `poison` fills them with NaN to prove it.
    """

    def tensor(*shape: int) -> torch.Tensor:
        if poison:
            return torch.full(shape, torch.nan, dtype=spec.dtype, device=device)
        return torch.empty(shape, dtype=spec.dtype, device=device)

    def layer(of: LayerSpec) -> LayerState:
        k = v = None
        if of.attention is not None:
            shape = (
                sizes.num_pages + 1,
                of.attention.kv_heads,
                sizes.page_size,
                of.attention.head_dim,
            )
            k, v = tensor(*shape), tensor(*shape)
        rings = {
            name: tensor(sizes.num_slots + 1, sizes.ring_len, conv.channels)
            for name, conv in of.convs.items()
        }
        return LayerState(k, v, rings)

    return tuple(layer(of) for of in spec.layers)


def apply_copies(state: tuple[LayerState, ...], copies: Copies) -> None:
    """Copies page and slot contents, every layer."""
    for layer in state:
        if copies.pages:
            source, target = (list(side) for side in zip(*copies.pages, strict=True))
            for pages in (layer.k_pages, layer.v_pages):
                if pages is not None:
                    pages[target] = pages[source]
        if copies.slots:
            source, target = (list(side) for side in zip(*copies.slots, strict=True))
            for ring in layer.rings.values():
                ring[target] = ring[source]
