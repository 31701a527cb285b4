"""Contrastive image-text objective: match the pairs of a batch (CLIP, Radford et al. 2021, arXiv:2103.00020).

Shapes: B examples of this process, N examples of all W processes, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from fieldguide.core.errors import SettingsError
from fieldguide.objectives.base import Objective

DUPLICATE_KEYS = ("text", "picture")  # batch tensors of ids: examples with equal ids are positives of each other
MAX_LOGIT_SCALE = 100.0  # limit of exp(logit_scale) (section 2.5)


class Gather(torch.autograd.Function):
    """Differentiable all-gather of tensors of equal shape along the first axis.

    The backward pass sums the gradients of all processes and returns to each the part of its own tensor.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:  # B ... -> W*B ...
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:  # W*B ... -> B ...
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(x: Tensor) -> tuple[Tensor, int]:  # B ... -> N ..., int
    """Return the rows of all processes, ordered by rank, and the index of this process's first row.

    Processes may hold different numbers of rows. Gradients flow back to each process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x, 0
    count = torch.tensor([len(x)], device=x.device)
    gathered = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, count)
    counts: list[int] = torch.cat(gathered).tolist()
    longest = max(counts)
    padded = Gather.apply(torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]))
    return torch.cat([part[:n] for part, n in zip(padded.split(longest), counts)]), sum(counts[: dist.get_rank()])


class Contrastive(Objective):
    """Symmetric cross-entropy over image-text similarities: each image selects its text, each text its image (figure 3).

    The network returns B 2 E (output type "embeddings"), whose dot products are logits, and has a parameter
    `logit_scale`, the logarithm of their scale, clamped to `log(MAX_LOGIT_SCALE)`. With several processes every example
    is compared with those of all processes: the mean of the losses, and of the gradients, over processes equals that of
    the joint batch. With gradient accumulation each part of the batch is compared only with itself.

    The batch may hold the ids `text` and `picture` (B int64): examples with an equal id have the same text or the same
    image, so they are not negatives of each other and share the target probability (Yang et al. 2022, arXiv:2204.03610,
    equations 2 and 3).

    Raises:
        SettingsError: if the joint batch has a single example.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str] = ("image", "tokens", "mask")):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        with torch.no_grad():  # clamp the parameter: a clamp in the forward pass would stop its gradient at the limit
            self.model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        own = self.model(*(batch[name] for name in self.inputs))  # B 2 E
        everyone, first = gather_rows(own)
        if len(everyone) < 2:
            raise SettingsError(
                "contrastive training compares the examples of a batch with each other: set batch_size=2 or more"
            )
        rows = torch.arange(first, first + len(own), device=own.device)
        positive = F.one_hot(rows, len(everyone)).bool()
        for name in DUPLICATE_KEYS:
            if name in batch:
                positive |= batch[name][:, None] == gather_rows(batch[name])[0]
        target = positive.to(own.dtype) / positive.sum(1, keepdim=True)  # B N
        with torch.autocast(own.device.type, enabled=False):  # logits up to 100 need float32
            image = F.cross_entropy(own[:, 0] @ everyone[:, 1].T, target, reduction="sum")
            text = F.cross_entropy(own[:, 1] @ everyone[:, 0].T, target, reduction="sum")
        rows_per_process = len(everyone) / (dist.get_world_size() if dist.is_initialized() else 1)
        return {
            "loss": (image + text) / (2 * rows_per_process),
            "image": image / rows_per_process,
            "text": text / rows_per_process,
            "scale": self.model.logit_scale.detach().exp(),
        }

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the normalized embeddings `image` and `text`, B E each."""
        image, text = F.normalize(self.model(*(batch[name] for name in self.inputs)), dim=-1).unbind(1)
        return {"image": image, "text": text}
