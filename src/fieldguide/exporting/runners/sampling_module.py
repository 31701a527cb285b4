"""Draw noise and run samplers for run.py."""

import numpy as np


def make_source(noise, name, seed, shape, numbers, *mark):
    """Return a function that draws noise for each number: from the arrays `noise` (row, draw, ...), or by seed and number."""
    if noise is not None:
        return iter(np.moveaxis(noise[name][numbers], 1, 0)).__next__
    streams = [np.random.default_rng([seed, number, *mark]) for number in numbers]
    return lambda: np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams])


def run_sampler(loop, draw, call):
    """Return x after all steps: each is a sum of x, the last predictions of the clean sample, and new noise."""
    x, history = loop["prior"] * draw(), []
    for step in loop["steps"]:
        output = call(np.float32(step["scale"] * x), np.full(len(x), step["time"], np.float32))
        clean = step["clean"][0] * x + step["clean"][1] * output
        history = [np.clip(clean, -loop["clip"], loop["clip"]) if loop["clip"] else clean, *history[:2]]
        *factors, fresh = step["next"]
        x = sum(factor * part for factor, part in zip(factors, (x, *history)) if factor)
        x = x + fresh * draw() if fresh else x
    return x
