"""Tiny pipelines of diffusers with random weights, written to folders: the peers of text-to-image and text-to-video."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import nn

CLIP_LENGTH = 20  # tokens
MERGES = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"), ("o", "f</w>"), ("d", "o"), ("do", "g</w>")]
T5_PIECES = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁the", "cat", "dog", *"abcdefghijklmnopqrstuvwxyz,."]


def randomize(module: nn.Module, seed: int) -> Any:
    """Return a module in evaluation mode with noise on all parameters, also on biases and norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def write_clip_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> None:
    """Write vocab.json and merges.txt, as published."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), *map("".join, MERGES), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@functools.cache
def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    from tv import transformers

    folder = Path(tempfile.mkdtemp())
    write_clip_tokenizer(folder, pad)
    return transformers.CLIPTokenizer.from_pretrained(folder)


@functools.cache
def t5_tokenizer() -> Any:
    from tv import transformers

    return transformers.T5TokenizerFast(vocab=[(piece, -float(i > 2)) for i, piece in enumerate(T5_PIECES)], extra_ids=0)


def clip_encoder(dim: int, seed: int, projected: bool = False, depth: int = 3) -> Any:
    from tv import transformers

    size = len(clip_tokenizer())
    config = transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=depth,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=dim,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return randomize(kind(config), seed)


def t5_encoder(dim: int, seed: int = 5) -> Any:
    from tv import transformers

    config = transformers.T5Config(
        vocab_size=len(t5_tokenizer()) + 3,
        d_model=dim,
        num_layers=2,
        num_heads=2,
        d_kv=8,
        d_ff=32,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return randomize(transformers.T5EncoderModel(config), seed)


def autoencoder(latent: int = 4, **changes: Any) -> Any:
    from tv import diffusers

    return randomize(
        diffusers.AutoencoderKL(
            **{
                "block_out_channels": (8, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "latent_channels": latent,
                "sample_size": 32,
                **changes,
            }
        ),
        1,
    )


def unet(**changes: Any) -> Any:
    from tv import diffusers

    return randomize(
        diffusers.UNet2DConditionModel(
            **{
                "sample_size": 16,
                "block_out_channels": (8, 16),
                "layers_per_block": 1,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "attention_head_dim": 2,
                "norm_num_groups": 4,
                "cross_attention_dim": 16,
                **changes,
            }
        ),
        2,
    )


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim(**changes: Any) -> Any:
    from tv import diffusers

    return diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **changes)


def stable_diffusion(kind: str = "StableDiffusionPipeline", **changes: Any) -> Any:
    from tv import diffusers

    return getattr(diffusers, kind)(
        vae=autoencoder(),
        text_encoder=clip_encoder(16, 3),
        tokenizer=clip_tokenizer(),
        unet=unet(**changes),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(kind: str = "StableDiffusionXLPipeline", **changes: Any) -> Any:
    from tv import diffusers

    return getattr(diffusers, kind)(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=clip_encoder(16, 3),
        text_encoder_2=clip_encoder(12, 4, projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer("!"),
        unet=unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=12 + 6 * 8,
            cross_attention_dim=28,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
        **changes,
    )


def sd3(kind: str = "StableDiffusion3Pipeline", **changes: Any) -> Any:
    from tv import diffusers

    return getattr(diffusers, kind)(
        **{
            "vae": autoencoder(16, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
            "text_encoder": clip_encoder(12, 3, projected=True),
            "text_encoder_2": clip_encoder(16, 4, projected=True),
            "text_encoder_3": t5_encoder(32),
            "tokenizer": clip_tokenizer(),
            "tokenizer_2": clip_tokenizer("!"),
            "tokenizer_3": t5_tokenizer(),
            "transformer": randomize(
                diffusers.SD3Transformer2DModel(
                    sample_size=16,
                    in_channels=16,
                    out_channels=16,
                    num_layers=2,
                    attention_head_dim=8,
                    num_attention_heads=2,
                    joint_attention_dim=32,
                    caption_projection_dim=16,
                    pooled_projection_dim=28,
                    pos_embed_max_size=12,
                    qk_norm="rms_norm",
                ),
                2,
            ),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            **changes,
        }
    )


def flux(kind: str = "FluxPipeline", guidance: bool = True) -> Any:
    from tv import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return getattr(diffusers, kind)(
        vae=autoencoder(shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(12, 3),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(16),
        tokenizer_2=t5_tokenizer(),
        transformer=randomize(
            diffusers.FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=16,
                pooled_projection_dim=12,
                guidance_embeds=guidance,
                axes_dims_rope=(2, 2, 4),
            ),
            2,
        ),
        scheduler=scheduler if guidance else diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def pixart(kind: str = "PixArtAlphaPipeline", sized: bool = True) -> Any:
    from tv import diffusers

    return getattr(diffusers, kind)(
        vae=autoencoder(),
        text_encoder=t5_encoder(16),
        tokenizer=t5_tokenizer(),
        transformer=randomize(
            diffusers.PixArtTransformer2DModel(
                sample_size=128 if sized else 16,
                num_layers=2,
                attention_head_dim=12,
                num_attention_heads=2,
                cross_attention_dim=24,
                caption_channels=16,
                in_channels=4,
                out_channels=8,
            ),
            2,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def umt5_encoder(dim: int, seed: int = 5) -> Any:
    from tv import transformers

    config = transformers.UMT5Config(
        vocab_size=len(t5_tokenizer()) + 3,
        d_model=dim,
        num_layers=2,
        num_heads=2,
        d_kv=8,
        d_ff=32,
        feed_forward_proj="gated-gelu",
    )
    return randomize(transformers.UMT5EncoderModel(config), seed)


def wan(scheduler: Any = None, **changes: Any) -> Any:
    from tv import diffusers

    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=3,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.5, -0.2, 0.1],
        latents_std=[2.0, 1.5, 0.5],
        scale_factor_spatial=4,
    )
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(16),
        vae=randomize(vae, 1),
        transformer=randomize(
            diffusers.WanTransformer3DModel(
                **{
                    "num_attention_heads": 2,
                    "attention_head_dim": 12,
                    "in_channels": 3,
                    "out_channels": 3,
                    "text_dim": 16,
                    "ffn_dim": 16,
                    "num_layers": 2,
                    **changes,
                }
            ),
            2,
        ),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def cogvideox(rotary: bool = False, shift: float = 3.0, kind: str = "CogVideoXPipeline") -> Any:
    """Return CogVideoX; for videos that begin with an image, it has stored positions besides."""
    from tv import diffusers

    begins = kind == "CogVideoXImageToVideoPipeline"

    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=3,
        scaling_factor=0.7,
    )
    made = getattr(diffusers, kind)(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(16),
        vae=randomize(vae, 1),
        transformer=randomize(
            diffusers.CogVideoXTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=6 if begins else 3,
                out_channels=3,
                time_embed_dim=8,
                text_embed_dim=16,
                num_layers=2,
                sample_height=4,
                sample_width=6,
                sample_frames=9,
                max_text_seq_length=12,
                use_rotary_positional_embeddings=rotary,
                use_learned_positional_embeddings=begins,
            ),
            2,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            clip_sample=False,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=shift,
        ),
    )
    if begins:
        made.transformer.patch_embed.pos_embedding.normal_(generator=torch.Generator().manual_seed(3))
    return made
