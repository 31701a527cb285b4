"""Fitting of networks that compare patches with those of normal images: components of patch features, and a core set of patches.

Roth et al. 2021 (arXiv:2106.08265), section 3.2: the patches to keep are chosen greedily, each time the one that is farthest from those
chosen before (k-center), so that every patch is near to one that is kept. Here they are chosen among a random sample of all patches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fieldguide.core.errors import TrainingError

if TYPE_CHECKING:
    from fieldguide.training.solvers import Problem, Solution

SAMPLED_PATCHES = 20_000  # of all training images, among which the core set is chosen


@torch.no_grad()
def fit_memory(problem: Problem) -> Solution:
    """Fit the components and the memory of a network. Raises `TrainingError` without any patch."""
    from fieldguide.training.solvers import Solution

    start: Any = problem.network if problem.network is not None else problem.card.make(problem.config)
    start.eval()
    sample, count = sample_patches(problem, start)
    if not len(sample):
        raise TrainingError(f"{problem.card.name}: the training images hold no patch.")
    mean, basis, fraction = find_components(sample, start.basis.shape[1])
    rows = choose_core_set((sample - mean) @ basis, problem.config.memory, problem.seed)
    network: Any = problem.card.make(replace(problem.config, memory=len(rows)))
    kept = {name: tensor for name, tensor in start.state_dict().items() if name not in ("mean", "basis", "memory")}
    network.load_state_dict({**kept, "mean": mean, "basis": basis, "memory": rows})
    network.eval()
    chosen = (
        f"{len(rows):,} of {count:,} patches of {len(problem.train):,} images; {basis.shape[1]} components hold "
        f"{100 * fraction:.0f} % of the variance"
    )
    return Solution(network, problem.score(network), chosen)


def sample_patches(problem: Problem, network: Any) -> tuple[Tensor, int]:
    """Return random patches, as many of each training image (N F), and the number of all patches."""
    from fieldguide.training.solvers import iterate_rows

    generator = torch.Generator().manual_seed(problem.seed)
    each, found, count = -(-SAMPLED_PATCHES // max(1, len(problem.train))), [], 0
    for batch in iterate_rows(problem, problem.train):
        for image in batch[problem.card.inputs[0]].split(8):
            features = network.describe(image).flatten(2).mT  # B hw F
            count += features.shape[0] * features.shape[1]
            for row in features:
                found.append(row[torch.randperm(len(row), generator=generator)[:each]])
    return (torch.cat(found) if found else torch.empty(0, len(network.mean))), count


def find_components(sample: Tensor, dims: int) -> tuple[Tensor, Tensor, float]:  # N F -> F, F D, fraction of the variance
    """Return the mean, the principal components with the largest variances, and the fraction of the variance that they hold."""
    mean = sample.double().mean(0)
    centered = sample.double() - mean
    variance, vectors = torch.linalg.eigh(centered.T @ centered / len(sample))  # in ascending order
    vectors = vectors[:, -dims:].flip(1)
    sign = torch.where(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)  # 1 D
    fraction = float(variance[-dims:].sum() / variance.sum().clamp(min=1e-12))
    return mean.to(sample.dtype), (vectors * sign).to(sample.dtype), fraction


def choose_core_set(x: Tensor, most: int, seed: int) -> Tensor:  # N D -> M D
    """Return at most `most` rows, each the farthest from those before it. Equal rows are kept once."""
    first = int(torch.randint(len(x), (), generator=torch.Generator().manual_seed(seed)))
    chosen, norms = [first], x.square().sum(1)
    nearest = x.new_full((len(x),), float("inf"))
    while True:
        latest = chosen[-1]
        nearest = torch.minimum(nearest, (norms - 2 * x @ x[latest] + norms[latest]).clamp(min=0))
        nearest[latest] = 0
        farthest = int(nearest.argmax())
        if len(chosen) >= most or nearest[farthest] <= 0:
            return x[chosen]
        chosen.append(farthest)
