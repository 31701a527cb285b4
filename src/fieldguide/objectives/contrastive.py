"""Contrastive: of all pairings in a batch, find those that belong together (Radford et al. 2021, arXiv:2103.00020).

Shapes: B examples of this process, N of all W processes, E width of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.base import Objective

DUPLICATE_KEYS = ("text", "picture")  # numbers of a batch that say which examples are right answers for each other
MAX_LOGIT_SCALE = 100.0  # of the scale of the logits (section 2.5)


class Gather(torch.autograd.Function):
    """The tensors of all processes, one after another, in every process; all have the same shape.

    What the loss of each process says of a tensor comes back to the process that it came from, added up.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # B ... -> W*B ...
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # W*B ... -> B ...
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(x: Tensor) -> tuple[Tensor, int]:  # B ... -> N ..., and the place of the first own row
    """The rows of all processes, by rank, which may hold different numbers of them; gradients flow to each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x, 0
    count = torch.tensor([len(x)], device=x.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    counts = torch.cat(counts).tolist()
    most = max(counts)
    padded = Gather.apply(torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]))
    return torch.cat([part[:n] for part, n in zip(padded.split(most), counts)]), sum(counts[: dist.get_rank()])


class Contrastive(Objective):
    """Symmetric cross-entropy: each picture finds its text among all, each text its picture (figure 3).

    The network gives B 2 E, whose products are logits (`embeddings` of a card), and has a `logit_scale`, the logarithm
    of their scale, which never exceeds `LARGEST`. Across processes every example meets those of all: the mean of the
    processes' losses, and of their gradients, is that of the joined batch. The parts of a batch that accumulates do not
    meet; the loss is then that of smaller batches.

    The batch may hold `text` and `picture`, B int64: examples of one number have the same text, or the same picture with
    several texts, so none is a wrong answer for another and they share the right one (Yang et al. 2022, arXiv:2204.03610,
    equations 2 and 3).
    Raises `SettingsError` for a batch of one, which has nothing to be told from.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str] = ("image", "tokens", "mask")):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        with torch.no_grad():  # the parameter itself: a clamp of its use would have no way back
            self.model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        own = self.model(*(batch[name] for name in self.inputs))  # B 2 E
        everyone, first = gather_rows(own)
        if len(everyone) < 2:
            raise SettingsError("contrastive training compares the examples of a batch: set batch=2 or more")
        rows = torch.arange(first, first + len(own), device=own.device)
        right = F.one_hot(rows, len(everyone)).bool()
        for name in DUPLICATE_KEYS:
            if name in batch:
                right |= batch[name][:, None] == gather_rows(batch[name])[0]
        target = right.to(own.dtype) / right.sum(1, keepdim=True)  # B N
        with torch.autocast(own.device.type, enabled=False):  # logits up to 100 need their digits
            image = F.cross_entropy(own[:, 0] @ everyone[:, 1].T, target, reduction="sum")
            text = F.cross_entropy(own[:, 1] @ everyone[:, 0].T, target, reduction="sum")
        share = len(everyone) / (dist.get_world_size() if dist.is_initialized() else 1)  # rows of a process, on average
        return {
            "loss": (image + text) / (2 * share),
            "image": image / share,
            "text": text / share,
            "scale": self.model.logit_scale.detach().exp(),
        }

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Vectors of length 1 of pictures and texts, each B E."""
        image, text = F.normalize(self.model(*(batch[name] for name in self.inputs)), dim=-1).unbind(1)
        return {"image": image, "text": text}
