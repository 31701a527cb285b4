"""Peers of the networks of latent diffusion and of diffusion Transformers: diffusers' classes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.checkpoints.config_mapping import to_public_config
from fieldguide.checkpoints.weights import get_tables, translate
from fieldguide.models.registry import card_of
from tied import Tied

State = Mapping[str, Tensor]
Peer = tuple[nn.Module, Callable[[State], dict[str, Tensor]]]


def public_config(model: nn.Module, origin: str = "diffusers") -> dict[str, Any]:
    """Return the configuration that we write for diffusers."""
    card = card_of(model)
    config = to_public_config(card, card.configs[origin], model.config)
    return {key: tuple(x) if isinstance(x, list) else x for key, x in config.items()}


def build(model: nn.Module, **changes: Any) -> nn.Module:
    """Return diffusers' network for one of ours."""
    from tv import diffusers

    config = public_config(model) | changes
    return getattr(diffusers, config["_class_name"]).from_config(config)


def rename(model: nn.Module, skip: Callable[[str], bool] = lambda name: False) -> Callable[[State], dict[str, Tensor]]:
    """Return a function that turns tensors under our names into those of a module whose part `peer` is diffusers'."""
    return lambda state: {
        f"peer.{name}": tensor
        for name, tensor in translate(state, get_tables(model)["diffusers"], reverse=True).items()
        if not skip(name)
    }


def dit(model: nn.Module) -> Peer:
    """Build diffusers' DiT as the authors computed it: the frequencies of the time, one embedding for all blocks.

    Labels are not dropped at random.
    """
    peer = build(model)
    first = peer.transformer_blocks[0].norm1.emb
    first.time_proj.downscale_freq_shift = 0
    first.class_embedder.dropout_prob = 0.0
    for block in peer.transformer_blocks[1:]:
        block.norm1.emb = first

    class Sample(Tied):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, image: Tensor, time: Tensor, label: Tensor) -> Tensor:
            classes = model.config.num_classes
            return self.peer(image, time, (label - 1) % (classes + 1)).sample[:, : model.config.channels]

    return Sample(), rename(model, lambda name: ".emb." in name and not name.startswith("transformer_blocks.0."))


def autoencoder_kl(model: nn.Module) -> Peer:
    """Return images decoded from the means."""
    peer = build(model)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, image: Tensor) -> Tensor:
            return self.peer.decode(self.peer.encode(image).latent_dist.mean).sample

    return Sample(), rename(model)


def consistency_decoder_vae(model: nn.Module) -> Peer:
    """Return images decoded from the means, with our noise; the tables of the scheduler are in float64."""
    from tv import diffusers

    whole = sys.modules[diffusers.ConsistencyDecoderVAE.__module__]
    steps = sys.modules[whole.ConsistencyDecoderScheduler.__module__]
    peer = build(model)
    alphas = (1 - steps.betas_for_alpha_bar(1024).double()).cumprod(0)
    times = (torch.arange(1025, dtype=torch.float64) / 1024 + 0.008) / 1.008 * torch.pi / 2
    alphas[:1023] = (times.cos() ** 2)[1:1024] / times[0].cos() ** 2  # which diffusers rounds to float32
    scheduler, sigmas = peer.decoder_scheduler, (1 / alphas - 1).sqrt()
    scheduler.sqrt_alphas_cumprod, scheduler.sqrt_one_minus_alphas_cumprod = alphas.sqrt(), (1 - alphas).sqrt()
    scheduler.c_skip = 0.25 / (alphas.sqrt() * (sigmas**2 + 0.25))
    scheduler.c_out = 0.5 * sigmas / (sigmas**2 + 0.25).sqrt()
    scheduler.c_in = 1 / (alphas * (sigmas**2 + 0.25)).sqrt()

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, image: Tensor) -> Tensor:
            noise = iter(model.draw_noise(tuple(image.shape)))
            draw = lambda shape, **options: next(noise).expand(shape).to(image)
            with mock.patch.object(whole, "randn_tensor", draw), mock.patch.object(steps, "randn_tensor", draw):
                return self.peer.decode(self.peer.encode(image).latent_dist.mean).sample

    return Sample(), rename(model)


def noisy_latent(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return latents, times, and the states of a text of five tokens; and its vector if the network takes one."""
    inputs = (
        torch.randn(rows, config.channels + getattr(config, "extra", 0), config.image, config.image),
        torch.randint(1000, (rows,)).float(),
        torch.randn(rows, 5, config.text_dim),
    )
    return (*inputs, torch.randn(rows, config.pooled_dim)) if hasattr(config, "pooled_dim") else inputs


def conditional_unet(model: nn.Module) -> Peer:
    """Return diffusers' text-conditional U-Net, told that images were neither scaled nor cropped."""
    peer = build(model)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor | None = None) -> Tensor:
            height, width = (8 * side for side in latent.shape[2:])
            sizes = torch.tensor([height, width, 0, 0, height, width]).expand(len(latent), 6)
            added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
            return self.peer(latent, time, text, added_cond_kwargs=added).sample

    return Sample(), rename(model)


def clip_text_model(model: nn.Module) -> nn.Module:
    """Return transformers' text encoder for one of ours."""
    from tv import transformers

    config = public_config(model, "huggingface")
    (name,) = config.pop("architectures")
    return getattr(transformers, name)(transformers.CLIPTextConfig(**config, pad_token_id=1, bos_token_id=0))


def clip_text(model: nn.Module) -> Peer:
    """Return the last states."""
    peer = clip_text_model(model)
    table = get_tables(model)["huggingface"]

    class States(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.peer(tokens, mask.long()).last_hidden_state

    return States(), lambda state: {
        f"peer.{name.removeprefix('text_model.')}": tensor for name, tensor in translate(state, table, reverse=True).items()
    }


def t5_encoder(model: nn.Module) -> Peer:
    """Return the states of transformers' encoder of T5."""
    from tv import transformers

    return encoder_states(
        model, transformers.T5EncoderModel, transformers.T5Config, transformers.models.t5.modeling_t5.T5LayerNorm
    )


def umt5_encoder(model: nn.Module) -> Peer:
    """Return the states of transformers' encoder of UMT5."""
    from tv import transformers

    norm = transformers.models.umt5.modeling_umt5.UMT5LayerNorm
    return encoder_states(model, transformers.UMT5EncoderModel, transformers.UMT5Config, norm)


def encoder_states(model: nn.Module, kind: Any, settings: Any, T5LayerNorm: Any) -> Peer:
    """Return the states of an encoder whose norms compute in float32 also in a network of float64."""
    normalize = lambda norm, x: F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    config = public_config(model, "huggingface")
    config.pop("architectures")
    peer = kind(settings(**config))
    table = get_tables(model)["huggingface"]

    class States(Tied):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            with mock.patch.object(T5LayerNorm, "forward", normalize):
                return self.peer(tokens, mask.long()).last_hidden_state

    return States(), lambda state: {f"peer.{name}": tensor for name, tensor in translate(state, table, reverse=True).items()}


def pixart(model: nn.Module) -> Peer:
    """Return diffusers' PixArt without variances, told the sizes of the latents in pixels."""
    peer = build(model)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
            height, width = (8 * side for side in latent.shape[2:])
            sizes = {
                "resolution": torch.tensor([[height, width]]).expand(len(latent), 2),
                "aspect_ratio": torch.tensor([[height / width]]).expand(len(latent), 1),
            }
            found = self.peer(latent, text, time, added_cond_kwargs=sizes if model.config.sizes else None)
            return found.sample[:, : model.config.channels]

    return Sample(), rename(model)


def keep_double(module: nn.Module) -> None:
    """Replace norms of diffusers that compute in float32, also in a network of float64."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "RMSNorm" and not isinstance(child, nn.RMSNorm):
                setattr(parent, name, nn.RMSNorm(child.dim, eps=child.eps))


@contextmanager
def keep_float64() -> Iterator[None]:
    """Let diffusers, where it computes in float32, compute in float64 if that is what it gets."""
    single = Tensor.float
    with mock.patch.object(Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x)):
        yield


def sd3(model: nn.Module) -> Peer:
    peer = build(model)
    keep_double(peer)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
            return self.peer(latent, text, pooled, time).sample

    return Sample(), rename(model)


def noisy_flux(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return what `noisy_latent` does, with times that remain exact if they are divided by 1,000, as in diffusers' pipeline."""
    latent, _, *texts = noisy_latent(config, rows)
    return latent, 125 * torch.randint(8, (rows,)).float(), *texts


def flux(model: nn.Module) -> Peer:
    """Return diffusers' FLUX on packed latents with positions of their own, as in its pipeline."""
    peer = build(model)
    module = sys.modules[type(peer).__module__]
    plain = module.apply_rotary_emb

    def rotate(*args: Any, **options: Any) -> Tensor:
        """Rotate as diffusers, but in float64 if that is what it gets."""
        with keep_float64():
            return plain(*args, **options)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
            rows, columns = latent.shape[2] // 2, latent.shape[3] // 2
            x = latent.unflatten(2, (rows, 2)).unflatten(4, (columns, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
            ids = torch.zeros(rows, columns, 3)
            ids[..., 1] += torch.arange(rows)[:, None]
            ids[..., 2] += torch.arange(columns)
            scale = torch.full_like(time, 3.5) if guidance is None else guidance
            with mock.patch.object(module, "apply_rotary_emb", rotate):
                x = self.peer(
                    x,
                    text,
                    pooled,
                    time / 1000,
                    ids.flatten(0, 1),
                    torch.zeros(text.shape[1], 3),
                    scale if model.config.guidance else None,
                ).sample
            x = x.unflatten(1, (rows, columns)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
            return x.flatten(4).flatten(2, 3)

    return Sample(), rename(model)


def vqgan(model: nn.Module) -> Peer:
    peer = build(model)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, image: Tensor) -> Tensor:
            return self.peer(image).sample

    return Sample(), rename(model)


def consistency_unet(model: nn.Module) -> Peer:
    peer = build(model)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, image: Tensor, time: Tensor, label: Tensor) -> Tensor:
            return self.peer(image, time, label - 1 if model.config.num_classes else None).sample

    return Sample(), rename(model)


def labeled_noisy(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return noisy images with a label each, for networks without a class for none."""
    image = torch.randn(rows, config.channels, config.image, config.image)
    return image, torch.randint(1000, (rows,)).float(), 1 + torch.arange(rows) % config.num_classes


def unclip_prior(model: nn.Module) -> Peer:
    """Return diffusers' prior, which is causal only if it gets a mask; its mean and deviation are no parameters here."""
    peer = build(model)
    for name in ("clip_mean", "clip_std"):
        values = getattr(peer, name).detach()
        delattr(peer, name)
        peer.register_buffer(name, values)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(
            self, latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor, text_mask: Tensor | None = None
        ) -> Tensor:
            mask = torch.ones_like(text[..., 0], dtype=torch.bool) if text_mask is None else text_mask
            found = self.peer(latent.flatten(1), time, pooled, text, mask)
            return found.predicted_image_embedding[:, :, None, None]

    return Sample(), rename(model)


def unclip_decoder(model: nn.Module) -> Peer:
    """Return diffusers' decoder of unCLIP without variances."""
    peer = build(model)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(
            self, latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor, text_mask: Tensor | None = None
        ) -> Tensor:
            found = self.peer(latent, time, text, class_labels=pooled, attention_mask=text_mask).sample
            return found[:, : model.config.channels]

    return Sample(), rename(model)


def noisy_pair(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return noisy images, times, and the images that they belong to."""
    target, image = (torch.randn(rows, count, config.image, config.image) for count in (config.channels, config.condition))
    return target, torch.randint(1000, (rows,)).float(), image


def super_resolution_unet(model: nn.Module) -> Peer:
    """Return diffusers' U-Net without attention, which reads both images side by side, without variances."""
    peer = build(model)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, target: Tensor, time: Tensor, image: Tensor) -> Tensor:
            return self.peer(torch.cat([target, image], 1), time).sample[:, : model.config.channels]

    return Sample(), rename(model)


def noisy_latent_video(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return latents of videos, and what `noisy_latent` returns."""
    _, *rest = noisy_latent(config, rows)
    channels = config.channels + getattr(config, "extra", 0)
    return torch.randn(rows, config.frames, channels, config.image, config.image + 2), *rest


def wan(model: nn.Module) -> Peer:
    """Return diffusers' Wan, whose latents have the channels first. Times are embedded in float32."""
    peer = build(model)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, latent: Tensor, time: Tensor, text: Tensor, image_states: Tensor | None = None) -> Tensor:
            time = time.float()
            with keep_float64():
                return self.peer(latent.transpose(1, 2), time, text, image_states).sample.transpose(1, 2)

    return Sample(), rename(model)


def video(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return videos of a color each, and noise."""
    size = config.frames, config.channels, config.image, config.image + 4
    return (torch.randn(rows, 1, config.channels, 1, 1) + 0.3 * torch.randn(rows, *size),)


def wan_vae(model: nn.Module) -> Peer:
    """Return videos decoded from the means, without limits for pixels, which stop gradients."""
    peer = build(model, dim_mult=list(model.config.growth))

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, video: Tensor) -> Tensor:
            with keep_float64():
                mean = self.peer.encode(video.transpose(1, 2)).latent_dist.mean
                with mock.patch.object(torch, "clamp", lambda x, **limits: x):
                    return self.peer.decode(mean).sample.transpose(1, 2)

    return Sample(), rename(model)


def video_vae(model: nn.Module) -> Peer:
    """Return videos decoded from the means, by diffusers' autoencoder, whose videos have the channels first."""
    peer = build(model)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, video: Tensor) -> Tensor:
            mean = self.peer.encode(video.transpose(1, 2)).latent_dist.mean
            return self.peer.decode(mean).sample.transpose(1, 2)

    return Sample(), rename(model)


@contextmanager
def exact_rotary(module: Any) -> Iterator[None]:
    """Let a module of diffusers compute the angles of rotary positions in float64, as some do, and return float32."""
    plain = module.get_1d_rotary_pos_embed

    def exact(dim: int, places: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        waves = plain(dim, places.double(), *args, **options | {"freqs_dtype": torch.float64})
        return tuple(wave.to(torch.float32) for wave in waves)

    with mock.patch.object(module, "get_1d_rotary_pos_embed", exact):
        yield


def cogvideox(model: nn.Module) -> Peer:
    """Return diffusers' CogVideoX, with rotations as its pipeline computes them. The positions that it adds have the precision of
    float32 here, as those of networks of float32.
    """
    from tv import diffusers

    c, peer = model.config, build(model)
    if not c.rotary or c.learned:
        patches, embed = peer.patch_embed, peer.patch_embed._get_positional_embeddings
        patches._get_positional_embeddings = lambda *args, **options: embed(*args, **options).to(torch.float32)
        patches.pos_embedding = patches.pos_embedding.float()
    pipeline, embeddings = diffusers.pipelines.cogvideo.pipeline_cogvideox, diffusers.models.embeddings

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
            time, rotations = time.float(), None
            if c.rotary:
                grid = latent.shape[3] // 2, latent.shape[4] // 2
                crop = pipeline.get_resize_crop_region_for_grid(grid, c.width // 2, c.image // 2)
                with exact_rotary(embeddings):
                    rotations = embeddings.get_3d_rotary_pos_embed(c.dim // c.heads, crop, grid, latent.shape[1])
            with keep_float64():
                return self.peer(latent, text, time, image_rotary_emb=rotations).sample

    return Sample(), rename(model)


def hunyuan_video(model: nn.Module) -> Peer:
    """Return diffusers' HunyuanVideo, which takes the scale of guidance times 1,000, as its pipeline gives it."""
    peer = build(model)
    keep_double(peer)
    module = sys.modules[type(peer).__module__]

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(
            self,
            latent: Tensor,
            time: Tensor,
            text: Tensor,
            pooled: Tensor,
            text_mask: Tensor | None = None,
            guidance: Tensor | None = None,
        ) -> Tensor:
            mask = torch.ones_like(text[..., 0], dtype=torch.bool) if text_mask is None else text_mask
            scale = torch.full_like(time, 6.0) if guidance is None else guidance
            time, scale = time.float(), 1000 * scale.float() if model.config.guidance else None
            with keep_float64(), exact_rotary(module):
                return self.peer(latent.transpose(1, 2), time, text, mask, pooled, scale).sample.transpose(1, 2)

    return Sample(), rename(model)


def open_sora(model: nn.Module) -> Peer:
    """Return diffusers' FLUX on packed frames, whose numbers are the first coordinate. It has neighboring rotary pairs, values apart from
    the MLP, and scale before shift in the last modulation.
    """
    from tv import diffusers

    c = model.config
    peer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=c.channels * 4,
        num_layers=c.depth,
        num_single_layers=c.single,
        attention_head_dim=c.dim // c.heads,
        num_attention_heads=c.heads,
        joint_attention_dim=c.text_dim,
        pooled_projection_dim=c.pooled_dim,
        guidance_embeds=False,
        axes_dims_rope=c.axes,
    )
    peer.x_embedder = nn.Identity()
    module = sys.modules[type(peer).__module__]
    plain = module.apply_rotary_emb

    def rotate(*args: Any, **options: Any) -> Tensor:
        with keep_float64():
            return plain(*args, **options)

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer, self.patch, self.given = peer, nn.Linear(c.channels * 4, c.dim), nn.Linear(c.extra * 4, c.dim)

        def forward(self, latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
            rows, frames, _, height, width = latent.shape
            x = latent.reshape(rows, frames, -1, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
            ids = torch.cartesian_prod(*(torch.arange(size).float() for size in x.shape[1:4]))
            noisy, given = x[..., : c.channels, :, :].flatten(4), x[..., c.channels :, :, :].flatten(4)
            x = (self.patch(noisy) + self.given(given)).flatten(1, 3)
            with mock.patch.object(module, "apply_rotary_emb", rotate):
                x = self.peer(x, text, pooled, time / 1000, ids, torch.zeros(text.shape[1], 3)).sample
            x = x.reshape(rows, frames, height // 2, width // 2, c.channels, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
            return x.reshape(rows, frames, c.channels, height, width)

    def convert(state: State) -> dict[str, Tensor]:
        from fieldguide.models.diffusion import flux

        found = {}
        for name, tensor in state.items():
            pairs = lambda x: x.unflatten(0, (-1, 2, c.dim // c.heads // 2)).transpose(1, 2).flatten(0, 2)
            if name.split(".")[0] in ("patch", "given"):
                found[name] = tensor
                continue
            if name.split(".")[-2] in ("q", "k", "norm_q", "norm_k"):
                tensor = pairs(tensor)
            for part in ("time", "pooled"):
                name = name.replace(f"{part}.linear", part)
            if name.startswith("condition"):
                tensor = torch.cat(tensor.chunk(2)[::-1])
            if name.startswith("singles") and name.split(".")[2] in ("q", "k", "norm_q", "norm_k"):
                name = name.replace(".q.", ".attn.q.").replace(".k.", ".attn.k.").replace(".norm_", ".attn.norm_")
            parts = {name: tensor}
            if ".v_up." in name:
                value, up = tensor.split([c.dim, 4 * c.dim])
                parts = {name.replace(".v_up.", ".attn.v."): value, name.replace(".v_up.", ".up."): up}
            found |= {f"peer.{key}": x for key, x in translate(parts, flux.DIFFUSERS, reverse=True).items()}
        return found

    return Sample(), convert


def noisy_video_flux(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return what `noisy_latent_video` does, with the times of `noisy_flux`."""
    latent, _, *texts = noisy_latent_video(config, rows)
    return latent, 125 * torch.randint(8, (rows,)).float(), *texts
