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
from contextlib import suppress

import numpy as np
import torch
from common import Pair, Run, check_equal, compare, describe_sizes, make_parser, parse_options
from loops import LIKE, read_recipe, run_inference, run_ours, run_plain
from torch import Tensor, nn

from fieldguide import create
from fieldguide.checkpoints import weights
from fieldguide.data.loader import Batches
from fieldguide.objectives import Forecast
from fieldguide.tasks.timeseries.forecasting import QUANTILES

LENGTH, HORIZON, BATCH, ROWS = 336, 96, 256, 2048
PAST, FUTURE = (
    torch.from_numpy(np.random.default_rng(0).standard_normal((ROWS, steps, 1), np.float32)) for steps in (LENGTH, HORIZON)
)


class Theirs(nn.Module):
    """The network of neuralforecast with our shapes: B T 1 -> B H."""

    def __init__(self) -> None:
        super().__init__()
        with suppress(ImportError):
            import tv  # noqa: F401   mends torchvision, which is asked for
        from neuralforecast.models import PatchTST

        self.model = PatchTST(
            h=HORIZON,
            input_size=LENGTH,
            encoder_layers=3,
            n_heads=4,
            hidden_size=16,
            linear_hidden_size=128,
            dropout=0.3,
            fc_dropout=0.3,
            head_dropout=0.0,
            attn_dropout=0.0,
            patch_len=16,
            stride=8,
            revin=True,
            revin_affine=False,
            revin_subtract_last=False,
        ).model

    def forward(self, series: Tensor) -> Tensor:
        return self.model(series.transpose(1, 2))[:, 0]


def make(rows: np.ndarray, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    index = torch.from_numpy(rows)
    return {"series": PAST[index], "target": FUTURE[index]}


def check() -> str:
    theirs, model = Theirs(), create("patchtst-etth1")
    left = weights.load(model, {f"model.{name}": x for name, x in theirs.model.state_dict().items()})
    assert not left, left
    with torch.inference_mode():
        output, other = model.eval()(PAST[:64])[:, :, 0, 0], theirs.eval()(PAST[:64])
    return f"{describe_sizes(model, theirs)} {check_equal('forecasts', output, other)}"


def train(quantiles: tuple[float, ...] = (), **settings: object) -> Run:
    model = create("patchtst-etth1", values=1 + len(quantiles))
    objective = Forecast(model, ("series",), quantiles) if quantiles else Forecast(model, ("series",), normalise=False)
    return run_ours(model, ("series",), Batches(ROWS, make), BATCH, objective, **settings)


def peer(**settings: object) -> Run:
    batches = [{**(b := make(np.arange(i, i + BATCH))), "target": b["target"][..., 0]} for i in range(0, ROWS, BATCH)]
    return run_plain(Theirs(), ("series",), batches, loss=nn.functional.l1_loss, **settings)


def answer(model: nn.Module) -> Run:
    return run_inference(model, lambda: model(PAST[:BATCH]))


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0], steps=4))
    logging.disable(logging.WARNING)
    try:
        Theirs()
    except ImportError as error:
        raise SystemExit(f"{error}: install neuralforecast first (see the top of this file)") from None
    torch.manual_seed(0)
    compare(
        "PatchTST, 336 steps read, 96 forecast, batch 256",
        "windows",
        "neuralforecast",
        [
            Pair(
                "training, like for like", lambda: train(precision="float32", **LIKE), lambda: peer(fused=True, **LIKE), BATCH
            ),
            Pair("training, defaults", lambda: train(QUANTILES, **read_recipe("patchtst-etth1")), lambda: peer(lr=1e-3), BATCH),
            Pair("inference", lambda: answer(create("patchtst-etth1")), lambda: answer(Theirs()), BATCH),
        ],
        options,
        check,
    )


if __name__ == "__main__":
    main()
