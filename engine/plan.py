"""What one step does: plain records that the scheduler decides and others carry out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..cache import Copies
    from .messages import Logprobs
    from .sequence import Sequence


@dataclass(frozen=True)
class Work:
    """The rows one sequence advances by: tokens[start : start + rows]."""

    seq: Sequence
    start: int
    rows: int
    samples: bool
    """The last row is the last known token, so its logits choose the next."""
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

    @property
    def num_rows(self) -> int:
        """Token rows of the step."""
        return sum(w.rows for w in self.works)


@dataclass(frozen=True)
class Sampled:
    """What the sampler made of one work's logits."""

    token_id: int | None = None
    """None if the work does not sample, or the logits were not finite."""
    logprobs: Logprobs | None = None
    scored: tuple[Logprobs, ...] = ()
    is_broken: bool = False
    """The logits were not finite: the sequence cannot go on."""
