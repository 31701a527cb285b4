"""Networks at their published sizes, each with the same network of timm or transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from common import Pair, Run, check_equal, describe_sizes
from loops import LIKE, read_recipe, repeat_batches, run_inference, run_ours, run_plain_steps
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
class LanguageNetwork:
    """A language model of ours, and that of transformers with the same config.

    Attributes:
        rows, length: rows of a batch, and tokens of each.
        like: changes of the config for like-for-like comparisons.
        brief: further changes for the check and the training of large networks, such as fewer layers.
    """

    size: str
    rows: int
    length: int
    like: dict[str, Any] = field(default_factory=dict)
    brief: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("tokens",)

    @property
    def amount(self) -> int:
        """Return the work of a step, in tokens or images."""
        return self.rows * self.length

    def empty(self, **changes: Any) -> nn.Module:
        """Return our network on the meta device."""
        with torch.device("meta"):
            return create(self.size, **self.like | changes)

    def build_peer(self, **changes: Any) -> nn.Module:
        """Return the network of transformers, made from our config in its format."""
        card = find(self.size)[0]
        public = to_public_config(card, card.configs["huggingface"], self.empty(**changes).config)
        kind, none = getattr(transformers, public["architectures"][0]), dict.fromkeys(("bos_token_id", "eos_token_id"))
        return kind(transformers.AutoConfig.for_model(public.pop("model_type"), **public | none | {"pad_token_id": None}))

    def tokens(self, rows: int, length: int) -> Tensor:
        return torch.randint(2, self.empty().config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))

    def batch(self) -> Batch:
        tokens = self.tokens(self.rows, self.length + 1)
        return {"tokens": tokens[:, :-1], "target": tokens[:, 1:]}

    def objective(self, model: nn.Module) -> Objective:
        return NextToken(model, self.inputs)

    def answer(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the output of our network."""
        return model(*(batch.get(name) for name in self.inputs))

    def reply(self, peer: nn.Module, batch: Batch) -> Tensor:
        """Return the output of the peer."""
        return peer(batch["tokens"], use_cache=False).logits

    def loss(self, peer: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of the peer, computed by its own code."""
        return peer(batch["tokens"], labels=batch["tokens"], use_cache=False).loss

    def compile(self, model: nn.Module, backend: str) -> None:
        """Compile the network of either side."""
        model.compile(backend=backend)

    # What is run

    def check(self) -> str:
        """Return a sentence about the difference of both outputs with the same weights."""
        model, peer = create(self.size, **self.like | self.brief).eval(), self.build_peer(**self.brief).eval()
        batch = {name: x[:1] for name, x in self.batch().items()}
        assert not weights.load(model, peer.state_dict())
        with torch.inference_mode():
            equal = check_equal("outputs", self.answer(model, batch), self.reply(peer, batch))
        return f"{self.size}{f' with {self.brief}' if self.brief else ''}: {describe_sizes(model, peer)} {equal}"

    def run_inference(self) -> Run:
        model, batch = create(self.size, **self.like), self.batch()
        return run_inference(model, lambda: self.answer(model, batch))

    def run_peer_inference(self) -> Run:
        peer, batch = self.build_peer(), self.batch()
        return run_inference(peer, lambda: self.reply(peer, batch))

    def run_training(self, like: bool, less: dict[str, Any], **settings: Any) -> Run:
        model = create(self.size, **(self.like if like else {}) | less)
        return run_ours(model, self.inputs, repeat_batches(self.batch()), 1, self.objective(model), **settings)

    def run_peer_training(self, less: dict[str, Any], **settings: Any) -> Run:
        peer = self.build_peer(**less)
        return run_plain_steps(peer, lambda batch: self.loss(peer, batch), [self.batch()], **settings)

    def pairs(self) -> list[Pair]:
        return [
            Pair(f"{self.size}, answers", self.run_inference, self.run_peer_inference, self.amount, room=self.room(1)),
            *self.train_batches({}),
            *(self.train_batches(self.brief) if self.brief else []),
        ]

    def train_batches(self, less: dict[str, Any]) -> list[Pair]:
        """Return the comparisons of training, for a network with changes of its config."""
        what, room = self.size + "".join(f" of {name} {value}" for name, value in less.items()), self.room(4, **less)
        return [
            Pair(
                f"{what}, training, like for like",
                lambda: self.run_training(True, less, precision="float32", **LIKE),
                lambda: self.run_peer_training(less, fused=True, **LIKE),
                self.amount,
                room=room,
            ),
            Pair(
                f"{what}, training, defaults",
                lambda: self.run_training(False, less, **read_recipe(self.size)),
                lambda: self.run_peer_training(less, lr=1e-3),
                self.amount,
                room=room,
            ),
        ]

    def room(self, copies: int, **less: Any) -> float:
        """Return the GB of a number of copies of both networks, plus activations."""
        return 2 * 4 * copies * sum(p.numel() for p in self.empty(**less).parameters()) / 1e9 + 1


class MaskedNetwork(LanguageNetwork):
    """A masked language model: an eighth of the tokens are predicted."""

    def batch(self) -> Batch:
        tokens = self.tokens(self.rows, self.length)
        return {"tokens": tokens, "target": tokens.where(torch.arange(self.length) % 8 == 3, -1)}

    def objective(self, model: nn.Module) -> Objective:
        return MaskedLM(model, self.inputs)

    def compile(self, model: nn.Module, backend: str) -> None:
        model.compile(backend=backend)
        if hasattr(model, "features"):  # ours computes logits of the masked tokens only
            model.features = torch.compile(model.features, backend=backend)

    def reply(self, peer: nn.Module, batch: Batch) -> Tensor:
        return peer(batch["tokens"]).logits

    def loss(self, peer: nn.Module, batch: Batch) -> Tensor:
        return peer(batch["tokens"], labels=batch["target"].masked_fill(batch["target"] < 0, -100)).loss


class SequenceNetwork(LanguageNetwork):
    """An encoder-decoder: source and target have `length` tokens each."""

    def batch(self) -> Batch:
        source, target = self.tokens(2 * self.rows, self.length).chunk(2)
        return {"source": source, "tokens": target.roll(1, 1), "target": target}

    def reply(self, peer: nn.Module, batch: Batch) -> Tensor:
        return peer(input_ids=batch["source"], decoder_input_ids=batch["tokens"], use_cache=False).logits

    def loss(self, peer: nn.Module, batch: Batch) -> Tensor:
        return peer(input_ids=batch["source"], decoder_input_ids=batch["tokens"], labels=batch["target"], use_cache=False).loss


class ImageNetwork(LanguageNetwork):
    """An image classifier for images of `length` pixels a side, and that of timm."""

    @property
    def amount(self) -> int:
        return self.rows

    def build_peer(self, **changes: Any) -> nn.Module:
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


def list_image_networks(rows: int, side: int = 224) -> list[LanguageNetwork]:
    """Return image classifiers. Like-for-like comparisons have no dropout, which timm's networks lack by default."""
    image, still = ("image",), {"dropout": 0.0, "drop_path": 0.0}
    return [
        ImageNetwork(size, rows, side, {key: still[key] for key in what}, inputs=image)
        for size, what in (
            ("resnet50", ()),
            ("efficientnet-b0", ("dropout", "drop_path")),
            ("convnext-tiny", ("drop_path",)),
            ("vit-b16", ("dropout",)),
            ("swin-t", ("dropout", "drop_path")),
        )
    ]


def list_text_networks(rows: int, length: int) -> list[LanguageNetwork]:
    """Return language models, with the same dropout on both sides. Llama has one row; with two layers it is checked and trained."""
    return [
        MaskedNetwork("bert-base", rows, length),
        LanguageNetwork("gpt2", rows, length),
        LanguageNetwork("llama3.2-1b", 1, length, brief={"depth": 2}),
        SequenceNetwork("t5-small", rows, length, inputs=("source", "source_mask", "tokens")),
    ]
