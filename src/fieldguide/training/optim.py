"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from fieldguide.core.settings import Settings
from fieldguide.training.peft import get_layer_depths, get_tower_prefixes
from fieldguide.training.precision import multiplies_bfloat16
from fieldguide.training.row_adagrad import RATE_FACTOR, RowwiseAdagrad, make_gradients_sparse


def get_lr_factor(settings: Settings, step: int) -> float:
    """Return the learning rate of a step relative to the peak: linear warm-up, then constant, cosine or linear decay."""
    steps = settings.resolved_steps
    warm = max(1, round(settings.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done


def get_embedding_ids(objective: nn.Module) -> set[int]:
    """Return the ids of the embedding weights, which get neither weight decay nor Muon."""
    return {id(m.weight) for m in objective.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}


def build_optimizers(
    objective: nn.Module, parameters: Iterable[tuple[str, nn.Parameter]], settings: Settings
) -> list[torch.optim.Optimizer]:
    """Return the optimizer(s) of one phase.

    Weight decay applies to matrices and kernels, not to vectors, norms and embeddings. `scale` of a parameter group is its
    factor of the learning rate: below 1 in lower layers if `layer_decay` is below 1. With `embedding_optimizer=adagrad`, tables that
    are only looked up get sparse gradients and an optimizer of their own.
    """
    tables = get_embedding_ids(objective)
    parameters = list(parameters)
    optimizers: list[torch.optim.Optimizer] = []
    if settings.embedding_optimizer == "adagrad":
        sparse = make_gradients_sparse(objective)
        rows = {"params": [p for _, p in parameters if id(p) in sparse], "scale": RATE_FACTOR}
        parameters = [(name, p) for name, p in parameters if id(p) not in sparse]
        optimizers.append(RowwiseAdagrad([rows], lr=settings.lr))
    depth, top = get_layer_depths((name for name, _ in parameters), get_tower_prefixes(objective))
    parts: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in parameters:
        scale = settings.layer_decay ** (top - depth[name]) if settings.layer_decay != 1 else 1.0
        parts.setdefault((scale, p.ndim >= 2 and id(p) not in tables), []).append(p)
    groups = [
        {"params": ps, "weight_decay": settings.weight_decay if matrices else 0.0, "scale": scale, "matrices": matrices}
        for (scale, matrices), ps in sorted(parts.items(), key=lambda part: (-part[0][0], not part[0][1]))
    ]
    if settings.optimizer == "sgd":
        plain = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0, fused=True)
        return [*optimizers, plain]
    matrices = [g for g in groups if g["matrices"]]
    if settings.optimizer == "muon" and matrices:
        optimizers.append(Muon(matrices, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay))
        groups = [g for g in groups if not g["matrices"]]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Muon: momentum with orthogonalized updates (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Kernels are reshaped to matrices out x (in * height * width). The update is scaled by 0.2 sqrt(max(rows, columns)), so
    that its magnitude matches AdamW's and the same learning rate suits both (Liu et al. 2025, arXiv:2502.16982, eq. 4).
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("momentum", torch.zeros_like(p))
                    by_shape.setdefault(tuple(p.flatten(1).shape), []).append(p)
            for (rows, columns), same in by_shape.items():
                grads, moments = [p.grad for p in same if p.grad is not None], [self.state[p]["momentum"] for p in same]
                torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, moments, group["momentum"])
                update = orthogonalize(torch.stack([u.flatten(1) for u in nesterov]))
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                scale = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
                torch._foreach_add_(same, [u.view_as(p).to(p.dtype) for u, p in zip(update, same)], alpha=-scale)


A, B, C = 3.4445, -4.7750, 2.0315  # coefficients of a x + b x^3 + c x^5, which each iteration applies to the singular values


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:  # N R C -> N R C
    """Return approximately the nearest semi-orthogonal matrices, by the quintic Newton-Schulz iteration of Muon.

    `dtype` is that of the products: by default bfloat16 where the device multiplies it faster (two to four times on CPUs that
    can), else float32. For elongated matrices in float32 the factor of x, a polynomial of x x^T, is iterated instead of x, because
    this needs only R x R products and gives the same result. In bfloat16 the squares of small singular values would be lost.
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrices.is_cuda or multiplies_bfloat16() else torch.float32
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.shape[-1] >= MIN_ASPECT_RATIO_FOR_GRAM * x.shape[-2] and x.dtype == torch.float32:
        gram, whole = x @ x.mT, None
        for step in range(steps):
            factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
            factor.diagonal(dim1=-2, dim2=-1).add_(A)
            whole = factor if whole is None else factor @ whole
            if step < steps - 1:
                gram = gram @ (factor @ factor)
        x = whole @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


MIN_ASPECT_RATIO_FOR_GRAM = 2  # columns per row from which iterating x x^T is cheaper


def measure_orthogonalization_seconds(objective: nn.Module, device: torch.device) -> float:
    """Estimate the seconds per step that Muon takes for its updates, by timing one matrix of each shape."""
    tables = get_embedding_ids(objective)
    shapes = Counter(
        tuple(p.flatten(1).shape) for p in objective.parameters() if p.requires_grad and p.ndim >= 2 and id(p) not in tables
    )
    total = 0.0
    for shape, count in shapes.items():
        matrix = torch.ones(1, *shape, device=device)
        for _ in range(2):  # the first run is a warm-up
            started = time.perf_counter()
            orthogonalize(matrix)
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - started
        total += count * taken
    return total
