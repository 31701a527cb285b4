"""Latte on pixels, 8 frames of 32 x 32: training steps and answers, against diffusers' LatteTransformer3DModel.

    python benchmarks/video.py [--save]

The sizes of latte-pixels-32. The peer is Latte's later form: what time says to the blocks is one layer for all of them and a
table each, ours (the paper's) a layer each; for the comparison of answers ours is given the sum, with a time that says the
same always. It reads a text beside; it is given one token, and no cross-attention. "like for like": float32, clipped, fused
AdamW, the peer's DDPMScheduler adds the noise, in a plain loop. "defaults": ours with its recipe (a running average of
weights among it) and the precision that `fit` chooses by timing, against plain AdamW.
"""

from __future__ import annotations

import torch
from common import Pair, Run, check_equal, compare, describe_sizes, make_parser, parse_options
from loops import LIKE, read_recipe, repeat_batches, run_inference, run_plain_steps, run_trainer
from torch import Tensor, nn

from fieldguide import create
from fieldguide.objectives import Diffusion, DiscreteProcess
from tv import diffusers

SIZE, BATCH, TEXT = "latte-pixels-32", 8, 8


def build_network() -> nn.Module:
    return create(SIZE)


def build_peer() -> nn.Module:
    with torch.device("meta"):
        c = build_network().config
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=c.heads,
        attention_head_dim=c.dim // c.heads,
        in_channels=c.channels,
        num_layers=c.depth // 2,
        attention_bias=True,
        sample_size=c.image,
        patch_size=c.patch,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT,
        video_length=c.frames,
    )


def make_videos() -> Tensor:  # B F C S S
    return torch.rand(BATCH, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def compute_output(model: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    """Return the output of either side."""
    if isinstance(model, diffusers.LatteTransformer3DModel):
        return model(x.transpose(1, 2), time, torch.zeros(len(x), 1, TEXT)).sample.transpose(1, 2)
    return model(x, time)


def train(**settings: object) -> Run:
    return run_trainer(
        Diffusion(build_network(), DiscreteProcess("linear"), data="video"),
        repeat_batches({"video": make_videos()}),
        1,
        **settings,
    )


def peer(**settings: object) -> Run:
    model, noises = build_peer(), diffusers.DDPMScheduler(1000)

    def loss(clean: Tensor) -> Tensor:
        noise, time = torch.randn_like(clean), torch.randint(1000, (len(clean),))
        return nn.functional.mse_loss(compute_output(model, noises.add_noise(clean, noise, time), time), noise)

    return run_plain_steps(model, loss, [make_videos()], **settings)


def answer(model: nn.Module) -> Run:
    x, time = make_videos(), torch.arange(BATCH)
    return run_inference(model, lambda: compute_output(model, x, time))


@torch.no_grad()
def check() -> str:
    ours, peer = build_network().eval(), build_peer().eval()
    told = peer.adaln_single
    told.emb.timestep_embedder.linear_2.weight.zero_()
    always = told.emb.timestep_embedder.linear_2.bias.normal_()
    mine = {
        "patch": peer.pos_embed.proj,
        "time1": told.emb.timestep_embedder.linear_1,
        "time2": told.emb.timestep_embedder.linear_2,
        "head": peer.proj_out,
    }
    for i, pair in enumerate(zip(peer.transformer_blocks, peer.temporal_transformer_blocks)):
        for block, other in zip((ours.blocks[2 * i], ours.blocks[2 * i + 1]), pair):
            for part in ("weight", "bias"):
                qkv = torch.cat([getattr(layer, part) for layer in (other.attn1.to_q, other.attn1.to_k, other.attn1.to_v)])
                getattr(block.attn.qkv, part).copy_(qkv)
            block.condition.weight.copy_(told.linear.weight)
            block.condition.bias.copy_(told.linear.bias + other.scale_shift_table.flatten())
            for layer, source in (
                (block.attn.proj, other.attn1.to_out[0]),
                (block.mlp["up"], other.ff.net[0].proj),
                (block.mlp["down"], other.ff.net[2]),
            ):
                layer.load_state_dict(source.state_dict())
    for name, layer in mine.items():
        getattr(ours, name).load_state_dict(layer.state_dict())
    ours.condition.weight.zero_()
    ours.condition.bias.copy_((peer.scale_shift_table + always).flatten())
    outputs = (compute_output(network, make_videos(), torch.arange(BATCH)) for network in (ours, peer))
    return f"{describe_sizes(ours, peer)} {check_equal('outputs', *outputs)}"


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0], steps=2, rounds=4))
    torch.manual_seed(0)
    compare(
        f"Latte, 8 frames of 32 x 32, batch {BATCH}",
        "videos",
        "diffusers",
        [
            Pair(
                "training, like for like", lambda: train(precision="float32", **LIKE), lambda: peer(fused=True, **LIKE), BATCH
            ),
            Pair("training, defaults", lambda: train(**read_recipe(SIZE)), lambda: peer(lr=1e-3), BATCH),
            Pair("answers", lambda: answer(build_network()), lambda: answer(build_peer()), BATCH),
        ],
        options,
        check,
    )


if __name__ == "__main__":
    main()
