"""Images a second at equal quality, with the defaults of `predict` and those of diffusers' pipelines: one network, Fashion-MNIST.

    python benchmarks/image_sampling.py [--steps 1500] [--images 500] [--rounds 3] [--folder build/image_sampling] [--save]

A U-Net of DDPM is trained for --steps (and kept in --folder), and copied to diffusers' UNet2DModel, which must give the same outputs.
Patches of 4 x 4 pixels are its channels, so that both libraries compute the same network. Each then makes the same number of images
without labels: ours with the sampler and the number of steps that `predict` uses by default; diffusers with DDIMPipeline as its
documentation begins (50 steps) and with DDPMPipeline in 50 steps, which needs 1,000 by default. "Like for like" is our DDIM with 50 steps.
Quality is that of `benchmarks/samplers.py`: feature distance to test images (lower is better), precision and recall.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import check_equal, describe_sizes, make_parser, parse_options, report, time_in_turns
from loops import read_recipe
from safetensors.torch import load_file, save_file
from samplers import BATCH, SIDE, Judge, read, show
from torch import Tensor, nn

from cases import diffusers_unet
from fieldguide import create
from fieldguide.automl.fit import NullCallback
from fieldguide.core.settings import Settings
from fieldguide.data.loader import Batches
from fieldguide.objectives import DDIM, Diffusion, DiscreteProcess
from fieldguide.objectives.diffusion import Sampler, sample
from fieldguide.tasks.vision.image_generation_options import SampleOptions
from fieldguide.tasks.vision.image_generation_sampling import build_sampler
from fieldguide.training.trainer import Trainer
from tv import diffusers

PATCH = 4
CELLS, CHANNELS = SIDE // PATCH, PATCH**2
SIZE = "ddpm-mini"
SMALL = {"patch": 1, "image": CELLS, "channels": CHANNELS, "dim": 48, "growth": (1,), "attend": (CELLS,), "num_classes": 0}
DRAWN = 100  # images drawn at once
PIPELINE_STEPS = 50  # the default of DDIMPipeline
GOAL = 1.5  # times as many images a second


def build_process() -> DiscreteProcess:
    return DiscreteProcess("cosine", predicts="v")


def build_scheduler(kind: type) -> object:
    """Return a scheduler of diffusers for the process that the network was trained with."""
    return kind(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def train(steps: int, folder: Path) -> nn.Module:
    """Return the trained network, from the folder if it is there."""
    path = folder / f"unconditional-{steps}.safetensors"
    torch.manual_seed(0)
    model = create(SIZE, **SMALL)
    if not path.exists():
        cells = F.pixel_unshuffle(read("train")[0], PATCH)
        data = Batches(len(cells), lambda rows, _: {"image": cells[rows]})
        settings = Settings().with_({"minutes": 0, "batch": BATCH, "channels_last": False, "steps": steps, **read_recipe(SIZE)})
        device, objective = torch.device("cpu"), Diffusion(model, build_process())
        loop, started = Trainer(objective, data, settings, device=device, callback=NullCallback()), time.perf_counter()
        loop.train()
        print(f"{steps} steps of training in {time.perf_counter() - started:.0f} s", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: x.contiguous() for key, x in model.state_dict().items()}, path)
    model.load_state_dict(load_file(path))
    return model.eval()


def copy_to_peer(model: nn.Module) -> nn.Module:
    """Return the network of diffusers with the same weights."""
    wrapped, translate = diffusers_unet(model)
    wrapped.load_state_dict(translate(model.state_dict()))
    return wrapped.peer.eval()


def check(model: nn.Module, peer: nn.Module) -> str:
    x, at = torch.randn(4, CHANNELS, CELLS, CELLS), torch.tensor([5, 300, 700, 999])
    with torch.inference_mode():
        return f"{describe_sizes(model, peer)} {check_equal('outputs', model(x, at), peer(x, at).sample)}"


def draw_ours(model: nn.Module, sampler: Sampler, count: int) -> Tensor:  # -> count 1 28 28 in -1 .. 1
    """Return images of our sampler."""
    process, shape = build_process(), (CHANNELS, CELLS, CELLS)
    parts = []
    for i in range(0, count, DRAWN):
        numbers = range(i, min(i + DRAWN, count))
        label = torch.zeros(len(numbers), dtype=torch.int64)
        parts.append(sample(model, process, sampler, label, shape, numbers=numbers).clamp(-1, 1))
    return F.pixel_shuffle(torch.cat(parts), PATCH)


def draw_pipeline(pipeline: object, steps: int, count: int) -> Tensor:  # -> count 1 28 28 in -1 .. 1
    """Return images of a pipeline of diffusers."""
    generator, parts = torch.Generator().manual_seed(0), []
    for i in range(0, count, DRAWN):
        size = min(DRAWN, count - i)
        made = pipeline(batch_size=size, generator=generator, num_inference_steps=steps, output_type="np").images
        parts.append(torch.from_numpy(made).movedim(-1, 1) * 2 - 1)
    return F.pixel_shuffle(torch.cat(parts), PATCH)


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--images", type=int, default=500, help="images made by each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/image_sampling"))
    options = parse_options(parser)
    model = train(options.steps, options.folder)
    peer = copy_to_peer(model)
    note = check(model, peer)
    print(note, flush=True)
    ddim = diffusers.DDIMPipeline(peer, build_scheduler(diffusers.DDIMScheduler))
    ddpm = diffusers.DDPMPipeline(peer, build_scheduler(diffusers.DDPMScheduler))
    for pipeline in (ddim, ddpm):
        pipeline.set_progress_bar_config(disable=True)
    chosen = SampleOptions()
    ours, theirs = f"ours, {chosen.sampler}, {chosen.steps} steps", f"diffusers, DDIMPipeline, {PIPELINE_STEPS} steps"
    makers: dict[str, Callable[[int], Tensor]] = {
        ours: lambda count: draw_ours(model, build_sampler(chosen), count),
        f"ours, ddim, {PIPELINE_STEPS} steps": lambda count: draw_ours(model, DDIM(steps=PIPELINE_STEPS), count),
        theirs: lambda count: draw_pipeline(ddim, PIPELINE_STEPS, count),
        f"diffusers, DDPMPipeline, {PIPELINE_STEPS} steps": lambda count: draw_pipeline(ddpm, PIPELINE_STEPS, count),
    }
    judge, scores = Judge(options.images), {}
    for name, make in makers.items():
        scores[name] = judge.score(make(options.images))
        print(name, show(scores[name]), flush=True)
    times = time_in_turns({name: lambda make=make: make(DRAWN) for name, make in makers.items()}, options.rounds)
    rate = {name: DRAWN / min(seconds) for name, seconds in times.items()}
    rows = [[name, f"{rate[name]:.1f}", f"{rate[name] / rate[theirs]:.2f}", show(scores[name])] for name in makers]
    equal = scores[ours][0] <= scores[theirs][0]
    note += (
        f" Defaults: {rate[ours] / rate[theirs]:.2f} times as many images a second as DDIMPipeline (goal {GOAL}), with a feature distance "
        f"that is {'not ' if equal else ''}higher."
    )
    title = f"Images a second with defaults, Fashion-MNIST, {options.steps} training steps, {options.images} images"
    report(title, ["", "images/s", "of DDIMPipeline", "distance / precision / recall"], rows, options.save, note)


if __name__ == "__main__":
    main()
