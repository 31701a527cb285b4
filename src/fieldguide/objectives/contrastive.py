"""Contrastive image-text objectives: match the pairs of a batch (CLIP, Radford et al. 2021, arXiv:2103.00020; SigLIP).

Shapes: B examples of this process, N examples of all W processes, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from fieldguide.core.card import Card
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


def count_rows_per_process(everyone: Tensor) -> float:
    """Return the mean number of rows of a process, given those of all processes."""
    return len(everyone) / (dist.get_world_size() if dist.is_initialized() else 1)


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

    def embed_pairs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embeddings of this process B 2 E, those of all processes N 2 E, and which of these belong together,
        B N bool."""
        own = self.model(*(batch[name] for name in self.inputs))
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
        return own, everyone, positive

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        with torch.no_grad():  # clamp the parameter: a clamp in the forward pass would stop its gradient at the limit
            self.model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        own, everyone, positive = self.embed_pairs(batch)
        target = positive.to(own.dtype) / positive.sum(1, keepdim=True)  # B N
        with torch.autocast(own.device.type, enabled=False):  # logits up to 100 need float32
            image = F.cross_entropy(own[:, 0] @ everyone[:, 1].T, target, reduction="sum")
            text = F.cross_entropy(own[:, 1] @ everyone[:, 0].T, target, reduction="sum")
        rows_per_process = count_rows_per_process(everyone)
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


class SigmoidContrastive(Contrastive):
    """Binary cross-entropy of each pairing of an image with a text (Zhai et al. 2023, arXiv:2303.15343, section 3.2).

    The network returns B 2 E+1 (output type "sigmoid-embeddings"), whose products are the logits. The sum over all pairings is
    divided by the number of images (algorithm 1). Several processes and examples that occur twice are treated as in
    `Contrastive`. The scale has no limit.
    """

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        own, everyone, positive = self.embed_pairs(batch)
        with torch.autocast(own.device.type, enabled=False):
            logits = own[:, 0] @ everyone[:, 1].T  # B N
            losses = F.softplus(torch.where(positive, -logits, logits))
        rows = count_rows_per_process(everyone)
        return {
            "loss": losses.sum() / rows,
            "positive": (losses * positive).sum() / rows,
            "negative": (losses * ~positive).sum() / rows,
            "scale": self.model.logit_scale.detach().exp().squeeze(),
            "bias": self.model.logit_bias.detach().squeeze(),
        }

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, text = F.normalize(self.model(*(batch[name] for name in self.inputs))[..., :-1], dim=-1).unbind(1)
        return {"image": image, "text": text}


def compute_probabilities(model: Any, similarity: Tensor) -> Tensor:  # B K -> B K
    """Return the probability of each text from cosine similarities: that it is the correct one of all, or for a network with a
    `logit_bias`, trained with a sigmoid, that it belongs to the image.
    """
    logits: Tensor = similarity * model.logit_scale.exp()
    bias = getattr(model, "logit_bias", None)
    return logits.softmax(1) if bias is None else (logits + bias).sigmoid()


# Output type of a network -> objective that trains it on pairs of an image and a text.
IMAGE_TEXT_OBJECTIVES: dict[str, type[Contrastive]] = {"embeddings": Contrastive, "sigmoid-embeddings": SigmoidContrastive}


def build_contrastive(model: nn.Module, card: Card) -> Contrastive:
    """Return the objective for a network that embeds images and texts."""
    return next(IMAGE_TEXT_OBJECTIVES[kind] for kind in card.output_types if kind in IMAGE_TEXT_OBJECTIVES)(model, card.inputs)
