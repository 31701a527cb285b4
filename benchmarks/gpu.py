"""The networks of the catalogue's first half on a GPU: right, how quick, and what part of the GPU they use.

    python benchmarks/gpu.py [--sizes resnet50,gpt2] [--batch 64] [--length 512] [--seconds 450] [--save]
    python benchmarks/gpu.py --device cpu --tiny --backend eager      # tries the script itself where there is no GPU

First each network in float32 (without TF32) must answer on the GPU as it does on the CPU. Then greedy answers with a cache,
ours and the peer with the same weights, in bfloat16. Then, of the same configs, answers and whole training steps (loss,
gradients, clipping, fused AdamW) in float32 and in bfloat16 by autocast; and at last in bfloat16 compiled, which takes most
of the time: --sizes of a few networks lets each come to it. `fit` makes its steps on a GPU as "ours, bfloat16" has them.

"MFU" is the multiply-adds of the network by table, twice, by those of products of large matrices measured here in the same
precision; of training three times those of an answer. "of memory" is that of benchmarks/decoding.py. After --seconds no
further line begins, and the rest is named.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from common import format_figure, make_parser, parse_options, read_free_memory, report
from decoding import PROMPT, count_bytes_per_step
from nets import ImageNetwork, LanguageNetwork, list_image_networks, list_text_networks
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fieldguide import create
from fieldguide.checkpoints import weights
from fieldguide.models.generation import Sampling, generate

TINY = {
    "resnet50": "resnet-test",
    "efficientnet-b0": "efficientnet-test",
    "convnext-tiny": "convnext-test",
    "vit-b16": "vit-test",
    "swin-t": "swin-test",
    "bert-base": "bert-test",
    "gpt2": "gpt2-test",
    "llama3.2-1b": "llama-test",
    "t5-small": "t5-test",
}
AGREE = 1e-3  # of the deviation of answers: sums are made in another order


class Timer:
    """Measures the seconds of work on a device: best of a few, synchronized before and after."""

    def __init__(self, device: torch.device):
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def __call__(self, run: Callable[[], object], times: int, repeats: int = 3) -> float:
        run()  # prepares kernels, or compiles
        run()
        best = float("inf")
        for _ in range(repeats):
            self.wait()
            started = time.perf_counter()
            for _ in range(times):
                run()
            self.wait()
            best = min(best, (time.perf_counter() - started) / times)
        return best


def measure_peak_rates(device: torch.device, timer: Timer, tiny: bool) -> dict[str, float]:
    """Return the peak rates of the device: operations per second by precision, and bytes read per second."""
    side, found = 256 if tiny else 8192, {}
    for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.randn(side, side, device=device, dtype=kind)
        found[name] = 2 * side**3 / timer(lambda a=a: a @ a, 5)
    large = torch.ones((1 if tiny else 1024) * 2**20, device=device)
    return found | {"bytes": large.nbytes / timer(large.sum, 10)}


def make_batch_on(net: LanguageNetwork, device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in net.batch().items()}


def check_device(net: LanguageNetwork, device: torch.device) -> str:
    """Return a sentence about the difference between float32 on the device and on the CPU."""
    model = create(net.size, **net.like | net.brief).eval()
    batch = {name: x[:2] for name, x in net.batch().items()}
    with torch.inference_mode():
        want = net.answer(model, batch)
        got = net.answer(model.to(device), {name: x.to(device) for name, x in batch.items()}).cpu()
    gap = ((got - want).abs().max() / want.std()).item()
    assert gap < AGREE, f"{net.size}: answers of {device} and CPU differ by {gap:.1e} deviations"
    return f"{net.size}: float32 on {device.type} and CPU differ by {gap:.0e} deviations at most."


def count_operations(net: LanguageNetwork) -> float:
    """Return the operations of a forward pass: multiply-adds, times two."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        net.answer(net.empty().eval(), make_batch_on(net, torch.device("meta")))
    return counter.get_total_flops()


def build_step(model: nn.Module, loss: Callable[[], Tensor], scope: Callable) -> Callable[[], object]:
    made = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with scope():
            value = loss()
        made.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        made.step()

    return step


def time_network(
    net: LanguageNetwork,
    compiled: str,
    device: torch.device,
    timer: Timer,
    best: dict[str, float],
    plain: dict[tuple, float],
    options: argparse.Namespace,
) -> Iterator[list[str]]:
    """Yield rows about one network, ours and the peer; with the backend `compiled` in bfloat16 only.

    `plain` holds the seconds of the uncompiled peer, to which all others are compared.
    """
    batch, flops = make_batch_on(net, device), count_operations(net)
    sides = ("ours",) if options.tiny and isinstance(net, ImageNetwork) else ("peer", "ours")
    for precision in ("bfloat16",) if compiled else ("float32", "bfloat16"):
        for what, factor in (("answers", 1), ("training", 3)):
            for who in sides:
                if time.monotonic() > options.until:
                    raise TimeoutError
                seconds = timer(build_runner(net, who, compiled, what, precision, batch, device), 1 if options.tiny else 10)
                if who == "peer" and not compiled:
                    plain[net.size, what, precision] = seconds
                memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else float("nan")
                yield [
                    net.size,
                    f"{what}, {precision}",
                    who + (", compiled" if compiled else ""),
                    format_figure(net.amount / seconds),
                    f"{plain.get((net.size, what, precision), float('nan')) / seconds:.2f}",
                    f"{memory:,.0f}",
                    f"{100 * factor * flops / seconds / best[precision]:.0f} %",
                    "-",
                ]
                gc.collect()
                torch._dynamo.reset()


def build_runner(
    net: LanguageNetwork, who: str, compiled: str, what: str, precision: str, batch: dict[str, Tensor], device: torch.device
) -> Callable[[], object]:
    """Return a step of one side."""
    scope = lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    torch.manual_seed(0)
    with device:  # numbers are drawn there, which is quicker
        model = create(net.size, **net.like) if who == "ours" else net.build_peer()
    model.to(device).train(what == "training")
    if compiled:
        net.compile(model, compiled)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if what == "training":
        objective = net.objective(model) if who == "ours" else None
        return build_step(model, lambda: objective(batch)["loss"] if objective else net.loss(model, batch), scope)

    def answer() -> None:
        with torch.inference_mode(), scope():
            net.answer(model, batch) if who == "ours" else net.reply(model, batch)

    return answer


def time_decoding(
    net: LanguageNetwork, device: torch.device, timer: Timer, best: dict[str, float], tokens: int
) -> list[list[str]]:
    """Return rows about greedy decoding with a cache, of ours and of transformers with its static cache."""
    rows = net.rows
    peer, model = net.build_peer().eval(), create(net.size, **net.like).eval()
    assert not weights.load(model, peer.state_dict())
    peer, model = (x.to(device, torch.bfloat16) for x in (peer, model))
    prompts, out = net.tokens(rows, PROMPT).to(device), []
    # What `generate` of transformers compiles by itself on a GPU takes longer than all else here.
    asked = {
        "attention_mask": torch.ones_like(prompts),
        "do_sample": False,
        "pad_token_id": 0,
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "cache_implementation": "static",
        "disable_compile": True,
    }

    def ours() -> None:
        for _ in generate(model, prompts.tolist(), tokens, sampling=Sampling(temperature=0.0)):
            pass

    seconds = {"peer": timer(lambda: peer.generate(prompts, **asked), 1), "ours": timer(ours, 1)}
    for who, taken in seconds.items():
        part = count_bytes_per_step(model, rows, tokens) * tokens / taken / best["bytes"]
        out.append(
            [
                net.size,
                f"{tokens} tokens greedily, {rows} at a time, bfloat16",
                who,
                format_figure(rows * tokens / taken),
                f"{seconds['peer'] / taken:.2f}",
                "-",
                "-",
                f"{100 * part:.0f} %",
            ]
        )
    return out


def shrink(net: LanguageNetwork) -> LanguageNetwork:
    """Return the same comparison with a test size; image networks have no peer then."""
    small = replace(net, size=TINY[net.size], rows=2, length=32 if isinstance(net, ImageNetwork) else 12, brief={})
    return replace(small, length=getattr(small.empty().config, "image", small.length))


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="", help="these alone, parted by commas")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step")
    parser.add_argument("--rows", type=int, default=16, help="rows of text a step; of Llama one")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--seconds", type=float, default=450, help="after which no line begins")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--backend", default="inductor", help="what compiles")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="test sizes, and no peers of their own sizes: tries the script")
    options = parse_options(parser)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here. `--device cpu --tiny --backend eager` tries the script.")
    options.until, timer = time.monotonic() + options.seconds, Timer(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    nets = [*list_image_networks(options.batch), *list_text_networks(options.rows, options.length)]
    nets = [shrink(net) if options.tiny else net for net in nets if net.size in (options.sizes or net.size).split(",")]
    best = measure_peak_rates(device, timer, options.tiny)
    notes = [
        f"Measured peaks: {best['float32'] / 1e12:.1f} TFLOPS in float32, {best['bfloat16'] / 1e12:.1f} in bfloat16, "
        f"{best['bytes'] / 1e9:,.0f} GB/s read; {read_free_memory():.0f} GB of the host's memory free."
    ]
    notes += [check_device(net, device) for net in nets]
    print("\n".join(notes), flush=True)
    rows: list[list[str]] = []
    ways = [("", net) for net in nets] + [(options.backend, net) for net in nets if options.compile]
    todo, plain = [net.size + (", compiled" if compiled else "") for compiled, net in ways], {}
    try:
        for size in () if options.sizes else ("gpt2-test", "llama-test") if options.tiny else ("gpt2", "smollm2-135m"):
            for many in (1, 8):
                net = LanguageNetwork(size, many, PROMPT, {"length": 32} if options.tiny else {})
                rows += time_decoding(net, device, timer, best, 8 if options.tiny else 128)
        for compiled, net in ways:
            for row in time_network(net, compiled, device, timer, best, plain, options):
                rows.append(row)
                print(*row, sep=" | ", flush=True)
            todo.pop(0)
    except TimeoutError:
        notes.append(f"After {options.seconds:.0f} s these were not run, or not whole: {'; '.join(todo)}.")
    report(
        f"On {device.type}",
        ["", "", "", "pictures or tokens/s", "to the peer", "MB", "MFU", "of memory"],
        rows,
        options.save,
        "\n".join(notes),
    )


if __name__ == "__main__":
    main()
