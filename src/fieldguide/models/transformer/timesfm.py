"""TimesFM 2.5: zero-shot forecasting with a decoder over patches (Das et al. 2023, arXiv:2310.10688).

New here: a language model of series. Each patch of 32 values is a token, and the output at a token is the next 128 values, so that a
long horizon needs few steps. Every patch is normalized by mean and standard deviation of all values up to it. Version 2.5 (2025) has
200 million weights, no frequency as an input, a past of up to 16,384 values, and a second head that gives the spread of nine
quantiles for 1,024 steps; the median is of the first head. The forecast is the mean of those of the series and of its mirror image.

Queries and keys are rotated before they are normalized, so positions are absolute: they count from the first patch with values. A
longer horizon is rolled out with the median. Missing values are interpolated; before the first value there is padding. If a whole
past is not negative, neither is its forecast.

The weights are on the Hugging Face Hub at google/timesfm-2.5-200m-transformers (Apache 2.0).

Initialization: linear layers N(0, 0.02), biases 0, scales of queries 1.
Shapes: B batch, T steps of the past, H steps of the future, C series, Q values per step, R trained quantiles, N patches, P steps of a
patch, O steps of a block, D width, h heads, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.layers.rope import rotate
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.mapping.key_rules import Fused
from fieldguide.models.transformer.chronos_bolt import weigh_levels

TOLERANCE = 1e-6  # standard deviations below are taken as constant


@dataclass(frozen=True, kw_only=True)
class Config:
    length: int = 512  # T in a task; windows of any length can be read, and the last `max_length` steps are
    horizon: int = 128  # H
    values: int = 6  # Q: the median, then the quantiles
    quantiles: tuple[float, ...] = (0.05, 0.1, 0.5, 0.9, 0.95)  # that are returned
    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # that were trained
    max_length: int = 16_384
    patch: int = 32  # P
    block: int = 128  # O, steps of the median that are forecast at once
    far: int = 1024  # steps of the quantiles that are forecast at once
    dim: int = 1280  # D
    depth: int = 20
    heads: int = 16
    width: int = 80  # d
    hidden: int = 1280
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    flip: bool = True  # average with the mirror image of the series
    positive: bool = True  # no negative forecasts of pasts without negative values
    eps: float = 1e-6


class ResidualMlp(nn.Module):
    """An MLP with a linear layer around it."""

    def __init__(self, inputs: int, hidden: int, outputs: int, bias: bool):
        super().__init__()
        self.up, self.down, self.skip = (
            nn.Linear(a, b, bias=bias) for a, b in ((inputs, hidden), (hidden, outputs), (inputs, outputs))
        )

    def forward(self, x: Tensor) -> Tensor:  # ... inputs -> ... outputs
        return self.down(F.silu(self.up(x))) + self.skip(x)


class Block(nn.Module):
    """Attention and MLP, each normalized before and after."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.width = c.heads, c.width
        self.norm1, self.norm2, self.norm3, self.norm4 = (RMSNorm(c.dim, c.eps) for _ in range(4))
        self.qkv = nn.Linear(c.dim, 3 * c.heads * c.width, bias=False)
        self.proj = nn.Linear(c.heads * c.width, c.dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(c.width, c.eps), RMSNorm(c.width, c.eps)
        self.scale = nn.Parameter(torch.ones(c.width))  # of queries, before softplus
        self.up, self.down = nn.Linear(c.dim, c.hidden, bias=False), nn.Linear(c.hidden, c.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor) -> Tensor:  # B N D, B 1 N d twice, B 1 N N -> B N D
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, self.width)).permute(2, 0, 3, 1, 4)  # B h N d
        q, k = self.q_norm(rotate(q, cos, sin)), self.k_norm(rotate(k, cos, sin))
        q = q * (F.softplus(self.scale) * (1.442695041 / math.sqrt(self.width)))
        weights = (q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1)
        x = x + self.norm2(self.proj((weights @ v).transpose(1, 2).flatten(2)))
        return x + self.norm4(self.down(F.silu(self.up(self.norm3(x)))))


class TimesFM(nn.Module):
    """Past values -> forecasts: the median, then the quantiles. Raises `SettingsError` for quantiles that are not possible."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if (
            not all(0 < q < 1 for q in (*c.quantiles, *c.levels))
            or list(c.levels) != sorted(set(c.levels))
            or 0.5 not in c.levels
        ):
            raise SettingsError(
                f"quantiles={c.quantiles}, levels={c.levels}: they must lie between 0 and 1, and the levels increase and contain 0.5."
            )
        self.embed = ResidualMlp(2 * c.patch, c.dim, c.dim, True)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.point = ResidualMlp(c.dim, c.dim, c.block * (len(c.levels) + 1), False)  # the mean, then the quantiles
        self.spread = ResidualMlp(c.dim, c.dim, c.far * (len(c.levels) + 1), False)
        asked = (0.5, *c.quantiles)[: c.values]
        asked = (*asked, *[0.5] * (c.values - len(asked)))
        self.mix = [weigh_levels(q, c.levels) for q in asked]  # Q R
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def compute(self, x: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:  # B T, B T -> B O 1+R, B far 1+R
        """Return the outputs of both heads at the last patch. T is a multiple of P; `missing` marks the padding in front."""
        c = self.config
        patches, gone = x.unflatten(1, (-1, c.patch)), missing.unflatten(1, (-1, c.patch))  # B N P
        mean, std = measure_until(patches, gone)  # B N
        scaled = (patches - mean[..., None]) / torch.where(std < TOLERANCE, 1.0, std)[..., None]
        scaled = scaled.masked_fill(gone, 0.0)
        y = self.embed(torch.cat([scaled, gone.to(x.dtype)], -1))  # B N D
        padding = gone[..., -1]  # B N
        places = torch.arange(y.shape[1], device=x.device)
        position = places - padding.sum(1, keepdim=True)
        cos, sin = build_rotations(position, c.width, c.rope_theta, y)
        seen = (places <= places[:, None]) & (~padding[:, None] | (places == places[:, None]))  # B N N
        for block in self.blocks:
            y = block(y, cos, sin, seen[:, None])
        heads = [head(y[:, -1]).unflatten(1, (-1, len(c.levels) + 1)) for head in (self.point, self.spread)]
        point, spread = (z * std[:, -1, None, None] + mean[:, -1, None, None] for z in heads)
        return point, spread

    def roll_out(self, x: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:  # B T, B T -> B H 1+R, B far 1+R
        """Return outputs for the whole horizon; the median of each block continues the past."""
        c, found = self.config, []
        middle = 1 + c.levels.index(0.5)
        point, spread = self.compute(x, missing)
        found.append(point)
        while len(found) * c.block < c.horizon:
            x = torch.cat([x, found[-1][..., middle]], 1)[:, -c.max_length :]
            missing = F.pad(missing, (0, c.block))[:, -c.max_length :]
            found.append(self.compute(x, missing)[0])
        return torch.cat(found, 1)[:, : c.horizon], spread

    def predict_quantiles(self, x: Tensor) -> Tensor:  # B T -> B R H
        """Return the trained quantiles of all future steps. Missing values are NaN."""
        c = self.config
        x, known = interpolate(x[:, -c.max_length :])
        front = -x.shape[1] % c.patch
        missing = ~(known.cumsum(1) > 0)  # before the first value
        mean, std = measure_until(x[:, None], missing[:, None])
        scale = torch.where(std < TOLERANCE, 1.0, std)
        scaled = F.pad((x - mean) / scale, (front, 0))
        missing = F.pad(missing, (front, 0), value=True)
        point, spread = self.roll_out(scaled, missing)
        if c.flip:
            mirrored = self.roll_out(-scaled, missing)
            point, spread = (
                (y - torch.cat([z[..., :1], z[..., 1:].flip(-1)], -1)) / 2 for y, z in zip((point, spread), mirrored)
            )
        middle, near = c.levels.index(0.5), min(c.horizon, c.far)
        point, spread = point[..., 1:], spread[:, :near, 1:]  # without the mean
        median = point[..., middle : middle + 1]
        quantiles = spread - spread[..., middle : middle + 1] + median[:, :near]
        quantiles = torch.cat([quantiles[..., :middle], median[:, :near], quantiles[..., middle + 1 :]], -1)
        found = torch.cat([quantiles, point[:, near:]], 1) * scale[..., None] + mean[..., None]  # B H R
        if c.positive:
            lowest = x.masked_fill(~(known.cumsum(1) > 0), torch.inf).amin(1)
            found = torch.where((lowest >= 0)[:, None, None], found.clamp(min=0), found)
        return found.mT

    def forward(self, series: Tensor) -> Tensor:  # B T C -> B H C Q
        found = self.predict_quantiles(series.transpose(1, 2).flatten(0, 1))  # B*C R H
        found = torch.einsum("brh,qr->bhq", found, found.new_tensor(self.mix))
        return found.unflatten(0, (series.shape[0], series.shape[2])).transpose(1, 2)


def measure_until(patches: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:  # B N P, B N P -> B N, B N
    """Return mean and standard deviation of all values up to the end of each patch.

    Patches are joined by their means and squared deviations, since differences of sums of squares lose precision.
    """
    real = (~missing).to(patches.dtype)
    count = real.sum(-1)
    inside = (patches * real).sum(-1) / count.clamp(min=1)
    squares = ((patches - inside[..., None]).square() * real).sum(-1)
    total = count.cumsum(-1)
    mean = (inside * count).cumsum(-1) / total.clamp(min=1)
    # Deviations from the mean so far: those inside the patches, and those of the patches' means from it.
    before = torch.ones(mean.shape[-1], mean.shape[-1], dtype=torch.bool, device=mean.device).tril()
    between = ((inside[:, None] - mean[..., None]).square() * count[:, None]).masked_fill(~before, 0.0).sum(-1)
    return mean, ((squares.cumsum(-1) + between) / total.clamp(min=1)).sqrt()


def build_rotations(position: Tensor, dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:  # B N -> B 1 N d, B 1 N d
    """Return cosines and sines, as `layers.rope` does, for positions that differ by row."""
    speed = 1.0 / base ** (torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) / dim)
    angle = position[:, None, :, None].to(torch.float32) * speed
    cos, sin = angle.cos().to(like.dtype), angle.sin().to(like.dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def interpolate(x: Tensor) -> tuple[Tensor, Tensor]:  # B T -> B T, B T
    """Fill missing values (NaN) linearly between known ones, with the last known one after them and 0 before them."""
    known = ~x.isnan()
    steps = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    before = torch.where(known, steps, -1).cummax(1).values
    after = torch.where(known, steps, x.shape[1]).flip(1).cummin(1).values.flip(1)
    full = x.nan_to_num(0.0)
    low, high = full.gather(1, before.clamp(min=0)), full.gather(1, after.clamp(max=x.shape[1] - 1))
    part = (steps - before).to(x.dtype) / (after - before).clamp(min=1).to(x.dtype)
    inside = torch.where(after < x.shape[1], low + part * (high - low), low)
    return torch.where(known, full, torch.where(before >= 0, inside, 0.0)), known


LAYER, ATTENTION = "model.layers.{i}.", "model.layers.{i}.self_attn."
PARTS = {"input_layer": "up", "output_layer": "down", "residual_layer": "skip"}
HUGGINGFACE = {  # names of files; the modules of transformers name the MLP's layers fc1 and fc2
    **{
        f"{theirs}.{part}.*": f"{ours}.{mine}.*"
        for theirs, ours in (
            ("model.input_ff_layer", "embed"),
            ("output_projection_point", "point"),
            ("output_projection_quantiles", "spread"),
        )
        for part, mine in PARTS.items()
    },
    ATTENTION + "scaling": "blocks.{i}.scale",
    **{f"{ATTENTION}{name}_proj.weight": Fused("blocks.{i}.qkv.weight", part, 3) for part, name in enumerate("qkv")},
    ATTENTION + "o_proj.weight": "blocks.{i}.proj.weight",
    ATTENTION + "q_norm.weight": "blocks.{i}.q_norm.weight",
    ATTENTION + "k_norm.weight": "blocks.{i}.k_norm.weight",
    LAYER + "mlp.ff0.weight": "blocks.{i}.up.weight",
    LAYER + "mlp.ff1.weight": "blocks.{i}.down.weight",
    LAYER + "input_layernorm.weight": "blocks.{i}.norm1.weight",
    LAYER + "post_attention_layernorm.weight": "blocks.{i}.norm2.weight",
    LAYER + "pre_feedforward_layernorm.weight": "blocks.{i}.norm3.weight",
    LAYER + "post_feedforward_layernorm.weight": "blocks.{i}.norm4.weight",
}

ARCHITECTURE = ["TimesFm2_5ModelForPrediction"]


def read_rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    rope = theirs.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise SettingsError(f"rope_type={rope['rope_type']!r} is not supported.")
    return {"rope_theta": rope.get("rope_theta", 10_000.0)}


CONFIG: Mapping[str, ConfigRow] = {
    "model_type": Expect("timesfm2_5"),
    "architectures": Expect(ARCHITECTURE, among=(ARCHITECTURE,)),
    "patch_length": "patch",
    "context_length": "max_length",
    "horizon_length": Derived(lambda keys: {"block": keys["horizon_length"]}, lambda config: config.block),
    "num_hidden_layers": "depth",
    "hidden_size": "dim",
    "intermediate_size": "hidden",
    "head_dim": "width",
    "num_attention_heads": "heads",
    "num_key_value_heads": Expect(lambda config: config.heads),
    "rms_norm_eps": "eps",
    "quantiles": "levels",
    "output_quantile_len": "far",
    "decode_index": Expect(lambda config: 1 + config.levels.index(0.5)),
    "attention_bias": Expect(False),
    "use_bias": Expect(False),
    "activation": Expect("swish"),
    "use_continuous_quantile_head": Expect(True),
    "force_flip_invariance": "flip",
    "infer_is_positive": "positive",
    "rope_parameters": Derived(read_rope, lambda config: {"rope_theta": config.rope_theta, "rope_type": "default"}),
}

CARD = Card(
    name="timesfm",
    model=TimesFM,
    config=Config,
    paper="arXiv:2310.10688",
    year=2023,
    input_type="series",
    output_type="forecast",
    endless=True,
    sizes={
        "timesfm-2.5-200m": Size(params=231_289_280, source="https://huggingface.co/google/timesfm-2.5-200m-transformers"),
        "timesfm-test": Size(
            levels=(0.1, 0.5, 0.9),
            max_length=32,
            patch=4,
            block=8,
            far=16,
            dim=12,
            depth=2,
            heads=2,
            width=6,
            hidden=10,
        ),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.0, "warmup": 0.1, "grad_clip": 1.0},
)
