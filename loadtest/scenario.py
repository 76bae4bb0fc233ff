"""A scenario: everything that fixes a run but the target, as one TOML or YAML file.

Plain, checked data. Flags of the command line are the same fields; a result embeds its scenario,
so it can be repeated. Knows nothing of HTTP.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import yaml

from .arrivals import Stage, check_stages
from .lengths import Length

Strategy = Literal["concurrent", "constant", "poisson", "gamma", "throughput", "trace"]
"""concurrent: users who each wait for their answer. constant, poisson, gamma: arrivals at a rate.
throughput: everything at once. trace: arrivals of a recorded trace."""

OPEN_LOOP: tuple[Strategy, ...] = ("constant", "poisson", "gamma", "throughput", "trace")

SCENARIO_FOLDER = Path(__file__).parent / "scenarios"


class Load(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many requests, and when."""

    strategy: Strategy = "concurrent"
    rate: float | None = None
    """Sessions per second of constant, poisson and gamma."""
    concurrency: int | None = None
    """Users of the closed loop; 1 if not given."""
    burstiness: float = 1.0
    """Shape of gamma gaps: 1 is Poisson, less is burstier."""
    stages: list[Stage] = []
    """Ramps and steps; instead of `rate` or `concurrency`."""
    trace: str | None = None
    speed: float = 1.0
    """A trace is replayed this many times faster."""
    max_requests: int | None = None
    """Sessions of the measured load."""
    max_duration: float | None = None
    """Seconds after which nothing new is sent; what is in flight is awaited."""
    max_in_flight: int | None = None
    """Open loop: more than this wait in the client, and the wait counts."""
    warmup: int = 0
    """Sessions sent in the same way, and awaited, before the measured load; not counted."""


class PrefixLevel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One level of a tree of shared prefixes: each node above has `fanout` children."""

    fanout: int
    tokens: int


class Traffic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A class of sessions."""

    name: str = "default"
    weight: float = 1.0
    """Its share among the classes."""
    prompt_tokens: str | float = 128
    """New prompt tokens of each turn, beyond any shared prefix and history."""
    output_tokens: str | float = 64
    turns: str | float = 1
    think_time: str | float = 0
    """Seconds between an answer and the next turn."""
    prefix_tree: list[PrefixLevel] = []
    prefix_skew: float = 0.0
    """Zipf exponent of the choice among siblings; 0 is uniform."""
    cancel_share: float = 0.0
    """Share of requests dropped by the client after `cancel_after` tokens."""
    cancel_after: str | float = 16
    slow_share: float = 0.0
    """Share of requests read slowly, at `slow_rate` bytes per second."""
    slow_rate: float = 2000.0
    extra: dict[str, Any] = {}
    """Fields added to each request body (temperature, priority, ...)."""


class RequestShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The form of requests, common to all classes."""

    endpoint: Literal["chat", "completions"] = "completions"
    prompts: Literal["auto", "ids", "text"] = "auto"
    """Token ids (exact lengths) or words (calibrated); auto is ids where completions know some."""
    vocab: int | None = None
    """Prompts of ids are drawn below this; without it from ids that /tokenize names."""
    ignore_eos: bool = True
    temperature: float = 0.0
    vendor_fields: bool | Literal["auto"] = "auto"
    """Send fields beyond OpenAI's own; auto asks the server once."""
    timeout: float = 300.0
    retries: int = 0
    honour_retry_after: bool = True
    keep_alive: bool = True


class Canary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A greedy prompt with one right answer, repeated under load."""

    every: int = 0
    """After every this many sessions; 0 is never."""
    prompt: str = "The quick brown fox"
    max_tokens: int = 32
    expected: str | None = None
    """The right answer; without it, the answer given before the load, alone."""


class Stop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a load may end before its time; what is in flight is awaited."""

    width: float | None = None
    """When each figure's 95 % interval is within this share of its value."""
    figures: list[str] = []
    """`ttft.p99`, ...; empty for the medians of ttft, itl and e2e."""
    slo: bool = False
    """When a gate is lost: its limit lies outside the whole interval."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole run."""

    name: str = "custom"
    description: str = ""
    seed: int = 0
    load: Load = Load()
    request: RequestShape = RequestShape()
    traffic: list[Traffic] = msgspec.field(default_factory=lambda: [Traffic()])
    canary: Canary = Canary()
    goodput: list[str] = []
    """Limits that each request must meet to count as good: `ttft<200ms`."""
    slo: list[str] = []
    """Gates of the run: `ttft.p99<200ms`, `error<0.1%`, `goodput>=99%`."""
    stop: Stop = Stop()

    def check(self) -> Scenario:
        """Returns itself.

        Raises:
            ValueError: `field: what is wrong (what is allowed)`.
        """
        load = self.load
        by_rate = load.strategy in ("constant", "poisson", "gamma")
        if load.stages:
            if load.strategy in ("throughput", "trace"):
                raise ValueError(f"load.stages: has no meaning for strategy {load.strategy}")
            check_stages(load.stages)
        elif by_rate and not (load.rate and load.rate > 0):
            raise ValueError(f"load.rate: strategy {load.strategy} needs a rate > 0 or stages")
        if load.rate is not None and not by_rate:
            raise ValueError(f"load.rate: has no meaning for strategy {load.strategy}")
        if load.concurrency is not None and load.strategy in OPEN_LOOP:
            raise ValueError("load.concurrency: only for the closed loop; see max_in_flight")
        if (load.strategy == "trace") != (load.trace is not None):
            raise ValueError("load.trace: a file, with strategy trace and no other")
        for field in ("concurrency", "burstiness", "speed", "max_requests", "max_duration"):
            value = getattr(load, field)
            if value is not None and not value > 0:
                raise ValueError(f"load.{field}: {value} (must be > 0)")
        if load.max_in_flight is not None:
            if load.strategy not in OPEN_LOOP:
                raise ValueError("load.max_in_flight: only for open loops; use concurrency")
            if load.max_in_flight < 1:
                raise ValueError(f"load.max_in_flight: {load.max_in_flight} (must be >= 1)")
        bounded = load.max_requests or load.max_duration or load.stages or load.strategy == "trace"
        if not bounded:
            raise ValueError("load: give max_requests, max_duration or stages")
        if load.strategy == "throughput" and load.max_requests is None:
            raise ValueError("load.max_requests: strategy throughput needs it")
        if not self.traffic or not any(item.weight > 0 for item in self.traffic):
            raise ValueError("traffic: needs a class with weight > 0")
        names = [item.name for item in self.traffic]
        if len(set(names)) < len(names):
            raise ValueError("traffic: two classes have the same name")
        for number, item in enumerate(self.traffic):
            where = f"traffic[{number}]"
            for field in ("prompt_tokens", "output_tokens", "turns", "think_time", "cancel_after"):
                Length.parse(getattr(item, field), f"{where}.{field}")
            for field in ("cancel_share", "slow_share"):
                if not 0 <= getattr(item, field) <= 1:
                    raise ValueError(f"{where}.{field}: {getattr(item, field)} (0 to 1)")
            if item.weight < 0 or item.slow_rate <= 0 or item.prefix_skew < 0:
                raise ValueError(f"{where}: weight, prefix_skew >= 0 and slow_rate > 0")
            for level in item.prefix_tree:
                if level.fanout < 1 or level.tokens < 1:
                    raise ValueError(f"{where}.prefix_tree: fanout and tokens must be >= 1")
        return self

    def lasting(self) -> list[Stage]:
        """The stages, or the one that rate or concurrency and max_duration amount to."""
        load = self.load
        if load.stages:
            return load.stages
        level = load.rate if load.strategy != "concurrent" else load.concurrency or 1
        # without a duration the number of requests ends the load
        return [Stage(duration=load.max_duration or 1e7, level=float(level or 0))]


def shipped_scenarios() -> dict[str, Path]:
    """The scenarios that come with the package, by name."""
    return {path.stem: path for path in sorted(SCENARIO_FOLDER.glob("*.toml"))}


def read_scenario(name: str) -> dict[str, Any]:
    """The raw table of a shipped scenario or of a TOML or YAML file.

    Raises:
        ValueError: unknown name, unreadable file.
    """
    shipped = shipped_scenarios()
    path = shipped.get(name, Path(name))
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(
            f"scenario: {name!r} is neither a file nor one of {', '.join(shipped)}"
        ) from error
    try:
        if path.suffix in (".yaml", ".yml"):
            table = yaml.safe_load(text)
        else:
            table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: is not a table")
    return table


def make_scenario(table: dict[str, Any], source: str = "scenario") -> Scenario:
    """Checks a raw table.

    Raises:
        ValueError: names the source, the field and what is allowed.
    """
    try:
        return msgspec.convert(table, Scenario).check()
    except (msgspec.ValidationError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def strategies() -> tuple[str, ...]:
    return get_args(Strategy)
