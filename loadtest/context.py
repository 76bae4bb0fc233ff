"""Would a load ask for more than the model's context holds? Then it is refused before it starts.

Looks at the sessions that the plan really makes: the tails of a distribution may be longer than
any of them. Knows nothing of sending.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .plan import Plan

if TYPE_CHECKING:
    from .plan import Session
    from .prompts import PromptPlan
    from .scenario import Scenario

_LOOKED_AT = 2000
"""Sessions at most: what comes after an hour may fail as it would anywhere."""


def served_context(told: dict[str, Any], model: str) -> int | None:
    """Tokens of prompt and answer that the model takes, if /v1/models says so."""
    try:
        for entry in told["/v1/models"]["data"]:
            if entry["id"] == model and entry.get("max_model_len"):
                return int(entry["max_model_len"])
    except (KeyError, TypeError, ValueError):
        pass
    return None


def session_tokens(session: Session, prompts: PromptPlan) -> float:
    """Tokens of a session's last request and its answer, all earlier turns included."""

    def size(piece: list[int] | str) -> float:
        if isinstance(piece, str):
            return len(piece.split()) * prompts.tokens_per_word
        return len(piece)

    turns = sum(size(turn.prompt) + turn.max_tokens for turn in session.turns)
    return size(session.prefix) + turns + prompts.overhead


def check_context(scenario: Scenario, prompts: PromptPlan, model: str, limit: int) -> None:
    """Looks for a session that is too long.

    Raises:
        ValueError: names the scenario, the class of traffic, the length and the limit.
    """
    plan = Plan(scenario, prompts, model)
    for index in range(_LOOKED_AT if plan.count is None else min(plan.count, _LOOKED_AT)):
        session = plan.session(index)
        tokens = session_tokens(session, prompts)
        if tokens > limit:
            raise ValueError(
                f"scenario {scenario.name}: a session of traffic {session.traffic.name!r} comes to "
                f"{tokens:.0f} tokens in {len(session.turns)} turns, and {model} takes {limit}: "
                "make prompts, answers, turns or prefixes shorter"
            )
