"""Networks that read and write text, at their published sizes: answers and training steps, against transformers.

    python benchmarks/language.py [--sizes bert-base,gpt2] [--batch 4] [--length 128] [--rounds 3] [--save]

Both first have the same weights and must give the same answers (Llama in a version of two layers). "answers": logits of every
place, evaluation mode, no gradients, no cache, float32. "like for like": float32, clipped, fused AdamW, the peer's own loss
(`labels=`); ours in the loop that `fit` runs, theirs in a plain one. "defaults": ours with its recipe, and the precision that
`fit` chooses by timing, against plain AdamW. A line that needs more memory than is free is not run, and says so: Llama's
answers take 11 GB, its training 41, that of two of its layers 13. Of T5 a token is one of the source
together with one of the target.
"""

from __future__ import annotations

import torch
from common import compare, make_parser, parse_options
from nets import list_text_networks


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], steps=1, rounds=3)
    parser.add_argument("--sizes", default="", help="these alone, parted by commas")
    parser.add_argument("--batch", type=int, default=4, help="rows a step; of Llama always one")
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    options = parse_options(parser)
    torch.manual_seed(0)
    nets = [
        net for net in list_text_networks(options.batch, options.length) if net.size in (options.sizes or net.size).split(",")
    ]
    compare(
        f"Text, {options.batch} rows of {options.length} tokens",
        "tokens",
        "transformers",
        [pair for net in nets for pair in net.pairs()],
        options,
        lambda: "\n".join(net.check() for net in nets),
    )


if __name__ == "__main__":
    main()
