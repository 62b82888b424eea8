"""Fitting of a TopK SAE to residual activations held in memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from qscope_monitor.kernels.sparse_decode import sparse_decode
from qscope_monitor.kernels.topk_encode import topk_encode
from qscope_monitor.sae.formats import CheckpointError, replace_file
from qscope_monitor.sae.topk_sae import TopKSAE

__all__ = ["TrainingReport", "fit_sae"]

AUX_WEIGHT = 1 / 32  # Gao et al. 2024 (arXiv 2406.04093), appendix A.2
OUTLIER = 6.0
# Short runs are the rule here: a short warm-up, a high peak and small batches use the few steps best.
_PEAK = 0.03
_WARMUP_SHARE, _WARMUP_STEPS = 0.05, 1000
_DECAY_SHARE = 0.3
_SAVE_SECONDS = 60.0
_CHUNK = 8192


@dataclass(frozen=True)
class TrainingReport:
    """How a fit went, measured on held-out tokens.

    Attributes:
        explained_variance: 1 - FVU; 1 is perfect, 0 no better than the mean.
        dead: share of features that are active on no held-out token.
        l0: mean number of active features per token; below k where tokens have fewer than k positives.
        steps: optimiser steps.
        seconds: of fitting, without collecting activations; over all sessions of a resumed run.
        tokens: training tokens per epoch.
        held_out: tokens measured on.
        dropped: tokens left out as not finite or with a norm above 6 times the median.
        scale: root mean square deviation of a coordinate, divided out while fitting and folded back at the end.
    """

    explained_variance: float
    dead: float
    l0: float
    steps: int
    seconds: float
    tokens: int
    held_out: int
    dropped: int
    scale: float


def fit_sae(
    activations: Tensor,
    held_out: Tensor,
    *,
    d_sae: int,
    k: int,
    epochs: float = 3,
    batch_size: int = 1024,
    lr: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    init: TopKSAE | None = None,
    state_file: Path | None = None,
    progress: bool = True,
    layer: int | None = None,
) -> tuple[TopKSAE, TrainingReport]:
    """Fit a TopK SAE: minimise the squared error of decode(encode(x)), plus 1/32 of AuxK for dead features.

    Loss on standardised activations: `mean((x - x_hat)^2) + 1/32 * mean((e - e_hat)^2) / mean(e^2)` with
    `e = x - x_hat` held constant and `e_hat` the decode of the largest d_model / 2 pre-activations among the features
    that have been silent for half an epoch (Gao et al. 2024, appendix A.2). Adam; decoder columns keep their norm (1,
    or what `init` had). Tokens that are not finite or with a norm above 6 times the median are left out.

    Args:
        activations: `[tokens, d_model]`, fp32 or 16-bit, on any device; indexed batch by batch, never copied whole.
        held_out: `[tokens, d_model]`, what the report is measured on.
        d_sae: number of features; ignored with `init`.
        k: activations kept per token.
        epochs: passes over the activations; may be a fraction.
        batch_size: tokens per step.
        lr: peak learning rate; default `0.03 / sqrt(d_model)`.
        seed: of the initial weights and the order of tokens; the global random state is not touched.
        device: where to compute; default: where the activations are.
        init: SAE to start from.
        state_file: where to keep the state of an unfinished fit, at most once a minute and when interrupted; if it
            is there, the fit goes on from it and ends as if it had not been interrupted.
        progress: whether to show a bar.
        layer: noted in the result.

    Raises:
        ValueError: if shapes, k or sizes do not fit, or too few usable tokens are left.
        CheckpointError: if `state_file` is damaged or of another fit.
    """
    device = torch.device(activations.device if device is None else device)
    d_model = activations.shape[-1]
    if activations.ndim != 2 or held_out.ndim != 2 or held_out.shape[1] != d_model:
        raise ValueError(
            f"activations and held_out must be [tokens, d_model], got {tuple(activations.shape)} and "
            f"{tuple(held_out.shape)}"
        )
    if init is not None:
        d_sae = init.d_sae
        if init.d_model != d_model:
            raise ValueError(f"init has d_model {init.d_model}, but the activations are {d_model} wide")
    if not 1 <= k <= d_sae:
        raise ValueError(f"k must be between 1 and d_sae = {d_sae}, got {k}")
    if epochs <= 0 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be positive, got {epochs} and {batch_size}")
    rows, limit = _usable(activations)
    held, _ = _usable(held_out, limit)
    if len(rows) < 2 or len(held) < 2:
        raise ValueError(f"only {len(rows)} training and {len(held)} held-out tokens are usable; pass more text")
    dropped = len(activations) - len(rows) + len(held_out) - len(held)
    mean, scale = _moments(activations, rows)
    lr = _PEAK / math.sqrt(d_model) if lr is None else lr
    batch_size = min(batch_size, len(rows))
    steps = max(1, int(epochs * (len(rows) // batch_size)))
    identity = {
        "d_model": d_model, "d_sae": d_sae, "k": k, "steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed,
        "tokens": len(rows), "scale": scale, "init": None if init is None else float(init.W_enc.double().sum()),
    }  # fmt: skip
    fit = _Fit(mean, scale, d_sae, k, lr, steps, len(rows), batch_size, seed, device, init)
    seconds = fit.load(state_file, identity) if state_file is not None and state_file.exists() else 0.0
    started = saved = time.monotonic()
    bar = tqdm(
        total=steps, initial=fit.step, disable=not progress, desc="SAE" if layer is None else f"SAE layer {layer}"
    )
    try:
        for index in _batches(len(rows), batch_size, fit.step, steps, seed):
            batch = activations[rows[index].to(activations.device)].to(device, torch.float32)
            loss, dead = fit.update(batch)
            bar.update()
            if fit.step % 20 == 0:
                bar.set_postfix(ev=f"{1 - float(loss):.3f}", dead=dead)
            if state_file is not None and time.monotonic() - saved > _SAVE_SECONDS:
                saved = time.monotonic()
                fit.save(state_file, identity, seconds + saved - started)
    except BaseException:
        if state_file is not None:
            fit.save(state_file, identity, seconds + time.monotonic() - started)
        raise
    finally:
        bar.close()
    seconds += time.monotonic() - started
    sae = fit.result(layer)
    report = _measure(
        sae, held_out, held, steps=fit.step, seconds=seconds, tokens=len(rows), dropped=dropped, scale=scale
    )
    return TopKSAE(
        sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, k, layer, "trained here", {"training": asdict(report)}
    ), report


class _Fit:
    """Parameters, optimiser and counters, in units where activations have mean square deviation 1."""

    def __init__(
        self,
        mean: Tensor,
        scale: float,
        d_sae: int,
        k: int,
        lr: float,
        steps: int,
        tokens: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        init: TopKSAE | None,
    ) -> None:
        self.scale, self.k, self.lr, self.steps = scale, k, lr, steps
        self.step = self.seen = 0
        if init is None:
            generator = torch.Generator().manual_seed(seed)
            W_dec = torch.randn(d_sae, len(mean), generator=generator)
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            # encoder and decoder start parallel, so that a feature reconstructs what makes it fire
            W_enc, b_dec = W_dec.clone(), mean / scale
            b_enc = -(W_enc @ b_dec)
        else:
            W_enc, W_dec, b_enc, b_dec = (w.float() for w in (init.W_enc, init.W_dec.T, init.b_enc, init.b_dec))
            b_enc, b_dec = b_enc / scale, b_dec / scale
        parts = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        self.params = {n: p.to(device).contiguous().clone().requires_grad_() for n, p in parts.items()}
        self.norms = self.params["W_dec"].detach().norm(dim=1, keepdim=True)  # [d_sae, 1]
        self.optimizer = torch.optim.Adam(self.params.values(), lr=lr, fused=device.type in ("cpu", "cuda"))
        self.last_active = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.dead_after = min(10_000_000, max(tokens // 2, 8 * batch_size))
        self.aux_k = max(1, len(mean) // 2)

    def update(self, batch: Tensor) -> tuple[Tensor, int]:
        """One optimiser step on `[batch, d_model]`; returns the FVU of the batch and the number of dead features."""
        W_enc, b_enc, W_dec, b_dec = self.params.values()
        x = batch / self.scale
        acts = topk_encode(x, W_enc, b_enc, self.k)
        error = x - sparse_decode(acts.values, acts.indices, W_dec.T, b_dec)
        loss = error.square().mean()
        self.seen += len(x)
        self.last_active[acts.indices[acts.active]] = self.seen
        dead = (self.seen - self.last_active > self.dead_after).nonzero().squeeze(1)
        total = loss
        if len(dead):
            target = error.detach()
            aux = topk_encode(x, W_enc[dead], b_enc[dead], min(self.aux_k, len(dead)))
            guess = sparse_decode(aux.values, aux.indices, W_dec[dead].T, torch.zeros_like(b_dec))
            total = loss + AUX_WEIGHT * (guess - target).square().mean() / target.square().mean().clamp(min=1e-12)
        warmup = max(1.0, min(_WARMUP_STEPS, _WARMUP_SHARE * self.steps))
        left = (self.steps - self.step) / (_DECAY_SHARE * self.steps)
        self.optimizer.param_groups[0]["lr"] = self.lr * min(1.0, (self.step + 1) / warmup, left)
        self.optimizer.zero_grad()
        total.backward()
        with torch.no_grad():
            unit = W_dec / self.norms
            assert W_dec.grad is not None
            # along a column the gradient only asks for a longer column, which the renormalisation takes back
            W_dec.grad -= (W_dec.grad * unit).sum(1, keepdim=True) * unit
            self.optimizer.step()
            W_dec *= self.norms / W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
        self.step += 1
        return loss.detach(), len(dead)

    def result(self, layer: int | None) -> TopKSAE:
        """Fold the scale back: x divided and x_hat multiplied by s leave the matrices and multiply the biases."""
        W_enc, b_enc, W_dec, b_dec = (p.detach().clone() for p in self.params.values())
        return TopKSAE(W_enc, W_dec.T, b_enc * self.scale, b_dec * self.scale, self.k, layer)

    def save(self, path: Path, identity: dict[str, Any], seconds: float) -> None:
        """Keep everything a later session needs."""
        state = {
            "identity": identity, "seconds": seconds, "step": self.step, "seen": self.seen,
            "last_active": self.last_active, "params": {n: p.detach() for n, p in self.params.items()},
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        replace_file(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: Path, identity: dict[str, Any]) -> float:
        """Go on from `path`; returns the seconds already spent."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state["identity"]
        except Exception as error:
            raise CheckpointError(
                f"{path}: not readable as the state of a fit ({error}); delete it to start over"
            ) from error
        differ = [n for n in identity if n != "scale" and found.get(n) != identity[n]]
        # the activations themselves may differ in their last bits from one session to the next
        if not math.isclose(found["scale"], identity["scale"], rel_tol=1e-3):
            differ.append("scale")
        if differ:
            listed = ", ".join(f"{n} {found.get(n)} (now {identity[n]})" for n in differ)
            raise CheckpointError(
                f"{path}: state of another fit, with {listed}; use another checkpoint_dir or delete it"
            )
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(state["params"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.last_active.copy_(state["last_active"])
        self.step, self.seen = state["step"], state["seen"]
        return float(state["seconds"])


def _batches(tokens: int, batch_size: int, first: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Shuffled row numbers from step `first` on; every epoch's order follows from the seed and its number alone."""
    per_epoch = tokens // batch_size
    order, epoch = torch.empty(0), -1
    for step in range(first, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch + 1))
        start = step % per_epoch * batch_size
        yield order[start : start + batch_size]


def _usable(activations: Tensor, limit: float | None = None) -> tuple[Tensor, float]:
    """Rows that are finite and within the norm limit, by default 6 times the median, on the CPU."""
    norms = torch.cat([part.float().norm(dim=1).cpu() for part in activations.split(_CHUNK)] or [torch.empty(0)])
    finite = torch.isfinite(norms)
    if limit is None:
        limit = OUTLIER * float(norms[finite].median()) if finite.any() else 0.0
    return (finite & (norms <= limit)).nonzero().squeeze(1), limit


def _moments(activations: Tensor, rows: Tensor) -> tuple[Tensor, float]:
    """Mean `[d_model]` and root mean square deviation of a coordinate, summed in fp64."""
    parts = [part.to(activations.device) for part in rows.split(_CHUNK)]
    total = torch.stack([activations[part].double().sum(0) for part in parts]).sum(0)
    mean = total / len(rows)
    square = sum(float((activations[part].double() - mean).square().sum()) for part in parts)
    scale = math.sqrt(square / (len(rows) * len(mean)))
    if scale == 0:
        raise ValueError("all activations are equal; there is nothing to fit")
    return mean.float().cpu(), scale


def _measure(
    sae: TopKSAE, held_out: Tensor, rows: Tensor, *, steps: int, seconds: float, tokens: int, dropped: int, scale: float
) -> TrainingReport:
    x = held_out[rows.to(held_out.device)].to(sae.device, torch.float32)
    counts = torch.zeros(sae.d_sae, dtype=torch.int64)
    with torch.no_grad():
        for part in x.split(_CHUNK):
            acts = sae.encode(part)
            counts += torch.bincount(acts.indices[acts.active].cpu(), minlength=sae.d_sae)
        fvu = sae.fvu(x)
    return TrainingReport(
        explained_variance=1 - fvu,
        dead=float((counts == 0).double().mean()),
        l0=float(counts.sum()) / len(x),
        steps=steps,
        seconds=seconds,
        tokens=tokens,
        held_out=len(x),
        dropped=dropped,
        scale=scale,
    )
