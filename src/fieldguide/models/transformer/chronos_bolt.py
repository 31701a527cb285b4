"""Chronos-Bolt: zero-shot forecasting with a T5 over patches (Ansari et al. 2024, arXiv:2403.07815; Bolt: 2024).

New here: Chronos is pretrained on nearly 100 billion values of many series, so that it forecasts series that it never saw. Chronos
writes values as tokens of a language model and samples futures; Bolt reads patches of 16 values instead of tokens, and its decoder
gives nine quantiles of the next 64 steps at once, up to 250 times faster. Every window is scaled by its own mean and standard
deviation; values may be missing (NaN). A longer horizon is rolled out: each quantile continues the past, and the quantiles of all
continuations are taken, as in the authors' code.

The weights are on the Hugging Face Hub at amazon/chronos-bolt-tiny, -mini, -small and -base under the Apache 2.0 licence, like the
authors' code.

Initialization: as T5; layers of the patches N(0, 1/inputs), biases 0.
Shapes: B batch, T steps of the past, H steps of the future, C series, Q values per step, R trained quantiles, N patches, P steps of a
patch, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer import t5

MIN_SCALE = 1e-5  # in place of the standard deviation of a constant window


@dataclass(frozen=True, kw_only=True)
class Config:
    length: int = 512  # T in a task; windows of any length can be read, and the last `max_length` steps are
    horizon: int = 64  # H
    values: int = 6  # Q: the median, then the quantiles
    quantiles: tuple[float, ...] = (0.05, 0.1, 0.5, 0.9, 0.95)  # that are returned
    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # that were trained
    max_length: int = 2048
    block: int = 64  # steps that are forecast at once
    patch: int = 16  # P
    stride: int = 16
    reg_token: bool = True  # the encoder reads one more token after the patches
    dim: int = 512  # D
    depth: int = 6
    decoder_depth: int = 6
    heads: int = 8
    width: int = 64  # of a head
    hidden: int = 2048
    buckets: int = 32  # number of relative position buckets
    far: int = 128  # distances from this one on share a bucket
    gated: bool = False
    dropout: float = 0.1
    eps: float = 1e-6
    begin: int = 0  # ID of the only decoder token


class ResidualMlp(nn.Module):
    """An MLP with a linear layer around it."""

    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float):
        super().__init__()
        self.up, self.down, self.skip = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs), nn.Linear(inputs, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # ... inputs -> ... outputs
        return self.dropout(self.down(F.relu(self.up(x)))) + self.skip(x)


class ChronosBolt(nn.Module):
    """Past values -> forecasts: the median, then the quantiles. Raises `SettingsError` for quantiles that are not possible."""

    def __init__(self, config: Config):
        super().__init__()
        c: Any = config
        if (
            not all(0 < q < 1 for q in (*c.quantiles, *c.levels))
            or list(c.levels) != sorted(set(c.levels))
            or 0.5 not in c.levels
        ):
            raise SettingsError(
                f"quantiles={c.quantiles}, levels={c.levels}: they must lie between 0 and 1, and the levels increase and contain 0.5."
            )
        self.config = config
        self.embed = nn.Embedding(1 + c.reg_token, c.dim)
        self.patch_in = ResidualMlp(2 * c.patch, c.hidden, c.dim, c.dropout)
        self.patch_out = ResidualMlp(c.dim, c.hidden, len(c.levels) * c.block, c.dropout)
        self.encoder_bias, self.decoder_bias = nn.Embedding(c.buckets, c.heads), nn.Embedding(c.buckets, c.heads)
        self.encoder = nn.ModuleList(t5.EncoderBlock(c) for _ in range(c.depth))
        self.decoder = nn.ModuleList(t5.DecoderBlock(c) for _ in range(c.decoder_depth))
        self.encoder_norm, self.decoder_norm = RMSNorm(c.dim, c.eps), RMSNorm(c.dim, c.eps)
        self.dropout = nn.Dropout(c.dropout)
        asked = (0.5, *c.quantiles)[: c.values]
        asked = (*asked, *[0.5] * (c.values - len(asked)))
        self.mix = [weigh_levels(q, c.levels) for q in asked]  # Q R
        self.reset_parameters()

    def reset_parameters(self) -> None:
        c = self.config
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith(("attn.qkv", "cross.q")):  # query weights, alone or in front of those of keys and values
                    with torch.no_grad():
                        module.weight[: c.heads * c.width] *= c.width**-0.5
        nn.init.normal_(self.embed.weight)
        for table in (self.encoder_bias, self.decoder_bias):
            nn.init.normal_(table.weight, std=c.dim**-0.5)

    def bias(self, table: nn.Embedding, steps: int, both: bool) -> Tensor:  # -> 1 heads N N
        """Return the bias of each pair of places."""
        places = torch.arange(steps, device=table.weight.device)
        bucket = t5.relative_position_bucket(places - places[:, None], both, self.config.buckets, self.config.far)
        return table(bucket).permute(2, 0, 1)[None]

    def predict_block(self, x: Tensor) -> Tensor:  # B T -> B R block
        """Return the trained quantiles of the next steps. Missing values are NaN."""
        c = self.config
        x = x[:, -c.max_length :]
        mean = x.nanmean(1, keepdim=True).nan_to_num(0.0)
        scale = (x - mean).square().nanmean(1, keepdim=True).sqrt().nan_to_num(1.0)
        scale = torch.where(scale == 0, MIN_SCALE, scale)
        patches = F.pad((x - mean) / scale, (-x.shape[1] % c.patch, 0), value=torch.nan).unfold(1, c.patch, c.stride)  # B N P
        known = ~patches.isnan()
        states = self.patch_in(torch.cat([patches.nan_to_num(0.0), known.to(x.dtype)], -1))  # B N D
        seen = known.any(-1)  # B N
        if c.reg_token:
            states = torch.cat([states, self.embed.weight[1].expand(x.shape[0], 1, -1)], 1)
            seen = F.pad(seen, (0, 1), value=True)
        bias = self.bias(self.encoder_bias, states.shape[1], True).masked_fill(~seen[:, None, None], -torch.inf)
        states = self.dropout(states)
        for block in self.encoder:
            states = block(states, bias)
        states = self.dropout(self.encoder_norm(states))
        y = self.dropout(self.embed.weight[c.begin].expand(x.shape[0], 1, -1))
        bias = self.bias(self.decoder_bias, 1, False)
        decoder: Any = self.decoder
        for block in decoder:
            y = block(y, bias, block.cross.project_kv(states), seen, None, 0)
        y = self.patch_out(self.dropout(self.decoder_norm(y)))[:, 0]  # B R*block
        return (y * scale + mean).unflatten(1, (len(c.levels), c.block))

    def predict_quantiles(self, x: Tensor) -> Tensor:  # B T -> B R H
        """Return the trained quantiles of all future steps."""
        c = self.config
        found = [self.predict_block(x)]
        if c.horizon > c.block:
            x, levels = x[:, None].expand(-1, len(c.levels), -1), x.new_tensor(c.levels)
        while len(found) * c.block < c.horizon:  # every quantile continues the past
            x = torch.cat([x, found[-1]], 2)[..., -c.max_length :]  # B R T
            ahead = self.predict_block(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # B R R block
            found.append(ahead.flatten(1, 2).quantile(levels, dim=1).transpose(0, 1))
        return torch.cat(found, 2)[..., : c.horizon]

    def forward(self, series: Tensor) -> Tensor:  # B T C -> B H C Q
        found = self.predict_quantiles(series.transpose(1, 2).flatten(0, 1))  # B*C R H
        found = torch.einsum("brh,qr->bhq", found, found.new_tensor(self.mix))
        return found.unflatten(0, (series.shape[0], series.shape[2])).transpose(1, 2)


def weigh_levels(quantile: float, levels: tuple[float, ...]) -> list[float]:
    """Return the weights of the trained quantiles that give a quantile: interpolated between two of them, or beyond the last one as a
    normal distribution with the median and the last one.
    """
    weights = [0.0] * len(levels)
    if not levels[0] <= quantile <= levels[-1]:
        last = 0 if quantile < levels[0] else len(levels) - 1
        factor = NormalDist().inv_cdf(quantile) / NormalDist().inv_cdf(levels[last])
        weights[levels.index(0.5)], weights[last] = 1 - factor, factor
        return weights
    above = next(i for i, level in enumerate(levels) if level >= quantile)
    if levels[above] == quantile:
        weights[above] = 1.0
        return weights
    part = (quantile - levels[above - 1]) / (levels[above] - levels[above - 1])
    weights[above - 1], weights[above] = 1 - part, part
    return weights


def huggingface(c: Any) -> dict[str, Row]:
    """Return the weight names of the authors, which are those of T5 in transformers and two MLPs."""
    parts = {"hidden_layer": "up", "output_layer": "down", "residual_layer": "skip"}
    names = {
        f"{theirs}_patch_embedding.{part}.*": f"patch_{ours}.{mine}.*"
        for theirs, ours in (("input", "in"), ("output", "out"))
        for part, mine in parts.items()
    }
    return {**{name: row for name, row in t5.huggingface(c).items() if name != "lm_head.weight"}, **names}


ARCHITECTURE = ["ChronosBoltModelForForecasting"]
CONFIG: Mapping[str, ConfigRow] = {
    "model_type": Expect("t5"),
    "architectures": Expect(ARCHITECTURE, among=(ARCHITECTURE,)),
    "chronos_config.context_length": "max_length",
    "chronos_config.prediction_length": Derived(
        lambda keys: {"block": keys["chronos_config"]["prediction_length"]}, lambda config: config.block
    ),
    "chronos_config.input_patch_size": "patch",
    "chronos_config.input_patch_stride": "stride",
    "chronos_config.quantiles": "levels",
    "chronos_config.use_reg_token": Derived(
        lambda keys: {"reg_token": bool(keys["chronos_config"].get("use_reg_token", False))}, lambda config: config.reg_token
    ),
    "d_model": "dim",
    "num_layers": "depth",
    "num_decoder_layers": Derived(
        lambda keys: {"decoder_depth": keys.get("num_decoder_layers") or keys["num_layers"]},
        lambda config: config.decoder_depth,
    ),
    "num_heads": "heads",
    "d_kv": "width",
    "d_ff": "hidden",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "far",
    "feed_forward_proj": Expect("relu", absent="relu"),
    "dropout_rate": "dropout",
    "layer_norm_epsilon": "eps",
    "decoder_start_token_id": Derived(t5.read_begin_token, lambda config: config.begin),
}

# (dim, depth, heads, hidden, parameter count) of each size
SIZES = {
    "tiny": (256, 4, 4, 1024, 8_652_672),
    "mini": (384, 4, 8, 1536, 21_236_096),
    "small": (512, 6, 8, 2048, 47_718_016),
    "base": (768, 12, 12, 3072, 205_292_928),
}

CARD = Card(
    name="chronos-bolt",
    model=ChronosBolt,
    config=Config,
    paper="arXiv:2403.07815",
    year=2024,
    input_type="series",
    output_type="forecast",
    endless=True,
    sizes={
        **{
            f"chronos-bolt-{name}": Size(
                dim=dim,
                depth=depth,
                decoder_depth=depth,
                heads=heads,
                hidden=hidden,
                params=params,
                source=f"https://huggingface.co/amazon/chronos-bolt-{name}",
            )
            for name, (dim, depth, heads, hidden, params) in SIZES.items()
        },
        "chronos-bolt-test": Size(
            levels=(0.1, 0.5, 0.9),
            max_length=12,
            block=4,
            patch=4,
            stride=4,
            dim=16,
            depth=2,
            decoder_depth=1,
            heads=2,
            width=6,
            hidden=24,
            buckets=6,
            far=5,
            dropout=0.0,
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.1, "grad_clip": 1.0},
)
