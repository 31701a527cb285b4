"""One row an architecture: what the tests feed it and the independent peer that it must equal.

A peer is a pair: a module that takes the same inputs, and a function that turns tensors under our names into
tensors under the peer's. That function carries gradients as well as weights, so both are compared.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import boxes
import clips
import detectors
import forecasters
import guide
import latents
import pictures
import references
import segmenters
import stylegans
from fieldguide.checkpoints.weights import get_tables, translate
from references import Equations
from tied import Tied

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


def labeled_image(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return images with further channels for the class."""
    return (torch.randn(rows, config.channels + config.num_classes, config.image, config.image),)


def wide(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return oblong images of multiples of 32 pixels, to which other sizes are padded."""
    return (0.3 * torch.randn(rows, config.channels, 64, 96),)  # no saturated probabilities, by which peers rank


def prompted(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return images and two prompts each: of two points and no point, and of a box and a point."""
    points = torch.rand(rows, 2, 3, 2) * config.image
    labels = torch.tensor([[0, 1, -1], [1, 2, 3]]).expand(rows, 2, 3)
    return (*image(config, rows), points, labels)


def coarse(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return images of squares, for networks with coarse outputs."""
    return (torch.randn(rows, config.channels, 5, 5).repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :33, 1:],)


def soft(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return soft images in -1 .. 1, the range of outputs."""
    rough = torch.randn(rows, config.channels, 12, 12)
    return (torch.nn.functional.interpolate(rough, (33, 33), mode="bicubic").tanh(),)


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


def steps(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return series for a network that reads any length."""
    return (torch.randn(rows, 12, config.channels),)


def covariates(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return three series of a window, past covariates, and future covariates to the end of the horizon."""
    return (
        torch.randn(rows, config.length, 3),
        torch.randn(rows, config.length, config.past),
        torch.randn(rows, config.length + config.horizon, config.known),
    )


def static_covariates(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return the same, and properties of the window's series."""
    return *covariates(config, rows), torch.randn(rows, config.static)


def noisy(config: Any, rows: int) -> tuple[Tensor, ...]:
    side = config.image
    return (
        torch.randn(rows, config.channels, side, side),
        torch.randint(1000, (rows,)).float(),
        torch.arange(rows) % (config.num_classes + 1),
    )


def noisy_target(config: Any, rows: int) -> tuple[Tensor, ...]:
    target, time, _ = noisy(config, rows)
    return target, time, torch.randn(rows, config.condition, *target.shape[2:])


def speech(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return recordings of 9 to 21 frames, the longest first; the content after their end is arbitrary."""
    return torch.randn(rows, 21, config.features), torch.linspace(21, 9, rows).long()


def waveform(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return recordings of 23 to 41 samples, the longest first; the content after their end is arbitrary."""
    return torch.randn(rows, 41), torch.linspace(41, 23, rows).long()


def speech_text(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return features of the full length, as the peer requires, and texts."""
    return torch.randn(rows, 2 * config.source_length, config.features), *tokens(config, rows)


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
    patches = (config.image // (config.patch * getattr(config, "merge", 1))) ** 2
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


def hstu_equations(c: Any) -> Callable[..., Tensor]:
    return references.hstu(c.heads, c.key_dim, c.value_dim, c.length, c.temperature)


def bert4rec(model: nn.Module) -> Peer:
    import encoders

    return encoders.bert4rec(model)


def writer(model: nn.Module) -> Peer:
    import writers

    return writers.writer(model)


def transcriber(model: Any) -> tuple[nn.Module, Any]:
    """Return transformers' Whisper."""
    import writers

    return writers.writer(model, writers.Transcripts, pad_token_id=0)


def waveform_encoder(model: Any) -> Peer:
    import recognizers

    return recognizers.waveform_encoder(model)


def parakeet(model: Any) -> Peer:
    import recognizers

    return recognizers.parakeet(model)


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


def rtdl_package(model: nn.Module) -> Peer:
    """Build the network of the authors' package, where each category column has an embedding of its own."""
    from rtdl_revisiting_models import FTTransformer

    c = model.config
    peer = FTTransformer(
        n_cont_features=c.numbers,
        cat_cardinalities=list(c.categories),
        d_out=c.num_classes,
        n_blocks=c.depth,
        d_block=c.dim,
        attention_n_heads=c.heads,
        attention_dropout=c.attention_dropout,
        ffn_d_hidden=c.hidden,
        ffn_d_hidden_multiplier=None,
        ffn_dropout=c.dropout,
        residual_dropout=0.0,
    )
    block = "backbone.blocks.{}."
    parts = {
        "attn.proj": "attention.W_out",
        "norm1": "attention_normalization",
        "norm2": "ffn_normalization",
        "up": "ffn.linear1",
        "down": "ffn.linear2",
    }

    def rename(state: State) -> dict[str, Tensor]:
        done = {
            "cls_embedding.weight": state["tokenizer.cls"],
            "cont_embeddings.weight": state["tokenizer.weight"],
            "cont_embeddings.bias": state["tokenizer.bias"][: c.numbers],
            "cat_embeddings.bias": state["tokenizer.bias"][c.numbers :],
        }
        for i, table in enumerate(state["tokenizer.embed.weight"].split(list(c.categories))):
            done[f"cat_embeddings.embeddings.{i}.weight"] = table
        for name, tensor in state.items():
            if name.startswith("blocks."):
                _, i, part = name.split(".", 2)
                part, kind = part.rsplit(".", 1)
                if part == "attn.qkv":
                    for letter, third in zip("qkv", tensor.chunk(3)):
                        done[block.format(i) + f"attention.W_{letter}.{kind}"] = third
                else:
                    done[block.format(i) + f"{parts[part]}.{kind}"] = tensor
            elif name.startswith(("norm.", "head.")):
                done["backbone.output." + name.replace("norm.", "normalization.").replace("head.", "linear.")] = tensor
        return done

    return peer, rename


def encode_classes(layer: nn.Linear, classes: Tensor) -> Tensor:
    codes = nn.functional.one_hot(classes.long(), layer.in_features).to(layer.weight.dtype)
    return nn.functional.linear(codes, layer.weight, layer.bias)


def predict_with_gradients(learner: Any, R: Tensor, y_train: Tensor, softmax_temperature: float, **_: Any) -> Tensor:
    """Return the probabilities of the package's prediction by one node, which computes them without gradients."""
    outputs = learner._icl_predictions(R, y_train)[:, y_train.shape[1] :, : len(y_train.unique())]
    return (outputs / softmax_temperature).softmax(-1)


class TabICLPackage(nn.Module):
    """The network of the authors' package for a stored context, whose columns are already normalized."""

    def __init__(self, config: Any, **arguments: Any):
        super().__init__()
        from tabicl._model.layers import OneHotAndLinear
        from tabicl._model.tabicl import TabICL

        c = self.config = config
        self.peer = TabICL(
            max_classes=c.max_classes,
            embed_dim=c.dim,
            col_num_blocks=c.column_depth,
            col_nhead=c.column_heads,
            col_num_inds=c.points,
            row_num_blocks=c.row_depth,
            row_nhead=c.row_heads,
            row_num_cls=c.row_tokens,
            row_rope_base=c.rope_theta,
            icl_num_blocks=c.depth,
            icl_nhead=c.heads,
            ff_factor=c.expansion,
            bias_free_ln=not c.norm_bias,
            **arguments,
        )
        for module in self.peer.modules():  # it encodes classes in float32, whatever the precision of its weights
            if isinstance(module, OneHotAndLinear):
                module.forward = functools.partial(encode_classes, module)
        learner = self.peer.icl_predictor
        # With many classes, the package changes the tokens in place between two passes, which gradients do not allow.
        self.peer.col_embedder.tf_col.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:]))
        learner._predict_standard = functools.partial(predict_with_gradients, learner)
        columns = c.numbers + len(c.categories)
        for name in ("mean", "std", "power", "power_mean", "power_std"):
            self.register_buffer(name, torch.empty(columns))
        for name, shape in {
            "low": (2, columns),
            "high": (2, columns),
            "rows": (c.context, columns),
            "target": (c.context,),
        }.items():
            self.register_buffer(name, torch.empty(shape))
        self.register_buffer("order", torch.empty(c.views, columns, dtype=torch.int64))
        self.register_buffer("shift", torch.empty(c.views, dtype=torch.int64))

    def train(self, mode: bool = True) -> TabICLPackage:
        """Stay in training mode, where the package computes without splitting into batches; it has no dropout."""
        return super().train(True)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        c, found = self.config, []
        x = torch.cat([self.rows, torch.cat([numbers, categories - 1], 1)]) / (1 + 1e-6)
        for order, shift in zip(self.order, self.shift):
            pattern = (torch.arange(c.num_classes) - shift) % c.num_classes  # class -> its number for this view
            y = pattern[self.target.long()].to(x.dtype) if c.max_classes else self.target
            if 0 < c.max_classes < c.num_classes:
                found.append(self.predict_many_classes(x[:, order], y)[:, pattern])
                continue
            out = self.peer(x[None, :, order], y[None])[0, -len(numbers) :]
            found.append(out[:, pattern] / 0.9 if c.max_classes else out.mean(1, keepdim=True))
        return torch.stack(found).mean(0)

    def predict_many_classes(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logits of the rows after those with classes, as the package does in evaluation mode."""
        learner, count = self.peer.icl_predictor, len(y)
        rows = self.peer.row_interactor(self.peer.col_embedder(x[None], y[None]))[0]
        learner._fit_hierarchical(rows[:count], y)
        return torch.log(learner._predict_hierarchical(rows[count:]) + 1e-6)


def tabicl_package(**arguments: Any) -> Callable[[nn.Module], Peer]:
    def build(model: nn.Module) -> Peer:
        def rename(state: State) -> dict[str, Tensor]:
            own = {name: tensor for name, tensor in state.items() if not name.startswith("context.")}
            own.setdefault("rows.rotation.freqs", torch.zeros_like(model.rows.rotation.freqs))  # a constant parameter there
            done = translate(own, get_tables(model)["tabicl"], reverse=True)
            context = {name.removeprefix("context."): t for name, t in state.items() if name.startswith("context.")}
            return {f"peer.{name}": tensor for name, tensor in done.items()} | context

        return TabICLPackage(model.config, **arguments), rename

    return build


TABICL_1 = {"col_affine": True, "col_feature_group": False, "col_target_aware": False, "col_ssmax": False, "icl_ssmax": False}


def build_chronos(c: Any) -> nn.Module:
    """Build the authors' network."""
    from chronos.chronos_bolt import ChronosBoltModelForForecasting

    import tv

    config = tv.transformers.T5Config(
        d_model=c.dim,
        d_ff=c.hidden,
        d_kv=c.width,
        num_heads=c.heads,
        num_layers=c.depth,
        num_decoder_layers=c.decoder_depth,
        relative_attention_num_buckets=c.buckets,
        relative_attention_max_distance=c.far,
        dropout_rate=c.dropout,
        feed_forward_proj="relu",
        decoder_start_token_id=c.begin,
        architectures=["ChronosBoltModelForForecasting"],
        chronos_config={
            "context_length": c.max_length,
            "prediction_length": c.block,
            "input_patch_size": c.patch,
            "input_patch_stride": c.stride,
            "quantiles": list(c.levels),
            "use_reg_token": c.reg_token,
        },
    )
    network = ChronosBoltModelForForecasting(config)
    network.encoder.embed_tokens = network.decoder.embed_tokens = network.shared
    return network


class ChronosPackage(Tied):
    """The authors' network, with the rollout of their pipeline beyond a block."""

    def __init__(self, config: Any):
        super().__init__()
        self.config, self.peer = config, build_chronos(config)

    def forward(self, series: Tensor) -> Tensor:
        to = Tensor.to  # its scaling and norms convert to float32
        kept = lambda x, *a, **k: x if x.dtype == torch.float64 and a[:1] == (torch.float32,) else to(x, *a, **k)
        with mock.patch.object(Tensor, "to", kept):
            return self.forecast(series)

    def forecast(self, series: Tensor) -> Tensor:
        c = self.config
        x = series.transpose(1, 2).flatten(0, 1)[:, -c.max_length :]
        found = [self.peer(x).quantile_preds]
        x = x[:, None].repeat(1, len(c.levels), 1)
        while len(found) * c.block < c.horizon:
            x = torch.cat([x, found[-1]], -1)[..., -c.max_length :]
            ahead = torch.stack([self.peer(x[:, i]).quantile_preds for i in range(len(c.levels))], 1).flatten(1, 2)
            found.append(torch.stack([torch.quantile(ahead, level, dim=1) for level in c.levels], 1))
        low, median, high = torch.cat(found, -1)[..., : c.horizon].unbind(1)
        normal = statistics.NormalDist()
        below = median + (low - median) * normal.inv_cdf(0.05) / normal.inv_cdf(0.1)
        above = median + (high - median) * (0.05 / 0.4)  # .55 between .5 and .9
        found = torch.stack([median, below, above], -1)
        return found.unflatten(0, (len(series), -1)).transpose(1, 2)


def chronos_package(model: nn.Module) -> Peer:
    def rename(state: State) -> dict[str, Tensor]:
        names = translate(dict(state), get_tables(model)["huggingface"], reverse=True)
        return {f"peer.{name}": tensor for name, tensor in names.items() if f"peer.{name}" not in peer.tied()}

    peer = ChronosPackage(model.config)
    return peer, rename


def build_timesfm(c: Any) -> nn.Module:
    """Build the network of transformers."""
    import tv

    return tv.transformers.TimesFm2_5ModelForPrediction(
        tv.transformers.TimesFm2_5Config(
            patch_length=c.patch,
            context_length=c.max_length,
            horizon_length=c.block,
            num_hidden_layers=c.depth,
            hidden_size=c.dim,
            intermediate_size=c.hidden,
            head_dim=c.width,
            num_attention_heads=c.heads,
            num_key_value_heads=c.heads,
            rms_norm_eps=c.eps,
            quantiles=list(c.levels),
            output_quantile_len=c.far,
            decode_index=1 + c.levels.index(0.5),
            force_flip_invariance=c.flip,
            infer_is_positive=c.positive,
            attn_implementation="eager",
            architectures=["TimesFm2_5ModelForPrediction"],
        )
    )


class TimesFmPackage(nn.Module):
    """The network of transformers on one series at a time, since it keeps forecasts positive by the minimum of the whole batch."""

    def __init__(self, config: Any):
        super().__init__()
        self.config, self.peer = config, build_timesfm(config)

    def forward(self, series: Tensor) -> Tensor:
        c = self.config
        with unrounded():
            rows = [self.peer([x]).full_predictions[0, :, 1:] for x in series.transpose(1, 2).flatten(0, 1)]  # H R
        low, median, high = torch.stack(rows)[:, : c.horizon].unbind(-1)
        normal = statistics.NormalDist()
        below = median + (low - median) * normal.inv_cdf(0.05) / normal.inv_cdf(0.1)
        above = median + (high - median) * (0.05 / 0.4)  # .55 between .5 and .9
        return torch.stack([median, below, above], -1).unflatten(0, (len(series), -1)).transpose(1, 2)


def timesfm_package(model: nn.Module) -> Peer:
    def rename(state: State) -> dict[str, Tensor]:
        names = translate(dict(state), get_tables(model)["huggingface"], reverse=True)
        live = {name.replace(".mlp.ff0.", ".mlp.fc1.").replace(".mlp.ff1.", ".mlp.fc2."): x for name, x in names.items()}
        return {f"peer.{name}": tensor for name, tensor in live.items()}

    return TimesFmPackage(model.config), rename


class Logits(Tied):
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
    typed, type_ = Tensor.type, lambda x, *a: x if x.dtype == torch.float64 and a[:1] == (torch.float32,) else typed(x, *a)
    softmax = nn.functional.softmax
    soft = lambda x, dim=None, dtype=None: softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype)
    with (
        mock.patch.object(Tensor, "to", kept),
        mock.patch.object(Tensor, "float", whole),
        mock.patch.object(Tensor, "type", type_),
        mock.patch.object(nn.functional, "softmax", soft),
    ):
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
    kind = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[theirs["model_type"]]
    how = "sdpa" if getattr(transformers, kind)._supports_sdpa else "eager"
    how = "plain" if theirs.get("attn_logit_softcapping") else how  # torch's own knows no caps
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
    table = get_tables(model)["huggingface"]

    def rename(state: State) -> dict[str, Tensor]:
        names = translate(state, table, reverse=True)
        for layer in range(model.config.depth):  # in memory transformers stacks the experts that its files part
            mlp = f"model.layers.{layer}.mlp."
            for moe, parts in (
                (f"model.layers.{layer}.block_sparse_moe.", ("w3", "w2", "w1")),
                (mlp, ("up_proj", "down_proj", "gate_proj")),
            ):
                if moe + "gate.weight" not in names:
                    continue
                up, down, gate = (
                    torch.stack([names.pop(f"{moe}experts.{e}.{part}.weight") for e in range(model.config.experts)])
                    for part in parts
                )
                names |= {
                    mlp + "gate.weight": names.pop(moe + "gate.weight"),
                    mlp + "experts.down_proj": down,
                    mlp + "experts.gate_up_proj": torch.cat([gate, up], 1),
                }
                break
        names = {key.replace("embed_out.", "lm_head."): x for key, x in names.items()}  # of GPT-NeoX
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

    c, extra = model.config, getattr(model.config, "condition", 0)
    attends = [c.image >> level in c.attend for level in range(len(c.growth))]
    peer = diffusers.UNet2DModel(
        sample_size=c.image,
        in_channels=c.channels + extra,
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
            if extra:  # the third input is an image
                return self.peer(torch.cat([image, label], 1), time).sample
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


def written(config: Any, rows: int) -> tuple[Tensor, ...]:
    """Return images and texts so far."""
    return *image(config, rows), *tokens(config, rows)


def huggingface_blip(model: nn.Module) -> Peer:
    from fieldguide.models.transformer.blip import HUGGINGFACE
    from tv import transformers

    c = model.config
    peer = transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(
            text_config={
                "vocab_size": c.vocab_size,
                "hidden_size": c.dim,
                "intermediate_size": c.hidden,
                "num_hidden_layers": c.depth,
                "num_attention_heads": c.heads,
                "max_position_embeddings": c.length,
                "bos_token_id": c.begin,
                "sep_token_id": c.end,
                "pad_token_id": c.pad,
            },
            vision_config={
                "hidden_size": c.seen_dim,
                "intermediate_size": c.seen_hidden,
                "num_hidden_layers": c.seen_depth,
                "num_attention_heads": c.seen_heads,
                "image_size": c.image,
                "patch_size": c.patch,
            },
        )
    )
    peer.text_decoder.bert.embeddings.word_embeddings.padding_idx = None  # padding is a token like others here

    class Writer(Tied):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.peer(pixel_values=image, input_ids=tokens, attention_mask=mask.long()).logits

    return Writer(), lambda state: {
        f"peer.{name}": tensor for name, tensor in translate(state, HUGGINGFACE, reverse=True).items()
    }


def huggingface_siglip(model: nn.Module) -> Peer:
    from fieldguide.models.transformer.siglip import HUGGINGFACE
    from tv import transformers

    c = model.config
    peer = transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config={
                "vocab_size": c.vocab_size,
                "hidden_size": c.text_dim,
                "intermediate_size": c.text_hidden,
                "num_hidden_layers": c.text_depth,
                "num_attention_heads": c.text_heads,
                "max_position_embeddings": c.length,
                "pad_token_id": c.pad,
                "eos_token_id": c.end,
                "bos_token_id": 0,
                "projection_size": c.dim,
            },
            vision_config={
                "hidden_size": c.dim,
                "intermediate_size": c.hidden,
                "num_hidden_layers": c.depth,
                "num_attention_heads": c.heads,
                "image_size": c.image,
                "patch_size": c.patch,
                "num_channels": c.channels,
            },
        )
    )

    class Pairs(nn.Module):
        """Texts padded to the full length, and the embeddings whose products are the logits."""

        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            text = torch.full((len(tokens), c.length), c.pad)
            text[:, : tokens.shape[1]] = torch.where(mask, tokens, c.pad)
            found = self.peer(pixel_values=image, input_ids=text)
            x = torch.stack([found.image_embeds, found.text_embeds], 1) * (self.peer.logit_scale / 2).exp()
            bias = torch.stack([self.peer.logit_bias, torch.ones_like(self.peer.logit_bias)])
            return torch.cat([x, bias.expand(len(x), 2, 1)], 2)

    return Pairs(), lambda state: {
        f"peer.{name}": tensor for name, tensor in translate(state, HUGGINGFACE, reverse=True).items()
    }


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


def pack_patches(images: Sequence[Tensor], patch: int, merge: int) -> tuple[Tensor, Tensor]:
    """Return images, C H W, as Qwen2.5-VL of transformers takes them: rows of patches, then frames, rows and columns of each."""
    parts, grid = [], []
    for image in images:
        c, h, w = image.shape[0], image.shape[1] // patch, image.shape[2] // patch
        x = image.reshape(c, h // merge, merge, patch, w // merge, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
        parts.append(x[:, :, :, :, :, None].expand(*[-1] * 5, 2, -1, -1).reshape(h * w, -1))
        grid.append([1, h, w])
    return torch.cat(parts), torch.tensor(grid)


def huggingface_qwen2_5_vl(model: nn.Module) -> Peer:
    from fieldguide.checkpoints.config_mapping import to_public_config
    from fieldguide.models.registry import card_of
    from tv import transformers

    card = card_of(model)
    c, theirs = model.config, to_public_config(card, card.configs["huggingface"], model.config)
    peer = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**theirs))

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
            pixels, grid = pack_patches(list(image), c.patch, c.merge)
            with unrounded():
                return self.peer(
                    pixel_values=pixels,
                    image_grid_thw=grid,
                    input_ids=tokens,
                    attention_mask=mask.long(),
                    mm_token_type_ids=((tokens == c.picture) & mask).int(),
                ).logits

    def rename(state: State) -> dict[str, Tensor]:
        """Return the names in memory, which differ from those on disk."""
        names = translate(state, card.weights["huggingface"], reverse=True)
        parts = {"visual": "model.visual", "model": "model.language_model", "lm_head": "lm_head"}
        live = lambda key: f"peer.{parts[key.partition('.')[0]]}.{key.partition('.')[2]}"
        return {live(key): x for key, x in names.items()}

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


def timm_beit(model: nn.Module) -> Peer:
    from tv import timm

    c = model.config
    peer = timm.models.beit.Beit(
        img_size=c.image,
        patch_size=c.patch,
        in_chans=c.channels,
        num_classes=c.num_classes,
        embed_dim=c.dim,
        depth=c.depth,
        num_heads=c.heads,
        init_values=c.scale,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
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


def huggingface_dinov3(model: nn.Module) -> Peer:
    """Build the peer, an encoder with a head on its class token and the mean of its patches. Its mask token is unused."""
    from tv import transformers

    c = model.config
    inner = transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            hidden_size=c.dim,
            intermediate_size=c.hidden,
            num_hidden_layers=c.depth,
            num_attention_heads=c.heads,
            image_size=c.image,
            patch_size=c.patch,
            num_channels=c.channels,
            num_register_tokens=c.registers,
            use_gated_mlp=c.gated,
            hidden_act="silu" if c.gated else "gelu",
            query_bias=c.bias,
            value_bias=c.bias,
            rope_theta=c.rope_theta,
            pos_embed_rescale=None,
        )
    )
    del inner.embeddings.mask_token
    inner.embeddings.register_buffer("mask_token", torch.zeros(1, 1, c.dim))

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.peer, self.classifier = inner, nn.Linear(2 * c.dim, c.num_classes)

        def forward(self, x: Tensor) -> Tensor:
            x = self.peer(x).last_hidden_state
            return self.classifier(torch.cat([x[:, 0], x[:, 1 + c.registers :].mean(1)], 1))

    table = get_tables(model)["huggingface"]
    return Headed(), lambda state: {
        name if name.startswith("classifier.") else f"peer.{'model.' * name.startswith('layer.')}{name}": x
        for name, x in translate(state, table, reverse=True).items()
    }


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
    "inception-v3": Case(inputs=image, peer=pictures.peer(pictures.torchvision_inception_v3, "torchvision")),
    "efficientnet": Case(inputs=image, peer=pictures.peer(pictures.timm_efficientnet, "timm")),
    "efficientnet-lite": Case(inputs=image, peer=pictures.peer(pictures.timm_efficientnet_lite, "timm")),
    "efficientnetv2": Case(inputs=image, peer=pictures.peer(pictures.torchvision_efficientnet_v2, "torchvision")),
    "mobilenetv2": Case(inputs=image, peer=pictures.peer(pictures.torchvision_mobilenet_v2, "torchvision")),
    "mobilenetv3": Case(inputs=image, peer=pictures.peer(pictures.torchvision_mobilenet_v3, "torchvision")),
    "mobilenetv4": Case(inputs=image, peer=pictures.peer(pictures.timm_mobilenet_v4, "timm")),
    "mobilenetv4-hybrid": Case(inputs=image, peer=pictures.peer(pictures.timm_mobilenet_v4, "timm")),
    "convnext": Case(inputs=image, peer=pictures.peer(pictures.huggingface_convnext, "huggingface")),
    "convnextv2": Case(inputs=image, peer=pictures.peer(pictures.huggingface_convnext, "huggingface")),
    "unet": Case(inputs=image, peer=equations(references.unet("valid"))),
    "yolov8": Case(inputs=image, peer=equations(boxes.yolov8), slack=10.0),
    "yolov8-pose": Case(inputs=image, peer=equations(boxes.yolov8), slack=10.0),
    "yolov8-seg": Case(inputs=image, peer=equations(boxes.yolov8), slack=10.0),
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
    "sam": Case(inputs=prompted, peer=segmenters.sam, skipped=("mask_prompt.",)),
    "mask2former": Case(inputs=wide, peer=segmenters.mask2former, slack=50.0, lr=3e-3, selects=True),
    "segformer": Case(inputs=coarse, peer=segmenters.segformer, slack=10.0),
    "lstm-classifier": Case(inputs=tokens, peer=last_real, lr=3e-2),
    "rnn": Case(inputs=tokens, peer=packed(nn.RNN)),
    "lstm": Case(inputs=tokens, peer=packed(nn.LSTM)),
    "gru": Case(inputs=tokens, peer=packed(nn.GRU)),
    "transformer-encoder": Case(inputs=tokens, peer=torch_encoder),
    "bert": Case(inputs=tokens, peer=encoder),
    "roberta": Case(inputs=unpadded, peer=encoder),
    "distilbert": Case(inputs=tokens, peer=encoder),
    "mpnet": Case(inputs=unpadded, peer=encoder),
    "electra": Case(inputs=tokens, peer=encoder, lr=3e-2),
    "albert": Case(inputs=tokens, peer=encoder, lr=3e-2),
    "deberta": Case(inputs=tokens, peer=encoder, lr=3e-2),
    "deberta-v2": Case(inputs=tokens, peer=encoder, lr=3e-2),
    "modernbert": Case(inputs=tokens, peer=encoder),
    "gpt": Case(inputs=tokens, peer=lambda model: huggingface_gpt2(model, "OpenAIGPT", "tokens_embed"), lr=3e-2),
    "gpt2": Case(inputs=tokens, peer=huggingface_gpt2, lr=3e-2),
    "llama": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "qwen3": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "qwen2": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "mistral": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "olmo2": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "gpt-neox": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "opt": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "phi3": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "mixtral": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "qwen3-moe": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "gpt-oss": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "gpt-neo": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "mamba2": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "deepseek-v3": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2, overrides=(("bias_speed", 0.0),), selects=True),
    "gemma": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "gemma2": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2, overrides=(("cap", 20.0),)),
    "gemma3": Case(inputs=tokens, peer=huggingface_decoder, lr=3e-2),
    "transformer": Case(inputs=pair, peer=torch_transformer, lr=2e-2),
    "t5": Case(inputs=pair, peer=writer, lr=3e-2),
    "t5gemma": Case(inputs=pair, peer=writer, lr=3e-2),
    "bart": Case(inputs=pair, peer=writer, lr=2e-2),
    "mbart": Case(inputs=pair, peer=writer, lr=2e-2),
    "whisper": Case(inputs=speech_text, peer=transcriber, lr=1e-2),
    "wav2vec2": Case(inputs=waveform, peer=waveform_encoder, lr=2e-2),
    "wav2vec2-conformer": Case(inputs=waveform, peer=waveform_encoder, lr=2e-2),
    "hubert": Case(inputs=waveform, peer=waveform_encoder, lr=2e-2),
    "marian": Case(inputs=pair, peer=writer, lr=2e-2),
    "pegasus": Case(inputs=pair, peer=writer, lr=2e-2),
    "nllb": Case(inputs=unpadded_pair, peer=writer, lr=2e-2),
    "nllb-moe": Case(inputs=unpadded_pair, peer=writer, lr=2e-2),
    "sasrec": Case(
        inputs=items, lr=3e-2, peer=lambda model: equations(references.sasrec(model.config.heads, model.config.length))(model)
    ),
    "bert4rec": Case(inputs=items, peer=bert4rec, lr=2e-2),
    "two-tower": Case(inputs=items, peer=equations(references.two_tower), lr=3e-2),
    "hstu": Case(inputs=items, peer=lambda model: equations(hstu_equations(model.config))(model), lr=3e-2),
    "patchtst": Case(
        inputs=series,
        lr=3e-2,
        peer=lambda model: equations(
            references.patchtst(model.config.patch, model.config.stride, model.config.heads, model.config.values)
        )(model),
    ),
    "chronos-bolt": Case(
        inputs=series,
        lr=3e-3,
        peer=chronos_package,
        overrides=(("length", 13), ("horizon", 7), ("values", 3), ("quantiles", (0.05, 0.55))),
        skipped=("decoder_bias.",),
    ),
    "timesfm": Case(
        inputs=series,
        lr=3e-3,
        peer=timesfm_package,
        overrides=(("length", 13), ("horizon", 7), ("values", 3), ("quantiles", (0.05, 0.55))),
    ),
    "lstm-forecaster": Case(
        inputs=covariates, lr=3e-2, peer=lambda model: equations(references.lstm_forecaster(model.config.horizon))(model)
    ),
    "itransformer": Case(
        inputs=covariates,
        lr=1e-2,
        peer=lambda model: equations(forecasters.itransformer(model.config.heads, model.config.values))(model),
    ),
    "tide": Case(
        inputs=static_covariates,
        lr=1e-2,
        peer=lambda model: equations(forecasters.tide(model.config.values, model.config.horizon))(model),
    ),
    "tft": Case(
        inputs=static_covariates,
        lr=2e-2,
        peer=lambda model: equations(
            forecasters.tft(
                model.config.heads,
                model.config.horizon,
                model.config.past_variables,
                model.config.known_variables,
                model.config.static_variables,
            )
        )(model),
    ),
    "autoencoder": Case(inputs=row("features"), lr=1e-2, peer=equations(forecasters.autoencoder)),
    "conv-autoencoder": Case(inputs=steps, lr=3e-2, peer=equations(forecasters.conv_autoencoder)),
    "patchcore": Case(
        inputs=image,
        lr=1e-2,
        peer=lambda model: equations(references.patchcore(model.config.patch, model.config.stride))(model),
    ),
    "rocket": Case(
        inputs=series,
        lr=0.1,
        peer=lambda model: equations(forecasters.rocket(model.order, model.config.channels))(model),
    ),
    "inceptiontime": Case(
        inputs=steps,
        lr=2e-2,
        peer=lambda model: equations(forecasters.inceptiontime(model.config.lengths))(model),
    ),
    "nhits": Case(
        inputs=series,
        lr=1e-2,
        peer=lambda model: equations(forecasters.nhits(model.config.pools, model.config.horizon, model.config.values))(model),
    ),
    "dlinear": Case(
        inputs=series,
        lr=3e-2,
        peer=lambda model: equations(references.dlinear(model.config.window, model.config.values))(model),
    ),
    "fastconformer": Case(inputs=speech, peer=parakeet, lr=2e-2, slack=10.0),
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
    "mfcc-linear": Case(
        inputs=speech, peer=lambda model: equations(references.mfcc_linear(model.config))(model), num_classes=3
    ),
    "exponential-smoothing": Case(
        inputs=series, peer=lambda model: equations(references.exponential_smoothing(model.config))(model)
    ),
    "item-neighbors": Case(
        inputs=items, lr=0.1, peer=lambda model: equations(references.item_neighbors(model.config.decay))(model)
    ),
    "mlp": Case(inputs=table, peer=lambda model: equations(references.mlp(model.config.categories))(model)),
    "tabm": Case(inputs=table, peer=tabm_package),
    "ft-transformer": Case(inputs=table, peer=rtdl_package),
    "tabicl": Case(inputs=table, peer=tabicl_package(**TABICL_1), lr=3e-3),
    "tabicl-v2": Case(inputs=table, peer=tabicl_package(row_rope_interleaved=False), lr=3e-3),
    "deepfm": Case(
        inputs=table, num_classes=1, peer=lambda model: equations(references.deepfm(model.config.categories))(model)
    ),
    "dlrm": Case(inputs=table, num_classes=1, peer=equations(references.dlrm)),
    "dcn-v2": Case(
        inputs=table,
        peer=lambda model: equations(references.dcn_v2(model.config.categories, model.config.structure))(model),
    ),
    "dcgan": Case(inputs=row("noise"), peer=equations(references.dcgan)),
    "dcgan-discriminator": Case(inputs=image, peer=equations(references.dcgan_discriminator)),
    "sngan": Case(inputs=row("noise"), peer=equations(references.sngan)),
    "sngan-discriminator": Case(inputs=labeled_image, peer=equations(references.sngan_discriminator)),
    "stylegan2": Case(inputs=row("noise"), peer=lambda model: equations(stylegans.stylegan2(model.config))(model), slack=4.0),
    "stylegan2-discriminator": Case(
        inputs=labeled_image,
        peer=lambda model: equations(stylegans.stylegan2_discriminator(model.config))(model),
        overrides=(("group", 1),),  # larger groups, of which images depend on each other: test_stylegan2.py
    ),
    "stylegan1": Case(inputs=row("noise"), peer=lambda model: equations(stylegans.stylegan1(model.config))(model), slack=8.0),
    "stylegan1-discriminator": Case(
        inputs=labeled_image,
        peer=lambda model: equations(stylegans.stylegan1_discriminator(model.config))(model),
        overrides=(("group", 1),),
    ),
    "stylegan3": Case(inputs=row("noise"), peer=lambda model: equations(stylegans.stylegan3(model.config))(model), slack=8.0),
    "r3gan": Case(inputs=row("noise"), peer=lambda model: equations(stylegans.r3gan(model.config))(model), slack=4.0),
    "r3gan-discriminator": Case(
        inputs=labeled_image, peer=lambda model: equations(stylegans.r3gan_discriminator(model.config))(model), slack=4.0
    ),
    "wgan": Case(inputs=row("noise"), peer=equations(references.dcgan)),
    "wgan-discriminator": Case(inputs=image, peer=equations(stylegans.wgan_discriminator)),
    "wgan-mlp": Case(inputs=row("noise"), peer=equations(stylegans.wgan_mlp), lr=3e-2),
    "wgan-mlp-discriminator": Case(inputs=image, peer=equations(stylegans.wgan_mlp_discriminator)),
    "wgan-gp": Case(inputs=row("noise"), peer=equations(references.sngan), slack=4.0),  # biases before norms
    "wgan-gp-discriminator": Case(inputs=image, peer=equations(references.wgan_gp_discriminator)),
    "pix2pix": Case(inputs=image, peer=equations(references.pix2pix), slack=4.0),
    "palette": Case(inputs=noisy_target, peer=diffusers_unet),
    "patchgan": Case(inputs=image, peer=equations(references.patchgan), slack=4.0),  # biases before norms
    "cyclegan": Case(
        inputs=soft, peer=equations(references.cyclegan), overrides=(("dim", 4), ("depth", 1)), lr=1e-2, slack=4.0
    ),
    "clip": Case(inputs=captioned, peer=huggingface_clip, lr=3e-3),
    "clip-text": Case(inputs=tokens, peer=latents.clip_text, lr=1e-2),
    "t5-encoder": Case(inputs=tokens, peer=latents.t5_encoder, lr=1e-2),
    "umt5-encoder": Case(inputs=tokens, peer=latents.umt5_encoder, lr=1e-2),
    "blip": Case(inputs=written, peer=huggingface_blip, lr=2e-2),
    "siglip": Case(inputs=captioned, peer=huggingface_siglip, lr=3e-3),
    "clip-resnet": Case(inputs=captioned, peer=clips.official, lr=3e-3),
    "ddpm-unet": Case(inputs=noisy, peer=diffusers_unet),
    "swin": Case(inputs=image, peer=huggingface_swin, lr=3e-3),
    "beit": Case(inputs=image, peer=timm_beit, lr=3e-3),
    "dinov3": Case(inputs=image, peer=huggingface_dinov3, lr=3e-3),
    "dinov2": Case(inputs=image, peer=huggingface_dinov2, lr=3e-3),
    "vit": Case(inputs=image, peer=timm_vit, lr=3e-3),
    "deit": Case(inputs=image, peer=timm_deit, lr=3e-3),
    "vilt": Case(inputs=captioned, peer=huggingface_vilt, lr=3e-3),
    "llava": Case(inputs=shown, peer=huggingface_llava, lr=2e-2, skipped=("vision.blocks.1.", "vision.norm.")),
    "qwen2.5-vl": Case(inputs=shown, peer=huggingface_qwen2_5_vl, lr=1e-2),
    "autoencoder-kl": Case(inputs=image, lr=3e-3, peer=latents.autoencoder_kl),
    "consistency-decoder-vae": Case(inputs=image, lr=3e-3, peer=latents.consistency_decoder_vae),
    "stable-diffusion-unet": Case(inputs=latents.noisy_latent, lr=3e-3, peer=latents.conditional_unet),
    "sdxl-unet": Case(inputs=latents.noisy_latent, lr=3e-3, peer=latents.conditional_unet),
    "pixart": Case(inputs=latents.noisy_latent, lr=3e-3, peer=latents.pixart),
    "sd3": Case(
        inputs=latents.noisy_latent,
        lr=3e-3,
        peer=latents.sd3,
        skipped=("blocks.2.text.attn.q.", "blocks.2.text.attn.norm_q."),  # nobody reads what the last text attends to
    ),
    "flux": Case(inputs=latents.noisy_flux, lr=3e-3, peer=latents.flux, slack=10.0),
    "vqgan": Case(inputs=image, lr=2e-3, peer=latents.vqgan, skipped=("codebook.",), selects=True),
    "consistency-unet": Case(inputs=latents.labeled_noisy, lr=3e-3, peer=latents.consistency_unet),
    "unclip-prior": Case(inputs=latents.noisy_latent, lr=3e-3, peer=latents.unclip_prior),
    "unclip-decoder": Case(inputs=latents.noisy_latent, lr=3e-3, peer=latents.unclip_decoder),
    "super-resolution-unet": Case(inputs=latents.noisy_pair, lr=3e-3, peer=latents.super_resolution_unet),
    "dit": Case(inputs=noisy, lr=3e-3, peer=latents.dit),
    "wan": Case(inputs=latents.noisy_latent_video, lr=3e-3, peer=latents.wan),
    "wan-vae": Case(inputs=latents.video, lr=1e-2, peer=latents.wan_vae),
    "cogvideox-vae": Case(inputs=latents.video, lr=1e-2, peer=latents.video_vae),
    "hunyuan-video-vae": Case(inputs=latents.video, lr=3e-3, peer=latents.video_vae, slack=10.0),
    "cogvideox": Case(inputs=latents.noisy_latent_video, lr=3e-3, peer=latents.cogvideox),
    "hunyuan-video": Case(inputs=latents.noisy_latent_video, lr=3e-3, peer=latents.hunyuan_video, slack=10.0),
    "open-sora": Case(inputs=latents.noisy_video_flux, lr=3e-3, peer=latents.open_sora, slack=10.0),
    "latte": Case(inputs=noisy_video, lr=3e-3, peer=lambda model: equations(references.latte(model.config))(model)),
    "simple-gan": Case(
        inputs=row("z_dim"), peer=same(lambda m: guide.Generator(m.net[0].in_features, m.net[4].out_features)), lr=1e-3
    ),
    "simple-gan-discriminator": Case(
        inputs=row("img_dim"), peer=same(lambda m: guide.Discriminator(m.net[0].in_features)), lr=1e-3
    ),
}
