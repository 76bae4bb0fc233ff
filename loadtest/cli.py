"""`convserve loadtest`: run (the default), sweep, compare, report, scenarios.

Exit codes: 0 fine, 1 a gate or a canary failed (or a comparison found worse), 2 the run is
invalid, undecided or could not be made. Knows options and output; everything else is elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from . import options as opt
from .compare import compare_results, compare_servers
from .early import check_stop
from .files import write_files
from .html import write_html
from .junit import write_junit
from .limits import parse_gates, parse_limits
from .parquet import check_parquet
from .plan import Plan
from .result import read_result, write_json
from .run import RunError, Settings, probe, run
from .scenario import read_scenario, shipped_scenarios
from .sweep import SweepOptions, read_sweep, sweep
from .terminal import LiveView, print_comparison, print_result, print_sweep
from .worker import run_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from .compare import Comparison
    from .records import RequestRecord
    from .result import Result
    from .scenario import Scenario
    from .sweep import Point, Sweep


_T = TypeVar("_T")


class _RunByDefault(TyperGroup):
    """`loadtest URL ...` means `loadtest run URL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    add_completion=False,
    help="Load tests whose latency reports can be believed, against any OpenAI-compatible server.",
)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """A wrong option or an unreachable server is one line and exit code 2."""
    try:
        yield
    except (ValueError, RunError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from None


def _command() -> list[str]:
    return ["convserve", "loadtest", *_redacted(sys.argv[1:])]


def _redacted(arguments: list[str]) -> list[str]:
    """Without the key, and without the name this program was reached by."""
    kept: list[str] = []
    for argument in arguments[arguments[:1] == ["loadtest"] :]:
        if kept and kept[-1] == "--api-key":
            argument = "***"
        elif argument.startswith("--api-key="):
            argument = "--api-key=***"
        kept.append(argument)
    return kept


def _interruptible(work: Callable[[asyncio.Event], Coroutine[Any, Any, _T]]) -> _T:
    """Runs to the end; the first interrupt asks for the result so far, the second kills."""

    async def entry() -> _T:
        interrupt = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            interrupt.set()

        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(signal.SIGINT, on_signal)
        return await work(interrupt)

    return run_loop(entry)  # pyright: ignore[reportReturnType]


def _run_once(
    scenario: Scenario, settings: Settings, console: Console, quiet: bool
) -> tuple[Result, list[RequestRecord]]:
    async def work(interrupt: asyncio.Event) -> tuple[Result, list[RequestRecord]]:
        known = await probe(settings, scenario)
        total = Plan(scenario, known.prompts, known.model).count
        view = None if quiet else LiveView(scenario, console, total)
        with view or contextlib.nullcontext():
            return await run(
                scenario,
                settings,
                known=known,
                on_progress=view.update if view else None,
                interrupt=interrupt,
            )

    return _interruptible(work)


def _check_judgement(scenario: Scenario) -> None:
    check_stop(scenario)
    parse_limits(scenario.goodput)
    if parse_gates(scenario.slo) and not scenario.goodput:
        for gate in parse_gates(scenario.slo):
            if gate.figure.startswith("goodput"):
                raise ValueError(f"slo: {gate.text!r} needs --goodput limits")


@app.command("run")
def run_command(
    target: opt.Target,
    scenario: opt.ScenarioName = None,
    scale: opt.Scale = None,
    overrides: opt.Overrides = None,
    strategy: opt.Strategy = None,
    rate: opt.Rate = None,
    concurrency: opt.Concurrency = None,
    burstiness: opt.Burstiness = None,
    stages: opt.Stages = None,
    trace: opt.Trace = None,
    speed: opt.Speed = None,
    max_requests: opt.MaxRequests = None,
    max_duration: opt.MaxDuration = None,
    max_in_flight: opt.MaxInFlight = None,
    warmup: opt.Warmup = None,
    seed: opt.Seed = None,
    prompt_tokens: opt.PromptTokens = None,
    output_tokens: opt.OutputTokens = None,
    turns: opt.Turns = None,
    think_time: opt.ThinkTime = None,
    prefix_tree: opt.PrefixTree = None,
    cancel_share: opt.CancelShare = None,
    cancel_after: opt.CancelAfter = None,
    slow_share: opt.SlowShare = None,
    canary_every: opt.CanaryEvery = None,
    model: opt.Model = None,
    api_key: opt.ApiKey = None,
    endpoint: opt.Endpoint = None,
    prompts: opt.Prompts = None,
    vocab: opt.Vocab = None,
    ignore_eos: opt.IgnoreEos = None,
    timeout: opt.Timeout = None,
    retries: opt.Retries = None,
    workers: opt.Workers = 1,
    scrape: opt.Scrape = True,
    slo: opt.Slo = None,
    goodput: opt.Goodput = None,
    stop_width: opt.StopWidth = None,
    stop_on_slo: opt.StopOnSlo = None,
    out: opt.Out = None,
    parquet: opt.Parquet = False,
    junit: opt.Junit = None,
    quiet: opt.Quiet = False,
) -> None:
    """One load, one report."""
    console = Console(highlight=False)
    with _plain_errors():
        made = opt.build_scenario(
            scenario,
            overrides,
            load={
                "strategy": strategy,
                "rate": rate,
                "concurrency": concurrency,
                "burstiness": burstiness,
                "stages": stages,
                "trace": trace,
                "speed": speed,
                "max_requests": max_requests,
                "max_duration": max_duration,
                "max_in_flight": max_in_flight,
                "warmup": warmup,
            },
            traffic={
                "prompt_tokens": prompt_tokens,
                "output_tokens": output_tokens,
                "turns": turns,
                "think_time": think_time,
                "prefix_tree": prefix_tree,
                "cancel_share": cancel_share,
                "cancel_after": cancel_after,
                "slow_share": slow_share,
            },
            request={
                "endpoint": endpoint,
                "prompts": prompts,
                "vocab": vocab,
                "ignore_eos": ignore_eos,
                "timeout": timeout,
                "retries": retries,
            },
            stop={"width": stop_width, "slo": stop_on_slo},
            top={"seed": seed, "slo": slo or None, "goodput": goodput or None},
            canary_every=canary_every,
            scale=scale,
        )
        _check_judgement(made)
        if parquet:
            check_parquet()
        settings = Settings(
            url=target,
            model=model,
            api_key=api_key,
            workers=workers,
            scrape=scrape,
            command=_command(),
        )
        result, records = _run_once(made, settings, console, quiet or not console.is_terminal)
        print_result(result, console)
        if junit:
            write_junit(result, junit)
        if out:
            rows = write_files(result, records, Path(out), parquet)
            console.print(f"written: {out}.json, {rows}, .csv, .html")
    raise typer.Exit(result.exit_code)


@app.command("sweep")
def sweep_command(
    target: opt.Target,
    scenario: opt.ScenarioName = None,
    overrides: opt.Overrides = None,
    prompt_tokens: opt.PromptTokens = None,
    output_tokens: opt.OutputTokens = None,
    seed: opt.Seed = None,
    model: opt.Model = None,
    api_key: opt.ApiKey = None,
    endpoint: opt.Endpoint = None,
    prompts: opt.Prompts = None,
    vocab: opt.Vocab = None,
    workers: opt.Workers = 1,
    goodput: opt.Goodput = None,
    keep: Annotated[float, typer.Option(help="Share of good requests a rate must keep.")] = 0.99,
    duration: Annotated[
        float, typer.Option(parser=opt.seconds, metavar="DURATION", help="Of each point.")
    ] = 20.0,
    max_concurrency: Annotated[
        int, typer.Option(min=1, help="Most users of the closed loop.")
    ] = 256,
    rates: Annotated[
        str | None, typer.Option(help="Rates to try, instead of finding them: 1,2,4,8.")
    ] = None,
    bisections: Annotated[
        int, typer.Option(min=0, help="Steps of the search for the SLO rate.")
    ] = 4,
    out: opt.Out = None,
) -> None:
    """Latency against load: capacity, knee, and the highest rate that keeps the limits."""
    console = Console(highlight=False)
    with _plain_errors():
        made = opt.build_scenario(
            scenario,
            overrides,
            traffic={"prompt_tokens": prompt_tokens, "output_tokens": output_tokens},
            request={"endpoint": endpoint, "prompts": prompts, "vocab": vocab},
            top={"seed": seed, "goodput": goodput or None, "slo": []},
        )
        _check_judgement(made)
        settings = Settings(
            url=target, model=model, api_key=api_key, workers=workers, command=_command()
        )
        options = SweepOptions(
            duration=duration,
            max_concurrency=max_concurrency,
            rates=[float(rate) for rate in rates.split(",")] if rates else [],
            goodput=keep,
            bisections=bisections,
        )

        def on_point(point: Point, result: Result) -> None:
            console.print(
                f"{point.label}: {point.request_rate:.3g} req/s, "
                f"{point.output_token_rate:.0f} tok/s{'' if point.valid else ' INVALID'}"
            )
            if out:
                folder = Path(f"{out}.runs")
                folder.mkdir(parents=True, exist_ok=True)
                count = len(list(folder.glob("*.json")))
                write_json(result, folder / f"{count:02}-{point.kind}-{point.level:.4g}.json")

        async def work(interrupt: asyncio.Event) -> Sweep:
            return await sweep(made, settings, options, on_point=on_point, interrupt=interrupt)

        found = _interruptible(work)
        print_sweep(found, console)
        if out:
            write_json(found, Path(f"{out}.json"))
            write_html(found, Path(f"{out}.html"))
            console.print(f"written: {out}.json, .html, and the runs in {out}.runs")
    raise typer.Exit(found.exit_code)


@app.command("compare")
def compare_command(
    a: Annotated[str, typer.Argument(help="Result files (comma-separated), or a server's URL.")],
    b: Annotated[str, typer.Argument(help="The same; what A is compared with.")],
    scenario: opt.ScenarioName = None,
    overrides: opt.Overrides = None,
    model: opt.Model = None,
    api_key: opt.ApiKey = None,
    workers: opt.Workers = 1,
    rounds: Annotated[
        int, typer.Option(min=1, help="Servers: how often B runs (A once more).")
    ] = 2,
    margin: Annotated[
        float, typer.Option(min=0, help="Smallest relative change worth a verdict.")
    ] = 0.02,
    out: opt.Out = None,
) -> None:
    """Better, same or worse, with intervals. Two servers are run in turn: A B A B A."""
    console = Console(highlight=False)
    with _plain_errors():
        urls = [side for side in (a, b) if "://" in side]
        if len(urls) == 1:
            raise ValueError("compare two URLs, or two sets of result files")
        if urls:
            made = opt.build_scenario(scenario, overrides)
            sides = [
                Settings(url=u, model=model, api_key=api_key, workers=workers, command=_command())
                for u in (a, b)
            ]

            def on_round(name: str, result: Result) -> None:
                console.print(
                    f"{name}: {result.full.completed} requests in {result.full.end:.1f} s"
                )

            async def work(interrupt: asyncio.Event) -> Comparison:
                found, _, _ = await compare_servers(
                    made, sides[0], sides[1], rounds, margin, on_round=on_round, interrupt=interrupt
                )
                return found

            comparison = _interruptible(work)
        else:
            left, right = ([read_result(Path(p)) for p in side.split(",")] for side in (a, b))
            comparison = compare_results(left, right, margin, (a, b))
        print_comparison(comparison, console)
        if out:
            write_json(comparison, Path(f"{out}.json"))
            write_html(comparison, Path(f"{out}.html"))
    raise typer.Exit(comparison.exit_code)


@app.command("report")
def report_command(
    source: Annotated[Path, typer.Argument(help="A run's or a sweep's JSON.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="HTML file to write.")] = None,
) -> None:
    """Draws an existing result again."""
    console = Console(highlight=False)
    with _plain_errors():
        try:
            subject: Result | Sweep = read_result(source)
        except ValueError:
            subject = read_sweep(source)
            print_sweep(subject, console)
        else:
            print_result(subject, console)
        if out:
            write_html(subject, out)


@app.command("scenarios")
def scenarios_command() -> None:
    """Lists the scenarios that come with the package."""
    console = Console(highlight=False)
    for name in shipped_scenarios():
        console.print(f"[b]{name}[/b]: {read_scenario(name).get('description', '')}")
