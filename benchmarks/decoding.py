"""Greedy decoding with a cache: GPT-2 and SmolLM2-135M against transformers, with the same weights.

    python benchmarks/decoding.py [--sizes gpt2] [--tokens 128] [--rounds 2] [--weights FILE.gguf] [--compiled] [--save]

The peer is `generate` with its static cache, with --compiled also its compiled version (takes minutes). Ours is measured in
float32 and with int8 weights, as in `fieldguide predict MODEL 'text' --set weights=int8`. Weights are random, or those of
--weights. With --weights the perplexity of both is reported on the license, the README and docs/architecture.md of this
project, at most 1,024 tokens of each.

A step reads the weights of all linear layers and the cache once. "of memory" is this number of bytes per second, as a
fraction of the bandwidth that this machine reaches for a sum or a matrix-vector product. With several rows a step is limited
by computation, and the fraction falls.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import check_equal, describe_sizes, format_figure, make_parser, parse_options, report, time_in_turns
from nets import LanguageNetwork
from torch import Tensor, nn

import fieldguide
from fieldguide.checkpoints import weights
from fieldguide.checkpoints.key_mapping import translate
from fieldguide.models.generation import Sampling, generate
from fieldguide.models.generation.quantization import Int8, quantize_int8
from fieldguide.models.registry import find
from tv import transformers

PROMPT, LONGEST = 16, 1024
TEXTS = ("LICENSE", "README.md", "docs/architecture.md")
Generator = Callable[[int], Tensor]  # number of tokens -> the tokens generated after the prompts


def measure_bandwidth(megabytes: int = 512) -> tuple[float, float]:
    """Return the memory bandwidth in bytes per second of a sum and of a matrix-vector product."""
    matrix = torch.ones(megabytes * 2**20 // 4 // 1024, 1024)
    vector, seconds = torch.ones(1024), {}
    for name, run in (("sum", matrix.sum), ("product", lambda: matrix @ vector)):
        seconds[name] = min(time_call(run) for _ in range(5))
    return tuple(matrix.nbytes / s for s in seconds.values())


def time_call(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def count_bytes_per_step(model: nn.Module, rows: int, tokens: int) -> float:
    """Return the bytes that a step reads, with a cache of mean length."""
    held = {id(w): w for m in model.modules() if isinstance(m, nn.Linear) for w in (m.weight,)}
    if getattr(model, "head", None) is None:  # the table is the head
        held[id(model.embed.weight)] = model.embed.weight
    size = sum(w.int_values.nbytes + w.scale.nbytes if isinstance(w, Int8) else w.nbytes for w in held.values())
    cache = model.new_cache(rows, PROMPT + tokens)
    return size + sum(x.nbytes for x in (*cache.keys, *cache.values)) * (PROMPT + tokens / 2) / (PROMPT + tokens)


def build_generator(model: nn.Module, prompts: Tensor) -> Generator:
    return lambda most: torch.stack(list(generate(model, prompts.tolist(), most, sampling=Sampling(temperature=0.0))), 1)


def build_peer_generator(model: nn.Module, prompts: Tensor, **options: Any) -> Generator:
    def generate_tokens(count: int) -> Tensor:
        with torch.inference_mode():
            return model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",
                **options,
            )[:, PROMPT:]

    return generate_tokens


def compile_options() -> dict[str, Any]:
    """Return the options with which `generate` compiles its step on a CPU."""
    config = transformers.CompileConfig(fullgraph=False, mode="default")
    config._compile_all_devices = True
    return {"compile_config": config}


def encode_texts(path: Path) -> Iterator[Tensor]:
    """Yield each text as one row of tokens of the checkpoint's tokenizer."""
    from fieldguide.inference.text_generation import TextGenerator

    speaker = TextGenerator.load(path)
    for name in TEXTS:
        yield torch.tensor([speaker.tokens((Path(__file__).parents[1] / name).read_text())[:LONGEST]])


def compute_perplexity(model: nn.Module, rows: list[Tensor]) -> float:
    with torch.inference_mode():
        nats = [F.cross_entropy(compute_logits_in_parts(model, row), row[0, 1:], reduction="sum") for row in rows]
    return math.exp(sum(map(float, nats)) / sum(row.shape[1] - 1 for row in rows))


def compute_logits_in_parts(model: nn.Module, row: Tensor, part: int = 16) -> Tensor:
    """Return the logits of a row, computed in parts short enough for the int8 kernels."""
    cache = model.new_cache(1, row.shape[1])
    return torch.cat([model(piece, cache=cache)[0] for piece in row[:, :-1].split(part, 1)])


def measure_size(
    size: str, rows: int, model: nn.Module, small: nn.Module, peer: nn.Module, speed: float, options: argparse.Namespace
) -> tuple[list[list[str]], str]:
    """Return a table row per implementation, and a note on how many tokens agree."""
    prompts = torch.randint(5, model.config.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    ways = {
        "transformers": build_peer_generator(peer, prompts, disable_compile=True),
        "ours": build_generator(model, prompts),
        "ours, weights=int8": build_generator(small, prompts),
    }
    if options.compiled:
        ways["transformers, compiled"] = build_peer_generator(peer, prompts, **compile_options())
    outputs: dict[str, Tensor] = {}
    runs = {name: lambda name=name, run=run: outputs.__setitem__(name, run(options.tokens)) for name, run in ways.items()}
    for run in ways.values():
        run(3)  # warm-up
    times = time_in_turns(runs, options.rounds, warm=False)
    peers = min(min(seconds) for name, seconds in times.items() if name.startswith("transformers"))
    lines = []
    for name, seconds in times.items():
        step = min(seconds) / options.tokens  # including the prompt
        part = count_bytes_per_step(small if "int8" in name else model, rows, options.tokens) / step / speed
        lines.append(
            [
                f"{size}, {rows} at a time",
                name,
                format_figure(rows / step),
                f"{1000 * step:.1f}",
                f"{min(times['transformers']) / min(seconds):.2f}",
                f"{peers / min(seconds):.2f}",
                f"{100 * part:.0f} %",
            ]
        )
    same = (outputs["ours"] == outputs["transformers"]).float().mean().item()
    assert rows > 1 or same > 0.9, f"only {100 * same:.0f} % of {options.tokens} tokens equal those of transformers"
    eight = (outputs["ours, weights=int8"] == outputs["transformers"]).float().mean().item()
    return lines, f"{size}, {rows} at a time: {100 * same:.0f} % of the tokens equal the peer's, with int8 {100 * eight:.0f} %."


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="gpt2,smollm2-135m")
    parser.add_argument("--rows", default="1,8", help="rows per batch")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--weights", type=Path, help="a checkpoint of one of the sizes")
    parser.add_argument("--compiled", action="store_true", help="also measure the compiled peer")
    options = parse_options(parser)
    torch.manual_seed(0)
    speeds = measure_bandwidth()
    notes, lines = [f"Memory: {speeds[0] / 1e9:.1f} GB/s summed, {speeds[1] / 1e9:.1f} multiplied."], []
    given = fieldguide.load(options.weights).eval() if options.weights else None
    for size in options.sizes.split(","):
        net = LanguageNetwork(size, 1, 64)
        peer, model = net.build_peer().eval(), fieldguide.create(size).eval()
        real = given is not None and given.config == model.config
        if real:
            model = given
            names = translate(model.state_dict(), find(size)[0].weights["huggingface"], reverse=True)
            assert not peer.load_state_dict(names, strict=False).unexpected_keys
        else:
            assert not weights.load(model, peer.state_dict())
        row = net.batch()["tokens"]
        with torch.inference_mode():
            notes.append(f"{size}: {describe_sizes(model, peer)} {check_equal('logits', model(row), peer(row).logits)}")
        small = quantize_int8(copy.deepcopy(model))
        for rows in map(int, options.rows.split(",")):
            found, note = measure_size(size, rows, model, small, peer, max(speeds), options)
            lines += found
            notes.append(note)
        if real:
            rows = list(encode_texts(options.weights))
            notes.append(
                f"{size}: perplexity {compute_perplexity(model, rows):.3f}, with int8 {compute_perplexity(small, rows):.3f}."
            )
    report(
        f"Greedy decoding, {options.tokens} tokens after {PROMPT}",
        ["", "", "tokens/s", "ms per step", "vs transformers", "vs its best", "of memory"],
        lines,
        options.save,
        "\n".join(notes),
    )


if __name__ == "__main__":
    main()
