"""Networks that name pictures, at their published sizes and 224 pixels a side: answers and training steps, against timm.

    python benchmarks/vision.py [--sizes resnet50,vit-b16] [--batch 4] [--rounds 3] [--save]

Both first have the same weights and must give the same answers. "answers": evaluation mode, no gradients, float32. "like
for like": nothing is dropped out, float32, contiguous, clipped, fused AdamW, ours in the loop that `fit` runs, timm's in a
plain one. "defaults": ours with its recipe (which drops out, smooths labels), and the precision and layout that `fit`
chooses by timing, against timm as its examples begin: float32, contiguous, plain AdamW.
"""

from __future__ import annotations

import torch
from common import compare, make_parser, parse_options
from nets import list_image_networks


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0], steps=1, rounds=3)
    parser.add_argument("--sizes", default="", help="these alone, parted by commas")
    parser.add_argument("--batch", type=int, default=4, help="pictures a step")
    parser.add_argument("--side", type=int, default=224, help="pixels; Swin needs a multiple of 32, ViT 224")
    options = parse_options(parser)
    torch.manual_seed(0)
    nets = [
        net for net in list_image_networks(options.batch, options.side) if net.size in (options.sizes or net.size).split(",")
    ]
    compare(
        f"Pictures of {options.side} x {options.side}, batch {options.batch}",
        "pictures",
        "timm",
        [pair for net in nets for pair in net.pairs()],
        options,
        lambda: "\n".join(net.check() for net in nets),
    )


if __name__ == "__main__":
    main()
