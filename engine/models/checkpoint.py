"""Weights from a folder of safetensors: streamed by name, checked, nothing left over.

Only safetensors are read. A reader is opened once, asked for each tensor once, and closed with a
check that every tensor of the checkpoint was asked for.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class CheckpointReader:
    """Tensors of a folder by name; a context manager."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        on_tensor: Callable[[int], None] = lambda _: None,
        adapter: Path | None = None,
    ) -> None:
        """Opens the folder's files.

        Args:
            dtype, device: what `take` returns.
            on_tensor: called with the number of elements of each tensor taken (progress).
            adapter: a safetensors file of further tensors.

        Raises:
            ModelError: no weights, a shard missing or truncated, an index that is not one.
        """
        self._folder = folder
        self._where = str(folder) if adapter is None else f"{folder} with {adapter}"
        self._dtype = dtype
        self._device = device
        self._on_tensor = on_tensor
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}
        self._file_of: dict[str, Any] = {}
        self._taken: set[str] = set()
        self.total_elements = 0
        try:
            self._open()
            if adapter is not None:
                self._add_adapter(adapter)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        return frozenset(self._file_of)

    def stored(self, name: str) -> Tensor:
        """A tensor as the file has it, on the CPU, unchecked; it does not count as taken."""
        return self._file_of[name].get_tensor(name)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Reads one tensor.

        Raises:
            ModelError: it is missing, has another shape, or holds a value that is not finite.
        """
        file = self._file_of.get(name)
        if file is None:
            raise ModelError(f"{self._where}: tensor {name} is missing")
        found = tuple(file.get_slice(name).get_shape())
        if found != shape:
            raise ModelError(
                f"{self._where}: tensor {name} has shape {list(found)}, expected {list(shape)}"
            )
        tensor: Tensor = file.get_tensor(name)
        if not tensor.is_floating_point():
            raise ModelError(f"{self._where}: tensor {name} has dtype {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{self._where}: tensor {name} holds values that are not finite")
        self._taken.add(name)
        self._on_tensor(tensor.numel())
        return tensor.to(device=self._device, dtype=dtype or self._dtype, copy=True)

    def skip(self, name: str) -> None:
        """Declares a tensor known and not needed."""
        self._taken.add(name)

    def finish(self) -> None:
        """Raises ModelError if a tensor of the checkpoint was never asked for."""
        left = sorted(
            name
            for name in self._file_of.keys() - self._taken
            if not name.endswith("rotary_emb.inv_freq")
        )
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ModelError(f"{self._where}: tensor {left[0]}{more} is not part of this model")

    def _open(self) -> None:
        index, single = self._folder / INDEX, self._folder / SINGLE
        if index.exists():
            for name, shard in self._read_index(index).items():
                if "/" in shard or "\\" in shard:
                    raise ModelError(f"{index}: shard {shard!r} is outside the folder")
                self._add(self._folder / shard, only=name)
            return
        if not single.exists():
            raise ModelError(f"{self._folder}: no weights ({SINGLE} or {INDEX})")
        self._add(single)

    def _add_adapter(self, path: Path) -> None:
        base = self.names
        self._add(path)
        again = sorted(base.intersection(self._opened(path).keys()))
        if again:
            raise ModelError(f"{path}: tensor {again[0]} is part of the base already")

    def _read_index(self, path: Path) -> dict[str, str]:
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: not a safetensors index ({error})") from None
        if not isinstance(weight_map, dict):
            raise ModelError(f"{path}: weight_map is not an object")
        return weight_map

    def _add(self, path: Path, only: str | None = None) -> None:
        file = self._opened(path)
        names = file.keys() if only is None else (only,)
        for name in names:
            try:
                shape = file.get_slice(name).get_shape()
            except SafetensorError:
                raise ModelError(f"{path}: tensor {name} is missing") from None
            self._file_of[name] = file
            self.total_elements += torch.Size(shape).numel()

    def _opened(self, path: Path) -> Any:
        if path not in self._files:
            try:
                file = safe_open(str(path), framework="pt", device="cpu")
                self._files[path] = self._stack.enter_context(file)
            except FileNotFoundError:
                raise ModelError(f"{path}: shard is missing") from None
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: damaged or not safetensors ({error})") from None
        return self._files[path]
