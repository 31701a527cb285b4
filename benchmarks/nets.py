"""The networks of the catalogue's first half at their published sizes, each beside the same one of timm or transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from common import Pair, Run, agree, count
from loops import LIKE, answers, fixed, ours, recipe, stepped
from torch import Tensor, nn

from fieldguide import create
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.config_mapping import to_public_config
from fieldguide.models.registry import find
from fieldguide.objectives import Classification, NextToken, Objective, Supervised
from fieldguide.objectives.masked_lm import MaskedLM
from tv import timm, transformers

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Net:
    """A size of ours that writes text, and transformers' own of the same config. `rows` of a batch, each of `length` tokens;
    `like`: changes of config for what is compared like for like; `brief`: further ones for the check and the lessons of large
    networks, all of whose layers are alike."""

    size: str
    rows: int
    length: int
    like: dict[str, Any] = field(default_factory=dict)
    brief: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("tokens",)

    @property
    def amount(self) -> int:
        """Work of a step, in tokens or pictures."""
        return self.rows * self.length

    def empty(self, **changes: Any) -> nn.Module:
        """Shapes alone."""
        with torch.device("meta"):
            return create(self.size, **self.like | changes)

    def theirs(self, **changes: Any) -> nn.Module:
        """As transformers makes it of our config, which is written as its own."""
        card = find(self.size)[0]
        said = to_public_config(card, card.configs["huggingface"], self.empty(**changes).config)
        kind, none = getattr(transformers, said["architectures"][0]), dict.fromkeys(("bos_token_id", "eos_token_id"))
        return kind(transformers.AutoConfig.for_model(said.pop("model_type"), **said | none | {"pad_token_id": None}))

    def tokens(self, rows: int, length: int) -> Tensor:
        return torch.randint(2, self.empty().config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))

    def batch(self) -> Batch:
        tokens = self.tokens(self.rows, self.length + 1)
        return {"tokens": tokens[:, :-1], "target": tokens[:, 1:]}

    def objective(self, model: nn.Module) -> Objective:
        return NextToken(model, self.inputs)

    def answer(self, model: nn.Module, batch: Batch) -> Tensor:
        """Ours."""
        return model(*(batch.get(name) for name in self.inputs))

    def reply(self, peer: nn.Module, batch: Batch) -> Tensor:
        """The peer's."""
        return peer(batch["tokens"], use_cache=False).logits

    def loss(self, peer: nn.Module, batch: Batch) -> Tensor:
        """The peer's, as it computes it."""
        return peer(batch["tokens"], labels=batch["tokens"], use_cache=False).loss

    def compile(self, model: nn.Module, backend: str) -> None:
        """Either side's."""
        model.compile(backend=backend)

    # What is run

    def check(self) -> str:
        """That both answer alike with the same weights."""
        model, peer = create(self.size, **self.like | self.brief).eval(), self.theirs(**self.brief).eval()
        batch = {name: x[:1] for name, x in self.batch().items()}
        assert not weights.load(model, peer.state_dict())
        with torch.inference_mode():
            said = agree("answers", self.answer(model, batch), self.reply(peer, batch))
        return f"{self.size}{f' with {self.brief}' if self.brief else ''}: {count(model, peer)} {said}"

    def said(self) -> Run:
        model, batch = create(self.size, **self.like), self.batch()
        return answers(model, lambda: self.answer(model, batch))

    def said_by_peer(self) -> Run:
        peer, batch = self.theirs(), self.batch()
        return answers(peer, lambda: self.reply(peer, batch))

    def trained(self, like: bool, less: dict[str, Any], **settings: Any) -> Run:
        model = create(self.size, **(self.like if like else {}) | less)
        return ours(model, self.inputs, fixed(self.batch()), 1, self.objective(model), **settings)

    def trained_peer(self, less: dict[str, Any], **settings: Any) -> Run:
        peer = self.theirs(**less)
        return stepped(peer, lambda batch: self.loss(peer, batch), [self.batch()], **settings)

    def pairs(self) -> list[Pair]:
        return [
            Pair(f"{self.size}, answers", self.said, self.said_by_peer, self.amount, room=self.room(1)),
            *self.train_batches({}),
            *(self.train_batches(self.brief) if self.brief else []),
        ]

    def train_batches(self, less: dict[str, Any]) -> list[Pair]:
        """What is timed of training, of the network with changes of its config."""
        what, room = self.size + "".join(f" of {name} {value}" for name, value in less.items()), self.room(4, **less)
        return [
            Pair(
                f"{what}, training, like for like",
                lambda: self.trained(True, less, precision="float32", **LIKE),
                lambda: self.trained_peer(less, fused=True, **LIKE),
                self.amount,
                room=room,
            ),
            Pair(
                f"{what}, training, defaults",
                lambda: self.trained(False, less, **recipe(self.size)),
                lambda: self.trained_peer(less, lr=1e-3),
                self.amount,
                room=room,
            ),
        ]

    def room(self, copies: int, **less: Any) -> float:
        """GB of so many copies of both sides, and of what passes through."""
        return 2 * 4 * copies * sum(p.numel() for p in self.empty(**less).parameters()) / 1e9 + 1


class Masked(Net):
    """A size that guesses hidden words: an eighth of them are asked."""

    def batch(self) -> Batch:
        tokens = self.tokens(self.rows, self.length)
        return {"tokens": tokens, "target": tokens.where(torch.arange(self.length) % 8 == 3, -1)}

    def objective(self, model: nn.Module) -> Objective:
        return MaskedLM(model, self.inputs)

    def compile(self, model: nn.Module, backend: str) -> None:
        model.compile(backend=backend)
        if hasattr(model, "features"):  # ours, which learns by what it reads, not by all that it could say
            model.features = torch.compile(model.features, backend=backend)

    def reply(self, peer: nn.Module, batch: Batch) -> Tensor:
        return peer(batch["tokens"]).logits

    def loss(self, peer: nn.Module, batch: Batch) -> Tensor:
        return peer(batch["tokens"], labels=batch["target"].masked_fill(batch["target"] < 0, -100)).loss


class Paired(Net):
    """A size that reads a text and writes another, each of `length` tokens."""

    def batch(self) -> Batch:
        source, target = self.tokens(2 * self.rows, self.length).chunk(2)
        return {"source": source, "tokens": target.roll(1, 1), "target": target}

    def reply(self, peer: nn.Module, batch: Batch) -> Tensor:
        return peer(input_ids=batch["source"], decoder_input_ids=batch["tokens"], use_cache=False).logits

    def loss(self, peer: nn.Module, batch: Batch) -> Tensor:
        return peer(input_ids=batch["source"], decoder_input_ids=batch["tokens"], labels=batch["target"], use_cache=False).loss


class Picture(Net):
    """A size that names pictures of `length` pixels a side, and timm's own."""

    @property
    def amount(self) -> int:
        return self.rows

    def theirs(self, **changes: Any) -> nn.Module:
        return timm.create_model(TIMM[self.size], drop_path_rate=0.0, **changes)

    def batch(self) -> Batch:
        chance, c = torch.Generator().manual_seed(0), self.empty().config
        return {
            "image": torch.randn(self.rows, c.channels, self.length, self.length, generator=chance),
            "target": torch.randint(c.num_classes, (self.rows,), generator=chance),
        }

    def objective(self, model: nn.Module) -> Objective:
        return Supervised(model, self.inputs, Classification())

    def reply(self, peer: nn.Module, batch: Batch) -> Tensor:
        return peer(batch["image"])

    def loss(self, peer: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(peer(batch["image"]), batch["target"])


TIMM = {
    "resnet50": "resnet50",
    "efficientnet-b0": "efficientnet_b0",
    "convnext-tiny": "convnext_tiny",
    "vit-b16": "vit_base_patch16_224",
    "swin-t": "swin_tiny_patch4_window7_224",
}


def pictures(rows: int, side: int = 224) -> list[Net]:
    """Dropped out is nothing like for like: timm's networks do not, unless they are told to."""
    image, still = ("image",), {"dropout": 0.0, "drop_path": 0.0}
    return [
        Picture(size, rows, side, {key: still[key] for key in what}, inputs=image)
        for size, what in (
            ("resnet50", ()),
            ("efficientnet-b0", ("dropout", "drop_path")),
            ("convnext-tiny", ("drop_path",)),
            ("vit-b16", ("dropout",)),
            ("swin-t", ("dropout", "drop_path")),
        )
    ]


def writers(rows: int, length: int) -> list[Net]:
    """Dropped out is alike on both sides. Llama has one row, and learns and is checked with two layers, too."""
    return [
        Masked("bert-base", rows, length),
        Net("gpt2", rows, length),
        Net("llama3.2-1b", 1, length, brief={"depth": 2}),
        Paired("t5-small", rows, length, inputs=("source", "source_mask", "tokens")),
    ]
