"""The `conv` object of a `dynconv` config: where convolutions stand and of what kind."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from .errors import ModelError

Place = Literal["q", "k", "v", "o", "gate", "up", "down", "xbc", "mixer_in", "mlp_in"]
"""What is convolved: the output of a linear layer, or a block's normed input (`*_in`)."""

PLACES: tuple[Place, ...] = ("q", "k", "v", "o", "gate", "up", "down")
"""Those that a dynconv config may name for attention and MLP."""


@dataclass(frozen=True)
class ConvConfig:
    """Convolutions of a model; field names and meanings as in the checkpoint format."""

    kind: Literal["static", "lowrank", "headwise"]
    width: int
    rank: int
    head_size: int
    placement: tuple[Place, ...]
    residual: bool
    bias: bool
    activation: Literal["silu"] | None
    generator_input: Literal["linear_input", "block_norm"]
    qk_norm_order: Literal["conv_first", "norm_first"]
    tap_order: Literal["recent_first", "oldest_first"]
    output_scale: float
    layers: frozenset[int] | None
    """Layers that have convolutions; None for all."""
    stored: Literal["dynconv", "canon"] = "dynconv"
    """Whose tensor names: the checkpoint format's, or LlamaCanon's."""

    @property
    def serial_per_layer(self) -> int:
        """Convolutions met in series along the residual path of one layer.

        k and v do not count: what they feed is read back from the cache. gate and up are parallel.
        """
        p = set(self.placement)
        singles = sum(place in p for place in ("mixer_in", "q", "o", "mlp_in", "down"))
        return singles + bool(p & {"gate", "up"})


_CHOICES: dict[str, tuple[Any, ...]] = {
    "activation": (None, "silu"),
    "generator_input": ("linear_input", "block_norm"),
    "qk_norm_order": ("conv_first", "norm_first"),
    "tap_order": ("recent_first", "oldest_first"),
}


def parse_mixer_conv(raw: Any, within: str, places: tuple[Place, ...]) -> ConvConfig | None:
    """The `conv` object of a recurrent mixer; None if it has none.

    SiLU follows every such convolution, so `activation` may be left out. The options that only
    mean something for attention and MLP are not known here.

    Raises:
        ModelError: as `parse_conv`, naming `within`.
    """
    if raw is None:
        return None
    try:
        if isinstance(raw, dict):
            for key in ("generator_input", "qk_norm_order", "layers"):
                if key in raw:
                    raise ModelError(f"conv.{key} is not a known key")
            if raw.get("activation", "silu") != "silu":
                raise ModelError(f"conv.activation {raw['activation']!r} must be 'silu'")
            raw = {**raw, "activation": "silu"}
        return parse_conv(raw, 0, places)
    except ModelError as error:
        raise ModelError(f"{within}.{error}") from None


def parse_conv(raw: Any, num_layers: int, places: tuple[Place, ...] = PLACES) -> ConvConfig | None:
    """Checks the `conv` object; None if its kind is `none`.

    Raises:
        ModelError: an unknown key, or a value that is missing or out of range.
    """
    if not isinstance(raw, dict):
        raise ModelError(f"conv must be an object, got {raw!r}")
    known = {f.name for f in fields(ConvConfig)} - {"stored"}
    for key in raw:
        if key not in known:
            raise ModelError(f"conv.{key} is not a known key (known: {', '.join(sorted(known))})")
    kind = raw.get("kind", "none")
    if kind == "none":
        return None
    if kind not in ("static", "lowrank", "headwise"):
        raise ModelError(f"conv.kind {kind!r} must be none, static, lowrank or headwise")
    for key, allowed in _CHOICES.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise ModelError(f"conv.{key} {raw[key]!r} must be one of {list(allowed)}")
    for key in ("residual", "bias"):
        if not isinstance(raw.get(key, True), bool):
            raise ModelError(f"conv.{key} must be true or false, got {raw[key]!r}")
    scale = raw.get("output_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ModelError(f"conv.output_scale must be a number, got {scale!r}")
    return ConvConfig(
        kind=kind,
        width=_int(raw, "width", 2, 8),
        rank=_int(raw, "rank", 1, 1 << 16) if kind == "lowrank" else 0,
        head_size=_int(raw, "head_size", 1, 1 << 16) if kind == "headwise" else 0,
        placement=_placement(raw.get("placement"), places),
        residual=raw.get("residual", True),
        bias=raw.get("bias", True),
        activation=raw.get("activation"),
        generator_input=raw.get("generator_input", "linear_input"),
        qk_norm_order=raw.get("qk_norm_order", "conv_first"),
        tap_order=raw.get("tap_order", "recent_first"),
        output_scale=float(scale),
        layers=_layers(raw.get("layers"), num_layers),
    )


def _int(raw: dict[str, Any], key: str, low: int, high: int) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ModelError(f"conv.{key} must be an integer in {low}..{high}, got {value!r}")
    return value


def _placement(raw: Any, places: tuple[Place, ...]) -> tuple[Place, ...]:
    if not isinstance(raw, list) or not raw or any(p not in places for p in raw):
        raise ModelError(f"conv.placement must list some of {' '.join(places)}, got {raw!r}")
    return tuple(p for p in places if p in raw)


def _layers(raw: Any, num_layers: int) -> frozenset[int] | None:
    if raw is None:
        return None
    if not isinstance(raw, list) or any(
        not isinstance(i, int) or not 0 <= i < num_layers for i in raw
    ):
        raise ModelError(f"conv.layers must list layers in 0..{num_layers - 1}, got {raw!r}")
    return frozenset(raw)
