"""The `convserve` command: flags to settings, and one line on stderr when something is wrong.

Knows nothing of how serving or the engine work. What a command needs is imported when it runs, so
`--help` is quick and the serving process never loads torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from ..engine.config import EngineConfig
from .settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Sequence


app = typer.Typer(
    name="convserve",
    help="Serve language models whose layers carry short convolutions.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_ENGINE = EngineConfig(model="")
_SERVER = ServerSettings(model_names=("",))
_ENV_KEYS = "CONVSERVE_API_KEY"

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Backend = Literal["auto", "reference"]

Model = Annotated[str, typer.Argument(help="A Hugging Face folder or a .gguf file.")]
AdapterOption = Annotated[
    Path | None, typer.Option(help="A folder of convolutions trained for the model.")
]
DeviceOption = Annotated[Device, typer.Option(help="Where the model runs.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of weights and cache.")]
MemoryOption = Annotated[
    str, typer.Option(help="Page pool: bytes (2GiB), a share of free memory (50%), or auto.")
]
LenOption = Annotated[int, typer.Option(help="Most tokens per sequence; 0: the model's.")]


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="A Hugging Face folder or a .gguf file; none: the default model."),
    ] = None,
    conv_adapter: Annotated[
        str | None,
        typer.Option(
            help="A folder of convolutions trained for the model; none: the default model alone."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    uds: Annotated[Path | None, typer.Option(help="Listen on this unix socket instead.")] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Serve TLS with this.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    device: DeviceOption = _ENGINE.device,
    dtype: DtypeOption = _ENGINE.dtype,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Most sequences that run at once.")
    ] = _ENGINE.max_num_seqs,
    max_batch_tokens: Annotated[
        int, typer.Option(min=0, help="Most token rows per step; 0: for the device.")
    ] = _ENGINE.max_batch_tokens,
    max_model_len: LenOption = _ENGINE.max_model_len,
    memory: MemoryOption = _ENGINE.memory,
    page_size: Annotated[int, typer.Option(help="Tokens per KV page.")] = _ENGINE.page_size,
    prefix_caching: Annotated[
        bool, typer.Option(help="Share the state of prompts that begin alike.")
    ] = _ENGINE.prefix_caching,
    conv_tail_memory: Annotated[
        str,
        typer.Option(
            help="Conv windows kept for shared prompts: bytes, a share of --memory, auto."
        ),
    ] = _ENGINE.conv_tail_memory,
    cuda_graphs: Annotated[
        bool, typer.Option(help="Replay captured graphs on a GPU.")
    ] = _ENGINE.cuda_graphs,
    overlap: Annotated[
        bool, typer.Option(help="Launch GPU steps before the last one's tokens are read.")
    ] = _ENGINE.overlap,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Bits that no batch changes; slower.")
    ] = _ENGINE.deterministic,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all.")] = _ENGINE.threads,
    backend: Annotated[Backend, typer.Option(help="Kernels.")] = _ENGINE.backend,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name in the API; repeat for aliases.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"A key that opens the API; repeat. Also from {_ENV_KEYS}."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Keys, one a line.")] = None,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="/metrics wants no key.")
    ] = False,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Sequences that may wait; more get 429.")
    ] = _SERVER.max_queue,
    max_body: Annotated[
        int, typer.Option(min=1024, help="Bytes of a request body; more get 413.")
    ] = _SERVER.max_body,
    deadline_seconds: Annotated[
        float, typer.Option(min=0, help="Time for one request; 0: any.")
    ] = _SERVER.deadline_seconds,
    keep_alive_seconds: Annotated[
        float, typer.Option(min=0, help="Silence before a stream sends a comment; 0: never.")
    ] = _SERVER.keep_alive_seconds,
    send_seconds: Annotated[
        float, typer.Option(min=0, help="Time a stream may stay unread; 0: any.")
    ] = _SERVER.send_seconds,
    stale_seconds: Annotated[
        float, typer.Option(min=1, help="Silence of the engine before /health fails.")
    ] = _SERVER.stale_seconds,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Time for requests in flight after SIGTERM.")
    ] = 30.0,
    vllm_metrics: Annotated[
        bool, typer.Option(help="Repeat metrics under vLLM's names.")
    ] = _SERVER.vllm_metrics,
    parity_check: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of greedy requests to compute again and compare."),
    ] = _SERVER.parity_check,
    page: Annotated[bool, typer.Option(help="A page to try the model on, at /.")] = _SERVER.page,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web origin that may call; repeat.")
    ] = None,
    log_format: Annotated[Literal["console", "json"], typer.Option(help="Log lines.")] = "console",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(help="Least level of log lines; probes' requests are at debug."),
    ] = "info",
    access_log: Annotated[bool, typer.Option(help="A log line per request.")] = True,
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            envvar="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            help="Send OpenTelemetry traces there, as http://host:4318/v1/traces.",
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP."""
    from .default_model import DEFAULT_ADAPTER
    from .logs import configure_logging
    from .serve import ListenOptions, run

    if (ssl_certfile is None) != (ssl_keyfile is None):
        _fail("--ssl-certfile and --ssl-keyfile go together")
    configure_logging(log_format, access=access_log, level=log_level)
    keys = _api_keys(api_key or (), api_key_file)
    folder, name = _default() if model is None else _resolve(model)
    if conv_adapter is None and model is None:
        conv_adapter, name = str(DEFAULT_ADAPTER), f"{name}-dynconv"
    engine = EngineConfig(
        model=str(folder),
        conv_adapter="" if conv_adapter in (None, "none") else conv_adapter,
        device=device,
        dtype=dtype,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        max_model_len=max_model_len,
        memory=memory,
        page_size=page_size,
        prefix_caching=prefix_caching,
        conv_tail_memory=conv_tail_memory,
        cuda_graphs=cuda_graphs,
        overlap=overlap,
        deterministic=deterministic,
        threads=threads,
        backend=backend,
        progress=sys.stderr.isatty(),
    )
    settings = ServerSettings(
        model_names=tuple(served_model_name or [name]),
        api_keys=keys,
        metrics_need_key=not open_metrics,
        max_queue=max_queue,
        max_body=max_body,
        keep_alive_seconds=keep_alive_seconds,
        send_seconds=send_seconds,
        deadline_seconds=deadline_seconds,
        stale_seconds=stale_seconds,
        vllm_metrics=vllm_metrics,
        parity_check=parity_check,
        page=page,
        otlp_traces_endpoint=otlp_traces_endpoint,
        cors_origins=tuple(cors_origin or ()),
    )
    listen = ListenOptions(
        host=host,
        port=port,
        uds=uds,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        drain_seconds=drain_seconds,
    )
    raise typer.Exit(run(engine, settings, listen))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop at; repeat.")] = None,
    conv_adapter: AdapterOption = None,
    device: DeviceOption = _ENGINE.device,
    dtype: DtypeOption = _ENGINE.dtype,
    memory: MemoryOption = _ENGINE.memory,
    max_model_len: LenOption = _ENGINE.max_model_len,
) -> None:
    """Continue a prompt and print the text, without a server."""
    folder, _ = _resolve(model)
    from ..engine import LLM, SamplingParams

    try:
        engine = LLM(
            folder,
            conv_adapter=conv_adapter,
            device=device,
            dtype=dtype,
            memory=memory,
            max_model_len=max_model_len,
            max_num_seqs=1,
            progress=sys.stderr.isatty(),
        )
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        )
        [completion] = engine.generate(prompt, params, stop=stop or ())
    except (ValueError, RuntimeError, OSError) as error:
        _fail(str(error))
    typer.echo(prompt + completion.text)


@app.command()
def inspect(
    model: Model,
    conv_adapter: AdapterOption = None,
    device: DeviceOption = _ENGINE.device,
    dtype: DtypeOption = _ENGINE.dtype,
    memory: MemoryOption = _ENGINE.memory,
    max_model_len: LenOption = _ENGINE.max_model_len,
) -> None:
    """Print what a model is and what serving it takes, without loading its weights."""
    folder, _ = _resolve(model)
    from ..engine.inspection import inspect_model

    config = EngineConfig(
        model=str(folder),
        conv_adapter=str(conv_adapter or ""),
        device=device,
        dtype=dtype,
        memory=memory,
        max_model_len=max_model_len,
    )
    try:
        typer.echo(inspect_model(folder, config))
    except (ValueError, RuntimeError, OSError) as error:
        _fail(str(error))


@app.command()
def import_gguf(
    file: Annotated[Path, typer.Argument(help="A .gguf file.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
) -> None:
    """Turn a .gguf file into a Hugging Face folder."""
    from ..engine.gguf_cache import GGUFImportError, import_file

    try:
        import_file(file, out, progress=True)
    except GGUFImportError as error:
        _fail(str(error))
    typer.echo(out)


@app.command()
def fetch_default() -> None:
    """Bring the default model to this machine and print its folder."""
    typer.echo(_default()[0])


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def loadtest(context: typer.Context) -> None:
    """Measure a server; see `convserve loadtest --help`."""
    from ..loadtest.cli import app as loadtest_app

    loadtest_app(context.args, prog_name="convserve loadtest")


def main() -> None:
    """The console script."""
    app()


def _resolve(model: str) -> tuple[Path, str]:
    """The folder to load, and the model's name; a .gguf file is imported into the cache."""
    from ..engine.gguf_cache import GGUFImportError, import_cached
    from .default_model import SHIPPED

    path = Path(model)
    if model in SHIPPED and not path.exists():
        return SHIPPED[model], SHIPPED[model].name
    if path.suffix.lower() != ".gguf":
        if not path.is_dir():
            _fail(f"{path}: no such folder (MODEL is a Hugging Face folder or a .gguf file)")
        return path, path.resolve().name
    try:
        return import_cached(path, progress=True), path.stem
    except GGUFImportError as error:
        _fail(str(error))


def _default() -> tuple[Path, str]:
    from .default_model import SMOLLM2, DefaultModelError, default_model_folder

    try:
        folder = default_model_folder(progress=True)
    except DefaultModelError as error:
        _fail(str(error))
    return folder, Path(SMOLLM2.member).name.partition(".")[0]


def _api_keys(flags: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Keys from all three places, without repetitions."""
    keys = [*flags, *os.environ.get(_ENV_KEYS, "").replace(",", " ").split()]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            _fail(f"--api-key-file {file}: {getattr(error, 'strerror', None) or error}")
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            _fail(f"--api-key-file {file}: has no key")
        keys += found
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            _fail("an API key must be printable ASCII without spaces")
    return tuple(dict.fromkeys(keys))


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"convserve: {message}\n")
    raise typer.Exit(1)


if __name__ == "__main__":
    main()
