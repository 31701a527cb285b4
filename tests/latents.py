"""Peers of the networks of latent diffusion and of diffusion Transformers: diffusers' classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
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
