"""Drawing token ids, as plain torch: the specification of `Ops.sample`, and what a CPU runs.

Every filter is a threshold on probability: min-p, top-k and top-p differ in where they put it, and
tokens of equal probability are kept or left out together. Knows nothing of requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-5

CANDIDATES = 1024
"""A top-p set is looked for among this many best tokens before everything is sorted."""


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor
) -> Tensor:
    """See `Ops.sample`."""
    best, greedy = logits.max(dim=-1)
    vocab = logits.shape[1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs = torch.softmax(wide / temperature.clamp_min(LEAST_TEMPERATURE)[:, None], dim=-1)
    if min_p.any():
        probs = probs.where(probs >= probs.amax(1, keepdim=True) * min_p[:, None], 0)
    limited = (top_k > 0) & (top_k < vocab)
    if limited.any():
        most = int(top_k.where(limited, 1).max())
        ranked = probs.topk(most, dim=-1).values
        least = ranked.gather(1, top_k.where(limited, 1).long()[:, None] - 1)
        probs = probs.where((probs >= least) | ~limited[:, None], 0)
    if (top_p < 1).any():
        least = _nucleus(probs, top_p[:, None])
        probs = probs.where((probs >= least) | (top_p >= 1)[:, None], 0)
    ids = _invert(probs, u)
    return torch.where(torch.isfinite(best), torch.where(temperature > 0, ids, greedy), -1)


def _nucleus(probs: Tensor, share: Tensor) -> Tensor:
    """The least probability such that what is more probable makes up less than a share.

    probs [N, V], share [N, 1] -> [N, 1].
    """
    vocab = probs.shape[1]
    target = share * probs.sum(1, keepdim=True)
    ranked, last = _below(probs, target, min(CANDIDATES, vocab))
    if (last == ranked.shape[1] - 1).any():
        ranked, last = _below(probs, target, vocab)
    return ranked.gather(1, last.clamp_min(0))


def _below(probs: Tensor, target: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best, and the place of the last before which there is less than a target."""
    ranked = probs.topk(count, dim=-1).values
    return ranked, (ranked.cumsum(1) - ranked < target).sum(1, keepdim=True) - 1


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds u times the total. weights [N, V], u [N]."""
    cumulative = weights.double().cumsum(1)
    index = (cumulative <= (u * cumulative[:, -1])[:, None]).sum(1)
    # u < 1, but its product may round up to the total: the last token with any weight, then.
    last = weights.shape[1] - 1 - (weights > 0).flip(1).int().argmax(1)
    return torch.minimum(index, last)
