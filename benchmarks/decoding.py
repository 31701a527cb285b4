"""Greedy answers with a cache, one token after another: GPT-2 and SmolLM2-135M against transformers, with the same weights.

    python benchmarks/decoding.py [--sizes gpt2] [--tokens 128] [--rounds 2] [--weights FILE.gguf] [--compiled] [--save]

The peer is `generate` with its static cache; with --compiled also as it compiles itself (minutes). Ours as it is, and with
weights of eight bits, as `fieldguide predict MODEL 'text' --set weights=int8` has them. Weights are drawn by chance, or of
a file of SmolLM2, which is then read by the network alone; only then does the perplexity say something, which is that of
the licence, the README and the architecture of this project, 1,024 tokens of each at most.

A step reads every weight of a linear layer and what is cached, once; "of memory" is what it reads in a second, as a part of
what this machine reads when it sums a large tensor or multiplies a large matrix with a vector. With several rows at a time
a step computes more than it reads, and the part falls.
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
from common import agree, arguments, begin, count, figure, race, report
from nets import Net
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
Say = Callable[[int], Tensor]  # so many tokens after the prompts


def bandwidth(megabytes: int = 512) -> tuple[float, float]:
    """Bytes a second that are read at best: for a sum, and for the product of a matrix and a vector."""
    matrix = torch.ones(megabytes * 2**20 // 4 // 1024, 1024)
    vector, seconds = torch.ones(1024), {}
    for name, run in (("sum", matrix.sum), ("product", lambda: matrix @ vector)):
        seconds[name] = min(timed(run) for _ in range(5))
    return tuple(matrix.nbytes / s for s in seconds.values())


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def read(model: nn.Module, rows: int, tokens: int) -> float:
    """Bytes that a step reads, the cache as long as it is on the mean."""
    held = {id(w): w for m in model.modules() if isinstance(m, nn.Linear) for w in (m.weight,)}
    if getattr(model, "head", None) is None:  # the table is the head
        held[id(model.embed.weight)] = model.embed.weight
    size = sum(w.int_values.nbytes + w.scale.nbytes if isinstance(w, Int8) else w.nbytes for w in held.values())
    cache = model.new_cache(rows, PROMPT + tokens)
    return size + sum(x.nbytes for x in (*cache.keys, *cache.values)) * (PROMPT + tokens / 2) / (PROMPT + tokens)


def ours(model: nn.Module, prompts: Tensor) -> Say:
    return lambda most: torch.stack(list(generate(model, prompts.tolist(), most, sampling=Sampling(temperature=0.0))), 1)


def theirs(model: nn.Module, prompts: Tensor, **how: Any) -> Say:
    def say(most: int) -> Tensor:
        with torch.inference_mode():
            return model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=most,
                min_new_tokens=most,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",
                **how,
            )[:, PROMPT:]

    return say


def compiling() -> dict[str, Any]:
    """What makes `generate` compile its step on a CPU, too."""
    config = transformers.CompileConfig(fullgraph=False, mode="default")
    config._compile_all_devices = True
    return {"compile_config": config}


def encoded(path: Path) -> Iterator[Tensor]:
    """The texts as tokens of the file's own tokenizer, each a row."""
    from fieldguide.inference.text_generation import TextGenerator

    speaker = TextGenerator.load(path)
    for name in TEXTS:
        yield torch.tensor([speaker.tokens((Path(__file__).parents[1] / name).read_text())[:LONGEST]])


def perplexity(model: nn.Module, rows: list[Tensor]) -> float:
    with torch.inference_mode():
        nats = [F.cross_entropy(stepwise(model, row), row[0, 1:], reduction="sum") for row in rows]
    return math.exp(sum(map(float, nats)) / sum(row.shape[1] - 1 for row in rows))


def stepwise(model: nn.Module, row: Tensor, part: int = 16) -> Tensor:
    """Logits read in parts so short that eight bits are multiplied as eight bits."""
    cache = model.new_cache(1, row.shape[1])
    return torch.cat([model(piece, cache=cache)[0] for piece in row[:, :-1].split(part, 1)])


def measured(
    size: str, rows: int, model: nn.Module, small: nn.Module, peer: nn.Module, speed: float, options: argparse.Namespace
) -> tuple[list[list[str]], str]:
    """A line of the table for each way, and how many tokens are the same."""
    prompts = torch.randint(5, model.config.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    ways = {
        "transformers": theirs(peer, prompts, disable_compile=True),
        "ours": ours(model, prompts),
        "ours, weights=int8": ours(small, prompts),
    }
    if options.compiled:
        ways["transformers, compiled"] = theirs(peer, prompts, **compiling())
    said: dict[str, Tensor] = {}
    runs = {name: lambda name=name, say=say: said.__setitem__(name, say(options.tokens)) for name, say in ways.items()}
    for say in ways.values():
        say(3)
    times = race(runs, options.rounds, warm=False)
    peers = min(min(seconds) for name, seconds in times.items() if name.startswith("transformers"))
    lines = []
    for name, seconds in times.items():
        step = min(seconds) / options.tokens  # the prompt among them
        part = read(small if "int8" in name else model, rows, options.tokens) / step / speed
        lines.append(
            [
                f"{size}, {rows} at a time",
                name,
                figure(rows / step),
                f"{1000 * step:.1f}",
                f"{min(times['transformers']) / min(seconds):.2f}",
                f"{peers / min(seconds):.2f}",
                f"{100 * part:.0f} %",
            ]
        )
    same = (said["ours"] == said["transformers"]).float().mean().item()
    assert rows > 1 or same > 0.9, f"of {options.tokens} tokens {100 * same:.0f} % are those of transformers"
    eight = (said["ours, weights=int8"] == said["transformers"]).float().mean().item()
    return lines, f"{size}, {rows} at a time: {100 * same:.0f} % of the tokens are the peer's, with int8 {100 * eight:.0f} %."


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="gpt2,smollm2-135m")
    parser.add_argument("--rows", default="1,8", help="answers at a time")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--weights", type=Path, help="a file or folder of a network of one of the sizes")
    parser.add_argument("--compiled", action="store_true", help="the peer compiled, too")
    options = begin(parser)
    torch.manual_seed(0)
    speeds = bandwidth()
    notes, lines = [f"Memory: {speeds[0] / 1e9:.1f} GB/s summed, {speeds[1] / 1e9:.1f} multiplied."], []
    given = fieldguide.load(options.weights).eval() if options.weights else None
    for size in options.sizes.split(","):
        net = Net(size, 1, 64)
        peer, model = net.theirs().eval(), fieldguide.create(size).eval()
        real = given is not None and given.config == model.config
        if real:
            model = given
            names = translate(model.state_dict(), find(size)[0].weights["huggingface"], reverse=True)
            assert not peer.load_state_dict(names, strict=False).unexpected_keys
        else:
            assert not weights.load(model, peer.state_dict())
        row = net.batch()["tokens"]
        with torch.inference_mode():
            notes.append(f"{size}: {count(model, peer)} {agree('logits', model(row), peer(row).logits)}")
        small = quantize_int8(copy.deepcopy(model))
        for rows in map(int, options.rows.split(",")):
            found, note = measured(size, rows, model, small, peer, max(speeds), options)
            lines += found
            notes.append(note)
        if real:
            rows = list(encoded(options.weights))
            notes.append(f"{size}: perplexity {perplexity(model, rows):.3f}, with int8 {perplexity(small, rows):.3f}.")
    report(
        f"Greedy answers, {options.tokens} tokens after {PROMPT}",
        ["", "", "tokens/s", "ms a step", "to transformers", "to its best", "of memory"],
        lines,
        options.save,
        "\n".join(notes),
    )


if __name__ == "__main__":
    main()
