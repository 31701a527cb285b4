"""Qwen2.5-VL: a language model that reads images at their own size (Bai et al. 2025, arXiv:2502.13923).

New here: images keep their size and aspect ratio. The image encoder has rotary positions by row and column instead of a table of
positions, and attends within windows of 112 pixels in all but four blocks, so that its cost grows linearly with the pixels. Four
neighboring patches become one token. In the decoder, a Qwen2.5, the rotary pairs of a head are divided among three positions:
time, row and column (M-RoPE); they are equal for text.

Initialization: N(0, 0.02), zero biases.
Shapes: B batch, I images of a row, N images, C channels, H and W pixels, P patch, h and w patches, M merged patches per side, T
tokens, V width of the image encoder, G windows, K patches of a window, d width of a head, D width of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import OPENAI as SCALE
from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError, WeightsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.gqa import CosSin, GatedMlp, cos_sin_at
from fieldguide.models.layers.kv_cache import Cache
from fieldguide.models.layers.norm import RMSNorm
from fieldguide.models.layers.rope import rotate
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Fused, Row
from fieldguide.models.transformer import llama, qwen2
from fieldguide.models.transformer._shared.image_decoder import ImageConditionedDecoder

Maybe = Tensor | None
EPS = 1e-6  # of the norms of the image encoder


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 448  # side in pixels of images whose size is not known yet, in plans and examples
    patch: int = 14  # P
    frames: int = 2  # frames of a patch, all of which show the same image
    merge: int = 2  # M
    window: int = 112  # side of the windows of attention, in pixels
    seen_dim: int = 1280  # V
    seen_depth: int = 32
    seen_heads: int = 16
    seen_hidden: int = 3420  # hidden width of the gated MLPs of the image encoder
    whole: tuple[int, ...] = (7, 15, 23, 31)  # blocks with attention over the whole image
    vocab_size: int = 152_064
    length: int = 128_000  # maximum sequence length, in tokens
    dim: int = 3584  # D
    depth: int = 28
    heads: int = 28
    kv_heads: int = 4  # number of key/value heads
    hidden: int = 18_944  # hidden width of the gated MLPs
    rope_theta: float = 1_000_000.0  # base of the rotary wavelengths
    rope_scaling: tuple[float | str, ...] = ()
    sections: tuple[int, ...] = (16, 24, 24)  # rotary pairs of a head for time, row and column
    eps: float = 1e-6
    tie_embeddings: bool = False  # the output head shares the weights of the embedding
    picture: int = 151_655  # ID of the image token


class Attention(nn.Module):
    """Attention among the patches of a window, or of all windows of an image, with rotary positions."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % (4 * heads):
            raise SettingsError(f"seen_dim={dim} must be divisible by 4 x seen_heads={heads}.")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, turn: CosSin, mask: Tensor | None, whole: bool) -> Tensor:  # N G K V -> N G K V
        images, windows = x.shape[:2]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # each N G heads K d
        q, k = rotate(q, *turn), rotate(k, *turn)
        if whole:
            q, k, v = (y.transpose(1, 2).flatten(2, 3) for y in (q, k, v))  # N heads GK d
            x = dot_product_attention(q, k, v, mask).unflatten(2, (windows, -1)).transpose(1, 2)
        else:
            q, k, v = (y.flatten(0, 1) for y in (q, k, v))  # NG heads K d
            x = dot_product_attention(q, k, v, mask).unflatten(0, (images, windows))
        return self.proj(x.transpose(2, 3).flatten(3))


class BiasedMlp(GatedMlp):
    """The gated MLP with biases."""

    def __init__(self, dim: int, hidden: int):
        super().__init__(dim, hidden)
        self.up, self.down = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)


class Block(nn.Module):
    """A pre-norm Transformer block of the image encoder."""

    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.seen_dim, EPS), RMSNorm(c.seen_dim, EPS)
        self.attn, self.mlp = Attention(c.seen_dim, c.seen_heads), BiasedMlp(c.seen_dim, c.seen_hidden)

    def forward(self, x: Tensor, turn: CosSin, mask: Tensor | None, whole: bool) -> Tensor:  # N G K V -> N G K V
        x = x + self.attn(self.norm1(x), turn, mask, whole)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Joins M x M patches and maps them to the width of the decoder."""

    def __init__(self, c: Config):
        super().__init__()
        self.merge = c.merge
        self.norm = RMSNorm(c.seen_dim, EPS)
        self.up = nn.Linear(c.merge**2 * c.seen_dim, c.merge**2 * c.seen_dim)
        self.down = nn.Linear(c.merge**2 * c.seen_dim, c.dim)

    def forward(self, x: Tensor) -> Tensor:  # N h w V -> N h/M w/M D
        x = self.norm(x).unflatten(2, (-1, self.merge)).unflatten(1, (-1, self.merge))
        return self.down(F.gelu(self.up(x.transpose(2, 3).flatten(3))))


def split_windows(x: Tensor, side: int) -> Tensor:  # N h w V -> N G K V
    """Return the patches by windows of `side` patches per side, which divides h and w."""
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join_windows(x: Tensor, side: int, columns: int) -> Tensor:  # N G K V -> N h w V
    """Undo `split_windows`; `columns` is the number of windows next to each other."""
    return x.unflatten(2, (side, side)).unflatten(1, (-1, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


class Vision(nn.Module):
    """The image encoder. Raises `SettingsError` if `window` is not a multiple of the sides of `merge` patches."""

    def __init__(self, c: Config):
        super().__init__()
        if c.window % (c.patch * c.merge):
            raise SettingsError(f"window={c.window} must be a multiple of patch x merge = {c.patch * c.merge}.")
        self.size, self.merge, self.side, self.whole = c.patch, c.merge, c.window // c.patch, c.whole
        self.patch = nn.Conv3d(
            c.channels, c.seen_dim, (c.frames, c.patch, c.patch), (c.frames, c.patch, c.patch), bias=False
        )  # N C frames H W -> N V 1 h w
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.seen_depth))
        self.merger = Merger(c)

    def make_turn(self, h: int, w: int, like: Tensor) -> CosSin:  # -> G 1 K d, twice
        """Return the rotary angles: one half of the pairs of a head turns with the row, the other with the column."""
        attn = self.blocks[0].attn
        assert isinstance(attn, Attention)
        width = attn.qkv.in_features // attn.heads
        speed = llama.inverse_frequencies(width // 2, 10_000.0, like.device)  # d/4
        rows, columns = (torch.arange(n, device=like.device).float()[:, None] * speed for n in (h, w))
        angle = torch.cat([rows[:, None].expand(-1, w, -1), columns[None].expand(h, -1, -1)], -1)  # h w d/2
        angle = split_windows(angle[None], self.side)[0, :, None]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype)

    def forward(self, image: Tensor, grid: Tensor | None = None) -> Tensor:  # N C H W, N 2 -> N h/M w/M D
        """Return the merged patches. `grid` holds the rows and columns of patches of images that are padded at their end."""
        h, w = (length // self.size for length in image.shape[2:])
        # All frames of a patch show the image, so that their weights add up.
        x = F.conv2d(image, self.patch.weight.sum(2), stride=self.size).permute(0, 2, 3, 1)  # N h w V
        down, right = -h % self.side, -w % self.side
        x = split_windows(F.pad(x, (0, 0, 0, right, 0, down)), self.side)
        turn = self.make_turn(h + down, w + right, x)
        near, far = self.make_masks(h, w, down, right, grid, x)
        for layer, block in enumerate(self.blocks):
            x = block(x, turn, far if layer in self.whole else near, layer in self.whole)
        x = join_windows(x, self.side, (w + right) // self.side)[:, :h, :w]
        return self.merger(x)

    def make_masks(
        self, h: int, w: int, down: int, right: int, grid: Tensor | None, like: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:  # N 2 -> NG 1 1 K, N 1 1 GK
        """Return which patches are read in windows and in whole images, or None if all are real.

        Where all are padding, all are read, so that no row of a softmax is empty.
        """
        if grid is None and not down and not right:
            return None, None
        rows = torch.arange(h + down, device=like.device)[:, None]
        columns = torch.arange(w + right, device=like.device)
        if grid is None:
            real = ((rows < h) & (columns < w)).expand(len(like), -1, -1)  # N h w
        else:
            real = (rows < grid[:, 0, None, None]) & (columns < grid[:, 1, None, None])
        real = split_windows(real[..., None], self.side)[..., 0]  # N G K
        near, far = real.flatten(0, 1), real.flatten(1)
        near, far = (part | ~part.any(-1, keepdim=True) for part in (near, far))
        return near[:, None, None], far[:, None, None]


class Language(qwen2.Qwen2):
    """Qwen2.5 with positions of time, row and column."""

    def make_turn(self, places: Tensor, cache: Cache | None, like: Tensor) -> CosSin:  # T, B T or B T 3 -> (B 1) T d, twice
        speed = self.inverse_frequencies(like.device)
        if places.ndim < 3:
            return cos_sin_at(places, speed, like)
        axis = [axis for axis, pairs in enumerate(self.config.sections) for _ in range(pairs)]  # of each pair, d/2
        angle = places[..., torch.tensor(axis, device=like.device)].float() * speed  # B T d/2
        cos, sin = angle.cos(), angle.sin()
        cos, sin = torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype)
        return cos[:, None], sin[:, None]


class Qwen2_5VL(nn.Module):
    """A decoder that returns the logits of the next token at each position, given images and tokens.

    `image` is B C H W or, with several images in a row, B I C H W; sides are multiples of P x M. Images of different sizes are
    padded at their right and lower end, and `grid` (B 2 or B I 2) holds the rows and columns of patches of each. A sequence has
    the token `picture` once per merged patch (see `expand_image_tokens`), for all images of the row, its first ones, or none.
    Padding of tokens may be on either side. For generation see `with_images`. Raises `DataError` for sequences longer than
    `length`, other sides, and another number of image tokens, and `SettingsError` if `sections` do not add up to d / 2.
    """

    frozen_parts: ClassVar[tuple[str, ...]] = ("vision.patch", "vision.blocks")  # in fine-tuning, as the authors' scripts do

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if 2 * sum(c.sections) * c.heads != c.dim or len(c.sections) != 3:
            raise SettingsError(f"sections={c.sections} must be three numbers with the sum {c.dim / c.heads / 2:g}.")
        self.vision, self.language = Vision(c), Language(c)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.language.reset_parameters()
        for module in self.vision.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def count_image_tokens(self, height: int, width: int) -> int:
        """Return the number of tokens of an image of this size in pixels."""
        unit = self.config.patch * self.config.merge
        return (height // unit) * (width // unit)

    def expand_image_tokens(self, tokens: Sequence[int], sizes: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Return the sequence with the k-th image token repeated for an image of the k-th size (height, width in pixels)."""
        left = iter(sizes)
        usual = (self.config.image, self.config.image)
        counts = (self.count_image_tokens(*next(left, usual)) if one == self.config.picture else 1 for one in tokens)
        return [token for one, count in zip(tokens, counts) for token in [one] * count]

    def embed(
        self, image: Tensor | None, tokens: Tensor, mask: Tensor | None, grid: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:  # B (I) C H W, B T, B T, B (I) 2 -> B T D, B T 3
        """Return the token embeddings, with merged patches in place of the image tokens, and the positions of all tokens."""
        picture = self.config.picture
        named = tokens == picture if mask is None else (tokens == picture) & mask
        x = self.language.embed(tokens.masked_fill(named, 0))
        known = not (torch.compiler.is_compiling() or tokens.is_meta)
        if image is None:
            if known and named.any():
                raise DataError(f"A sequence has the image token {picture}, but no image was passed.")
            return x, None
        c, unit = self.config, self.config.patch * self.config.merge
        if image.shape[-1] % unit or image.shape[-2] % unit:
            raise DataError(
                f"Images of {image.shape[-2]} x {image.shape[-1]} pixels: both sides must be multiples of {unit} "
                f"(patch={c.patch} x merge={c.merge})."
            )
        image = image[:, None] if image.ndim == 4 else image
        rows, columns = image.shape[-2] // unit, image.shape[-1] // unit
        if grid is None:
            sides = torch.tensor([rows, columns], device=tokens.device).expand(*image.shape[:2], 2)
        else:
            sides = grid.view(*image.shape[:2], 2) // c.merge  # B I 2
        ends = (sides[..., 0] * sides[..., 1]).cumsum(1)  # B I: image tokens up to the end of each image
        if known:
            found = named.sum(1, keepdim=True)
            if (wrong := ((found != ends) & (found > 0)).all(1)).any():
                row = int(wrong.nonzero()[0])
                raise DataError(
                    f"Row {row} has the image token {picture} {int(found[row])} times, but its images have "
                    f"{', '.join(map(str, ends.diff(dim=1, prepend=0 * ends[:, :1])[row].tolist()))} merged patches. "
                    "Use expand_image_tokens(tokens, sizes) to repeat the image token."
                )
        seen = self.vision(image.flatten(0, 1), None if grid is None else grid.reshape(-1, 2))  # BI rows columns D
        seen = seen.unflatten(0, image.shape[:2]).flatten(1, 3).to(x.dtype)  # B I*rows*columns D
        before = named.cumsum(1) - named.long()  # B T: image tokens before each token
        done = before[..., None] >= ends[:, None]  # B T I: whether an image ends before a token
        which = done.sum(-1).clamp(max=image.shape[1] - 1)
        pick = lambda values: values.gather(1, which)
        within = before - pick(ends - sides[..., 0] * sides[..., 1])
        across = pick(sides[..., 1]).clamp(min=1)
        row, column = within // across, within % across
        place = ((which * rows + row) * columns + column).clamp(0, seen.shape[1] - 1)
        x = torch.where(named[..., None], seen.gather(1, place[..., None].expand(-1, -1, seen.shape[2])), x)
        # An image takes as many positions as its longer side; its tokens count from there by row and column.
        words = ~named if mask is None else mask & ~named
        start = words.cumsum(1) - words.long() + (done * sides.amax(-1)[:, None]).sum(-1)
        shift = torch.stack([torch.zeros_like(row), row, column], -1)
        return x, start[..., None] + torch.where(named[..., None], shift, 0)

    def features(
        self,
        image: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        grid: Tensor | None = None,
    ) -> Tensor:  # B (I) C H W, B T, B T -> B T D
        """Return the final hidden states of the decoder."""
        x, places = self.embed(image, tokens, mask, grid)
        x = self.language.forward_blocks(x, mask, cache, places)
        if cache is not None and places is not None:
            last = places.amax(-1) if mask is None else places.amax(-1).masked_fill(~mask, -1)
            cache.continue_at(last.amax(1) + 1)
        return x

    def forward(self, image: Maybe, tokens: Tensor, mask: Maybe = None, grid: Maybe = None) -> Tensor:  # ... -> B T vocab
        return self.language.head(self.features(image, tokens, mask, grid=grid))

    def with_images(self, image: Tensor, grid: Tensor | None = None) -> ImageConditionedDecoder:
        """Return the model with these images as a decoder for `fieldguide.models.generation.generate` with B prompts."""
        return ImageConditionedDecoder(self, image, **({} if grid is None else {"grid": grid}))


def map_weights(tower: str, body: str) -> dict[str, Row]:
    """Return the public names, given the prefixes of the image encoder and of the decoder's body."""
    block = tower + "blocks.{i}."
    names: dict[str, Row] = {
        tower + "patch_embed.proj.weight": "vision.patch.weight",
        block + "norm1.weight": "vision.blocks.{i}.norm1.weight",
        block + "norm2.weight": "vision.blocks.{i}.norm2.weight",
        block + "attn.qkv.*": "vision.blocks.{i}.attn.qkv.*",
        block + "attn.proj.*": "vision.blocks.{i}.attn.proj.*",
        block + "mlp.down_proj.*": "vision.blocks.{i}.mlp.down.*",
        tower + "merger.ln_q.weight": "vision.merger.norm.weight",
        tower + "merger.mlp.0.*": "vision.merger.up.*",
        tower + "merger.mlp.2.*": "vision.merger.down.*",
        "lm_head.weight": "language.head.weight",  # absent if tied to the embedding
    }
    for kind in ("weight", "bias"):
        for part, name in enumerate(("gate", "up")):
            names[f"{block}mlp.{name}_proj.{kind}"] = Fused(f"vision.blocks.{{i}}.mlp.up.{kind}", part, 2)
    for key, row in qwen2.HUGGINGFACE.items():
        if key.startswith("model."):
            ours = Fused(f"language.{row.ours}", row.part, row.parts) if isinstance(row, Fused) else row
            names[body + key.removeprefix("model.")] = f"language.{row}" if isinstance(row, str) else ours
    return names


HUGGINGFACE = map_weights("visual.", "model.") | map_weights("model.visual.", "model.language_model.")  # files, memory


def read_mrope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and sections. Raises `WeightsError` for positions of another kind."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "mrope"))
    if kind not in ("default", "mrope"):
        raise WeightsError(f"rope_type={kind!r} is not supported. It must be 'mrope', or 'default' with mrope_section.")
    theta = rope.get("rope_theta", theirs.get("rope_theta", 1_000_000.0))
    return {"rope_theta": theta, "sections": tuple(rope.get("mrope_section", (16, 24, 24)))}


def write_mrope(c: Config) -> dict[str, Any]:
    """Return the rope_parameters of a config."""
    return {"rope_type": "default", "rope_theta": c.rope_theta, "mrope_section": list(c.sections)}


def read_channels(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of channels, which has two names."""
    vision = theirs.get("vision_config") or {}
    return {"channels": vision.get("in_channels", vision.get("in_chans", 3))}


def place_row(key: str, row: ConfigRow) -> ConfigRow:
    """Return a rule of the decoder, read from `text_config` or, in files from before 2026, from the configuration itself."""
    find = lambda theirs: theirs.get("text_config") or theirs
    if isinstance(row, Derived):
        return Derived(lambda theirs: row.read(find(theirs)), row.write)
    if isinstance(row, str):
        return Derived(lambda theirs: {row: find(theirs)[key]} if key in find(theirs) else {}, lambda c: getattr(c, row))
    return row


LANGUAGE = {
    **{key: row for key, row in llama.SHARED.items() if key != "tie_word_embeddings"},
    "rope_parameters": Derived(read_mrope, write_mrope),
}
CONFIG: dict[str, ConfigRow] = {
    "model_type": Expect("qwen2_5_vl"),
    "architectures": Expect(["Qwen2_5_VLForConditionalGeneration"]),
    "image_token_id": WithDefault("picture", 151_655),
    "tie_word_embeddings": WithDefault("tie_embeddings", False),
    "use_sliding_window": Expect(False, written=False),
    "hidden_act": Expect("silu", written=False),
    "text_config.model_type": Expect("qwen2_5_vl_text"),
    **{f"text_config.{key}": place_row(key, row) for key, row in LANGUAGE.items()},
    "text_config.use_sliding_window": Expect(False),
    "vision_config.model_type": Expect("qwen2_5_vl_vision", absent="qwen2_5_vl_vision"),
    "vision_config.in_channels": Derived(read_channels, lambda c: c.channels),
    "vision_config.image_size": WithDefault("image", 448),  # our own key
    "vision_config.patch_size": WithDefault("patch", 14),
    "vision_config.temporal_patch_size": WithDefault("frames", 2),
    "vision_config.spatial_merge_size": WithDefault("merge", 2),
    "vision_config.window_size": WithDefault("window", 112),
    "vision_config.hidden_size": "seen_dim",
    "vision_config.depth": WithDefault("seen_depth", 32),
    "vision_config.num_heads": WithDefault("seen_heads", 16),
    "vision_config.intermediate_size": WithDefault("seen_hidden", 3420),
    "vision_config.fullatt_block_indexes": WithDefault("whole", (7, 15, 23, 31)),
    "vision_config.out_hidden_size": Expect(lambda c: c.dim),
    "vision_config.hidden_act": Expect("silu"),
}

CARD = Card(
    name="qwen2.5-vl",
    model=Qwen2_5VL,
    config=Config,
    paper="arXiv:2502.13923",
    year=2025,
    input_type="captioned",
    output_type="tokens",
    optional_inputs=("grid",),
    sizes={
        "qwen2.5-vl-7b": Size(params=8_292_166_656, source="Qwen/Qwen2.5-VL-7B-Instruct"),
        "qwen2.5-vl-3b": Size(
            vocab_size=151_936,
            dim=2048,
            depth=36,
            heads=16,
            kv_heads=2,
            hidden=11_008,
            tie_embeddings=True,
            params=3_754_622_976,
            source="Qwen/Qwen2.5-VL-3B-Instruct",
        ),
        "qwen2.5-vl-72b": Size(
            seen_hidden=3456,
            dim=8192,
            depth=80,
            heads=64,
            kv_heads=8,
            hidden=29_568,
            params=73_410_777_344,
            source="Qwen/Qwen2.5-VL-72B-Instruct",
        ),
        "qwen2.5-vl-test": Size(
            channels=2,
            image=16,
            patch=4,
            window=8,
            seen_dim=16,
            seen_depth=2,
            seen_heads=2,
            seen_hidden=10,
            whole=(1,),
            vocab_size=32,
            length=24,
            dim=32,
            depth=2,
            heads=4,
            kv_heads=2,
            hidden=12,
            sections=(1, 1, 2),
            picture=31,
        ),
    },
    weights={"huggingface": HUGGINGFACE},
    configs={"huggingface": CONFIG},
    scale=SCALE,
    # The report gives no learning rate; this is that of LLaVA-1.5 (table 9).
    recipe={"optimizer": "adamw", "lr": 2e-5, "weight_decay": 0.0, "warmup": 0.03, "grad_clip": 1.0},
)
