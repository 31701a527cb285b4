"""Peers of segmentation networks: networks of other libraries that take images and return what ours return."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.checkpoints.weights import get_tables, translate

# Name in files of transformers -> name in its live network since version 5.
SEGFORMER_LIVE = (
    (r"encoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
    (r"encoder\.block\.(\d+)\.", r"stages.\1.blocks."),
    (r"encoder\.layer_norm\.(\d+)", r"stages.\1.layer_norm"),
    (r"attention\.self\.(query|key|value)", lambda found: f"attention.{found[1][0]}_proj"),
    (r"attention\.self\.sr", "attention.sequence_reduction.sequence_reduction"),
    (r"attention\.self\.layer_norm", "attention.sequence_reduction.layer_norm"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"mlp\.dense", "mlp.fc"),
    (r"layer_norm_1", "layernorm_before"),
    (r"layer_norm_2", "layernorm_after"),
    (r"decode_head\.linear_c", "decode_head.linear_projections"),
)


def to_live(name: str, rules: tuple[tuple[str, str | Callable], ...]) -> str:
    """Return the name in the live network of transformers 5 for a name in files."""
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


class Enlarged(nn.Module):
    """A segmentation network whose logits are enlarged to the size of the image."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer = peer

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.peer(x).logits, x.shape[2:], mode="bilinear", align_corners=False)


def segformer_config(config, **options):
    from tv import transformers

    return transformers.SegformerConfig(
        num_channels=config.channels,
        hidden_sizes=list(config.widths),
        depths=list(config.depths),
        num_attention_heads=list(config.heads),
        sr_ratios=list(config.reductions),
        decoder_hidden_size=config.dim,
        num_labels=config.num_classes,
        hidden_dropout_prob=config.dropout,
        drop_path_rate=config.drop_path,
        classifier_dropout_prob=config.head_dropout,
        **options,
    )


def segformer(model: nn.Module):
    from tv import transformers

    peer = Enlarged(transformers.SegformerForSemanticSegmentation(segformer_config(model.config)))

    def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        public = translate(state, get_tables(model)["huggingface"], reverse=True)
        return {f"peer.{to_live(name, SEGFORMER_LIVE)}": tensor for name, tensor in public.items()}

    return peer, rename


# Name in files of transformers -> name in its live network since version 5, for the Swin of Mask2Former.
SWIN_LIVE = (
    (r"level_module\.encoder\.(embeddings|encoder\.layers)", r"level_module.encoder.swin.\1"),
    (r"attention\.self\.(query|key|value)", lambda found: f"attention.{found[1][0]}_proj"),
    (r"attention\.self\.relative", "attention.relative_position_bias.relative"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(blocks\.\d+)\.output\.dense", r"\1.mlp.fc2"),
)


class MaskQueries(nn.Module):
    """A Mask2Former of transformers that returns class and mask logits in one tensor."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer = peer

    def forward(self, x: Tensor) -> Tensor:
        found = self.peer(x)
        return torch.cat([found.class_queries_logits, found.masks_queries_logits.flatten(2)], -1)


def mask2former_config(c, **options):
    from fieldguide.models.transformer._shared.mask2former_checkpoints import write_backbone
    from tv import transformers

    body = write_backbone(c)
    kind = {"swin": transformers.SwinConfig, "resnet": transformers.ResNetConfig}[body.pop("model_type")]
    return transformers.Mask2FormerConfig(
        backbone_config=kind(**body),
        hidden_dim=c.dim,
        feature_size=c.dim,
        mask_feature_size=c.dim,
        num_attention_heads=c.heads,
        encoder_layers=c.depth,
        encoder_feedforward_dim=c.hidden,
        decoder_layers=c.decoder_depth + 1,
        dim_feedforward=c.decoder_hidden,
        num_queries=c.queries,
        num_labels=c.num_classes,
        dropout=c.dropout,
        **options,
    )


def mask2former(model: nn.Module):
    from tv import transformers

    peer = MaskQueries(transformers.Mask2FormerForUniversalSegmentation(mask2former_config(model.config)))
    if model.config.backbone == "swin":
        peer.peer.model.pixel_level_module.encoder.swin.layernorm = nn.Identity()  # not used
    del peer.peer.criterion.empty_weight

    def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        public = translate(state, get_tables(model)["huggingface"], reverse=True)
        return {f"peer.{to_live(name, SWIN_LIVE)}": tensor for name, tensor in public.items()}

    return peer, rename


def sam_config(c, **options):
    """Return a configuration of transformers, whose norms have the epsilon of `c`."""
    from fieldguide.models.transformer._shared import sam_checkpoints as public
    from tv import transformers

    return transformers.SamConfig(
        vision_config=public.write_vision(c),
        prompt_encoder_config=public.write_prompts(c),
        mask_decoder_config=public.write_decoder(c),
        attn_implementation="sdpa",  # the other computes softmax in float32
        **options,
    )


class PromptedMasks(nn.Module):
    """A SAM of transformers that takes prompts of points, in which corners of boxes may be, and returns all masks in one tensor."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer = peer

    def embed(self, points: Tensor, labels: Tensor) -> Tensor:
        """Return the tokens of prompts, each of which has a box or none."""
        encoder, found = self.peer.prompt_encoder, []
        for row in range(labels.shape[1]):
            own, kinds = points[:, row : row + 1], labels[:, row : row + 1]
            corner = (labels[0, row] >= 2).nonzero().flatten().tolist()
            plain = [i for i in range(labels.shape[2]) if i not in corner and labels[0, row, i] >= 0]
            box = own[:, :, corner].flatten(2) if corner else None
            given = (own[:, :, plain], kinds[:, :, plain]) if plain else (None, None)
            found.append(encoder(*given, box, None)[0])
        return torch.cat(found, 1)

    def forward(self, x: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        peer = self.peer
        places = peer.get_image_wide_positional_embeddings().repeat(len(x), 1, 1, 1)
        dense = peer.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        size = peer.config.prompt_encoder_config.image_embedding_size
        features = peer.vision_encoder(x).last_hidden_state
        found = [
            peer.mask_decoder(
                features, places, self.embed(points, labels), dense.expand(len(x), -1, size, size), multimask_output=m
            )
            for m in (False, True)
        ]
        masks, scores = (torch.cat([pair[i] for pair in found], 2) for i in (0, 1))
        return torch.cat([scores[..., None], masks.flatten(3)], -1)


def sam(model: nn.Module):
    from tv import transformers

    peer = PromptedMasks(transformers.SamModel(sam_config(model.config)))
    inner = peer.peer
    for module in (inner.shared_image_embedding, inner.prompt_encoder.shared_embedding):
        frequencies = module.positional_embedding.detach().clone()
        del module.positional_embedding
        module.register_buffer("positional_embedding", frequencies)

    def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        public = translate(state, get_tables(model)["huggingface"], reverse=True)
        name = "shared_image_embedding.positional_embedding"
        also = {"prompt_encoder.shared_embedding.positional_embedding": public[name]} if name in public else {}
        return {f"peer.{key}": tensor for key, tensor in {**public, **also}.items()}

    return peer, rename
