"""Transformer of 2017, a small one: training steps and beam search, against transformers' MarianMTModel with the same weights.

    python benchmarks/translation.py [--only beams] [--save]

The sizes of transformer-small; 32 pairs of sentences of 10 to 40 tokens. "like for like": float32, clipped, fused AdamW, the
peer's own loss (`labels=`) in a plain loop. "defaults": ours with its recipe (smoothing of labels among it), the precision
that `fit` chooses by timing, and pairs of similar length together, as `fit` has them; against plain AdamW on pairs as they
come, padded to the longest. Beam search has 4 beams and is made to go on for 32 tokens by both.
"""

from __future__ import annotations

import numpy as np
import torch
from common import Pair, Run, check_equal, compare, describe_sizes, make_parser, parse_options
from loops import LIKE, read_recipe, run_inference, run_ours, run_plain_steps
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fieldguide import create
from fieldguide.data.loader import Batches
from fieldguide.models.generation import beam_search
from fieldguide.objectives import NextToken
from tv import transformers

SIZE, ROWS, BATCH, ASKED, BEAMS, MOST = "transformer-small", 256, 32, 8, 4, 32
PAD, END, BEGIN = 0, 1, 2
INPUTS = ("source", "source_mask", "tokens")


def make_sentences(seed: int) -> list[Tensor]:
    """Return sentences; those with the same index have about the same length in both languages."""
    lengths, chance = np.random.default_rng(0).integers(10, 41, ROWS), torch.Generator().manual_seed(seed)
    return [torch.randint(3, 8192, (n,), generator=chance) for n in lengths.tolist()]


def make(rows: np.ndarray, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    source, target = ([texts[i] for i in rows] for texts in (SOURCE, TARGET))
    said = [torch.cat([torch.tensor([BEGIN]), t]) for t in target]
    follows = [torch.cat([t, torch.tensor([END])]) for t in target]
    padded = pad_sequence(source, batch_first=True, padding_value=PAD)
    return {
        "source": padded,
        "source_mask": padded != PAD,
        "tokens": pad_sequence(said, batch_first=True, padding_value=PAD),
        "target": pad_sequence(follows, batch_first=True, padding_value=-1),
    }


SOURCE, TARGET = make_sentences(1), make_sentences(2)
LENGTHS = np.array([len(s) + len(t) for s, t in zip(SOURCE, TARGET)])
PLAIN = Batches(ROWS, make)
FIXED = [make(np.arange(i, i + BATCH)) for i in range(0, ROWS, BATCH)]


def build_peer() -> nn.Module:
    with torch.device("meta"):
        c = create(SIZE).config
    return transformers.MarianMTModel(
        transformers.MarianConfig(
            vocab_size=c.vocab_size,
            d_model=c.dim,
            encoder_layers=c.depth,
            decoder_layers=c.depth,
            encoder_attention_heads=c.heads,
            decoder_attention_heads=c.heads,
            encoder_ffn_dim=c.hidden,
            decoder_ffn_dim=c.hidden,
            activation_function="relu",
            dropout=c.dropout,
            attention_dropout=0.0,
            activation_dropout=0.0,
            scale_embedding=True,
            max_position_embeddings=c.length,
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=BEGIN,
            forced_eos_token_id=None,
        )
    )


def train(batches: Batches, smoothing: float = 0.0, **settings: object) -> Run:
    model = create(SIZE)
    return run_ours(model, INPUTS, batches, BATCH, NextToken(model, INPUTS, smoothing), **settings)


def peer(**settings: object) -> Run:
    model = build_peer()

    def loss(b: dict[str, Tensor]) -> Tensor:
        labels = b["target"].masked_fill(b["target"] < 0, -100)
        return model(
            input_ids=b["source"],
            attention_mask=b["source_mask"].long(),
            decoder_input_ids=b["tokens"],
            labels=labels,
            use_cache=False,
        ).loss

    return run_plain_steps(model, loss, FIXED, **settings)


def search(model: nn.Module) -> Run:
    batch = make(np.arange(ASKED))
    source, mask = batch["source"], batch["source_mask"]
    if isinstance(model, transformers.MarianMTModel):
        return run_inference(
            model,
            lambda: model.generate(
                source, attention_mask=mask.long(), num_beams=BEAMS, do_sample=False, min_new_tokens=MOST, max_new_tokens=MOST
            ),
        )

    def answer() -> Tensor:
        cache = model.new_cache(ASKED * BEAMS, MOST + 1)

        def step(tokens: Tensor) -> Tensor:
            logits = model(source, mask, tokens, cache=cache)
            logits[..., END] = -torch.inf
            return logits

        return beam_search(step, cache, begin=BEGIN, end=END, num_beams=BEAMS, max_new_tokens=MOST - 1)

    return run_inference(model, answer)


@torch.no_grad()
def check() -> str:
    model, peer = create(SIZE).eval(), build_peer().eval()
    inner = peer.model
    model.embed.weight.copy_(inner.shared.weight)
    model.pos.copy_(inner.encoder.embed_positions.weight)  # sines and cosines in another order
    for mine, other in zip([*model.encoder, *model.decoder], [*inner.encoder.layers, *inner.decoder.layers]):
        pairs = [(mine.attn, other.self_attn)] + ([(mine.cross, other.encoder_attn)] if hasattr(mine, "cross") else [])
        for attn, layer in pairs:
            for part in ("weight", "bias"):
                getattr(attn.qkv, part).copy_(torch.cat([getattr(x, part) for x in (layer.q_proj, layer.k_proj, layer.v_proj)]))
            attn.proj.load_state_dict(layer.out_proj.state_dict())
        norms = [
            other.self_attn_layer_norm,
            *([other.encoder_attn_layer_norm] if len(pairs) == 2 else []),
            other.final_layer_norm,
        ]
        for own, layer in zip(
            [mine.mlp.up, mine.mlp.down, mine.norm1, mine.norm2, getattr(mine, "norm3", None)], [other.fc1, other.fc2, *norms]
        ):
            own.load_state_dict(layer.state_dict())
    b = FIXED[0]
    want = peer(input_ids=b["source"], attention_mask=b["source_mask"].long(), decoder_input_ids=b["tokens"]).logits
    return f"{describe_sizes(model, peer)} (with sines) {check_equal('logits', model(*(b[name] for name in INPUTS)), want)}"


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0], steps=2, rounds=4))
    torch.manual_seed(0)
    tokens = float(LENGTHS.sum()) / len(FIXED)
    compare(
        f"Transformer of 2017, {SIZE}, {BATCH} pairs of 10 to 40 tokens",
        "tokens",
        "transformers",
        [
            Pair(
                "training, like for like",
                lambda: train(PLAIN, precision="float32", **LIKE),
                lambda: peer(fused=True, **LIKE),
                tokens,
            ),
            Pair(
                "training, defaults",
                lambda: train(Batches(ROWS, make, LENGTHS), **read_recipe(SIZE)),
                lambda: peer(lr=7e-4),
                tokens,
            ),
            Pair(
                "4 beams, 8 sentences together",
                lambda: search(create(SIZE)),
                lambda: search(build_peer()),
                ASKED * MOST,
                steps=1,
            ),
        ],
        options,
        check,
    )


if __name__ == "__main__":
    main()
