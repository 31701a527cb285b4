"""Row-wise Adagrad for tables of embeddings with sparse gradients: a step costs what its rows cost, however long the table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from fieldguide.core import distributed
from fieldguide.core.errors import SettingsError

EPS = 1e-8
RATE_FACTOR = 10.0  # of the rate of the other weights: Adagrad's steps shrink from the start


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one sum per row, of the mean square of its gradient (Gupta et al. 2014, arXiv:1407.4490; DLRM's and FBGEMM's
    `rowwise adagrad`). Gradients are sparse or dense; rows without a gradient do not change.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["sum"] = torch.zeros(len(p), dtype=p.dtype, device=p.device)
                total = state["sum"]
                if not p.grad.is_sparse:
                    total += p.grad.square().mean(1)
                    p -= group["lr"] * p.grad / (total.sqrt() + EPS)[:, None]
                    continue
                grad = p.grad.coalesce()  # a row that occurs twice has one gradient, the sum
                rows, values = grad.indices()[0], grad.values()
                seen = total[rows] + values.square().mean(1)
                total[rows] = seen
                p.index_add_(0, rows, values / (seen.sqrt() + EPS)[:, None], alpha=-group["lr"])


def find_tables(objective: nn.Module) -> list[Any]:
    """Return the tables that are only looked up, so that their gradient may be sparse; see `models.layers.table`."""
    return [module for module in objective.modules() if getattr(module, "is_only_looked_up", False)]


def make_gradients_sparse(objective: nn.Module) -> set[int]:
    """Switch to sparse gradients and return the ids of the weights of the tables.

    Raises `SettingsError` if there are none, and with several processes, which cannot sum sparse gradients on all devices.
    """
    tables = find_tables(objective)
    if not tables:
        raise SettingsError(
            "embedding_optimizer=adagrad: the network has no table of embeddings that is only looked up. "
            "Leave it out, or use a network for tables with categories, such as dlrm."
        )
    if distributed.get_world_size() > 1:
        raise SettingsError("embedding_optimizer=adagrad runs in one process only. Start without torchrun, or leave it out.")
    for table in tables:
        table.sparse = True
    return {id(table.weight) for table in tables}


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale gradients, some of which may be sparse, to a norm of at most `most`. Return the norm before."""
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if not any(grad.is_sparse for grad in grads):
        return nn.utils.clip_grad_norm_(parameters, most)
    values = []
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()  # a row that occurs twice counts once, with the sum
            values.append(p.grad.values())
        elif p.grad is not None:
            values.append(p.grad)
    norm = nn.utils.get_total_norm(values)
    factor = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch does
    for value in values:
        value.mul_(factor)
    return norm
