"""From logits to tokens: penalties and masks, the choice, and reports of its probability.

Sampling is launched when everything before the token is known on the host, and read when the
device has come so far; in between the next step is launched. Rows are independent of each other: a
draw takes its uniform number from (seed, choice, position), so the same request gets the same
tokens whatever else is in the batch, and in whatever step its turn comes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .drawing import draw_inputs
from .plan import NOT_FINITE, Sampled
from .reports import Report, to_host
from .sequence import Status

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Rows

    from .grammar import Grammars
    from .output import Output
    from .plan import StepPlan, Work
    from .sequence import Sequence


@dataclass
class Choices:
    """What was launched for one step."""

    count: int
    """Works of the step."""
    works: list[int] = field(default_factory=list)
    """The works that choose a token."""
    ids: Tensor | None = None
    """[len(works)] int64 on the host, -1 where logits were not finite."""
    reported: list[int] = field(default_factory=list)
    """Which of `works` want reports, and how many rivals each."""
    rivals: list[int] = field(default_factory=list)
    report: Report | None = None
    scores: dict[int, Report] = field(default_factory=dict)
    """By work: its scored rows."""
    problems: dict[int, str] = field(default_factory=dict)
    """By work: why it has no token, where that is not the logits' fault."""
    done: torch.cuda.Event | None = None
    """When the device has come so far; None where the host does the work."""

    def read(self) -> list[Sampled]:
        """One result per work, in order. Waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        results = [Sampled()] * self.count
        ids: list[int] = [] if self.ids is None else self.ids.tolist()
        reports = (
            {}
            if self.report is None
            else dict(zip(self.reported, self.report.read(self.rivals), strict=True))
        )
        for place, (work, token) in enumerate(zip(self.works, ids, strict=True)):
            if work in self.problems:
                results[work] = Sampled(problem=self.problems[work])
            elif token < 0:
                results[work] = Sampled(problem=NOT_FINITE)
            else:
                results[work] = Sampled(token, reports.get(place))
        for work, report in self.scores.items():
            r = results[work]
            results[work] = Sampled(r.token_id, r.logprobs, tuple(report.read()), r.problem)
        return results


class Sampler:
    """Chooses the next token of every work that samples, and scores prompt rows."""

    def __init__(
        self,
        eos_token_ids: tuple[int, ...],
        slot: Callable[[Sequence], int],
        feed: Callable[[Tensor, Tensor], None],
        draw: Callable[..., Tensor],
        grammars: Grammars | None = None,
    ) -> None:
        """
        Args:
            slot: where a sequence's last token is kept.
            feed: takes slots [N] and tokens [N], where the greedy choice is not the last word.
            draw: `Ops.sample`.
            grammars: without them, a request with a grammar fails.
        """
        self._eos = eos_token_ids
        self._slot = slot
        self._feed = feed
        self._draw = draw
        self._grammars = grammars

    def launch(self, output: Output, plan: StepPlan) -> Choices:
        """Launches the choice of a token for every work that samples and has not ended."""
        choices = Choices(len(plan.works))
        rows: list[int] = []
        at = 0
        for i, work in enumerate(plan.works):
            is_live = work.seq.status is not Status.FINISHED
            if work.score_rows and is_live:
                choices.scores[i] = _score(output.logits[at : at + work.score_rows], work)
            if work.samples and is_live:
                choices.works.append(i)
                rows.append(i if output.by_sequence else at + work.score_rows)
            at += work.num_logits
        if rows:
            seqs = [plan.works[i].seq for i in choices.works]
            self._choose(output, rows, seqs, choices)
        return choices

    def _choose(
        self, output: Output, rows: list[int], seqs: Rows[Sequence], choices: Choices
    ) -> None:
        device = output.logits.device
        ids = _rows(output.best, rows)
        special = [
            i for i, s in enumerate(seqs) if s.params.temperature > 0 or _adjusts(s, self._eos)
        ]
        if special:
            theirs = [seqs[i] for i in special]
            raw = _rows(output.logits, [rows[i] for i in special])
            tokens, problems = self._decide(raw, theirs)
            choices.problems = {choices.works[special[i]]: why for i, why in problems.items()}
            where = _index(special, device)
            ids = ids.index_copy(0, where, tokens)
            self._feed(_index([self._slot(s) for s in theirs], device), tokens)
        choices.reported = [i for i, s in enumerate(seqs) if s.params.logprobs is not None]
        if choices.reported:
            choices.rivals = [seqs[i].params.logprobs or 0 for i in choices.reported]
            raw = _rows(output.logits, [rows[i] for i in choices.reported])
            chosen = _rows(ids, choices.reported).clamp_min(0)
            choices.report = Report(raw, chosen, max(choices.rivals))
        choices.ids = to_host(ids)

    def _decide(self, raw: Tensor, seqs: Rows[Sequence]) -> tuple[Tensor, dict[int, str]]:
        """raw [N, V], one row per sequence -> tokens [N], -1 where logits are not finite, and why a
        row has none, where that is not the logits' fault."""
        logits, problems = raw, {}
        if any(_adjusts(s, self._eos) for s in seqs):
            logits = raw.to(torch.float32, copy=True)
            for row, seq in enumerate(seqs):
                if _adjusts(seq, self._eos):
                    _adjust(logits[row], seq, self._eos)
            problems = self._constrain(logits, seqs)
        return self._draw(logits, *draw_inputs(seqs, logits.shape[1], logits.device)), problems

    def _constrain(self, logits: Tensor, seqs: Rows[Sequence]) -> dict[int, str]:
        """Leaves each row the tokens that its sequence's grammar allows. logits [N, V]

        Returns:
            Why a row has none left, by row.
        """
        rows = [i for i, s in enumerate(seqs) if s.params.grammar is not None]
        if not rows:
            return {}
        if self._grammars is None:
            return dict.fromkeys(rows, "grammar: this engine has no tokenizer")
        device, vocab = logits.device, logits.shape[1]
        masks = torch.zeros(
            len(rows), -(-vocab // 32), dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        problems = self._grammars.write_masks(
            [seqs[i] for i in rows], masks.data_ptr(), masks.shape[1] * masks.itemsize
        )
        banned = _unset(masks, vocab, device)
        if len(rows) == len(seqs):
            logits.masked_fill_(banned, -torch.inf)
        else:
            where = _index(rows, device)
            logits.index_copy_(0, where, logits[where].masked_fill_(banned, -torch.inf))
        return {rows[i]: why for i, why in problems.items()}


def _adjusts(seq: Sequence, eos: tuple[int, ...]) -> bool:
    """Whether anything changes the sequence's logits before the draw."""
    p = seq.params
    return bool(
        p.repetition_penalty != 1
        or ((p.presence_penalty or p.frequency_penalty) and seq.num_output)
        or p.logit_bias
        or p.allowed_token_ids is not None
        or p.bad_token_ids
        or p.grammar is not None
        or (seq.num_output < p.min_tokens and (eos or p.stop_token_ids))
    )


def _adjust(logits: Tensor, seq: Sequence, eos: tuple[int, ...]) -> None:
    """Penalties, biases and masks of one row, in place. logits [V]."""
    p, device = seq.params, logits.device
    if p.repetition_penalty != 1:
        seen = _index(sorted(set(seq.tokens)), device)
        values = logits[seen]
        penalised = torch.where(
            values > 0, values / p.repetition_penalty, values * p.repetition_penalty
        )
        logits[seen] = penalised
    output = seq.tokens[seq.prompt_len :]
    if output and (p.presence_penalty or p.frequency_penalty):
        ids, counts = torch.tensor(output).unique(return_counts=True)
        penalties = p.presence_penalty + p.frequency_penalty * counts
        logits[ids.to(device, non_blocking=True)] -= penalties.to(device, non_blocking=True)
    if p.logit_bias:
        biases = torch.tensor(list(p.logit_bias.values()), dtype=torch.float32)
        logits[_index(list(p.logit_bias), device)] += biases.to(device, non_blocking=True)
    if p.allowed_token_ids is not None:
        allowed = _index(p.allowed_token_ids, device)
        kept = logits[allowed]
        logits.fill_(-torch.inf)
        logits[allowed] = kept
    banned = [
        bad[-1]
        for bad in p.bad_token_ids
        if len(bad) - 1 <= len(output) and list(bad[:-1]) == output[len(output) - len(bad) + 1 :]
    ]
    if seq.num_output < p.min_tokens:
        banned += [*eos, *p.stop_token_ids]
    if banned:
        logits[_index(banned, device)] = -torch.inf


def _unset(masks: Tensor, count: int, device: torch.device) -> Tensor:
    """Which of the first `count` bits are 0. masks [N, W] int32 on the host -> [N, count] bool."""
    if device.type == "cpu":
        octets = ~masks.numpy().view(np.uint8)
        bits = np.unpackbits(octets, axis=1, count=count, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool)
    bits = masks.to(device, non_blocking=True)[:, :, None] >> torch.arange(32, device=device)
    return (bits & 1).flatten(1)[:, :count] == 0


def _index(values: Rows[int], device: torch.device) -> Tensor:
    """[N] int64 on the device, without waiting for it."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def _rows(values: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor."""
    if rows == list(range(len(values))):
        return values
    if rows == list(range(len(rows))):
        return values[: len(rows)]
    return values[_index(rows, values.device)]


def _score(logits: Tensor, work: Work) -> Report:
    """Log-probabilities of the prompt tokens after each row. logits [n, V]."""
    seq, first = work.seq, work.start + work.score_from + 1
    targets = _index(seq.tokens[first : first + work.score_rows], logits.device)
    return Report(logits, targets, seq.params.prompt_logprobs or 0)
