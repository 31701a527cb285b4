"""Does a step take as long with tables of ten million rows as with a hundred thousand?

    python benchmarks/embedding_rows.py [--save]

DLRM with two tables of width 16 and batches of 2,048 rows: forward, backward, clipping and the update, with dense gradients and
AdamW, and with sparse gradients and row-wise Adagrad (`embedding_optimizer=adagrad`). The best of nine steps counts.
"""

from __future__ import annotations

import time

import torch
from common import make_parser, parse_options, report

from fieldguide import create
from fieldguide.core.settings import Settings
from fieldguide.objectives import Classification, Supervised
from fieldguide.training.optim import build_optimizers
from fieldguide.training.row_adagrad import clip_gradients

ROWS = (10**5, 10**6, 10**7)
TABLES, WIDTH, BATCH, STEPS = 2, 16, 2048, 9
KINDS = {"same": "dense, AdamW", "adagrad": "sparse, row-wise Adagrad"}


def measure(rows: int, kind: str, rounds: int) -> list[float]:
    """Return the seconds of each step."""
    torch.manual_seed(0)
    model = create("dlrm", categories=(rows // TABLES,) * TABLES, numbers=13, dim=WIDTH, bottom=(64,), top=(64,))
    objective = Supervised(model, ("numbers", "categories"), Classification())
    optimizers = build_optimizers(objective, objective.named_parameters(), Settings().with_({"embedding_optimizer": kind}))
    seconds = []
    for _ in range(rounds + 1):
        codes = torch.randint(rows // TABLES, (BATCH, TABLES))
        batch = {"numbers": torch.randn(BATCH, 13), "categories": codes, "target": torch.randint(2, (BATCH,))}
        started = time.perf_counter()
        objective(batch)["loss"].backward()
        clip_gradients(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]  # the first one creates the state


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0]))
    best = {(kind, rows): 1000 * min(measure(rows, kind, STEPS)) for rows in ROWS for kind in KINDS}
    rows = [
        [words, *(f"{best[kind, n]:.1f}" for n in ROWS), f"{best[kind, ROWS[-1]] / best[kind, ROWS[0]]:.1f}"]
        for kind, words in KINDS.items()
    ]
    columns = ["gradients and optimizer", *(f"{n:,} rows, ms" for n in ROWS), "last / first"]
    report("A step of DLRM by the rows of its tables", columns, rows, options.save, f"{BATCH:,} rows a step, width {WIDTH}.")


if __name__ == "__main__":
    main()
