"""Networks of transformers that read recordings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import references
from fieldguide.checkpoints.config_mapping import to_public_config
from fieldguide.checkpoints.weights import translate
from fieldguide.models.registry import card_of
from tv import transformers

State = dict[str, Tensor]


class RowByRow(nn.Module):
    """A network that reads each recording alone, without padding, which would change the statistics of its group norm."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        rows = [self.read(x[None, :n])[0] for x, n in zip(waveform, lengths.tolist())]
        if rows[0].ndim == 1:
            return torch.stack(rows)
        longest = self.inner._get_feat_extract_output_lengths(waveform.shape[1])
        return torch.stack([nn.functional.pad(row, (0, 0, 0, int(longest) - len(row))) for row in rows])

    def read(self, waveform: Tensor) -> Tensor:
        found = self.inner(waveform)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state


class Distances(nn.Module):
    """Embeddings of distances in the precision of the network, which transformers stores in float32."""

    def forward(self, x: Tensor) -> Tensor:  # B S D -> B 2S-1 D
        steps, dim = x.shape[1:]
        rows = range(steps - 1, -steps, -1)
        table = torch.tensor([[references.sinusoid(t, column, dim) for column in range(dim)] for t in rows], dtype=x.dtype)
        return table.expand(len(x), -1, -1)


class Padded(nn.Module):
    """A network with Conformer blocks that reads a padded batch. Its convolutions and batch norms are kept from reading padding."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        from cases import PackedNorm

        self.inner, self.norms = inner, []
        inner.base_model.encoder.embed_positions = Distances()
        for block in inner.base_model.encoder.layers:
            block.conv_module.batch_norm = PackedNorm(block.conv_module.batch_norm.num_features)
            block.conv_module.depthwise_conv.register_forward_pre_hook(lambda _, xs: (xs[0] * self.mask[:, None],))
            self.norms.append(block.conv_module.batch_norm)

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(waveform.shape[1]) < lengths[:, None]
        frames = self.inner._get_feat_extract_output_lengths(lengths)
        longest = int(self.inner._get_feat_extract_output_lengths(waveform.shape[1]))
        self.mask = torch.arange(longest) < frames[:, None]
        for norm in self.norms:
            norm.mask = self.mask
        found = self.inner(waveform * real, attention_mask=real.long())
        return found.logits if hasattr(found, "logits") else found.last_hidden_state


def waveform_encoder(model: Any) -> tuple[nn.Module, Any]:
    """Return the network of transformers with the configuration that ours is exported with, and the names of its tensors."""
    card = card_of(model)
    public = to_public_config(card, card.configs["huggingface"], model.config)
    kind, model_type = public.pop("architectures")[0], public.pop("model_type")
    config = transformers.AutoConfig.for_model(model_type, **public, attn_implementation="eager")
    peer = getattr(transformers, kind)(config)
    if model_type == "wav2vec2-conformer":  # which has a convolution for positions that it does not use
        del peer.base_model.encoder.pos_conv_embed

    def rename(state: State) -> State:
        names = translate(state, card.tables(model.config)["huggingface"], reverse=True)
        return {f"inner.{name}": tensor for name, tensor in names.items()}

    return (Padded if model_type == "wav2vec2-conformer" else RowByRow)(peer), rename


class Parakeet(nn.Module):
    """transformers' Parakeet, whose batch norms are kept from reading padding and whose positions have the precision of the network."""

    def __init__(self, inner: nn.Module, blank: int):
        super().__init__()
        from cases import PackedNorm

        self.inner, self.order = inner, [blank, *(i for i in range(inner.config.vocab_size) if i != blank)]
        for block in inner.encoder.layers:
            block.conv.norm = PackedNorm(block.conv.norm.num_features)
        inner.encoder.encode_positions = Distances()

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(features.shape[1]) < lengths[:, None]
        stride = self.inner.config.encoder_config.subsampling_factor
        for block in self.inner.encoder.layers:
            block.conv.norm.mask = torch.arange(-(-features.shape[1] // stride)) < (-(-lengths // stride))[:, None]
        return self.inner(features * real[..., None], attention_mask=real).logits[..., self.order]


def parakeet(model: Any) -> tuple[nn.Module, Any]:
    """Return transformers' network for the configuration that ours is exported with, and the names of its tensors."""
    card = card_of(model)
    public = to_public_config(card, card.configs["huggingface"], model.config)
    encoder = transformers.ParakeetEncoderConfig(**public["encoder_config"])
    config = transformers.ParakeetCTCConfig(
        vocab_size=public["vocab_size"],
        pad_token_id=public["pad_token_id"],
        encoder_config=encoder,
        attn_implementation="sdpa",  # the eager one computes in float32
    )
    peer = Parakeet(transformers.ParakeetForCTC(config), model.config.blank)

    def rename(state: State) -> State:
        names = translate(state, card.tables(model.config)["huggingface"], reverse=True)
        return {f"inner.{name}": tensor for name, tensor in names.items()}

    return peer, rename
