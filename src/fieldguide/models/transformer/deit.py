"""DeiT: a ViT trained on ImageNet alone with the help of a teacher (Touvron et al. 2020, arXiv:2012.12877).

New here: a distillation token, whose prediction is trained to match the teacher's instead of the label; a
convolutional teacher works best. `--set teacher=RUN` sets it. Without a teacher both tokens are trained on the
labels. The paper's models without this token are `vit-ti16`, `vit-s16` and `vit-b16`.

Initialization: truncated N(0, 0.02), as in the authors' code, with a standard deviation larger by sqrt(768 / D) if D
is less than 768; zero biases.
Shapes: B batch, C channels, H W image height and width, N = 2 + H W / P^2 tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.classifier_head import OUTPUT_TYPES, architectures, classifier_head
from fieldguide.models.layers.patches import choose_patch_size
from fieldguide.models.mapping.key_rules import Fused, Row
from fieldguide.models.transformer import vit


@dataclass(frozen=True, kw_only=True)
class Config(vit.Config):
    drop_path: float = 0.1  # stochastic depth rate of the last block; increases linearly from 0 (table 9)


class DeiT(vit.ViT):
    """An image classifier for images of any size: the mean of the logits of the class and the distillation token.

    In training it returns B 2 classes: the logits of the class token, trained on the labels, then those of the
    distillation token.
    """

    num_prefix_tokens = 2
    distillation_head = 1  # index of the training output that is compared with the teacher's

    def make_head(self) -> None:
        self.dist = nn.Parameter(torch.empty(self.config.dim))
        self.head = classifier_head(self.config, self.config.dim, 2)  # the weights of both heads, concatenated

    def prefix_tokens(self) -> Tensor:  # -> 2 D
        return torch.stack([self.cls, self.dist])

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B classes, in training B 2 classes; or B D
        x = self.prefix_features(image)
        if self.config.output_type == "vector":
            return x[:, 0]
        assert isinstance(self.head, nn.Linear)
        weights, biases = self.head.weight.chunk(2), self.head.bias.chunk(2)
        x = torch.stack([F.linear(x[:, i], weights[i], biases[i]) for i in (0, 1)], 1)
        return x if self.training else x.mean(1)


def map_two_heads(table: dict[str, Row], head: str, *heads: str) -> dict[str, Row]:
    """Return the table of a ViT with two heads instead of one; ours are concatenated."""
    return {name: row for name, row in table.items() if name != head} | {
        f"{name}.*": Fused("head.*", i, 2) for i, name in enumerate(heads)
    }


def timm(c: Config) -> dict[str, Row]:
    """Return the weight names of timm."""
    return {"dist_token": vit.map_token("dist")} | map_two_heads(vit.timm(c), "head.*", "head", "head_dist")


def huggingface(c: Config, root: str = "deit.") -> dict[str, Row]:
    """Return the weight names of transformers."""
    return {root + "embeddings.distillation_token": vit.map_token("dist")} | map_two_heads(
        vit.huggingface(c, root), "classifier.*", "cls_classifier", "distillation_classifier"
    )


CARD = Card(
    name="deit",
    model=DeiT,
    config=Config,
    paper="arXiv:2012.12877",
    year=2020,
    input_type="image",
    output_type=OUTPUT_TYPES,
    adapt=lambda need: {"patch": patch} if (patch := choose_patch_size(need["image"])) else {},
    sizes={
        "deit-tiny": Size(dim=192, heads=3, params=5_910_800, source="deit_tiny_distilled_patch16_224"),
        "deit-small": Size(dim=384, heads=6, params=22_436_432, source="deit_small_distilled_patch16_224"),
        "deit-base": Size(params=87_338_192, source="deit_base_distilled_patch16_224"),
        "deit-base-384": Size(image=384, params=87_630_032, source="deit_base_distilled_patch16_384"),
        # For training from scratch on small images.
        "deit-mini": Size(dim=128, depth=6, heads=4, image=32, patch=4, num_classes=10),
        "deit-test": Size(dim=16, depth=3, heads=2, image=12, patch=4, channels=2, num_classes=5, drop_path=0.0),
    },
    weights={"timm": timm, "huggingface": huggingface, "huggingface-base": lambda c: huggingface(c, "")},
    configs={"huggingface": vit.map_config("deit", architectures("DeiT", "ForImageClassificationWithTeacher"))},
    aliases={
        "timm": {f"deit_{size}_distilled_patch16_224": f"deit-{size}" for size in ("tiny", "small", "base")}
        | {"deit_base_distilled_patch16_384": "deit-base-384"}
    },
    # Table 9 for batches of 1024, without mixup and cutmix, which pay off after hundreds of epochs (--set mixup=0.8).
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1, "grad_clip": 1.0},
)
