"""Networks that have no benchmark of their own: answers and training steps, against the peers of the tests.

    python benchmarks/networks.py [--sizes distilbert-base detr-resnet50 ...] [--rounds 3] [--save]

Each line compares a network with the one of transformers, timm or the authors' package to which the tests compare it (`tests/cases.py`),
with the same weights, inputs and outputs. Networks that would take minutes a step have fewer or narrower layers (`changes`), as the
note of the table says. Both sides are trained by the same plain loop, with fused AdamW and the mean square of the outputs as loss, so
that only the networks differ. Transformers' fused attention is used where a network supports it.

Not compared: networks whose peer is a set of slow equations (YOLO, TFT, N-HiTS, TiDE, iTransformer, DLRM, DCN-v2, HSTU, two towers),
and Faster R-CNN, whose peer needs operators of torchvision that only its CUDA wheel has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import Pair, Run, check_equal, compare, make_parser, parse_options
from loops import LIKE, run_inference, run_plain_steps
from torch import Tensor, nn

import cases
from fieldguide import create
from fieldguide.models.registry import find
from tv import transformers

Inputs = Callable[[Any, int], tuple[Tensor, ...]]
DECODER = {"vocab_size": 32_000, "dim": 768, "depth": 4, "heads": 12, "hidden": 2048}
GROUPED = {**DECODER, "kv_heads": 4}
MIXTURE = {**GROUPED, "width": 64, "hidden": 512, "experts": 16, "used": 4}

QUANTILES = {"levels": (0.1, 0.5, 0.9), "values": 3, "quantiles": (0.05, 0.55)}


def write_words(length: int) -> Inputs:
    """Return inputs of a number of tokens without padding."""
    return lambda c, rows: (torch.randint(2, c.vocab_size - 1, (rows, length)), torch.ones(rows, length, dtype=torch.bool))


def write_pairs(length: int) -> Inputs:
    """Return sources and targets of a number of tokens."""
    return lambda c, rows: (*write_words(length)(c, rows), *write_words(length)(c, rows))


def draw_images(side: int) -> Inputs:
    return lambda c, rows: (torch.randn(rows, c.channels, side, side),)


def record_speech(frames: int) -> Inputs:
    """Return spectrograms of the same number of frames."""
    return lambda c, rows: (torch.randn(rows, frames, c.features), torch.full((rows,), frames))


def record_waveforms(samples: int) -> Inputs:
    return lambda c, rows: (torch.randn(rows, samples), torch.full((rows,), samples))


def tell_images(length: int) -> Inputs:
    """Return an image for each row and texts of a number of tokens, after an image token for each patch if the network has such."""

    def make(c: Any, rows: int) -> tuple[Tensor, ...]:
        words, mask = write_words(length)(c, rows)
        if hasattr(c, "picture"):
            patches = (c.image // (c.patch * getattr(c, "merge", 1))) ** 2
            words = torch.cat([torch.full((rows, patches), c.picture), words], 1)
            mask = torch.ones_like(words, dtype=torch.bool)
        return *draw_images(c.image)(c, rows), words, mask

    return make


def hear_words(c: Any, rows: int) -> tuple[Tensor, ...]:
    return torch.randn(rows, 2 * c.source_length, c.features), *write_words(32)(c, rows)


def list_items(c: Any, rows: int) -> tuple[Tensor, ...]:
    return torch.randint(1, c.items, (rows, c.length - 1)), torch.ones(rows, c.length - 1, dtype=torch.bool)


@dataclass(frozen=True)
class Network:
    """A network of ours at one size, and its peer.

    Attributes:
        rows: of a batch.
        inputs: (config, rows) -> inputs of both.
        changes: of the config, for networks that are too large.
    """

    size: str
    rows: int
    inputs: Inputs
    changes: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return create(self.size, **self.changes)

    def build_peer(self) -> nn.Module:
        """Return the peer with the weights of `build`."""
        model = self.build()
        peer, rename = cases.CASES[find(self.size)[0].name].peer(model)
        peer.load_state_dict(rename(model.state_dict()))
        for module in peer.modules():
            if isinstance(module, transformers.PreTrainedModel) and module._supports_sdpa:
                with contextlib.suppress(ValueError):  # of a convolutional part, which has none
                    module.set_attn_implementation("sdpa")
        return peer

    def make_inputs(self) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        with torch.device("meta"):
            config = create(self.size, **self.changes).config
        return self.inputs(config, self.rows)

    def check(self) -> str:
        model, peer, inputs = self.build().eval(), self.build_peer().eval(), self.make_inputs()
        with torch.inference_mode():
            equal = check_equal("outputs", model(*inputs), peer(*inputs), within=1e-2)
        return f"{self.size}{f' with {self.changes}' if self.changes else ''}, {self.rows} rows: {equal}"

    def answer(self, build: Callable[[], nn.Module]) -> Run:
        model, inputs = build(), self.make_inputs()
        return run_inference(model, lambda: model(*inputs))

    def train(self, build: Callable[[], nn.Module]) -> Run:
        model = build()
        return run_plain_steps(model, lambda inputs: model(*inputs).square().mean(), [self.make_inputs()], fused=True, **LIKE)

    def pairs(self) -> list[Pair]:
        sides = (self.build, self.build_peer)
        answers, training = ([lambda make=make, side=side: make(side) for side in sides] for make in (self.answer, self.train))
        return [
            Pair(f"{self.size}, answers", *answers, self.rows),
            Pair(f"{self.size}, training", *training, self.rows),
        ]


NETWORKS = (
    Network("distilbert-base", 4, write_words(128)),
    Network("albert-base", 4, write_words(128)),
    Network("electra-base", 4, write_words(128)),
    Network("mpnet-base", 4, write_words(128)),
    Network("opt-125m", 4, write_words(128)),
    Network("pythia-160m", 4, write_words(128)),
    Network("mamba2-130m", 2, write_words(128), {"depth": 6}),
    Network("qwen2.5-0.5b", 4, write_words(128), {"depth": 6}),
    Network("mistral-7b", 4, write_words(128), {**GROUPED, "width": 64}),
    Network("phi3-mini", 4, write_words(128), {**GROUPED, "kv_heads": 12}),
    Network("olmo2-1b", 4, write_words(128), {**GROUPED, "kv_heads": 12}),
    Network("qwen3-30b-a3b", 4, write_words(128), MIXTURE),
    Network("gpt-oss-20b", 4, write_words(128), MIXTURE),
    Network(
        "deepseek-v3",
        4,
        write_words(128),
        {
            **DECODER,
            **{"q_rank": 384, "kv_rank": 128, "width": 64, "rope_width": 32, "value_width": 64, "dense_layers": 1},
            **{"expert_hidden": 512, "experts": 16, "used": 4, "expert_groups": 4, "used_groups": 2, "bias_speed": 0.0},
        },
    ),
    Network("opus-mt-en-de", 8, write_pairs(64)),
    Network("pegasus-large", 4, write_pairs(64), {"depth": 3, "decoder_depth": 3}),
    Network("t5gemma-s-s", 4, write_pairs(64), {"vocab_size": 32_000}),
    Network("beit-base", 4, draw_images(224)),
    Network("dinov3-s16", 8, draw_images(224), {"output_type": "label"}),
    Network("mobilenetv4-conv-small", 16, draw_images(224)),
    Network("detr-resnet50", 1, draw_images(320)),
    Network("rt-detr-resnet18", 2, draw_images(320)),
    Network("segformer-b0", 2, draw_images(256)),
    Network("mask2former-resnet50", 1, draw_images(256)),
    Network("sam-vit-b", 1, cases.prompted, {"depth": 4, "global_layers": (3,)}),
    Network("siglip-b16-224", 4, tell_images(64)),
    Network("blip-base", 4, tell_images(32), {"image": 224}),
    Network("llava-1.5-7b", 2, tell_images(32), {**DECODER, "kv_heads": 12, "image": 224, "seen_depth": 6, "picture": 31_999}),
    Network(
        "qwen2.5-vl-3b",
        2,
        tell_images(32),
        {
            **GROUPED,
            **{"image": 224, "seen_dim": 512, "seen_depth": 4, "seen_heads": 8, "seen_hidden": 1376, "whole": (3,)},
            **{"sections": (8, 12, 12), "picture": 31_999},
        },
    ),
    Network("whisper-tiny", 1, hear_words),
    Network("wav2vec2-base", 1, record_waveforms(80_000)),
    Network("hubert-base", 1, record_waveforms(80_000), {"output_type": "ctc"}),
    Network("wav2vec2-conformer-rel-pos-large", 1, record_waveforms(80_000), {"depth": 6}),
    Network("fastconformer-large", 4, record_speech(800)),
    Network("chronos-bolt-tiny", 32, cases.series, QUANTILES),
    Network("ft-transformer", 256, cases.table, {"numbers": 12, "categories": (5, 9, 20)}),
    Network("tabicl-v2", 128, cases.table, {"context": 512, "depth": 4, "categories": (5, 9)}),
    Network("bert4rec-ml1m", 32, list_items),
)


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], steps=1, rounds=3)
    parser.add_argument("--sizes", nargs="*", default=[], help="these alone")
    options = parse_options(parser)
    chosen = [network for network in NETWORKS if network.size in (options.sizes or [network.size])]
    compare(
        "Networks without a benchmark of their own",
        "rows",
        "the peer",
        [pair for network in chosen for pair in network.pairs()],
        options,
        lambda: "\n".join(network.check() for network in chosen),
    )


if __name__ == "__main__":
    main()
