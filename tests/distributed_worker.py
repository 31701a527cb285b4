"""Started by `torchrun` in test_distributed: train with SGD in every process and store the weights of the first.

Arguments: the file to write, and `gan` for two phases.
"""

from __future__ import annotations

import sys

import torch

from fieldguide.core import distributed
from test_loop import digits, gan, line, regression, trainer, weights


def main(path: str, kind: str) -> None:
    torch.set_num_threads(1)
    with distributed.join_process_group():
        objective, batches = (gan(), digits()[1]) if kind == "gan" else (regression(), line())
        objective = objective.double()
        double = type(batches)(len(batches), lambda i, g: {k: t.double() for k, t in batches.make(i, g).items()})
        t = trainer(objective, double, optimizer="sgd", lr=0.1, steps=8, accumulate=2)
        if kind == "gan":
            torch.randn = noise  # the same noise whatever the number of processes
        t.train()
        alike = distributed.gather(weights(objective))
        assert all(torch.equal(alike[0], w) for w in alike), "processes hold different weights"
        if distributed.rank() == 0:
            torch.save({"weights": alike[0], "world": distributed.get_world_size()}, path)


def noise(*size, device=None) -> torch.Tensor:
    return torch.linspace(-1, 1, size[-1], dtype=torch.float64).expand(size)


main(*sys.argv[1:])
