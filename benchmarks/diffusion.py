"""The U-Net of DDPM, 35.7 million weights, 32 x 32 pictures: training steps and steps of sampling, against diffusers.

    python benchmarks/diffusion.py [--rounds 3] [--save]

"like for like": no dropout, float32, clipped, fused AdamW, the peer's DDPMScheduler adds the noise, in a plain loop.
"defaults": ours with its recipe (a running average of weights among it) and the precision and layout that `fit` chooses by
timing, against plain AdamW. A sampling step is one of DDIM's, the network's answer and what is made of it.
"""

from __future__ import annotations

import torch
from common import Pair, Run, check_equal, compare, describe_sizes, make_parser, parse_options
from loops import LIKE, read_recipe, repeat_batches, run_inference, run_plain_steps, run_trainer
from torch import Tensor, nn

from cases import diffusers_unet
from fieldguide import create
from fieldguide.checkpoints import weights
from fieldguide.objectives import DDIM, Diffusion, DiscreteProcess
from fieldguide.objectives.diffusion import sample
from tv import diffusers

SIZE, SIDE, BATCH, STEPS = "ddpm-cifar10", 32, 4, 4


def make_images() -> Tensor:
    return torch.rand(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build_network() -> nn.Module:
    return create(SIZE, dropout=0.0)


def build_peer() -> nn.Module:
    with torch.device("meta"):
        shape = build_network()
    return diffusers_unet(shape)[0].peer


def train(**settings: object) -> Run:
    return run_trainer(
        Diffusion(build_network(), DiscreteProcess("linear")), repeat_batches({"image": make_images()}), 1, **settings
    )


def peer(**settings: object) -> Run:
    model, noises = build_peer(), diffusers.DDPMScheduler(1000)

    def loss(clean: Tensor) -> Tensor:
        noise, time = torch.randn_like(clean), torch.randint(1000, (len(clean),))
        return nn.functional.mse_loss(model(noises.add_noise(clean, noise, time), time).sample, noise)

    return run_plain_steps(model, loss, [make_images()], **settings)


def sample_ours(model: nn.Module) -> Tensor:
    """Return images sampled by our network in a few steps."""
    return sample(model, DiscreteProcess("linear"), DDIM(steps=STEPS), torch.zeros(BATCH, dtype=torch.int64), (3, SIDE, SIDE))


def sample_peer(model: nn.Module) -> Tensor:
    x, scheduler = torch.randn(BATCH, 3, SIDE, SIDE), diffusers.DDIMScheduler(1000, clip_sample=True)
    scheduler.set_timesteps(STEPS)
    for time in scheduler.timesteps:
        x = scheduler.step(model(x, time).sample, time, x).prev_sample
    return x


def check() -> str:
    model, peer, time = build_network().eval(), build_peer().eval(), torch.tensor([5, 300, 700, 999])
    assert not weights.load(model, peer.state_dict())
    with torch.inference_mode():
        return f"{describe_sizes(model, peer)} {check_equal('answers', model(make_images(), time), peer(make_images(), time).sample)}"


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0], steps=1, rounds=3))
    torch.manual_seed(0)
    compare(
        f"U-Net of DDPM, {SIDE} x {SIDE}, batch {BATCH}",
        "pictures",
        "diffusers",
        [
            Pair(
                "training, like for like", lambda: train(precision="float32", **LIKE), lambda: peer(fused=True, **LIKE), BATCH
            ),
            Pair("training, defaults", lambda: train(**read_recipe(SIZE)), lambda: peer(lr=1e-3), BATCH),
            Pair(
                "sampling step",
                lambda: run_repeatedly(build_network(), sample_ours),
                lambda: run_repeatedly(build_peer(), sample_peer),
                BATCH * STEPS,
            ),
        ],
        options,
        check,
    )


def run_repeatedly(model: nn.Module, draw) -> Run:
    return run_inference(model, lambda: draw(model))


if __name__ == "__main__":
    main()
