"""DINOv2: a ViT pre-trained by self-supervision, with a linear classifier (Oquab et al. 2023, arXiv:2304.07193).

New here: general features without labels, so that a linear layer on frozen features works well; each residual branch
is scaled by a learned vector (LayerScale). Registers (Darcet et al. 2023, arXiv:2309.16588) are additional tokens
without position that take up global information which the model would otherwise store in background patches.
`features` returns the patch features after the last normalization.

Position embeddings are interpolated to other image sizes as in the authors' code: scaled with an offset of 0.1
without antialiasing, and with registers without offset but with antialiasing; transformers has no offset (`offset=0`
gives the same result).
Initialization: truncated N(0, 0.02), with a standard deviation larger by sqrt(768 / D) if D is less than 768;
LayerScale with `scale`; zero biases.
Shapes: B batch, C channels, H W image height and width, P patch size, R registers, h w = H/P W/P, N = 1 + R + h w, D
width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.classifier_head import OUTPUT_TYPES, classifier_head
from fieldguide.models.layers.mlp import Mlp
from fieldguide.models.layers.patches import Patches, choose_patch_size, interpolate_pos_embed
from fieldguide.models.layers.stochastic_depth import DropPath
from fieldguide.models.mapping.config_rules import Constant, Derived, Expect, LabelCount, WithDefault
from fieldguide.models.mapping.key_rules import Fused, Reshaped, Row, Zeros

EPS = 1e-6  # epsilon of the normalization layers


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "label"  # label, or vector: the features before the classifier
    num_classes: int = 1000
    channels: int = 3  # C
    image: int = 518  # image side of the trained position embeddings; other sizes are interpolated
    patch: int = 14  # P
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    gated: bool = False  # SwiGLU instead of the MLP, as in the giant size
    registers: int = 0  # R
    read: int = 1  # number of last blocks whose class tokens the head reads: 1 or 4 in the authors' heads
    scale: float = 1e-5  # initial LayerScale value
    antialias: bool = False  # antialiasing in the interpolation of position embeddings
    offset: float = 0.1  # offset added to the target size of the interpolation
    drop_path: float = 0.0  # stochastic depth rate, equal for all blocks


class Scale(nn.Module):
    """LayerScale: a learned factor per channel (Touvron et al. 2021, arXiv:2103.17239, section 2)."""

    def __init__(self, dim: int, start: float):
        super().__init__()
        self.start, self.gamma = start, nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        return x * self.gamma


class SwiGLU(nn.Module):
    """A SwiGLU MLP (Shazeer 2020, arXiv:2002.05202) with 2/3 of the hidden width, rounded up to a multiple of 8."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        hidden = -(-(hidden * 2 // 3) // 8) * 8
        self.up, self.down = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... D
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """A pre-norm Transformer block with LayerScale on both residual branches."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.dim, eps=EPS), nn.LayerNorm(c.dim, eps=EPS)
        self.attn, self.mlp = Attention(c.dim, c.heads), (SwiGLU if c.gated else Mlp)(c.dim, 4 * c.dim)
        self.scale1, self.scale2 = Scale(c.dim, c.scale), Scale(c.dim, c.scale)
        self.drop_path = DropPath(c.drop_path)

    def forward(self, x: Tensor) -> Tensor:  # B N D -> B N D
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class DINOv2(nn.Module):
    """An image classifier for images of any size, on the class token and the mean of the patches; or the class token
    itself.

    Raises `SettingsError` if the head reads more blocks than there are.
    """

    heads: ClassVar[tuple[str, ...]] = ("head",)  # parts that a checkpoint may lack or have in another shape

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if not 1 <= c.read <= c.depth:
            raise SettingsError(f"read={c.read} must be between 1 and depth={c.depth}.")
        self.patch = Patches(c.channels, c.dim, c.patch)
        self.cls = nn.Parameter(torch.empty(c.dim))
        self.register_buffer("mask", torch.zeros(1, c.dim))  # mask token of the pre-training; kept for export
        self.pos = nn.Embedding(1 + math.ceil(c.image / c.patch) ** 2, c.dim)
        self.registers = nn.Embedding(c.registers, c.dim) if c.registers else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.dim, eps=EPS)
        self.head = classifier_head(c, (1 + c.read) * c.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = 0.02 * max(768 / self.config.dim, 1) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, Scale):
                nn.init.constant_(module.gamma, module.start)
        nn.init.normal_(self.cls, std=std)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Feature name -> (channels D, stride in pixels) of what `features` returns."""
        depth = self.config.depth
        return {f"b{i}": (self.config.dim, self.config.patch) for i in sorted({depth * k // 4 for k in (1, 2, 3, 4)} - {0})}

    def resize_weight(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return position embeddings trained at another image size, interpolated to the size of this model; None for
        other tensors.

        If the file has none for the class token, zeros are used.
        """
        if name == "pos.weight" and tensor.ndim == 2 and math.isqrt(len(tensor)) ** 2 == len(tensor):
            tensor = torch.cat([tensor.new_zeros(1, tensor.shape[1]), tensor])
        grid = math.isqrt(max(len(tensor) - 1, 0)) if tensor.ndim == 2 else 0
        if name != "pos.weight" or not grid or len(tensor) != 1 + grid**2:
            return None
        return self.interpolate_positions(tensor, (math.isqrt(len(self.pos.weight) - 1),) * 2)

    def interpolate_positions(self, places: Tensor, size: tuple[int, int]) -> Tensor:  # 1 + S S, D -> 1 + h w, D
        """Interpolate position embeddings to another grid."""
        return interpolate_pos_embed(places, size, antialias=self.config.antialias, offset=self.config.offset)

    def tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:  # B C H W -> B N D, (h, w)
        """Return the embedded tokens and the size of the patch grid."""
        x = self.patch(image)
        size = tuple(x.shape[2:])
        places = self.interpolate_positions(self.pos.weight, size)
        first = (self.cls + places[0])[None]
        if self.registers:  # registers have no position embedding
            first = torch.cat([first, self.registers.weight])
        x = x.flatten(2).mT + places[1:]
        return torch.cat([first.to(x.dtype).expand(x.shape[0], -1, -1), x], 1), size

    def features(self, image: Tensor) -> dict[str, Tensor]:  # B C H W -> {"b3": B D h w, ...}
        """Return the feature maps described by `levels`."""
        x, size = self.tokens(image)
        found = {}
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if f"b{i}" in self.levels:
                found[f"b{i}"] = self.norm(x[:, 1 + self.config.registers :]).mT.unflatten(2, size)
        return found

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B classes, or B D
        x, _ = self.tokens(image)
        read, first = [], len(self.blocks) - self.config.read
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= first:
                read.append(x[:, 0])
        if self.config.output_type == "vector":
            return self.norm(x[:, 0])
        seen = self.norm(x[:, 1 + self.config.registers :]).mean(1)
        return self.head(torch.cat([*(self.norm(token) for token in read), seen], 1))


def huggingface(c: Config, root: str = "") -> dict[str, Row]:
    """Return the names of Dinov2ForImageClassification (`root` is "dinov2."), the one with registers, and the backbones
    ("").
    """
    layer, block = root + "encoder.layer.{i}.", "blocks.{i}."
    up, down = ("mlp.weights_in.*", "mlp.weights_out.*") if c.gated else ("mlp.fc1.*", "mlp.fc2.*")
    names: dict[str, Row] = {
        root + "embeddings.cls_token": Reshaped("cls", here=(-1,), there=(1, 1, -1)),
        root + "embeddings.mask_token": "mask",
        root + "embeddings.position_embeddings": Reshaped("pos.weight", here=(-1, c.dim), there=(1, -1, c.dim)),
        root + "embeddings.register_tokens": Reshaped("registers.weight", here=(-1, c.dim), there=(1, -1, c.dim)),
        root + "embeddings.patch_embeddings.projection.*": "patch.*",
        root + "layernorm.*": "norm.*",
        "classifier.*": "head.*",
    }
    names |= {
        f"{layer}attention.attention.{part}.*": Fused(block + "attn.qkv.*", i, 3)
        for i, part in enumerate(("query", "key", "value"))
    }
    return names | {
        layer + "attention.output.dense.*": block + "attn.proj.*",
        layer + "layer_scale{k}.lambda1": block + "scale{k}.gamma",
        layer + "norm{k}.*": block + "norm{k}.*",
        layer + up: block + "mlp.up.*",
        layer + down: block + "mlp.down.*",
    }


def facebook(c: Config, root: str = "") -> dict[str, Row]:
    """Return the names of the authors' .pth files: of a backbone, and of their classifiers, which contain a backbone
    ("backbone.").
    """
    layer, block = root + "blocks.{i}.", "blocks.{i}."
    up, down = ("mlp.w12.*", "mlp.w3.*") if c.gated else ("mlp.fc1.*", "mlp.fc2.*")
    return {
        root + "cls_token": Reshaped("cls", here=(-1,), there=(1, 1, -1)),
        root + "mask_token": "mask",
        root + "pos_embed": Reshaped("pos.weight", here=(-1, c.dim), there=(1, -1, c.dim)),
        root + "register_tokens": Reshaped("registers.weight", here=(-1, c.dim), there=(1, -1, c.dim)),
        root + "patch_embed.proj.*": "patch.*",
        root + "norm.*": "norm.*",
        layer + "norm{k}.*": block + "norm{k}.*",
        layer + "attn.qkv.*": block + "attn.qkv.*",
        layer + "attn.proj.*": block + "attn.proj.*",
        layer + "ls{k}.gamma": block + "scale{k}.gamma",
        layer + up: block + "mlp.up.*",
        layer + down: block + "mlp.down.*",
        "linear_head.*": "head.*",
    }


def timm(c: Config) -> dict[str, Row]:
    """Return the names of timm, whose backbones have no mask token and, with registers, no position of the class token
    (see `resize_weight`).
    """
    ours = ("mask", "registers.weight", "blocks.{i}.mlp.up.*", "blocks.{i}.mlp.down.*", "head.*")
    names = {key: row for key, row in facebook(c).items() if getattr(row, "ours", row) not in ours}
    return names | {
        "reg_token": Reshaped("registers.weight", here=(-1, c.dim), there=(1, -1, c.dim)),
        "blocks.{i}.mlp.fc1.*": "blocks.{i}.mlp.up.*",
        "blocks.{i}.mlp.fc2.*": "blocks.{i}.mlp.down.*",
        "head.*": "head.*",
        "<no mask token>": Zeros("mask", like="pos.weight"),
    }


WITH, WITHOUT = "dinov2_with_registers", "dinov2"  # model types of transformers


def read_registers(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that depend on the model type."""
    with_them = theirs["model_type"] == WITH
    return {
        "registers": theirs.get("num_register_tokens", 4) if with_them else 0,
        "antialias": theirs.get("interpolate_antialias", with_them),
    }


KINDS = {"label": "ForImageClassification", "vector": "Model"}


def read_output_type(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the output type of the class name. Raises `WeightsError` for other classes."""
    name = (theirs.get("architectures") or ["ForImageClassification"])[0]
    end = name.removeprefix("Dinov2").removeprefix("WithRegisters")
    found = next((gives for gives, known in KINDS.items() if known == end), None)
    if found is None:
        raise WeightsError(
            f"architectures={name!r} is not supported. Supported are Dinov2ForImageClassification and Dinov2Model, "
            "with or without WithRegisters."
        )
    return {"output_type": found}


CONFIG = {  # keys of transformers
    "model_type": Expect(lambda c: WITH if c.registers else WITHOUT, among=(WITH, WITHOUT)),
    "architectures": Derived(
        read_output_type, lambda c: [f"Dinov2{'WithRegisters' if c.registers else ''}{KINDS[c.output_type]}"]
    ),
    "id2label": LabelCount("num_classes"),
    "num_channels": "channels",
    "image_size": "image",
    "patch_size": "patch",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "mlp_ratio": Expect(4),
    "use_swiglu_ffn": "gated",
    "num_register_tokens": Derived(read_registers, lambda c: c.registers),
    "layerscale_value": WithDefault("scale", 1.0),
    "drop_path_rate": WithDefault("drop_path", 0.0),
    "interpolate_antialias": Derived(read_registers, lambda c: c.antialias),  # this and the next are the authors' keys,
    "interpolate_offset": WithDefault("offset", 0.0),  # which transformers keeps but ignores
    "layer_norm_eps": Expect(EPS),
    "hidden_act": Expect("gelu"),
    "hidden_dropout_prob": Expect(0.0),
    "attention_probs_dropout_prob": Expect(0.0),
    "qkv_bias": Expect(True),
    "<the head reads one class token>": Constant("read", 1),
}
REGISTERS: dict[str, Any] = {"registers": 4, "antialias": True, "offset": 0.0}
S, L = {"dim": 384, "heads": 6}, {"dim": 1024, "depth": 24, "heads": 16}
G = {"dim": 1536, "depth": 40, "heads": 24, "gated": True}
BUT = "without the mask token of D parameters, which only pre-training uses"

CARD = Card(
    name="dinov2",
    model=DINOv2,
    config=Config,
    paper="arXiv:2304.07193",
    year=2023,
    input_type="image",
    output_type=OUTPUT_TYPES,
    adapt=lambda need: {"patch": patch} if (patch := choose_patch_size(need["image"])) else {},
    sizes={
        "dinov2-small": Size(**S, params=22_825_192, source=f"facebook/dinov2-small-imagenet1k-1-layer, {BUT}"),
        "dinov2-base": Size(params=88_116_712, source=f"facebook/dinov2-base-imagenet1k-1-layer, {BUT}"),
        "dinov2-large": Size(**L, params=306_416_616, source=f"facebook/dinov2-large-imagenet1k-1-layer, {BUT}"),
        "dinov2-giant": Size(**G, params=1_139_552_232, source=f"facebook/dinov2-giant-imagenet1k-1-layer, {BUT}"),
        "dinov2-small-reg": Size(
            **S, **REGISTERS, params=22_826_728, source=f"facebook/dinov2-with-registers-small-imagenet1k-1-layer, {BUT}"
        ),
        "dinov2-base-reg": Size(
            **REGISTERS, params=88_119_784, source=f"facebook/dinov2-with-registers-base-imagenet1k-1-layer, {BUT}"
        ),
        "dinov2-large-reg": Size(
            **L, **REGISTERS, params=306_420_712, source=f"facebook/dinov2-with-registers-large-imagenet1k-1-layer, {BUT}"
        ),
        "dinov2-giant-reg": Size(
            **G, **REGISTERS, params=1_139_558_376, source=f"facebook/dinov2-with-registers-giant-imagenet1k-1-layer, {BUT}"
        ),
        # For training from scratch on small images.
        "dinov2-mini": Size(dim=128, depth=6, heads=4, image=32, patch=4, num_classes=10, **REGISTERS),
        "dinov2-test": Size(dim=16, depth=3, heads=2, image=12, patch=4, channels=2, num_classes=5, gated=True, **REGISTERS),
    },
    weights={
        "facebook": facebook,
        "facebook-classifier": lambda c: facebook(c, "backbone."),
        "huggingface-base": huggingface,
        "huggingface": lambda c: huggingface(c, "dinov2_with_registers." if c.registers else "dinov2."),
        "timm": timm,
    },
    configs={"huggingface": CONFIG},
    aliases={
        "timm": {
            f"vit_{size}_patch14_{kind}dinov2": (f"dinov2-{size}{ours}", {"antialias": True, "offset": 0.0})
            for size in ("small", "base", "large", "giant")
            for kind, ours in (("", ""), ("reg4_", "-reg"))
        }
    },
    # As for a ViT trained on labels from scratch (DeiT, arXiv:2012.12877, table 9).
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1, "grad_clip": 1.0},
)
