"""From logits to tokens: penalties, masks, temperature, filters, and the draw.

Rows are independent of each other. A draw is the inverse of the cumulative distribution at one
uniform number, which is a hash of (seed, choice, position): the same request draws the same numbers
whatever else is in the batch, and in whatever step its turn comes.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .messages import Logprobs
from .plan import Sampled

if TYPE_CHECKING:
    from collections.abc import Sequence as Rows

    from .messages import SamplingParams
    from .plan import StepPlan, Work
    from .sequence import Sequence

CANDIDATES = 1024
"""A top-p set is looked for among this many best tokens before everything is sorted."""


class Sampler:
    """Chooses the next token of every work that samples, and scores prompt rows."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos = eos_token_ids

    def sample(self, logits: Tensor, plan: StepPlan) -> list[Sampled]:
        """One result per work of the plan, in order.

        Args:
            logits: [L, V], the rows that the plan's works asked for, in order.
        """
        results: list[Sampled] = [Sampled()] * len(plan.works)
        scored: dict[int, tuple[Logprobs, ...]] = {}
        rows: list[int] = []
        who: list[int] = []
        offset = 0
        for i, work in enumerate(plan.works):
            if work.score_rows:
                scored[i] = _score(logits[offset : offset + work.score_rows], work)
            if work.samples:
                rows.append(offset + work.score_rows)
                who.append(i)
            offset += work.num_logits
        if rows:
            chosen = logits if len(rows) == len(logits) else logits[rows]
            seqs = [plan.works[i].seq for i in who]
            for i, result in zip(who, self._choose(chosen, seqs), strict=True):
                results[i] = result
        for i, entries in scored.items():
            r = results[i]
            results[i] = Sampled(r.token_id, r.logprobs, entries, r.is_broken)
        return results

    def _choose(self, raw: Tensor, seqs: Rows[Sequence]) -> list[Sampled]:
        """raw [N, V], one row per sequence, in the dtype the model computes in."""
        logits = raw
        if any(_adjusts(s, self._eos) for s in seqs):
            logits = raw.to(torch.float32, copy=True)
            for row, seq in enumerate(seqs):
                if _adjusts(seq, self._eos):
                    _adjust(logits[row], seq, self._eos)
        best, tokens = logits.max(dim=-1)
        drawn = [i for i, s in enumerate(seqs) if s.params.temperature > 0]
        if drawn:
            rows = logits if len(drawn) == len(seqs) else logits[drawn]
            tokens[drawn] = _draw(rows.float(), [seqs[i] for i in drawn])
        # One transfer from the device: the tokens, and -1 where the logits were not finite.
        ids: list[int] = torch.where(torch.isfinite(best), tokens, -1).tolist()
        reports = _logprobs(raw, [max(token, 0) for token in ids], seqs)
        return [
            Sampled(is_broken=True) if token < 0 else Sampled(token, reports.get(i))
            for i, token in enumerate(ids)
        ]


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed, the choice and the position alone."""
    data = b"".join(n.to_bytes(8, "little") for n in (seed % 2**64, index, position))
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _adjusts(seq: Sequence, eos: tuple[int, ...]) -> bool:
    """Whether anything changes the sequence's logits before the draw."""
    p = seq.params
    return bool(
        p.repetition_penalty != 1
        or ((p.presence_penalty or p.frequency_penalty) and seq.num_output)
        or p.logit_bias
        or p.allowed_token_ids is not None
        or p.bad_token_ids
        or (seq.num_output < p.min_tokens and (eos or p.stop_token_ids))
    )


def _adjust(logits: Tensor, seq: Sequence, eos: tuple[int, ...]) -> None:
    """Penalties, biases and masks of one row, in place. logits [V]."""
    p = seq.params
    if p.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(seq.tokens)), device=logits.device)
        values = logits[seen]
        penalised = torch.where(
            values > 0, values / p.repetition_penalty, values * p.repetition_penalty
        )
        logits[seen] = penalised
    output = seq.tokens[seq.prompt_len :]
    if output and (p.presence_penalty or p.frequency_penalty):
        ids, counts = torch.tensor(output, device=logits.device).unique(return_counts=True)
        logits[ids] -= p.presence_penalty + p.frequency_penalty * counts
    for token, bias in p.logit_bias.items():
        logits[token] += bias
    if p.allowed_token_ids is not None:
        mask = torch.ones_like(logits, dtype=torch.bool)
        mask[list(p.allowed_token_ids)] = False
        logits.masked_fill_(mask, -torch.inf)
    banned = [
        bad[-1]
        for bad in p.bad_token_ids
        if len(bad) - 1 <= len(output) and list(bad[:-1]) == output[len(output) - len(bad) + 1 :]
    ]
    if seq.num_output < p.min_tokens:
        banned += [*eos, *p.stop_token_ids]
    if banned:
        logits[banned] = -torch.inf


def _draw(logits: Tensor, seqs: Rows[Sequence]) -> Tensor:
    """One token per row at temperature > 0. logits [N, V] -> [N] int64."""
    device = logits.device
    params = [s.params for s in seqs]
    temperature = torch.tensor([max(p.temperature, 1e-5) for p in params], device=device)
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    # At the position that the token will take.
    u = torch.tensor(
        [uniform(s.seed, s.index, len(s.tokens)) for s in seqs],
        dtype=torch.float64,
        device=device,
    )
    vocab = logits.shape[1]
    sorts = [i for i, p in enumerate(params) if p.top_p < 1 or 0 < p.top_k < vocab]
    plain = [i for i in range(len(seqs)) if i not in set(sorts)]
    tokens = torch.empty(len(seqs), dtype=torch.int64, device=device)
    if plain:
        kept = _apply_min_p(probs[plain], [params[i] for i in plain])
        tokens[plain] = _invert(kept, u[plain])
    if sorts:
        values, ids = _filter(probs[sorts], [params[i] for i in sorts])
        picked = _invert(values, u[sorts])
        tokens[sorts] = ids.gather(1, picked[:, None]).squeeze(1)
    return tokens


def _apply_min_p(probs: Tensor, params: Rows[SamplingParams]) -> Tensor:
    if not any(p.min_p for p in params):
        return probs
    least = torch.tensor([p.min_p for p in params], device=probs.device)
    floor = probs.amax(1, keepdim=True) * least[:, None]
    return torch.where(probs >= floor, probs, 0)


def _filter(probs: Tensor, params: Rows[SamplingParams]) -> tuple[Tensor, Tensor]:
    """min-p, then top-k, then top-p of what is left. -> (probabilities, token ids), best first."""
    vocab = probs.shape[1]
    probs = _apply_min_p(probs, params)
    ks = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    ps = [p.top_p for p in params]
    k = torch.tensor(ks, device=probs.device)[:, None]
    p = torch.tensor(ps, dtype=probs.dtype, device=probs.device)[:, None]
    # Rows cut by top-k need no more than k; top-p alone usually ends within the candidates.
    width = min(vocab, max(k if k < vocab else CANDIDATES for k in ks))
    while True:
        values, ids = probs.topk(width, dim=-1)
        values = torch.where(torch.arange(width, device=probs.device) < k, values, 0)
        total = torch.where(k <= width, values.sum(1, keepdim=True), probs.sum(1, keepdim=True))
        before = values.cumsum(1) - values
        if width == vocab or bool(((k <= width) | (before[:, -1:] >= p * total)).all()):
            break
        width = vocab
    values = torch.where(before < p * total, values, 0)
    return values, ids


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds u times the total. weights [N, K], u [N]."""
    cumulative = weights.double().cumsum(1)
    target = u * cumulative[:, -1]
    index = (cumulative <= target[:, None]).sum(1)
    # u < 1, but its product may round up to the total: the last token with any weight, then.
    last = weights.shape[1] - 1 - (weights > 0).flip(1).int().argmax(1)
    return torch.minimum(index, last)


def _logprobs(raw: Tensor, ids: list[int], seqs: Rows[Sequence]) -> dict[int, Logprobs]:
    """Reports of the rows that want them, from the model's own distribution."""
    rows = [i for i, s in enumerate(seqs) if s.params.logprobs is not None]
    if not rows:
        return {}
    wanted = [seqs[i].params.logprobs or 0 for i in rows]
    reports = _report(raw[rows].float().log_softmax(-1), [ids[i] for i in rows], max(wanted))
    return {
        i: Logprobs(r.token_id, r.logprob, r.rank, r.top[:k])
        for i, r, k in zip(rows, reports, wanted, strict=True)
    }


def _score(logits: Tensor, work: Work) -> tuple[Logprobs, ...]:
    """Log-probabilities of the prompt tokens after each row. logits [n, V]."""
    seq, first = work.seq, work.start + work.score_from + 1
    targets = seq.tokens[first : first + work.score_rows]
    return tuple(_report(logits.float().log_softmax(-1), targets, seq.params.prompt_logprobs or 0))


def _report(logprobs: Tensor, ids: list[int], k: int) -> list[Logprobs]:
    """logprobs [N, V] -> one record per row, the token's and its k best rivals' figures alike."""
    index = torch.tensor(ids, device=logprobs.device)[:, None]
    own = logprobs.gather(1, index)
    ranks = (logprobs > own).sum(1) + 1
    values, best = logprobs.topk(k, dim=-1) if k else (logprobs[:, :0], index[:, :0])
    tops = zip(best.tolist(), values.tolist(), strict=True)
    return [
        Logprobs(token, value, rank, tuple(zip(*top, strict=True)))
        for token, value, rank, top in zip(
            ids, own.squeeze(1).tolist(), ranks.tolist(), tops, strict=True
        )
    ]
