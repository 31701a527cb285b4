"""One row an architecture: what the tests feed it and the independent peer that it must equal.

A peer is a pair: a module that takes the same inputs, and a function that turns tensors under our names into
tensors under the peer's. That function carries gradients as well as weights, so both are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import boxes
import clips
import detectors
import guide
import pictures
import references
from fieldguide.checkpoints.weights import get_tables, translate
from references import Equations

State = Mapping[str, Tensor]
Peer = tuple[nn.Module, Callable[[State], dict[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Case:
    inputs: Callable[[Any, int], tuple[Tensor, ...]]  # (config, rows) -> the inputs of forward
    peer: Callable[[nn.Module], Peer]  # our network -> its peer
    lr: float = 1e-2  # that learns one batch
    overrides: tuple[tuple[str, Any], ...] = ()  # laid over the tiny size, for a less general peer
    num_classes: int = 7  # another number of classes that it can have
    skipped: tuple[str, ...] = ()  # how names begin of what files have and the output does not depend on
    slack: float = 1.0  # how much wider float32 may stray in a deep network
    selects: bool = False  # its outputs are chosen by value, so that rounding may choose others


# ---------------------------------------------------------------------------------------------- inputs


def image(config: Any, rows: int) -> tuple[Tensor, ...]:
    side = getattr(config, "image", 33)  # odd, so that every rounding matters
    return (torch.randn(rows, config.channels, side, side),)


def wide(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return oblong images of multiples of 32 pixels, to which other sizes are padded."""
    return (0.3 * torch.randn(rows, config.channels, 64, 96),)  # no saturated probabilities, by which peers rank


def coarse(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return images of squares, for networks with coarse outputs."""
    return (torch.randn(rows, config.channels, 5, 5).repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :33, 1:],)


def tokens(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return rows of every length from 1 to 9; the content of the padding is arbitrary."""
    vocab = getattr(config, "vocab", None) or getattr(config, "vocab_size", 30)
    length = 1 + torch.arange(rows) * 8 // max(rows - 1, 1)
    length = length[torch.randperm(rows)]
    return torch.randint(vocab, (rows, 9)), torch.arange(9) < length[:, None]


def unpadded(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return rows without the padding token among real tokens, by which the peer recognizes padding."""
    text, mask = tokens(config, rows)
    return torch.where(mask & (text == config.pad), 0, torch.where(mask, text, config.pad)), mask


def pair(config: Any, rows: int) -> tuple[Tensor, ...]:
    source, mask = tokens(config, rows)
    return source[:, :7], mask[:, :7], *tokens(config, rows)


def unpadded_pair(config: Any, rows: int) -> tuple[Tensor, ...]:
    source, mask = unpadded(config, rows)
    return source[:, :7], mask[:, :7], *unpadded(config, rows)


def items(config: Any, rows: int) -> tuple[Tensor, ...]:
    _, mask = tokens(config, rows)
    return torch.randint(1, config.items, mask.shape), mask


def series(config: Any, rows: int) -> tuple[Tensor, ...]:
    return (torch.randn(rows, config.length, 3),)


def covariates(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return three series of a window, past covariates, and future covariates to the end of the horizon."""
    return (
        torch.randn(rows, config.length, 3),
        torch.randn(rows, config.length, config.past),
        torch.randn(rows, config.length + config.horizon, config.known),
    )


def noisy(config: Any, rows: int) -> tuple[Tensor, ...]:
    side = config.image
    return (
        torch.randn(rows, config.channels, side, side),
        torch.randint(1000, (rows,)).float(),
        torch.arange(rows) % (config.num_classes + 1),
    )


def speech(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return recordings of 9 to 21 frames, the longest first; the content after their end is arbitrary."""
    return torch.randn(rows, 21, config.features), torch.linspace(21, 9, rows).long()


def captioned(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return texts whose last real token is the only end token, if there is one."""
    text, mask = tokens(config, rows)
    if (end := getattr(config, "end", None)) is not None:
        text = torch.where(text == end, 0, text)
        text[torch.arange(rows), mask.sum(1) - 1] = end
    return *image(config, rows), text, mask


def shown(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return an image for each row, placed after its first token, followed by 1 to 9 text tokens."""
    text, mask = tokens(config, rows)
    text = torch.where(text == config.picture, 0, text)
    patches = (config.image // config.patch) ** 2
    row = torch.cat([text[:, :1], torch.full((rows, patches), config.picture), text], 1)
    return *image(config, rows), row, torch.cat([torch.ones(rows, 1 + patches, dtype=torch.bool), mask], 1)


def noisy_video(config: Any, rows: int) -> tuple[Tensor, ...]:
    return (
        torch.randn(rows, config.frames, config.channels, config.image, config.image),
        torch.randint(1000, (rows,)).float(),
        torch.arange(rows) % (config.num_classes + 1),
    )


def table(config: Any, rows: int) -> tuple[Tensor, ...]:
    categories = [torch.randint(1, size, (rows,)) for size in config.categories]
    return 2 * torch.randn(rows, config.numbers), torch.stack(categories, 1)


def row(name: str) -> Callable[[Any, int], tuple[Tensor, ...]]:
    return lambda config, rows: (torch.randn(rows, getattr(config, name)),)


def sequence(config: Any, rows: int) -> tuple[Tensor, ...]:
    return (torch.randn(rows, 5, config.d_model),)


# ---------------------------------------------------------------------------------------------- peers


def encoder(model: nn.Module) -> Peer:
    import encoders

    return encoders.encoder(model)


def writer(model: nn.Module) -> Peer:
    import writers

    return writers.writer(model)


def same(build: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], Peer]:
    """Return the guide's class, which has the same names as ours."""
    return lambda model: (build(model), dict)


def equations(function: Callable[..., Tensor]) -> Callable[[nn.Module], Peer]:
    return lambda model: (Equations(model, function), Equations.translate)


class PackedReader(nn.Module):
    """Text classifier built from torch's recurrent layers and packed sequences."""

    def __init__(self, cell: type[nn.RNNBase], vocab: int, dim: int, hidden: int, depth: int, directions: int, classes: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.rnn = cell(dim, hidden, depth, batch_first=True, bidirectional=directions == 2)
        self.head = nn.Linear(directions * hidden, classes)
        self.directions = directions

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(tokens), mask.sum(1), batch_first=True, enforce_sorted=False)
        _, state = self.rnn(packed)
        state = state[0] if isinstance(state, tuple) else state  # depth*directions B H
        return self.head(torch.cat(list(state[-self.directions :]), -1))


def packed(cell: type[nn.RNNBase]) -> Callable[[nn.Module], Peer]:
    def build(model: nn.Module) -> Peer:
        c = model.config

        def rename(state: State) -> dict[str, Tensor]:
            names = {}
            for name, tensor in state.items():
                if name.startswith("rnn."):
                    _, _, layer, direction, part = name.split(".")
                    name = f"rnn.{part.replace('_l0', f'_l{layer}')}{'_reverse' * int(direction)}"
                names[name] = tensor
            return names

        return PackedReader(cell, c.vocab_size, c.dim, c.hidden, c.depth, c.directions, c.num_classes), rename

    return build


class LastReal(guide.LSTMClassifier):
    """The guide's classifier, applied to each row cut to its real tokens."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([super(LastReal, self).forward(one[real][None]) for one, real in zip(x, mask)])


def last_real(model: nn.Module) -> Peer:
    peer = LastReal(model.emb.num_embeddings, model.emb.embedding_dim, model.lstm.hidden_size, model.fc.out_features)
    peer.lstm.dropout = model.lstm.dropout = 0.0  # rows alone draw other masks than rows together
    return peer, dict


class TorchEncoder(nn.Module):
    """Classifier built from torch's encoder, between an embedding and a mean."""

    def __init__(self, config: Any):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            config.dim, config.heads, 4 * config.dim, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.depth, nn.LayerNorm(config.dim), enable_nested_tensor=False)
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.head = nn.Linear(config.dim, config.num_classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        dim = self.embed.embedding_dim
        pos = torch.tensor(
            [[references.sinusoid(t, column, dim) for column in range(dim)] for t in range(tokens.shape[1])],
            dtype=torch.float32,
        )
        x = self.encoder(self.embed(tokens) * dim**0.5 + pos, src_key_padding_mask=~mask)
        return self.head(torch.stack([one[real].mean(0) for one, real in zip(x, mask)]))


def torch_encoder(model: nn.Module) -> Peer:
    from fieldguide.models.transformer.encoder_classifier import TORCH

    def rename(state: State) -> dict[str, Tensor]:
        inner = {name: tensor for name, tensor in state.items() if name.split(".")[0] in ("blocks", "norm")}
        outer = {name: tensor for name, tensor in state.items() if name not in inner}
        return outer | {f"encoder.{name}": tensor for name, tensor in translate(inner, TORCH, reverse=True).items()}

    return TorchEncoder(model.config), rename


def huggingface_resnet(model: nn.Module) -> Peer:
    from fieldguide.models.convolutional.resnet import HUGGINGFACE
    from tv import transformers

    c = model.config
    growth = 4 if c.block == "bottleneck" else 1
    peer = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            num_channels=c.channels,
            embedding_size=c.widths[0],
            hidden_sizes=[growth * w for w in c.widths],
            depths=list(c.depths),
            layer_type=c.block,
            num_labels=c.num_classes,
        )
    )

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, x: Tensor) -> Tensor:
            return self.peer(x).logits

    return Logits(), lambda state: {
        f"peer.{name}": tensor for name, tensor in translate(state, HUGGINGFACE, reverse=True).items()
    }


def tabm_package(model: nn.Module) -> Peer:
    """Build the network of the authors' package, which has no code for unseen categories: ours are shifted by one."""
    import tabm
    from rtdl_num_embeddings import PiecewiseLinearEmbeddings

    c = model.config
    peer = tabm.TabM.make(
        n_num_features=c.numbers,
        cat_cardinalities=[size - 1 for size in c.categories],
        d_out=c.num_classes,
        num_embeddings=PiecewiseLinearEmbeddings(list(model.numbers.edges.float()), c.embedding, activation=False, version="B"),
        n_blocks=c.depth,
        d_block=c.dim,
        dropout=c.dropout,
        k=c.members,
    )
    names = {
        "numbers.weight": "num_module.linear0.weight",
        "numbers.bias": "num_module.linear0.bias",
        "numbers.curve": "num_module.linear.weight",
        "head.weight": "output.weight",
        "head.bias": "output.bias",
    }

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
            return self.peer(numbers, categories - 1)

    def rename(state: State) -> dict[str, Tensor]:
        done = {}
        for name, tensor in state.items():
            if name == "numbers.edges":  # there kept as the line of each interval
                done["peer.num_module.impl.weight"] = 1 / tensor.diff(dim=1)
                done["peer.num_module.impl.bias"] = -tensor[:, :-1] / tensor.diff(dim=1)
            elif name.startswith("layers."):
                _, layer, part = name.split(".")
                done[f"peer.backbone.blocks.{layer}.0.{part}"] = tensor
            else:
                done[f"peer.{names[name]}"] = tensor
        return done

    return Shifted(), rename


class Logits(nn.Module):
    """A language model of transformers, with padding on the right and positions from 0."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer = peer

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.peer(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits


class Doubled(Logits):
    """A peer that would round to float32, changed to keep the given precision."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        with unrounded():
            return super().forward(tokens, mask)


@contextmanager
def unrounded() -> Iterator[None]:
    """Keep float64 inside the block, where a peer would convert to float32."""
    to = Tensor.to
    kept = lambda x, *a, **k: x if x.dtype == torch.float64 and a[:1] == (torch.float32,) else to(x, *a, **k)
    whole = lambda x: x if x.dtype == torch.float64 else to(x, torch.float32)
    with mock.patch.object(Tensor, "to", kept), mock.patch.object(Tensor, "float", whole):
        yield


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Eager attention of transformers without conversion to float32."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    return ((logits + attention_mask).softmax(-1) @ value).transpose(1, 2).contiguous(), None


def huggingface_decoder(model: nn.Module) -> Peer:
    """Build the language model of transformers that our exported config describes."""
    from fieldguide.checkpoints.config_mapping import to_public_config
    from fieldguide.models.registry import card_of
    from tv import transformers

    card = card_of(model)
    theirs = to_public_config(card, card.configs["huggingface"], model.config)
    how = "plain" if theirs.get("attn_logit_softcapping") else "sdpa"  # torch's own knows no caps
    transformers.AttentionInterface.register("plain", plain_attention)
    transformers.AttentionMaskInterface.register("plain", transformers.masking_utils.eager_mask)
    config = transformers.AutoConfig.for_model(
        theirs.pop("model_type"),
        **theirs,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=how,
        experts_implementation="eager",
    )
    table = card.weights["huggingface"]

    def rename(state: State) -> dict[str, Tensor]:
        names = translate(state, table, reverse=True)
        for layer in range(model.config.depth):  # in memory transformers stacks the experts that its files part
            moe = f"model.layers.{layer}.block_sparse_moe."
            if moe + "gate.weight" in names:
                up, down, gate = (
                    torch.stack([names.pop(f"{moe}experts.{e}.w{k}.weight") for e in range(model.config.experts)])
                    for k in (3, 2, 1)
                )
                mlp = f"model.layers.{layer}.mlp."
                names |= {
                    mlp + "gate.weight": names.pop(moe + "gate.weight"),
                    mlp + "experts.down_proj": down,
                    mlp + "experts.gate_up_proj": torch.cat([gate, up], 1),
                }
        return {f"peer.{key}": x for key, x in names.items()}

    return Doubled(transformers.AutoModelForCausalLM.from_config(config)), rename


def huggingface_gpt2(model: nn.Module, kind: str = "GPT2", embed: str = "wte") -> Peer:
    from fieldguide.checkpoints.weights import get_tables
    from tv import transformers

    c, names = model.config, get_tables(model)["huggingface"]
    peer = getattr(transformers, f"{kind}LMHeadModel")(
        getattr(transformers, f"{kind}Config")(
            vocab_size=c.vocab_size,
            n_positions=c.length,
            n_embd=c.dim,
            n_layer=c.depth,
            n_head=c.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    peer.lm_head = nn.Linear(c.dim, c.vocab_size, bias=False)
    peer.lm_head.weight = peer.transformer.get_submodule(embed).weight

    class Tied(Logits):
        """The head shares the tensor of the embedding, under one name."""

        def load_state_dict(self, state, strict=True):
            return super().load_state_dict(state | {"peer.lm_head.weight": state[f"peer.transformer.{embed}.weight"]}, strict)

    return Tied(peer), lambda state: {f"peer.{name}": tensor for name, tensor in translate(state, names, reverse=True).items()}


class TorchTransformer(nn.Module):
    """torch's encoder and decoder without final norms, between a shared embedding and output head."""

    def __init__(self, config: Any):
        super().__init__()
        self.inner = nn.Transformer(config.dim, config.heads, config.depth, config.depth, config.hidden, 0.0, batch_first=True)
        self.inner.encoder.norm = self.inner.decoder.norm = None
        self.inner.encoder.use_nested_tensor = False
        self.embed = nn.Embedding(config.vocab_size, config.dim)

    def read(self, tokens: Tensor) -> Tensor:
        dim = self.embed.embedding_dim
        return self.embed(tokens) * dim**0.5 + torch.tensor(
            [[references.sinusoid(t, column, dim) for column in range(dim)] for t in range(tokens.shape[1])],
            dtype=torch.float32,
        )

    def forward(self, source: Tensor, source_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        x = self.inner(
            self.read(source),
            self.read(tokens),
            tgt_mask=later,
            src_key_padding_mask=~source_mask,
            tgt_key_padding_mask=~mask,
            memory_key_padding_mask=~source_mask,
        )
        return x @ self.embed.weight.T


def torch_transformer(model: nn.Module) -> Peer:
    from fieldguide.models.transformer.seq2seq import TORCH

    def rename(state: State) -> dict[str, Tensor]:
        inner = {name: tensor for name, tensor in state.items() if name != "embed.weight"}
        return {"embed.weight": state["embed.weight"]} | {
            f"inner.{name}": tensor for name, tensor in translate(inner, TORCH, reverse=True).items()
        }

    return TorchTransformer(model.config), rename


def smp_unet(model: nn.Module) -> Peer:
    """Build the decoder of segmentation-models-pytorch on the ResNet of transformers, whose widths can be chosen."""
    from fieldguide.models.convolutional.resnet import HUGGINGFACE
    from fieldguide.models.convolutional.unet_resnet import SMP
    from tv import smp, transformers

    c = model.config
    growth = 4 if c.block == "bottleneck" else 1
    widths = [growth * width for width in c.widths]

    class Composed(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = transformers.ResNetModel(
                transformers.ResNetConfig(
                    num_channels=c.channels,
                    embedding_size=c.widths[0],
                    hidden_sizes=widths,
                    depths=list(c.depths),
                    layer_type=c.block,
                )
            )
            self.decoder = smp.decoders.unet.decoder.UnetDecoder((c.channels, c.widths[0], *widths), c.up, n_blocks=len(c.up))
            self.segmentation_head = smp.base.SegmentationHead(c.up[-1], c.num_classes)

        def forward(self, x: Tensor) -> Tensor:
            stem = self.encoder.embedder.embedder(x)
            levels, inner = [x, stem], self.encoder.embedder.pooler(stem)
            for stage in self.encoder.encoder.stages:
                levels.append(inner := stage(inner))
            return self.segmentation_head(self.decoder(levels))

    def rename(state: State) -> dict[str, Tensor]:
        inner = {name.removeprefix("encoder."): x for name, x in state.items() if name.startswith("encoder.")}
        outer = {name: x for name, x in state.items() if not name.startswith("encoder.")}
        return translate(outer, SMP, reverse=True) | {
            f"encoder.{name.removeprefix('resnet.')}": x for name, x in translate(inner, HUGGINGFACE, reverse=True).items()
        }

    return Composed(), rename


def diffusers_unet(model: nn.Module) -> Peer:
    """Build the U-Net of diffusers as in the authors' code: down- and upsampling, sinusoids, normalization."""
    from fieldguide.models.diffusion.ddpm_unet import DIFFUSERS
    from tv import diffusers

    c = model.config
    attends = [c.image >> level in c.attend for level in range(len(c.growth))]
    peer = diffusers.UNet2DModel(
        sample_size=c.image,
        in_channels=c.channels,
        out_channels=c.channels,
        layers_per_block=c.depth,
        block_out_channels=tuple(c.dim * growth for growth in c.growth),
        attention_head_dim=None,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=c.groups,
        num_class_embeds=c.num_classes + 1 if c.num_classes else None,
    )

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, image: Tensor, time: Tensor, label: Tensor) -> Tensor:
            return self.peer(image, time, label if c.num_classes else None).sample

    return Sample(), lambda state: {
        f"peer.{name}": tensor for name, tensor in translate(state, DIFFUSERS, reverse=True).items()
    }


class PackedNorm(nn.BatchNorm1d):
    """Apply torch's batch normalization to the concatenated real frames."""

    mask: Tensor | None = None  # B S

    def forward(self, x: Tensor) -> Tensor:  # B D S -> B D S
        y = torch.zeros_like(x.mT)
        y[self.mask] = super().forward(x.mT[self.mask])
        return y.mT


def conformer_layers(model: nn.Module) -> Peer:
    """Layers of transformers, whose convolutions ignore padding, between slow equations."""
    from fieldguide.models.transformer.conformer import HUGGINGFACE_LAYERS
    from tv import transformers

    c = model.config
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=c.dim,
        num_hidden_layers=c.depth,
        num_attention_heads=c.heads,
        intermediate_size=c.growth * c.dim,
        conv_depthwise_kernel_size=c.kernel,
        position_embeddings_type="relative",
        hidden_act="swish",
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        conformer_conv_dropout=0.0,
        attn_implementation="eager",
    )
    layer = transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer.Wav2Vec2ConformerEncoderLayer

    class Composed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layer(config) for _ in range(c.depth))
            self.lm_head = nn.Linear(c.dim, c.vocab_size)
            stem = {name: x for name, x in model.state_dict().items() if name.startswith("stem.")}
            self.stem = nn.ParameterDict({name.replace(".", "__"): torch.empty_like(x) for name, x in stem.items()})
            for one in self.layers:
                one.conv_module.batch_norm = PackedNorm(c.dim)
                one.conv_module.depthwise_conv.register_forward_pre_hook(lambda _, xs: (xs[0] * self.mask[:, None],))

        def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
            stem = {name.replace("__", "."): x for name, x in self.stem.items()}
            rows = [references.conformer_stem(stem, x[:n]) for x, n in zip(features, lengths.tolist())]
            x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            steps, dim = x.shape[1:]
            self.mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
            hidden = torch.zeros(self.mask.shape, dtype=x.dtype).masked_fill(~self.mask, -torch.inf)[:, None, None]
            pos = torch.tensor(
                [[references.sinusoid(t, column, dim) for column in range(dim)] for t in range(steps - 1, -steps, -1)],
                dtype=x.dtype,
            )[None]
            for one in self.layers:
                one.conv_module.batch_norm.mask = self.mask
                x = one(x, attention_mask=hidden, relative_position_embeddings=pos)
            x = self.lm_head(x)
            longest = -(-features.shape[1] // 4)  # padding that all rows share is cut above
            return torch.cat([x, x.new_zeros(len(x), longest - steps, x.shape[-1])], 1)

    def rename(state: State) -> dict[str, Tensor]:
        inner = {name: x for name, x in state.items() if not name.startswith("stem.")}
        return {
            name.removeprefix("wav2vec2_conformer.encoder."): x
            for name, x in translate(inner, HUGGINGFACE_LAYERS, reverse=True).items()
        } | {f"stem.{name.replace('.', '__')}": x for name, x in state.items() if name.startswith("stem.")}

    return Composed(), rename


def huggingface_clip(model: nn.Module) -> Peer:
    from fieldguide.models.transformer.clip import HUGGINGFACE
    from tv import transformers

    c = model.config
    act = "quick_gelu" if c.quick else "gelu"
    peer = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                "vocab_size": c.vocab_size,
                "hidden_size": c.text_dim,
                "intermediate_size": 4 * c.text_dim,
                "num_hidden_layers": c.text_depth,
                "num_attention_heads": c.text_heads,
                "hidden_act": act,
                "max_position_embeddings": c.length,
                "eos_token_id": c.end,
                "bos_token_id": 0,
                "pad_token_id": 1,
            },
            vision_config={
                "hidden_size": c.dim,
                "intermediate_size": 4 * c.dim,
                "num_hidden_layers": c.depth,
                "num_attention_heads": c.heads,
                "hidden_act": act,
                "image_size": c.image,
                "patch_size": c.patch,
                "num_channels": c.channels,
            },
            projection_dim=c.embed,
        )
    )

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            found = self.peer(pixel_values=image, input_ids=tokens, attention_mask=mask.long())
            return torch.stack([found.image_embeds, found.text_embeds], 1) * (self.peer.logit_scale / 2).exp()

    return Pairs(), lambda state: {
        f"peer.{name}": tensor for name, tensor in translate(state, HUGGINGFACE, reverse=True).items()
    }


def huggingface_llava(model: nn.Module) -> Peer:
    from fieldguide.checkpoints.config_mapping import to_public_config
    from fieldguide.models.registry import card_of
    from tv import transformers

    card = card_of(model)
    theirs = to_public_config(card, card.configs["huggingface"], model.config)
    peer = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**theirs))

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            with unrounded():
                return self.peer(pixel_values=image, input_ids=tokens, attention_mask=mask.long()).logits

    def rename(state: State) -> dict[str, Tensor]:
        """Return the names in memory, which differ from those on disk."""
        names = translate(state, card.weights["huggingface"], reverse=True)
        live = lambda key: key.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "language_model.")
        names = {live(key).replace("vision_tower.vision_model.", "vision_tower."): x for key, x in names.items()}
        return {f"peer.{key}" if key.startswith("lm_head") else f"peer.model.{key}": x for key, x in names.items()}

    return Words(), rename


def huggingface_vilt(model: nn.Module) -> Peer:
    from fieldguide.models.transformer.vilt import HUGGINGFACE
    from tv import transformers

    c = model.config
    peer = transformers.ViltForQuestionAnswering(
        transformers.ViltConfig(
            vocab_size=c.vocab_size,
            max_position_embeddings=c.length,
            hidden_size=c.dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.heads,
            intermediate_size=4 * c.dim,
            image_size=c.image,
            patch_size=c.patch,
            num_channels=c.channels,
            num_labels=c.num_classes,
            pad_token_id=None,
        )
    )

    class Answers(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.peer(pixel_values=image, input_ids=tokens, attention_mask=mask.long()).logits

    return Answers(), lambda state: {
        f"peer.{name}": tensor for name, tensor in translate(state, HUGGINGFACE, reverse=True).items()
    }


def timm_vit(model: nn.Module) -> Peer:
    from tv import timm

    c = model.config
    peer = timm.models.vision_transformer.VisionTransformer(
        img_size=c.image,
        patch_size=c.patch,
        in_chans=c.channels,
        num_classes=c.num_classes,
        embed_dim=c.dim,
        depth=c.depth,
        num_heads=c.heads,
    )
    return peer, lambda state: translate(state, get_tables(model)["timm"], reverse=True)


def timm_deit(model: nn.Module) -> Peer:
    from tv import timm

    c = model.config

    class Stacked(timm.models.deit.VisionTransformerDistilled):
        def forward(self, x: Tensor) -> Tensor:
            found = super().forward(x)
            return torch.stack(found, 1) if self.training else found

    peer = Stacked(
        img_size=c.image,
        patch_size=c.patch,
        in_chans=c.channels,
        num_classes=c.num_classes,
        embed_dim=c.dim,
        depth=c.depth,
        num_heads=c.heads,
    )
    peer.set_distilled_training()
    return peer, lambda state: translate(state, get_tables(model)["timm"], reverse=True)


class Classes(nn.Module):
    """A classifier of transformers under the parameter names of its files."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer = peer

    def forward(self, image: Tensor) -> Tensor:
        return self.peer(image).logits

    def living(self, state: State) -> dict[str, Tensor]:
        """Map tensors by name on disk to names in memory, with the table of transformers."""
        from tv import transformers

        mine = self.peer.state_dict()
        disk = transformers.core_model_loading.revert_weight_conversion(self.peer, mine)
        place = {x.data_ptr(): name for name, x in mine.items()}
        return {f"peer.{place[disk[name].data_ptr()]}": x for name, x in state.items()}


def huggingface_swin(model: nn.Module) -> Peer:
    from tv import transformers

    c = model.config
    peer = Classes(
        transformers.SwinForImageClassification(
            transformers.SwinConfig(
                image_size=33,
                patch_size=c.patch,
                num_channels=c.channels,
                embed_dim=c.dim,
                depths=list(c.depths),
                num_heads=list(c.heads),
                window_size=c.window,
                num_labels=c.num_classes,
                drop_path_rate=0.0,
            )
        )
    )
    return peer, lambda state: peer.living(translate(state, get_tables(model)["huggingface"], reverse=True))


def huggingface_dinov2(model: nn.Module) -> Peer:
    """Build the peer. Its gated layer splits gate and value, unlike the file; its mask token is unused."""
    from tv import transformers

    c = model.config
    inner = transformers.Dinov2WithRegistersForImageClassification(
        transformers.Dinov2WithRegistersConfig(
            hidden_size=c.dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.heads,
            image_size=c.image,
            patch_size=c.patch,
            num_channels=c.channels,
            num_labels=c.num_classes,
            num_register_tokens=c.registers,
            use_swiglu_ffn=c.gated,
        )
    )
    embeddings = inner.dinov2_with_registers.embeddings
    del embeddings.mask_token
    embeddings.register_buffer("mask_token", torch.zeros(1, c.dim))
    table = get_tables(model)["huggingface"]

    def rename(state: State) -> dict[str, Tensor]:
        done = {}
        for name, x in translate(state, table, reverse=True).items():
            for disk, living in (
                ("attention.output.dense", "attention.o_proj"),
                ("weights_out", "down_proj"),
                *((f"attention.attention.{part}", f"attention.{part[0]}_proj") for part in ("query", "key", "value")),
            ):
                name = name.replace(disk, living)
            if "weights_in" in name:
                for part, half in zip(("gate_proj", "up_proj"), x.chunk(2)):
                    done[f"peer.{name.replace('weights_in', part)}"] = half
            else:
                done[f"peer.{name}"] = x
        return done

    return Classes(inner), rename


CASES = {
    "fnn": Case(
        inputs=row("in_dim"), peer=same(lambda m: guide.FNN(m.net[0].in_features, m.net[0].out_features, m.net[4].out_features))
    ),
    "simplecnn": Case(
        inputs=image,
        peer=same(lambda m: guide.SimpleCNN(m.classifier[4].out_features)),
        overrides=(("channels", 3), ("image", 32)),
        lr=1e-3,
    ),
    "lenet5-1998": Case(inputs=image, peer=equations(references.lenet5), lr=3e-3),
    "lenet5-modern": Case(inputs=image, peer=equations(references.lenet5_modern), lr=3e-3),
    "resnet": Case(inputs=image, peer=huggingface_resnet, lr=1e-2),
    "alexnet": Case(inputs=image, peer=pictures.peer(pictures.torchvision_alexnet, "torchvision"), lr=3e-3),
    "alexnet-2012": Case(inputs=image, peer=equations(pictures.alexnet_2012)),
    "vgg": Case(inputs=image, peer=pictures.peer(pictures.torchvision_vgg, "torchvision"), lr=3e-2),
    "efficientnet": Case(inputs=image, peer=pictures.peer(pictures.timm_efficientnet, "timm")),
    "efficientnet-lite": Case(inputs=image, peer=pictures.peer(pictures.timm_efficientnet_lite, "timm")),
    "efficientnetv2": Case(inputs=image, peer=pictures.peer(pictures.torchvision_efficientnet_v2, "torchvision")),
    "mobilenetv2": Case(inputs=image, peer=pictures.peer(pictures.torchvision_mobilenet_v2, "torchvision")),
    "mobilenetv3": Case(inputs=image, peer=pictures.peer(pictures.torchvision_mobilenet_v3, "torchvision")),
    "convnext": Case(inputs=image, peer=pictures.peer(pictures.huggingface_convnext, "huggingface")),
    "convnextv2": Case(inputs=image, peer=pictures.peer(pictures.huggingface_convnext, "huggingface")),
    "unet": Case(inputs=image, peer=equations(references.unet("valid"))),
    "yolov8": Case(inputs=image, peer=equations(boxes.yolov8), slack=10.0),
    "yolo11": Case(inputs=image, peer=equations(boxes.yolo11), slack=10.0),
    "detr": Case(inputs=image, peer=detectors.detr, slack=10.0),
    "faster-rcnn": Case(inputs=wide, peer=detectors.faster_rcnn, slack=10.0, selects=True),
    "rt-detr": Case(
        inputs=wide,
        peer=detectors.rt_detr,
        slack=10.0,
        selects=True,
        # Only the auxiliary losses train the proposals, the classes of noisy objects and the heads of the first layers.
        skipped=("proposal", "known", "box.0.", "label.0."),
    ),
    "unet-resnet": Case(inputs=coarse, peer=smp_unet),
    "lstm-classifier": Case(inputs=tokens, peer=last_real, lr=3e-2),
    "rnn": Case(inputs=tokens, peer=packed(nn.RNN)),
    "lstm": Case(inputs=tokens, peer=packed(nn.LSTM)),
    "gru": Case(inputs=tokens, peer=packed(nn.GRU)),
    "transformer-encoder": Case(inputs=tokens, peer=torch_encoder),
    "bert": Case(inputs=tokens, peer=encoder),
    "roberta": Case(inputs=unpadded, peer=encoder),
    "deberta": Case(inputs=tokens, peer=encoder, lr=3e-2),
    "deberta-v2": Case(inputs=tokens, peer=encoder, lr=3e-2),
    "modernbert": Case(inputs=tokens, peer=encoder),
    "gpt": Case(inputs=tokens, peer=lambda model: huggingface_gpt2(model, "OpenAIGPT", "tokens_embed"), lr=3e-2),
    "gpt2": Case(inputs=tokens, peer=huggingface_gpt2, lr=3e-2),
    "llama": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "qwen3": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "mixtral": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "gemma": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "gemma2": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2, overrides=(("cap", 20.0),)),
    "gemma3": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "transformer": Case(inputs=pair, peer=torch_transformer, lr=2e-2),
    "t5": Case(inputs=pair, peer=writer, lr=3e-2),
    "bart": Case(inputs=pair, peer=writer, lr=2e-2),
    "mbart": Case(inputs=pair, peer=writer, lr=2e-2),
    "nllb": Case(inputs=unpadded_pair, peer=writer, lr=2e-2),
    "nllb-moe": Case(inputs=unpadded_pair, peer=writer, lr=2e-2),
    "sasrec": Case(
        inputs=items, lr=3e-2, peer=lambda model: equations(references.sasrec(model.config.heads, model.config.length))(model)
    ),
    "patchtst": Case(
        inputs=series,
        lr=3e-2,
        peer=lambda model: equations(
            references.patchtst(model.config.patch, model.config.stride, model.config.heads, model.config.values)
        )(model),
    ),
    "lstm-forecaster": Case(
        inputs=covariates, lr=3e-2, peer=lambda model: equations(references.lstm_forecaster(model.config.horizon))(model)
    ),
    "dlinear": Case(
        inputs=series,
        lr=3e-2,
        peer=lambda model: equations(references.dlinear(model.config.window, model.config.values))(model),
    ),
    "conformer": Case(inputs=speech, peer=conformer_layers, lr=2e-2),
    "self-attention": Case(inputs=sequence, peer=same(lambda m: guide.SelfAttention(m.W_q.in_features, m.n_heads))),
    "linear": Case(inputs=table, peer=lambda model: equations(references.linear(model.config.categories))(model), lr=0.1),
    "gradient-boosting": Case(
        inputs=table,
        peer=lambda model: equations(references.gradient_boosting(model.config.nodes, model.config.trees))(model),
        lr=0.1,
    ),
    "bag-of-ngrams": Case(inputs=tokens, peer=equations(references.bag_of_ngrams), lr=0.1),
    "hog-linear": Case(inputs=image, peer=lambda model: equations(references.hog_linear(model.config))(model), num_classes=3),
    "exponential-smoothing": Case(
        inputs=series, peer=lambda model: equations(references.exponential_smoothing(model.config))(model)
    ),
    "mlp": Case(inputs=table, peer=lambda model: equations(references.mlp(model.config.categories))(model)),
    "tabm": Case(inputs=table, peer=tabm_package),
    "deepfm": Case(
        inputs=table, num_classes=1, peer=lambda model: equations(references.deepfm(model.config.categories))(model)
    ),
    "dcgan": Case(inputs=row("noise"), peer=equations(references.dcgan)),
    "dcgan-discriminator": Case(inputs=image, peer=equations(references.dcgan_discriminator)),
    "clip": Case(inputs=captioned, peer=huggingface_clip, lr=3e-3),
    "clip-resnet": Case(inputs=captioned, peer=clips.official, lr=3e-3),
    "ddpm-unet": Case(inputs=noisy, peer=diffusers_unet),
    "swin": Case(inputs=image, peer=huggingface_swin, lr=3e-3),
    "dinov2": Case(inputs=image, peer=huggingface_dinov2, lr=3e-3),
    "vit": Case(inputs=image, peer=timm_vit, lr=3e-3),
    "deit": Case(inputs=image, peer=timm_deit, lr=3e-3),
    "vilt": Case(inputs=captioned, peer=huggingface_vilt, lr=3e-3),
    "llava": Case(inputs=shown, peer=huggingface_llava, lr=2e-2, skipped=("vision.blocks.1.", "vision.norm.")),
    "latte": Case(inputs=noisy_video, lr=3e-3, peer=lambda model: equations(references.latte(model.config))(model)),
    "simple-gan": Case(
        inputs=row("z_dim"), peer=same(lambda m: guide.Generator(m.net[0].in_features, m.net[4].out_features)), lr=1e-3
    ),
    "simple-gan-discriminator": Case(
        inputs=row("img_dim"), peer=same(lambda m: guide.Discriminator(m.net[0].in_features)), lr=1e-3
    ),
}
