"""VQGAN: images as a map of codes from a learned codebook (Esser et al. 2021, arXiv:2012.09841).

New here: each latent is replaced by the nearest of some thousand vectors (VQ-VAE, van den Oord et al. 2017, arXiv:1711.00937), and the
autoencoder is trained against a critic, so that few codes suffice for a Transformer or for diffusion to work on. Gradients pass the
choice of the nearest vector as if it were not there (straight-through); the codebook learns by losses of its own.

Initialization: torch's defaults; the codebook uniform within 1 / its size, as in the authors' code.
Shapes: B batch, C channels of the image, L of the latents, H W sides of the image, h w of the latents, E width of a code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import HALF, Card, Size
from fieldguide.core.errors import DataError
from fieldguide.models.diffusion import autoencoder_kl as kl
from fieldguide.models.diffusion._shared.tiles import map_tiles
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Row


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 3  # C
    image: int = 256  # side of the images that it was trained with; others work, too
    latent: int = 3  # L
    codes: int = 8192  # size of the codebook
    code_dim: int = 3  # E
    dim: int = 128
    growth: tuple[int, ...] = (1, 2, 4)  # width of each level, times dim
    depth: int = 2  # blocks per level of the encoder; the decoder has one more
    groups: int = 32  # of group norm
    scaling: float = 0.18215  # 1 / standard deviation of the latents


class VQGAN(nn.Module):
    """VQGAN: image -> image, decoded from codes. Pixels are -1 to 1.

    Raises `DataError` if `encode` gets an image whose sides are not divisible by `stride`.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.stride = 2 ** (len(c.growth) - 1)  # sides of the image by those of the latents
        self.encoder, self.decoder = kl.Encoder(c, c.latent), kl.Decoder(c)
        self.quant, self.post_quant = nn.Conv2d(c.latent, c.code_dim, 1), nn.Conv2d(c.code_dim, c.latent, 1)
        self.codebook = nn.Embedding(c.codes, c.code_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.codebook.weight, -1 / self.config.codes, 1 / self.config.codes)

    def encode(self, image: Tensor) -> Tensor:  # B C H W -> B E h w
        """Return latents before they are replaced by codes."""
        if any(side % self.stride for side in image.shape[2:]):
            raise DataError(
                f"an image of {image.shape[3]} x {image.shape[2]} pixels cannot be encoded: its sides must be multiples of "
                f"{self.stride}. Crop or resize it."
            )
        return self.quant(self.encoder(image))

    def find_codes(self, z: Tensor) -> Tensor:  # B E h w -> B h w
        """Return the number of the nearest vector of the codebook for each latent."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        return torch.cdist(flat, self.codebook.weight.to(flat.dtype)).argmin(1).view(-1, *z.shape[2:])

    def look_up(self, codes: Tensor) -> Tensor:  # B h w -> B E h w
        """Return the vectors of codes."""
        return self.codebook(codes).permute(0, 3, 1, 2)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # B E h w -> B E h w, scalar, scalar
        """Return the nearest vectors, the error by which the encoder learns to stay close to them, and that by which they learn."""
        found = self.look_up(self.find_codes(z))
        return z + (found - z).detach(), F.mse_loss(z, found.detach()), F.mse_loss(found, z.detach())

    def decode(self, z: Tensor, quantize: bool = True, tile: int = 0) -> Tensor:  # B E h w -> B C H W
        """Return images of latents, which are first replaced by codes if `quantize`. `tile` is the side, in latents, of the overlapping
        tiles in which larger maps are decoded; 0 decodes the whole map at once.
        """
        z = self.quantize(z)[0] if quantize else z
        decode = lambda part: self.decoder(self.post_quant(part))
        return map_tiles(decode, z, tile, self.stride) if 0 < tile < max(z.shape[2:]) else decode(z)

    def normalize(self, z: Tensor) -> Tensor:  # B E h w -> B E h w
        """Return latents as diffusion works on them, with a standard deviation of about 1."""
        return z * self.config.scaling

    def denormalize(self, z: Tensor) -> Tensor:  # B E h w -> B E h w
        """Return latents as `decode` expects them."""
        return z / self.config.scaling

    def pad(self, image: Tensor) -> Tensor:  # B C H W -> B C H' W'
        """Return images with their last row and column repeated, up to multiples of the stride."""
        height, width = image.shape[2:]
        return F.pad(image, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")

    def reconstruct(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # B C H W -> B C H W, terms
        """Return images decoded from codes, and the two errors of `quantize`, by which encoder and codebook learn (equation 4)."""
        z, commitment, codebook = self.quantize(self.encode(self.pad(image)))
        made = self.decode(z, quantize=False)[:, :, : image.shape[2], : image.shape[3]]
        return made, {"commitment": commitment, "codebook": codebook}

    def forward(self, image: Tensor) -> Tensor:  # B C H W -> B C H W
        return self.decode(self.encode(self.pad(image)))[:, :, : image.shape[2], : image.shape[3]]


def diffusers_keys(query: str, key: str, value: str, out: str) -> dict[str, Row]:
    """Return the key table of diffusers for one of its two sets of attention names."""
    return {"quantize.embedding.weight": "codebook.weight", **kl.diffusers_keys(query, key, value, out)}


CONFIG: dict[str, ConfigRow] = {  # of diffusers
    "_class_name": Expect("VQModel"),
    "in_channels": "channels",
    "out_channels": Expect(lambda c: c.channels),
    "sample_size": "image",
    "latent_channels": "latent",
    "num_vq_embeddings": "codes",
    "vq_embed_dim": Derived(lambda raw: {"code_dim": raw.get("vq_embed_dim") or raw["latent_channels"]}, lambda c: c.code_dim),
    "block_out_channels": Derived(kl.parse_widths, lambda c: [c.dim * growth for growth in c.growth]),
    "down_block_types": Expect(lambda c: ["DownEncoderBlock2D"] * len(c.growth)),
    "up_block_types": Expect(lambda c: ["UpDecoderBlock2D"] * len(c.growth)),
    "layers_per_block": "depth",
    "norm_num_groups": "groups",
    "act_fn": Expect("silu"),
    "norm_type": Expect("group"),
    "scaling_factor": WithDefault("scaling", 0.18215),  # missing in the first files
    "mid_block_add_attention": Expect(True),
    "lookup_from_codebook": Expect(False),
}

CARD = Card(
    name="vqgan",
    model=VQGAN,
    config=Config,
    paper="arXiv:2012.09841",
    year=2021,
    input_type="image",
    output_type="reconstruction",
    sizes={
        "vq-f4": Size(params=55_322_782, source="CompVis/ldm-celebahq-256"),
        # For training from scratch on images of 32 pixels, with 8 x 8 codes.
        "vq-f4-32": Size(image=32, latent=4, code_dim=4, codes=512, dim=32, growth=(1, 2, 2), depth=1, groups=8),
        "vqgan-test": Size(channels=2, image=8, latent=4, code_dim=3, codes=6, dim=16, growth=(1, 1), depth=1, groups=4),
    },
    weights={
        "diffusers": diffusers_keys("to_q", "to_k", "to_v", "to_out.0"),
        "diffusers-2022": diffusers_keys("query", "key", "value", "proj_attn"),
        "compvis": lambda c: {"quantize.embedding.weight": "codebook.weight", **kl.compvis_keys(c)},
    },
    configs={"diffusers": CONFIG},
    scale=HALF,
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.0, "grad_clip": 1.0},
)
