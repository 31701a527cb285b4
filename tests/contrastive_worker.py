"""Started by `torchrun` in test_contrastive: train CLIP with SGD in every process; the first stores weights and losses.

Arguments: the file to write, and `texts` if some examples share a text or an image, `sigmoid` for SigLIP, or `pairs` for BERT on
pairs of texts.
"""

from __future__ import annotations

import sys

import torch

from fieldguide import create
from fieldguide.core import distributed
from fieldguide.data.loader import Batches
from fieldguide.objectives import Contrastive, SigmoidContrastive
from fieldguide.objectives.text_pairs import KEY_BASE, TextPairs
from test_loop import trainer, weights


def make_pairs(rows, tokens):
    """Return pairs of texts; every third has a negative, and rows that are equal modulo 5 have the same positive."""
    negatives = rows[rows % 3 == 0]
    there = lambda count: torch.ones(count, 4, dtype=torch.bool)
    return {
        "anchor_tokens": tokens[rows][:, :4],
        "anchor_mask": there(len(rows)),
        "passage_tokens": torch.cat([tokens[rows % 5][:, 2:], tokens[negatives][:, 1:5]]),
        "passage_mask": there(len(rows) + len(negatives)),
        "anchor_id": rows,
        "passage_id": torch.cat([100 + rows % 5, 200 + negatives]),
        "known": rows * KEY_BASE + 100 + rows % 5,
    }


def main(path: str, kind: str) -> None:
    torch.set_num_threads(1)
    with distributed.join_process_group():
        torch.manual_seed(0)
        kinds = {
            "sigmoid": (SigmoidContrastive, "siglip-test", ("loss", "positive", "negative")),
            "pairs": (lambda model: TextPairs(model, None, 0.3, True), "bert-test", ("loss",)),
        }
        build, name, parts = kinds.get(kind, (Contrastive, "clip-test", ("loss", "image", "text")))
        objective = build(create(name, **({"output_type": "vector"} if kind == "pairs" else {}))).double()
        side = getattr(objective.model.config, "image", 1)
        image, tokens = torch.randn(22, 2, side, side, dtype=torch.float64), torch.randint(29, (22, 6))
        mask = torch.arange(6) < torch.randint(1, 7, (22, 1))
        columns = {"image": image, "tokens": tokens, "mask": mask}
        if kind != "plain":
            columns |= {"text": torch.arange(22) % 5, "picture": torch.arange(22) // 3}
        data = Batches(22, lambda i, _: {name: x[i] for name, x in columns.items()})
        if kind == "pairs":
            data = Batches(22, lambda i, _: make_pairs(torch.as_tensor(i), tokens))
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
            losses = torch.tensor([[step[name] for name in parts] for step in seen])
            torch.save({"weights": alike[0], "losses": losses, "world": distributed.get_world_size()}, path)


main(*sys.argv[1:])
