"""PatchTST: ours against neuralforecast's, with the same weights.

    python benchmarks/forecasting.py [--steps 4] [--rounds 5] [--save]

Windows of one series, 336 steps read and 96 forecast, batches of 256, the sizes of patchtst-etth1. First, both must give the
same forecasts from the same weights. "like for like": float32, absolute error, clipped, fused AdamW; neuralforecast's network
runs in a plain PyTorch loop. "defaults": ours with the precision that `fit` chooses by timing and the quantiles that it
learns beside the point, against plain AdamW in float32.

neuralforecast is no dependency of ours and asks for more than the tests have: pip install neuralforecast "ray[tune]" in an
environment of its own, beside fieldguide.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from common import arguments, begin, race, ratio, report
from loops import ours, plain
from torch import Tensor, nn

from fieldguide import create, weights
from fieldguide.data.batches import Batches
from fieldguide.objectives import Forecast
from fieldguide.tasks.forecasting import QUANTILES

LENGTH, HORIZON, BATCH, ROWS = 336, 96, 256, 2048


class Theirs(nn.Module):
    """neuralforecast's network behind our shapes: B T 1 -> B H."""

    def __init__(self) -> None:
        super().__init__()
        from neuralforecast.models import PatchTST
        self.model = PatchTST(h=HORIZON, input_size=LENGTH, encoder_layers=3, n_heads=4, hidden_size=16,
                              linear_hidden_size=128, dropout=0.3, fc_dropout=0.3, head_dropout=0.0, attn_dropout=0.0,
                              patch_len=16, stride=8, revin=True, revin_affine=False, revin_subtract_last=False).model

    def forward(self, series: Tensor) -> Tensor:
        return self.model(series.transpose(1, 2))[:, 0]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = begin(parser)
    logging.disable(logging.WARNING)
    try:
        theirs = Theirs()
    except ImportError as error:
        raise SystemExit(f"{error}: install neuralforecast first (see the top of this file)") from None
    torch.manual_seed(0)
    past, future = torch.randn(ROWS, LENGTH, 1), torch.randn(ROWS, HORIZON, 1)

    def make(rows: np.ndarray, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        index = torch.from_numpy(rows)
        return {"series": past[index], "target": future[index]}

    model = create("patchtst-etth1")
    left = weights.load(model, {f"model.{name}": x for name, x in theirs.model.state_dict().items()})
    assert not left, left
    with torch.inference_mode():
        said, other = model.eval()(past[:64])[:, :, 0, 0], theirs.eval()(past[:64])
    gap, size = (said - other).abs().max().item(), other.std().item()
    print(f"largest difference of the forecasts: {gap:.1e}, their deviation {size:.2f}")
    assert gap < 1e-4 < size

    batches = Batches(ROWS, make)
    fixed = [{**(b := make(np.arange(i, i + BATCH))), "target": b["target"][..., 0]} for i in range(0, ROWS, BATCH)]
    inputs, l1 = ("series",), nn.functional.l1_loss
    full = create("patchtst-etth1", values=1 + len(QUANTILES))
    runs = {
        "ours, float32": ours(model, inputs, batches, BATCH, Forecast(model, inputs, normalise=False), precision="float32"),
        "theirs, float32": plain(theirs, inputs, fixed, loss=l1, lr=1e-3, fused=True, clip=1.0),
        "ours, defaults": ours(full, inputs, batches, BATCH, Forecast(full, inputs, QUANTILES)),
        "theirs, defaults": plain(Theirs(), inputs, fixed, loss=l1, lr=1e-3),
    }
    times = race({key: lambda run=run: run(options.steps) for key, run in runs.items()}, options.rounds)

    def answer(network: nn.Module) -> None:
        network.eval()
        with torch.inference_mode():
            for batch in fixed[:options.steps]:
                network(batch["series"])

    times |= race({"ours, inference": lambda: answer(model), "theirs, inference": lambda: answer(theirs)}, options.rounds)
    rows = []
    for what, key in (("training, like for like", "float32"), ("training, defaults", "defaults"), ("inference", "inference")):
        us, them = f"ours, {key}", f"theirs, {key}"
        best, low, high = ratio(times, us, them)
        speed = [options.steps * BATCH / min(times[name]) for name in (us, them)]
        rows.append([what, *(f"{s:,.0f}" for s in speed), f"{best:.2f}", f"{low:.2f} to {high:.2f}"])
    report("PatchTST, 336 steps read, 96 forecast, batch 256", ["", "ours, windows/s", "neuralforecast, windows/s", "ratio",
                                                                "rounds"], rows, options.save)


if __name__ == "__main__":
    main()
