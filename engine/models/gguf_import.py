"""A GGUF file made into a Hugging Face folder that the engine loads like any other.

The folder appears by rename, complete or not at all. Weights pass through as bfloat16 one bounded
piece at a time, so a large file needs little memory. Nothing here knows about serving.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from .errors import ModelError
from .gguf_config import architecture_of, generation_config, model_config
from .gguf_file import GGUFFile, ImportedTensor, imported_tensors
from .gguf_tokenizer import build_tokenizer, tokenizer_config

if TYPE_CHECKING:
    from collections.abc import Sequence


def import_gguf(file: Path, out: Path, progress: bool = False) -> None:
    """Writes config.json, model.safetensors (bfloat16), tokenizer.json, tokenizer_config.json and
    generation_config.json to the new folder `out`.

    Raises:
        ModelError: the file is damaged or holds something unsupported, or `out` exists.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ModelError(f"{out}: exists already; name a new folder")
    gguf = GGUFFile(file)
    architecture, config = architecture_of(gguf), model_config(gguf)
    tensors = imported_tensors(
        gguf,
        config["num_attention_heads"],
        config["num_key_value_heads"],
        architecture.interleaved,
        architecture.qk_norm,
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ModelError(f"{out}: {error.strerror}") from error
    try:
        partial.chmod(0o755)
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", generation_config(gguf))
        build_tokenizer(gguf).save(str(partial / "tokenizer.json"))
        _write_json(partial / "tokenizer_config.json", tokenizer_config(gguf))
        _write_tensors(gguf, partial / "model.safetensors", tensors, progress)
        partial.rename(out)
    except OSError as error:
        raise ModelError(f"{out}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tensors(
    file: GGUFFile, path: Path, tensors: Sequence[ImportedTensor], progress: bool
) -> None:
    """The safetensors library only writes tensors that are all in memory, so the container, a
    JSON table of offsets and then the bytes, is written here."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.bytes_as_bfloat16
        header[tensor.name] = {
            "dtype": "BF16",
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    table = json.dumps(header).encode()
    table += b" " * (-len(table) % 8)
    with path.open("wb") as stream:
        stream.write(len(table).to_bytes(8, "little"))
        stream.write(table)
        for tensor in track(
            tensors,
            description=f"importing {file.path.name}",
            console=Console(stderr=True),
            disable=not progress,
        ):
            try:
                stream.writelines(tensor.bfloat16_chunks())
            except NotImplementedError as error:
                kind = tensor.source.tensor_type.name
                what = f"tensor {tensor.source.name} has the unsupported type {kind}"
                raise file.error(what) from error
            except ValueError as error:
                raise file.error(
                    f"tensor {tensor.source.name} has a value that is {error}"
                ) from error
        stream.flush()
        os.fsync(stream.fileno())


def _main(arguments: Sequence[str]) -> int:
    """`FILE OUT [--progress]`, for a parent process: the last line of stdout is the error."""
    file, out, *options = arguments
    try:
        import_gguf(Path(file), Path(out), progress="--progress" in options)
    except ModelError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
