"""What one step does: plain records that the scheduler decides and others carry out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from ..cache import Copies
    from .messages import Logprobs
    from .sequence import Sequence


class Work(msgspec.Struct, frozen=True, gc=False):
    """The rows one sequence advances by: tokens[start : start + rows]."""

    seq: Sequence
    start: int
    rows: int
    samples: bool
    """The last row is the sequence's last token, so its logits choose the next."""
    is_fed: bool = False
    """The last row's token is the one that the step before this chooses: the host does not know it
    when this step is launched, and the device takes it from there."""
    score_from: int = 0
    score_rows: int = 0
    """Rows score_from .. score_from + score_rows - 1 (counted from `start`) score the token after
    them."""

    @property
    def stop(self) -> int:
        """One past the last position of the rows."""
        return self.start + self.rows

    @property
    def num_logits(self) -> int:
        """Logit rows this work needs: the scored rows first, then the sampling one."""
        return self.score_rows + self.samples


@dataclass(frozen=True)
class StepPlan:
    """One step: works in row order, and copies to make before any of them runs."""

    works: tuple[Work, ...]
    copies: Copies
    num_rows: int
    """Token rows of the step."""
    unsettled: tuple[int, ...] = ()
    """Places in `works` of those that change more than a sequence's last token: the cache's books,
    or scores. The others generate inside a page of their own."""


NOT_FINITE = "the model produced logits that are not finite"


class Sampled(msgspec.Struct, frozen=True, gc=False):
    """What the sampler made of one work's logits."""

    token_id: int | None = None
    """None if the work does not sample, or has a problem."""
    logprobs: Logprobs | None = None
    scored: tuple[Logprobs, ...] = ()
    problem: str | None = None
    """Why the sequence cannot go on: its logits were not finite, or its grammar failed."""
