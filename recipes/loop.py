"""The training loop: batches from token arrays, losses, schedule, progress, curve, resuming.

Knows nothing of where convolutions stand; what is trained is whatever parameters it is given.
"""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from conv_model import ConvModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    steps: int
    batch: int
    """Sequences per step."""
    length: int
    """Tokens of a sequence."""
    lr: float
    warmup: int = 30
    weight_decay: float = 0.0
    seed: int = 0
    seconds: float = 0.0
    """Stop after this long, the rate decayed as if the steps had been done; 0: never."""
    save_every: int = 500


class Windows:
    """Random windows of one long array of token ids; each seed gives the same order of windows."""

    def __init__(self, ids: Tensor, length: int, seed: int) -> None:
        self._ids, self._length = ids, length
        self.generator = torch.Generator().manual_seed(seed)
        if len(ids) <= length + 1:
            raise ValueError(f"{len(ids)} tokens are too few for windows of {length}")

    def take(self, count: int) -> Tensor:
        """[count, length + 1] int64, on the array's device."""
        last = len(self._ids) - self._length - 1
        starts = torch.randint(last, (count, 1), generator=self.generator)
        index = starts + torch.arange(self._length + 1)
        return self._ids[index.to(self._ids.device, non_blocking=True)].long()


def read_ids(path: Path, device: torch.device) -> Tensor:
    """A .npy array of token ids, on the device as int32."""
    return torch.from_numpy(np.load(path).astype(np.int32)).to(device)


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of next tokens, in float32. hidden [B, T, H], targets [B, T]; -1: none."""
    logits = F.linear(hidden, head.to(hidden.dtype)).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)


def head_divergence(hidden: Tensor, other: Tensor, head: Tensor) -> Tensor:
    """Mean KL divergence of the predictions from `hidden` from those of `other` (the truth)."""
    new = F.linear(hidden, head.to(hidden.dtype)).flatten(0, 1).float().log_softmax(-1)
    old = F.linear(other, head.to(other.dtype)).flatten(0, 1).float().log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1).mean()


def head_of(model: ConvModel) -> Tensor:
    """The output projection [vocab, hidden]."""
    return model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight


def compile_parts(model: ConvModel) -> None:
    """Compiles one layer, shared by all: a whole deep model takes minutes."""
    for layer in model.model.layers:
        layer.compile(dynamic=False)


@torch.compiler.set_stance("force_eager")  # a few batches are sooner done than compiled
@torch.no_grad()
def mean_loss(
    model: ConvModel,
    ids: Tensor,
    length: int,
    windows: int,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 16,
) -> float:
    """Mean cross entropy (nats) over windows spread evenly over `ids`, each from no context."""
    count = min(windows, (len(ids) - 1) // length)
    starts = torch.linspace(0, len(ids) - length - 1, count).long()[:, None]
    rows = ids[(starts + torch.arange(length + 1)).to(ids.device)].long()
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    for chunk in rows.split(batch):
        hidden = model(chunk[:, :-1], dtype)
        total += head_loss(hidden, head_of(model), chunk[:, 1:]).double() * len(chunk)
    return float(total / count)


def train(
    model: ConvModel,
    parameters: list[nn.Parameter],
    plan: Plan,
    loss_of: Callable[[], Tensor],
    generators: list[torch.Generator],
    out: Path,
    watch: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Runs AdamW over `loss_of` with warm-up and linear decay to zero.

    Args:
        loss_of: draws a batch and returns its loss.
        generators: of the batches; kept in the checkpoint so that a resumed run goes on as it was.
        out: gets `curve.csv`, `curve.png` if matplotlib is there, and `checkpoint.pt` meanwhile; a
            checkpoint found there is resumed.
        watch: an evaluation to add to the curve ten times on the way.

    Returns:
        steps, tokens, seconds, tokens_per_second (compilation left out), final loss.
    """
    out.mkdir(parents=True, exist_ok=True)
    fused = parameters[0].is_cuda
    optimiser = torch.optim.AdamW(
        parameters, plan.lr, betas=(0.9, 0.95), weight_decay=plan.weight_decay, fused=fused
    )
    checkpoint = out / "checkpoint.pt"
    first, rows = 0, []
    if checkpoint.exists():
        first, rows = _restore(checkpoint, parameters, optimiser, generators)
    begun = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
    settled, settled_at = first, begun
    losses: list[Tensor] = []
    step = first
    for step in _progress(range(first, plan.steps), out.name):
        elapsed = time.monotonic() - begun
        done = max(step / plan.steps, elapsed / plan.seconds if plan.seconds else 0.0)
        if done >= 1:
            break
        rate = plan.lr * min((step + 1) / plan.warmup, 1.0) * (1 - done)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step - first == 4:  # compilation is behind
            float(loss.detach())
            settled, settled_at = step, time.monotonic()
        if (step + 1) % max(plan.steps // 100, 1) == 0 or step + 1 == plan.steps:
            row = {
                "step": step + 1,
                "tokens": (step + 1) * plan.batch * plan.length,
                "loss": float(torch.stack(losses).mean()),
                "lr": rate,
                "seconds": time.monotonic() - begun,
            }
            losses.clear()
            if watch is not None and (step + 1) % max(plan.steps // 10, 1) == 0:
                row["held_out"] = watch()
            rows.append(row)
            _write_rows(rows, out)
        if (step + 1) % plan.save_every == 0:
            _keep(checkpoint, step + 1, rows, parameters, optimiser, generators)
    if fused:
        torch.cuda.synchronize()
    ended = time.monotonic()
    write_curve(rows, out)
    checkpoint.unlink(missing_ok=True)
    taken = rows[-1]["step"] if rows else first
    return {
        "steps": taken,
        "tokens": taken * plan.batch * plan.length,
        "seconds": round(ended - begun, 2),
        "tokens_per_second": round(
            (step - settled) * plan.batch * plan.length / max(ended - settled_at, 1e-9)
        ),
        "train_loss": rows[-1]["loss"] if rows else math.nan,
    }


@torch.no_grad()
def round_to(dtype: torch.dtype, parameters: Iterable[Tensor]) -> None:
    """Rounds parameters to what is saved, so that figures are those of the saved model."""
    for parameter in parameters:
        parameter.copy_(parameter.to(dtype))


def write_curve(rows: list[dict[str, float]], out: Path) -> None:
    """curve.csv, and curve.png where matplotlib is installed."""
    if not rows:
        return
    _write_rows(rows, out)
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([r["tokens"] for r in rows], [r["loss"] for r in rows], label="training")
    held = [r for r in rows if "held_out" in r]
    axes.plot([r["tokens"] for r in held], [r["held_out"] for r in held], "o-", label="held out")
    axes.set(xlabel="tokens", ylabel="nats per token", title=out.name)
    axes.legend()
    figure.savefig(out / "curve.png", dpi=120)
    plt.close(figure)


def _write_rows(rows: list[dict[str, float]], out: Path) -> None:
    with (out / "curve.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["step", "tokens", "loss", "lr", "seconds", "held_out"])
        writer.writeheader()
        writer.writerows(rows)


def write_result(out: Path, **result: Any) -> None:
    """result.json, and one line for whoever watches."""
    (out / "result.json").write_text(json.dumps(result, indent=1, default=str))
    shown = {name: value for name, value in result.items() if name != "arguments"}
    print(json.dumps(shown, default=str), flush=True)


def _progress(steps: range, name: str) -> Iterator[int]:
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield from bar.track(steps)


def _keep(
    path: Path,
    step: int,
    rows: list[dict[str, float]],
    parameters: list[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    generators: list[torch.Generator],
) -> None:
    state = {
        "step": step,
        "rows": rows,
        "parameters": [p.detach() for p in parameters],
        "optimiser": optimiser.state_dict(),
        "generators": [g.get_state() for g in generators],
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(path)  # whole or not at all


def _restore(
    path: Path,
    parameters: list[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    generators: list[torch.Generator],
) -> tuple[int, list[dict[str, float]]]:
    state = torch.load(path, map_location=parameters[0].device, weights_only=True)
    with torch.no_grad():
        for parameter, kept in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(kept)
    optimiser.load_state_dict(state["optimiser"])
    for generator, kept in zip(generators, state["generators"], strict=True):
        generator.set_state(kept.cpu())
    return state["step"], state["rows"]
