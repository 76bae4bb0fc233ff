"""The command line's options, declared once, and how they change a scenario.

Knows typer and scenarios; runs nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from .arrivals import Stage, parse_duration
from .lengths import GRAMMAR
from .scenario import Scenario, make_scenario, read_scenario, strategies

_LOAD, _WORK, _REQUEST, _OUT = "Load", "Workload", "Requests", "Judgement and output"


def seconds(text: str | float) -> float:
    """A duration option's value."""
    try:
        return parse_duration(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a duration such as 90, 90s, 1.5m or 2h"
        ) from None


def share(text: str | float) -> float:
    """A share option's value."""
    try:
        return float(text[:-1]) / 100 if isinstance(text, str) and text[-1:] == "%" else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a share such as 5% or 0.05") from None


Target = Annotated[str, typer.Argument(help="Base URL of an OpenAI-compatible server.")]
ScenarioName = Annotated[
    str | None, typer.Option("--scenario", "-s", help="A shipped scenario or a TOML or YAML file.")
]
Scale = Annotated[
    str | None,
    typer.Option(
        metavar="RATE[:TIME]",
        help="Multiply a scenario's rates and users, and its durations and numbers of sessions.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Change any field: load.rate=4, traffic.0.turns=2."
    ),
]
Strategy = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(strategies())}.", rich_help_panel=_LOAD),
]
Rate = Annotated[
    float | None,
    typer.Option(
        "--rate",
        "-r",
        help="Sessions per second (open loop; Poisson unless --strategy says otherwise).",
        rich_help_panel=_LOAD,
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        "-c",
        help="Users who wait for their answers (closed loop).",
        rich_help_panel=_LOAD,
    ),
]
Burstiness = Annotated[
    float | None,
    typer.Option(
        help="Shape of gamma gaps: 1 is Poisson, less is burstier.", rich_help_panel=_LOAD
    ),
]
Stages = Annotated[
    str | None,
    typer.Option(help="Steps and ramps: 30s:5,60s:5-20 (rates, or users).", rich_help_panel=_LOAD),
]
Trace = Annotated[
    str | None,
    typer.Option(help="Replay a Mooncake, Azure or BurstGPT trace.", rich_help_panel=_LOAD),
]
Speed = Annotated[
    float | None, typer.Option(help="Replay this many times faster.", rich_help_panel=_LOAD)
]
MaxRequests = Annotated[
    int | None,
    typer.Option("--max-requests", "-n", help="Sessions to send.", rich_help_panel=_LOAD),
]
MaxDuration = Annotated[
    float | None,
    typer.Option(
        "--max-duration",
        "-d",
        parser=seconds,
        metavar="DURATION",
        help="Send nothing new after this (30s where nothing else ends the run).",
        rich_help_panel=_LOAD,
    ),
]
MaxInFlight = Annotated[
    int | None,
    typer.Option(
        help="Open loop: the rest waits in the client, and the wait counts.", rich_help_panel=_LOAD
    ),
]
Warmup = Annotated[
    int | None,
    typer.Option(
        help="Sessions sent the same way and awaited before measuring.", rich_help_panel=_LOAD
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="Fixes arrivals, lengths and prompts.", rich_help_panel=_LOAD)
]
PromptTokens = Annotated[str | None, typer.Option(help=f"{GRAMMAR}.", rich_help_panel=_WORK)]
OutputTokens = Annotated[str | None, typer.Option(help="The same forms.", rich_help_panel=_WORK)]
Turns = Annotated[str | None, typer.Option(help="Turns of a session.", rich_help_panel=_WORK)]
ThinkTime = Annotated[
    str | None,
    typer.Option(help="Seconds between an answer and the next turn.", rich_help_panel=_WORK),
]
PrefixTree = Annotated[
    str | None,
    typer.Option(
        metavar="NxTOKENS,...",
        help="Shared prefixes: 4x512,16x128 is 4 prefixes with 16 continuations each.",
        rich_help_panel=_WORK,
    ),
]
CancelShare = Annotated[
    float | None,
    typer.Option(help="Share of requests dropped in mid-stream.", rich_help_panel=_WORK),
]
CancelAfter = Annotated[
    str | None, typer.Option(help="Tokens after which they are dropped.", rich_help_panel=_WORK)
]
SlowShare = Annotated[
    float | None, typer.Option(help="Share of requests read slowly.", rich_help_panel=_WORK)
]
CanaryEvery = Annotated[
    int | None,
    typer.Option(
        help="A greedy prompt after every N sessions, compared byte for byte.",
        rich_help_panel=_WORK,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(help="Default: the first that the server names.", rich_help_panel=_REQUEST),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="OPENAI_API_KEY", show_envvar=True, help="Bearer token.", rich_help_panel=_REQUEST
    ),
]
Endpoint = Annotated[
    str | None, typer.Option(help="completions or chat.", rich_help_panel=_REQUEST)
]
Prompts = Annotated[str | None, typer.Option(help="ids, text or auto.", rich_help_panel=_REQUEST)]
Vocab = Annotated[
    int | None, typer.Option(help="Draw prompt ids below this.", rich_help_panel=_REQUEST)
]
IgnoreEos = Annotated[
    bool | None,
    typer.Option(
        "--ignore-eos/--stop-at-eos", help="Ask for full-length outputs.", rich_help_panel=_REQUEST
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        parser=seconds, metavar="DURATION", help="For a whole request.", rich_help_panel=_REQUEST
    ),
]
Retries = Annotated[
    int | None, typer.Option(help="Of refused or overloaded requests.", rich_help_panel=_REQUEST)
]
Workers = Annotated[int, typer.Option(min=1, help="Client processes.", rich_help_panel=_REQUEST)]
Scrape = Annotated[
    bool,
    typer.Option(
        "--scrape/--no-scrape", help="Read the server's /metrics.", rich_help_panel=_REQUEST
    ),
]
Slo = Annotated[
    list[str] | None,
    typer.Option(
        help="Gate: ttft.p99<200ms, error<0.1%, goodput>=99%; decides the exit code.",
        rich_help_panel=_OUT,
    ),
]
Goodput = Annotated[
    list[str] | None,
    typer.Option(help="What makes a request good: ttft<200ms,tpot<20ms.", rich_help_panel=_OUT),
]
StopWidth = Annotated[
    float | None,
    typer.Option(
        parser=share,
        metavar="SHARE",
        help="End early when the medians' intervals are within this of them: 5%.",
        rich_help_panel=_OUT,
    ),
]
StopOnSlo = Annotated[
    bool | None,
    typer.Option("--stop-on-slo", help="End early when a gate is lost.", rich_help_panel=_OUT),
]
Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        metavar="PREFIX",
        help="Write PREFIX.json, .jsonl, .csv and .html.",
        rich_help_panel=_OUT,
    ),
]
Parquet = Annotated[
    bool,
    typer.Option(
        "--parquet",
        help="Write PREFIX.parquet in place of PREFIX.jsonl (needs pyarrow).",
        rich_help_panel=_OUT,
    ),
]
Junit = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the verdicts as JUnit XML.", rich_help_panel=_OUT),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No live display.", rich_help_panel=_OUT)
]


def _prefix_tree(text: str) -> list[dict[str, int]]:
    levels = []
    for part in text.split(","):
        fanout, cross, tokens = part.strip().partition("x")
        if not (cross and fanout.isdigit() and tokens.isdigit()):
            raise ValueError(f"prefix-tree: {part!r} is not NxTOKENS")
        levels.append({"fanout": int(fanout), "tokens": int(tokens)})
    return levels


def _scale(load: dict[str, Any], text: str) -> None:
    """Fits a shipped load to a machine: so much of its rate, for so much of its time."""
    try:
        rate, time = (float(part) for part in (text if ":" in text else f"{text}:1").split(":"))
    except ValueError:
        rate = time = 0.0
    if not (0 < rate < math.inf and 0 < time < math.inf):
        raise ValueError(f"scale: {text!r} is not RATE or RATE:TIME with numbers > 0")
    stages = load.get("stages", [])
    for place, key, factor in (
        (load, "rate", rate),
        (load, "max_duration", time),
        *((stage, "duration", time) for stage in stages),
        *((stage, key, rate) for stage in stages for key in ("level", "to")),
    ):
        if place.get(key) is not None:
            place[key] *= factor
    for key, factor in (("concurrency", rate), ("max_requests", time)):
        if load.get(key) is not None:
            load[key] = max(round(load[key] * factor), 1)


def _set(table: dict[str, Any], path: str, value: Any) -> None:
    """Sets a dotted path; numbers index lists, which must be that long already."""
    keys = path.split(".")
    place: Any = table
    for here, key in enumerate(keys[:-1]):
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise ValueError(f"{path}: no entry {key}")
            place = place[int(key)]
        else:
            place = place.setdefault(key, [{}] if keys[here + 1].isdigit() else {})
        if not isinstance(place, (dict, list)):
            raise ValueError(f"{path}: {key} is a single value")
    if isinstance(place, list):
        raise ValueError(f"{path}: name a field of the entry")
    place[keys[-1]] = value


def _parse_value(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def build_scenario(
    name: str | None,
    overrides: list[str] | None,
    *,
    load: dict[str, Any] | None = None,
    traffic: dict[str, Any] | None = None,
    request: dict[str, Any] | None = None,
    stop: dict[str, Any] | None = None,
    top: dict[str, Any] | None = None,
    canary_every: int | None = None,
    scale: str | None = None,
) -> Scenario:
    """A scenario with flags applied; None leaves a field alone, traffic flags hold for all classes.

    Raises:
        ValueError: `field: what is wrong`.
    """
    table: dict[str, Any] = read_scenario(name) if name else {"name": "command line"}
    table.setdefault("traffic", [{}])
    given = {key: value for key, value in (load or {}).items() if value is not None}
    target = table.setdefault("load", {})
    if scale is not None:
        _scale(target, scale)
    if given.keys() & {"strategy", "rate", "concurrency", "stages", "trace"}:
        # a new kind of load replaces the scenario's, it does not mix with it
        for key in ("strategy", "rate", "concurrency", "stages", "trace"):
            target.pop(key, None)
        given.setdefault("strategy", _implied_strategy(given))
    if "stages" in given:
        stages = Stage.parse_all(given["stages"])
        given["stages"] = [{"duration": s.duration, "level": s.level, "to": s.to} for s in stages]
    target.update(given)
    for entry in table["traffic"]:
        for key, value in (traffic or {}).items():
            if value is not None:
                entry[key] = _prefix_tree(value) if key == "prefix_tree" else value
    for section, fields in (("request", request), ("stop", stop), (None, top)):
        place = table.setdefault(section, {}) if section else table
        place.update({key: value for key, value in (fields or {}).items() if value is not None})
    if canary_every is not None:
        table.setdefault("canary", {})["every"] = canary_every
    for override in overrides or []:
        path, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set: {override!r} is not FIELD=VALUE")
        _set(table, path.strip(), _parse_value(text))
    if not any(target.get(key) for key in ("max_requests", "max_duration", "stages", "trace")):
        target["max_duration"] = 30.0
    return make_scenario(table, name or "options")


def _implied_strategy(given: dict[str, Any]) -> str:
    if given.get("trace"):
        return "trace"
    return "poisson" if given.get("rate") else "concurrent"
