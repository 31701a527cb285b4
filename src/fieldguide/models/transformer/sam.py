"""SAM: masks of whatever points and boxes in an image ask for (Kirillov et al. 2023, arXiv:2304.02643).

New here: segmentation without classes. A heavy encoder reads the image once; then a light decoder answers each prompt, some points, a
box or a rough mask, in milliseconds. Since a point may mean an object or a part of it, three masks are predicted, each with an
estimate of its IoU, so that the best can be chosen; a fourth is for prompts that leave no doubt. The masks of one billion objects were
collected with the network itself.

The encoder is a ViT (Li et al. 2022, arXiv:2203.16527): attention in windows of 14 x 14 patches, which are padded with zeros, and in
four layers among all patches; relative positions are added to the scores, separately for rows and columns. Positions of points are
random Fourier features (Tancik et al. 2020, arXiv:2006.10739), whose frequencies are not trained. In the decoder, tokens attend to
the image, and then the image to the tokens (two-way). transformers computes the norms of these layers with an epsilon of 1e-6, the
authors with 1e-5.

Initialization: torch's defaults; positions zero, embeddings and frequencies standard normal.
Shapes: B batch, C channels, H W sides of the image, h w of its patches, D width of the encoder, E of the decoder, N prompts, P points
of a prompt, T tokens, K masks of a prompt, S positions of a map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.mlp import Mlp
from fieldguide.models.layers.norm import ChannelNorm
from fieldguide.models.transformer._shared.sam_checkpoints import AUTHORS, CONFIG, HUGGINGFACE, KINDS

EPS = 1e-6  # of the norms of the encoder
MAX_BIAS = 2**25  # relative positions (rows x heads x patches x patches) that are added at once
Pair = tuple[Tensor, Tensor]
NO_POINT, PADDING = -1, -2  # labels of points; 0 background, 1 object, 2 and 3 the corners of a box


@dataclass(frozen=True, kw_only=True)
class Config:
    image: int = 1024  # side of the image, padded to a square
    channels: int = 3  # C
    patch: int = 16
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # width of the encoder's feed-forward layers
    window: int = 14  # patches per side
    global_layers: tuple[int, ...] = (2, 5, 8, 11)  # layers of the encoder that attend to all patches
    width: int = 256  # E
    mask_width: int = 16  # channels of a mask that is a prompt
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_hidden: int = 2048
    decoder_eps: float = 1e-5  # of the norms of the decoder's layers
    quality_hidden: int = 256  # width of the head that predicts the IoU
    candidates: int = 3  # masks for prompts that may mean several objects; K is one more


class EncoderAttention(nn.Module):
    """Attention among the patches of a square with `side` patches, with relative positions of rows and columns."""

    def __init__(self, c: Config, side: int):
        super().__init__()
        self.heads, self.side = c.heads, side
        self.qkv, self.proj = nn.Linear(c.dim, 3 * c.dim), nn.Linear(c.dim, c.dim)
        self.rows = nn.Parameter(torch.zeros(2 * side - 1, c.dim // c.heads))
        self.columns = nn.Parameter(torch.zeros(2 * side - 1, c.dim // c.heads))

    def forward(self, x: Tensor) -> Tensor:  # B h w D -> B h w D
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rows = x.shape[0] if isinstance(x.shape[0], int) else 1  # a traced graph leaves their number open
        step = max(1, min(self.heads, MAX_BIAS // max(1, rows * self.side**4)))  # heads at once
        parts = zip(*(values.split(step, 1) for values in (q, k, v)))
        found = torch.cat([dot_product_attention(a, b, c, self.measure_positions(a)) for a, b, c in parts], 1)
        return self.proj(found.transpose(1, 2).flatten(2)).view_as(x)

    def measure_positions(self, q: Tensor) -> Tensor:  # B heads S E -> B heads S S
        """Return what is added to the scores of each pair of patches."""
        place = torch.arange(self.side, device=q.device)
        away = place[:, None] - place + self.side - 1
        grid = q.unflatten(2, (self.side, self.side))
        down = torch.einsum("bnhwe,hke->bnhwk", grid, self.rows[away].to(q.dtype))
        across = torch.einsum("bnhwe,wke->bnhwk", grid, self.columns[away].to(q.dtype))
        return (down[..., :, None] + across[..., None, :]).flatten(4, 5).flatten(2, 3)


class Block(nn.Module):
    """A pre-norm block, whose attention is limited to windows unless `window` is 0."""

    def __init__(self, c: Config, window: int):
        super().__init__()
        self.window = window
        self.norm1, self.attn = nn.LayerNorm(c.dim, EPS), EncoderAttention(c, window or c.image // c.patch)
        self.norm2, self.mlp = nn.LayerNorm(c.dim, EPS), Mlp(c.dim, c.hidden)

    def forward(self, x: Tensor) -> Tensor:  # B h w D -> B h w D
        normed = self.norm1(x)
        x = x + (self.attend_windows(normed) if self.window else self.attn(normed))
        return x + self.mlp(self.norm2(x))

    def attend_windows(self, x: Tensor) -> Tensor:  # B h w D -> B h w D
        side, (high, wide) = self.window, x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -wide % side, 0, -high % side))
        parts = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # B rows columns side side D
        found = self.attn(parts.flatten(0, 2)).view_as(parts)
        return found.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :high, :wide]


class Encoder(nn.Module):
    """A ViT, and two convolutions that reduce its width."""

    def __init__(self, c: Config):
        super().__init__()
        side = c.image // c.patch
        self.patch = nn.Conv2d(c.channels, c.dim, c.patch, c.patch)
        self.positions = nn.Parameter(torch.zeros(1, side, side, c.dim))
        self.blocks = nn.ModuleList(Block(c, 0 if i in c.global_layers else c.window) for i in range(c.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(c.dim, c.width, 1, bias=False),
            ChannelNorm(c.width, EPS),
            nn.Conv2d(c.width, c.width, 3, padding=1, bias=False),
            ChannelNorm(c.width, EPS),
        )

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B E h w
        x = self.patch(x).permute(0, 2, 3, 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


class Attention(nn.Module):
    """Attention whose queries, keys and values are `reduction` times narrower than their inputs."""

    def __init__(self, c: Config, reduction: int):
        super().__init__()
        self.heads, inner = c.decoder_heads, c.width // reduction
        self.query, self.key, self.value = (nn.Linear(c.width, inner) for _ in range(3))
        self.proj = nn.Linear(inner, c.width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # B T E, B S E, B S E -> B T E
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        return self.proj(dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TwoWayLayer(nn.Module):
    """Attention among tokens, from tokens to the image, a feed-forward network, and attention from the image to tokens."""

    def __init__(self, c: Config, is_first: bool):
        super().__init__()
        self.is_first = is_first
        self.own, self.cross, self.back = Attention(c, 1), Attention(c, 2), Attention(c, 2)
        self.mlp = nn.Sequential(nn.Linear(c.width, c.decoder_hidden), nn.ReLU(), nn.Linear(c.decoder_hidden, c.width))
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(c.width, c.decoder_eps) for _ in range(4))

    def forward(self, x: Tensor, image: Tensor, tokens: Tensor, places: Tensor) -> Pair:  # B T E, B S E -> the same
        placed = x if self.is_first else x + tokens
        attended = self.own(placed, placed, x)
        x = self.norm1(attended if self.is_first else x + attended)
        x = self.norm2(x + self.cross(x + tokens, image + places, image))
        x = self.norm3(x + self.mlp(x))
        return x, self.norm4(image + self.back(image + places, x + tokens, x))


def build_head(width: int, hidden: int, out: int) -> nn.Sequential:
    """Return three linear layers with ReLU in between."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out))


class Sam(nn.Module):
    """Segmentation network for square images with prompts (see `OUTPUT_TYPES["prompted-masks"]`).

    Points are in pixels of the image. A point's label is 1 for the object, 0 for the background, 2 and 3 for the corners of a box, -1 for
    no point, which follows the points of a prompt without a box, and -2 for padding, which becomes a token of zeros, as in transformers.

    `encode` reads an image once, and `decode` answers prompts about it. Raises `SettingsError` for sizes that do not divide each other.
    """

    frequencies: Tensor

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.image % c.patch or c.dim % c.heads or c.width % 8 or (c.width // 2) % c.decoder_heads:
            raise SettingsError(
                f"image={c.image} must be divisible by patch={c.patch}, dim={c.dim} by heads={c.heads}, and width={c.width} by 8 and by "
                f"twice decoder_heads={c.decoder_heads}."
            )
        self.encoder = Encoder(c)
        self.register_buffer("frequencies", torch.randn(2, c.width // 2))
        self.kinds, self.no_point = nn.Parameter(torch.randn(KINDS, c.width)), nn.Parameter(torch.randn(1, c.width))
        self.no_mask = nn.Parameter(torch.randn(1, c.width))
        self.mask_prompt = nn.Sequential(
            nn.Conv2d(1, c.mask_width // 4, 2, 2),
            ChannelNorm(c.mask_width // 4, EPS),
            nn.GELU(),
            nn.Conv2d(c.mask_width // 4, c.mask_width, 2, 2),
            ChannelNorm(c.mask_width, EPS),
            nn.GELU(),
            nn.Conv2d(c.mask_width, c.width, 1),
        )
        self.quality_token = nn.Parameter(torch.randn(1, c.width))
        self.mask_tokens = nn.Parameter(torch.randn(c.candidates + 1, c.width))
        self.layers = nn.ModuleList(TwoWayLayer(c, not i) for i in range(c.decoder_depth))
        self.final, self.norm = Attention(c, 2), nn.LayerNorm(c.width)
        self.enlarge = nn.Sequential(
            nn.ConvTranspose2d(c.width, c.width // 4, 2, 2),
            ChannelNorm(c.width // 4, EPS),
            nn.GELU(),
            nn.ConvTranspose2d(c.width // 4, c.width // 8, 2, 2),
            nn.GELU(),
        )
        self.masks = nn.ModuleList(build_head(c.width, c.width, c.width // 8) for _ in range(c.candidates + 1))
        self.quality = build_head(c.width, c.quality_hidden, c.candidates + 1)

    def encode(self, image: Tensor) -> Tensor:  # B C H W -> B E h w
        """Return the features of images."""
        return self.encoder(image)

    def encode_places(self, places: Tensor) -> Tensor:  # ... 2 -> ... E
        """Return Fourier features of places, x and y as fractions of the image's sides."""
        angle = 2 * math.pi * ((2 * places - 1) @ self.frequencies)
        return torch.cat([angle.sin(), angle.cos()], -1)

    def encode_points(self, points: Tensor, labels: Tensor) -> Tensor:  # B N P 2, B N P -> B N P E
        """Return the tokens of points."""
        known = self.encode_places((points.to(self.frequencies.dtype) + 0.5) / self.config.image)
        known = known + self.kinds[labels.clamp(min=0)]
        return torch.where((labels == NO_POINT)[..., None], self.no_point, known) * (labels != PADDING)[..., None]

    def decode(
        self, features: Tensor, points: Tensor, labels: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # B E h w, B N P 2, B N P, B N 4h 4w -> B N K, B N K 4h 4w
        """Return the predicted IoU and the logits of the masks of prompts. `masks` are logits of rough masks, one for each prompt."""
        (high, wide), (rows, count) = features.shape[2:], labels.shape[:2]
        if masks is None:
            dense = self.no_mask.view(1, -1, 1, 1)
        else:
            dense = self.mask_prompt(masks.flatten(0, 1)[:, None])  # B*N E h w
        image = (features.repeat_interleave(count, 0) + dense).flatten(2).mT
        y, x = ((torch.arange(n, device=features.device, dtype=self.frequencies.dtype) + 0.5) / n for n in (high, wide))
        positions = self.encode_places(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)).flatten(0, 1)
        learned = torch.cat([self.quality_token, self.mask_tokens]).expand(rows * count, -1, -1)
        tokens = torch.cat([learned, self.encode_points(points, labels).flatten(0, 1)], 1)
        state = tokens
        for layer in self.layers:
            state, image = layer(state, image, tokens, positions)
        state = self.norm(state + self.final(state + tokens, image + positions, image))
        enlarged = self.enlarge(image.mT.unflatten(2, (high, wide)))
        weights = torch.stack([head(state[:, 1 + k]) for k, head in enumerate(self.masks)], 1)  # B*N K E/8
        logits = torch.einsum("bke,behw->bkhw", weights, enlarged)
        return self.quality(state[:, 0]).unflatten(0, (rows, count)), logits.unflatten(0, (rows, count))

    def forward(self, image: Tensor, points: Tensor, labels: Tensor) -> Tensor:  # B C H W, B N P 2, B N P -> B N K 1+S
        quality, masks = self.decode(self.encode(image), points, labels)
        return torch.cat([quality[..., None], masks.flatten(3)], -1)


SOURCE = "transformers, {} with the 256 frequencies, which are not trained"

CARD = Card(
    name="sam",
    model=Sam,
    config=Config,
    paper="arXiv:2304.02643",
    year=2023,
    input_type="prompted-image",
    output_type="prompted-masks",
    sizes={
        "sam-vit-b": Size(params=93_735_472, source=SOURCE.format("93,735,728")),
        "sam-vit-l": Size(
            dim=1024,
            depth=24,
            heads=16,
            hidden=4096,
            global_layers=(5, 11, 17, 23),
            params=312_342_832,
            source=SOURCE.format("312,343,088"),
        ),
        "sam-vit-h": Size(
            dim=1280,
            depth=32,
            heads=16,
            hidden=5120,
            global_layers=(7, 15, 23, 31),
            params=641_090_608,
            source=SOURCE.format("641,090,864"),
        ),
        "sam-test": Size(
            image=40,
            patch=8,
            dim=12,
            depth=2,
            heads=2,
            hidden=24,
            window=2,
            global_layers=(1,),
            width=16,
            mask_width=8,
            decoder_heads=2,
            decoder_hidden=24,
            quality_hidden=12,
        ),
    },
    weights={"huggingface": HUGGINGFACE, "facebook": AUTHORS},
    configs={"huggingface": CONFIG},
)
