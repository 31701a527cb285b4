"""Peers of detectors: networks of other libraries that take images and return what ours return."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fieldguide.checkpoints.weights import get_tables, translate


class Queries(nn.Module):
    """A detector of transformers that returns the boxes and class logits of its queries in one tensor."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer = peer.requires_grad_(True)  # parts are frozen there

    def forward(self, x: Tensor) -> Tensor:
        found = self.peer(x)
        return torch.cat([found.pred_boxes, found.logits], -1)


def to_live(name: str) -> str:
    """Return the name in the live network of transformers 5 for a name in files."""
    name = name.replace("out_proj", "o_proj").replace("backbone.conv_encoder.", "backbone.")
    return re.sub(r"layers\.(\d+)\.fc", r"layers.\1.mlp.fc", name)


def detr_config(model: nn.Module, **options):
    from tv import transformers

    c = model.config
    growth = 4 if c.block == "bottleneck" else 1
    backbone = transformers.ResNetConfig(
        num_channels=c.channels,
        embedding_size=c.widths[0],
        hidden_sizes=[growth * width for width in c.widths],
        depths=list(c.depths),
        layer_type=c.block,
        out_features=[f"stage{len(c.depths)}"],
    )
    return transformers.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        num_channels=c.channels,
        d_model=c.dim,
        encoder_layers=c.depth,
        decoder_layers=c.decoder_depth,
        encoder_ffn_dim=c.hidden,
        decoder_ffn_dim=c.hidden,
        encoder_attention_heads=c.heads,
        decoder_attention_heads=c.heads,
        num_queries=c.queries,
        num_labels=c.num_classes,
        dropout=c.dropout,
        **options,
    )


def detr(model: nn.Module):
    from tv import transformers

    peer = Queries(transformers.DetrForObjectDetection(detr_config(model)))
    live = peer.state_dict().keys()

    def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        public = translate(state, get_tables(model)["huggingface"], reverse=True)
        done = {f"peer.{to_live(name)}": tensor for name, tensor in public.items()}
        # In files `conv_encoder.model`, in the live network one of the two.
        return {name if name in live else name.replace("backbone.model", "backbone"): t for name, t in done.items()}

    return peer, rename
