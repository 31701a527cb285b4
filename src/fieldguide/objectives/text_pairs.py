"""Objectives of text embeddings: texts that belong together get similar vectors.

Shapes: B pairs of this process, P passages (the B positives first, then negatives), N and M those of all processes, E width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.contrastive import gather_rows
from fieldguide.objectives.embedding import EmbeddingObjective, Pooling

KEY_BASE = 1 << 31  # a pair of two text ids below it is one integer


class TextPairs(EmbeddingObjective):
    """InfoNCE with in-batch negatives, or the squared error of the cosine similarity if the batch has a `score`.

    InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, equation 4; as "multiple negatives ranking" Henderson et al. 2017,
    arXiv:1705.00652, section 4.2): each anchor selects its positive among the positives and negatives of the batch, by cosine
    similarity divided by `temperature`. With `symmetric`, each positive also selects its anchor, and the losses are averaged.
    With several processes the passages of all are compared, and the mean of the losses over processes is that of the joint batch.

    A passage that is known to belong to an anchor is no negative of it: `known` (K int64) lists the pairs (anchor, passage) of
    the anchors in the batch as `anchor_id * KEY_BASE + passage_id`, which covers repeated texts, several positives of an anchor,
    and the anchor itself.

    With `widths`, the loss is the mean over the first E' numbers of the vectors for every E' in `widths` (Kusupati et al. 2022,
    arXiv:2205.13147, equation 1, equal weights).

    Raises:
        SettingsError: if the joint batch has a single pair and no negative.
    """

    def __init__(
        self,
        model: nn.Module,
        pooling: Pooling | None = None,
        temperature: float = 0.05,
        symmetric: bool = False,
        widths: Sequence[int] = (),
    ):
        super().__init__(model, pooling)
        self.temperature, self.symmetric, self.widths = temperature, symmetric, tuple(widths)

    def encode(self, batch: dict[str, Tensor], name: str) -> Tensor:  # -> texts E
        return super().outputs({"tokens": batch[f"{name}_tokens"], "mask": batch[f"{name}_mask"]})["vector"]

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        both = [self.encode(batch, name) for name in ("anchor", "passage")]
        with torch.autocast(both[0].device.type, enabled=False):
            wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in both]
            cut = [[F.normalize(x[:, :width], dim=-1) for x in wide] for width in self.widths] or [wide]
            losses = [self.compare(anchors, passages, batch) for anchors, passages in cut]
        return {name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]}

    def compare(self, anchors: Tensor, passages: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:  # B E, P E
        """Return the losses of normalized vectors."""
        count = len(anchors)
        if "score" in batch:
            cosine = (anchors * passages[:count]).sum(1)
            return {"loss": F.mse_loss(cosine, batch["score"].to(cosine.dtype))}
        ids, own = batch["passage_id"], batch["anchor_id"]
        positives, first = gather_rows(passages[:count])
        candidates = torch.cat([positives, gather_rows(passages[count:])[0]])  # M E
        codes = torch.cat([gather_rows(ids[:count])[0], gather_rows(ids[count:])[0]])
        if len(candidates) < 2:
            raise SettingsError("the pairs of a batch are compared with each other: set batch_size=2 or more")
        place = torch.arange(first, first + count, device=ids.device)
        known = gather_rows(batch["known"])[0]
        loss = self.select(anchors @ candidates.T, place, torch.isin(own[:, None] * KEY_BASE + codes, known))
        if self.symmetric:
            everyone, others = gather_rows(anchors)[0], gather_rows(own)[0]
            back = torch.isin(others * KEY_BASE + ids[:count, None], known)
            loss = (loss + self.select(passages[:count] @ everyone.T, place, back)) / 2
        processes = dist.get_world_size() if dist.is_initialized() else 1
        return {"loss": loss * processes / len(positives)}

    def select(self, similarity: Tensor, place: Tensor, known: Tensor) -> Tensor:  # B M, B, B M bool -> scalar
        """Return the summed cross-entropy of selecting the candidate `place`, among those that are not `known` to be right too."""
        own = F.one_hot(place, similarity.shape[1]).bool()
        logits = (similarity / self.temperature).masked_fill(known & ~own, -torch.inf)
        return F.cross_entropy(logits, place, reduction="sum")

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `vector` of single texts, or `anchor`, `positive` (B E) and `negatives` (B K E, NaN where there are fewer)."""
        if "tokens" in batch:
            return super().outputs(batch)
        anchors, passages = self.encode(batch, "anchor"), self.encode(batch, "passage")
        count, row, slot = len(anchors), batch["negative_row"], batch["negative_slot"]
        found = {"anchor": anchors, "positive": passages[:count]}
        if "score" not in batch:
            width = int(slot.max()) + 1 if len(slot) else 0
            negatives = anchors.new_full((count, width, anchors.shape[1]), torch.nan)
            negatives[row, slot] = passages[count:]
            found["negatives"] = negatives
        return found
