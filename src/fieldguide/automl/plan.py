"""`fieldguide plan`: memory and time of a network, a run or a run to be, on this machine or another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fieldguide.automl.callbacks import NullCallback
from fieldguide.core.errors import DataError, SettingsError, nearest
from fieldguide.core.settings import Settings
from fieldguide.models import registry
from fieldguide.planning import estimate as planning
from fieldguide.planning.estimate import Estimate
from fieldguide.planning.sizing import describe_tokens

MODES = ("train", "predict", "serve")
DEFAULT_MODES = MODES[:2]


def plan(
    source: str | Path,
    target: str | None = None,
    *,
    mode: str | None = None,
    on: str | Path = "cpu",
    devices: int = 1,
    strategy: str = "ddp",
    batch: int | None = None,
    length: int | None = None,
    side: int | None = None,
    dtype: str = "float32",
    new_tokens: int = 0,
    task: str | None = None,
    model: str = "auto",
    minutes: float | None = None,
    settings: Mapping[str, Any] | None = None,
    callback: NullCallback | None = None,
) -> list[Estimate]:
    """Plan memory and time, without training: of a network by name, of a run folder, or of `fit` with some data.

    Parameters
    ----------
    source : a name from `fieldguide models`, a run folder, or data as for `fit`.
    target, task, model, minutes : for data, as for `fit`.
    mode : "train", "predict" or "serve"; the first two by default. A server has `batch` sequences at a time, of
        `length + new_tokens` positions each.
    on : name of a machine (see `fieldguide.planning.machines`), "cpu" for this one, or the file of `fieldguide probe`.
    devices : number of devices, whose work is shared by `strategy`: "ddp", "fsdp" for training, or
        "tensor" for serving.
    batch : rows per device and step; by default as chosen for the data, or 32.
    length, side : tokens per row and pixels per side, where the network leaves them open; by default those of the run, else 128
        and 224.
    dtype : of the stored weights of a network that is named: "float32" or "bfloat16".
    new_tokens : tokens that a language model writes for each row, whose keys and values are cached.
    settings : training settings by name, and fields of the network as `model.FIELD`.

    Returns
    -------
    One `Estimate` for each mode.

    Raises
    ------
    SettingsError : an unknown network, machine, mode or setting.
    DataError : the data cannot be used.
    """
    from fieldguide.automl.request import group_settings

    if mode is not None and mode not in MODES:
        raise SettingsError(f"mode={mode!r} is none of {', '.join(MODES)}.")
    modes = DEFAULT_MODES if mode is None else (mode,)
    requested, fields, *_ = group_settings(settings or {})
    shared: dict[str, Any] = {
        "machine": on,
        "devices": devices,
        "strategy": strategy,
        **{name: value for name, value in (("length", length), ("side", side)) if value is not None},
        "new_tokens": new_tokens,
    }
    if (Path(source) / "run.json").is_file():
        return plan_run(Path(source), modes, requested, batch, shared)
    if not Path(source).exists() and is_network(str(source)):
        card, _ = registry.find(str(source))
        chosen = Settings().with_(card.recipe).override(requested)
        return [
            planning.estimate(str(source), mode=each, settings=chosen, batch=batch, dtype=dtype, fields=fields, **shared)
            for each in modes
        ]
    return plan_fit(source, target, modes, task, model, minutes, settings, batch, shared, callback or NullCallback())


def is_network(name: str) -> bool:
    """Return whether a name is that of a network. Raises `SettingsError`, with suggestions, if it is no sample either."""
    from fieldguide.data.samples import SAMPLES

    if name in SAMPLES:
        return False
    try:
        registry.find(name)
    except SettingsError:
        if "/" in name or "." in name:  # a path that does not exist, which reading explains
            return False
        names = [*registry.names(), *SAMPLES]
        raise SettingsError(
            f"{name!r} is no network, sample, run folder or file.{nearest(name, names)} `fieldguide models` lists the networks."
        ) from None
    return True


def plan_run(
    folder: Path, modes: tuple[str, ...], requested: Mapping[str, Any], batch: int | None, shared: Mapping[str, Any]
) -> list[Estimate]:
    """Plan training and prediction with the network of a run."""
    from fieldguide.inference.run import open_run

    run = open_run(folder)
    make, card, _ = planning.from_card(run.record["model"]["size"], run.config)
    if card.solver:
        modes = tuple(mode for mode in modes if mode != "train")  # it is fitted in seconds, without steps
    chosen = run.settings.override(requested)
    sizes = {name: getattr(run.task.options, name, None) for name in ("length", "side")}
    shared = {**{name: size for name, size in sizes.items() if isinstance(size, int)}, **shared}
    return [
        planning.estimate(
            make,
            mode=mode,
            settings=chosen,
            batch=batch,
            family=card.family,
            name=run.record["model"]["size"],
            keeps_best=True,
            **shared,
        )
        for mode in modes
    ]


def plan_fit(
    source: str | Path,
    target: str | None,
    modes: tuple[str, ...],
    task: str | None,
    model: str,
    minutes: float | None,
    settings: Mapping[str, Any] | None,
    batch: int | None,
    shared: Mapping[str, Any],
    callback: NullCallback,
) -> list[Estimate]:
    """Plan what `fit` would train with this data."""
    from fieldguide.automl.build_plan import build_plan
    from fieldguide.automl.request import build_request, read_for
    from fieldguide.data.loader import representative_rows

    request = build_request(str(source), target=target, task=task, model=model, settings=settings)
    data, _, why = read_for(request, str(source))
    made = build_plan(data, task=request["task"], why=why, model=model, minutes=minutes, settings=settings, callback=callback)
    if made.card.solver:
        raise SettingsError(f"{made.size} is fitted in seconds without steps, so there is nothing to plan. Name a network.")
    rows = representative_rows(made.train_batches, made.settings.resolved_batch_size)
    example = made.train_batches.make(np.asarray(rows), torch.Generator().manual_seed(0))
    if not example:
        raise DataError(f"{data.source}: the training rows give no batch.")
    make = planning.from_example(made.objective, example, examples=len(rows))
    plans = [
        planning.estimate(
            make,
            mode=mode,
            settings=made.settings,
            batch=batch or len(rows),
            family=made.card.family,
            name=made.size,
            keeps_best=True,
            **shared,
        )
        for mode in modes
    ]
    tokens = getattr(made.task, "tokens", 0) if "tokens" in made.card.output_types else 0
    if isinstance(tokens, int) and tokens:  # a language model: the number of training tokens
        plans = [replace(each, notes=(*each.notes, describe_tokens(tokens))) for each in plans]
    return plans
