"""Started by `torchrun` in test_contrastive: train CLIP with SGD in every process; the first stores weights and losses.

Arguments: the file to write, and `texts` if some examples share a text or an image.
"""

from __future__ import annotations

import sys

import torch

from fieldguide import create
from fieldguide.core import distributed
from fieldguide.data.loader import Batches
from fieldguide.objectives import Contrastive
from test_loop import trainer, weights


def main(path: str, kind: str) -> None:
    torch.set_num_threads(1)
    with distributed.join_process_group():
        torch.manual_seed(0)
        objective = Contrastive(create("clip-test")).double()
        image, tokens = torch.randn(22, 2, 12, 12, dtype=torch.float64), torch.randint(29, (22, 6))
        mask = torch.arange(6) < torch.randint(1, 7, (22, 1))
        columns = {"image": image, "tokens": tokens, "mask": mask}
        if kind == "texts":
            columns |= {"text": torch.arange(22) % 5, "picture": torch.arange(22) // 3}
        data = Batches(22, lambda i, _: {name: x[i] for name, x in columns.items()})
        seen = []
        callback = type(
            "Watch", (), {"on_step": lambda self, step, losses: seen.append(losses), "log": lambda self, text: None}
        )()
        t = trainer(objective, data, optimizer="sgd", lr=0.02, steps=6, batch=11)  # 6 and 5 rows for two processes
        t.callback = callback
        t.train()
        alike = distributed.gather(weights(objective))
        assert all(torch.equal(alike[0], w) for w in alike), "processes hold different weights"
        if distributed.rank() == 0:
            losses = torch.tensor([[step[name] for name in ("loss", "image", "text")] for step in seen])
            torch.save({"weights": alike[0], "losses": losses, "world": distributed.get_world_size()}, path)


main(*sys.argv[1:])
