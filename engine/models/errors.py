"""What goes wrong with a model folder."""

from __future__ import annotations


class ModelError(ValueError):
    """A model cannot be loaded: one line that names the file, key or tensor."""
