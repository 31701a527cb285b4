"""Run steps of the real training and prediction loops on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.settings import Settings
from fieldguide.planning.trace import Trace, Tracer, undisturbed
from fieldguide.planning.workload import Workload
from fieldguide.training.precision import autocast
from fieldguide.training.trainer import Trainer

CPU = torch.device("cpu")


class Silent:
    """Callback that does nothing."""

    def on_step(self, step: int, losses: dict[str, float]) -> None: ...
    def on_evaluate(self, step: int, scores: dict[str, float], best: bool) -> None: ...
    def log(self, text: str) -> None: ...
    def on_replan(self, steps: int) -> None: ...


def trace_training(workload: Workload, settings: Settings) -> Trace:
    """Trace the first step of the training loop, which also creates the state of the optimizer.

    Nothing is allocated, and the objective does not change.
    """
    tracer = Tracer()
    objective = tracer.fake_module(workload.objective, bool(settings.channels_last))
    settings = settings.with_({"steps": 2, "eval_steps": 2})
    with undisturbed():
        trainer = Trainer(objective, None, settings, device=CPU, callback=Silent())  # type: ignore[arg-type]
        label_state(tracer, trainer)
        watch(tracer, trainer)
        trainer.set_train_mode()
        tracer.begin_steps()

        def stream() -> Iterator[tuple[int, dict[str, Tensor]]]:
            while True:
                yield 0, make_batch(tracer, workload.batch, bool(settings.channels_last))

        with tracer:
            trainer.train_step(stream())
            label_optimizer(tracer, trainer)
    return tracer.finish()


def make_batch(tracer: Tracer, batch: Mapping[str, Tensor], channels_last: bool) -> dict[str, Tensor]:
    """Return a new fake batch, whose storages belong to the data."""
    made = {}
    for name, tensor in batch.items():
        fake = tracer.fake_tensor(tensor, channels_last=channels_last)
        tracer.label(fake, "data")
        made[name] = fake
    return made


def label_state(tracer: Tracer, trainer: Trainer) -> None:
    """Label the weights and their averages, which exist before the first step."""
    for tensor in (*trainer.objective.parameters(), *trainer.objective.buffers()):
        tracer.label(tensor, "weights")
    if trainer.average:
        for tensor in trainer.average.mean:
            tracer.label(tensor, "average")


def watch(tracer: Tracer, trainer: Trainer) -> None:
    """Label what is alive after the forward pass as activations, and gradients as they are accumulated."""

    def after_forward(*_: Any) -> None:
        tracer.label_rest("activations")
        tracer.phase = "backward"

    def accumulated(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tracer.label(parameter.grad, "gradients")

    for runner in trainer.runners:
        runner.module.register_forward_hook(after_forward)
        for parameter in runner.parameters:
            parameter.register_post_accumulate_grad_hook(accumulated)
        for optimizer in runner.optimizers:
            optimizer.register_step_pre_hook(lambda *_: setattr(tracer, "phase", "update"))


def label_optimizer(tracer: Tracer, trainer: Trainer) -> None:
    for runner in trainer.runners:
        for optimizer in runner.optimizers:
            for state in optimizer.state.values():
                for tensor in state.values():
                    if isinstance(tensor, Tensor):
                        tracer.label(tensor, "optimizer")


def trace_prediction(workload: Workload, precision: str = "float32") -> Trace:
    """Trace the prediction of a batch."""
    tracer = Tracer()
    objective: nn.Module = tracer.fake_module(workload.objective).eval()
    for tensor in (*objective.parameters(), *objective.buffers()):
        tracer.label(tensor, "weights")
    tracer.begin_steps()
    with undisturbed(), tracer, torch.inference_mode():
        inputs = {k: t for k, t in workload.batch.items() if k not in workload.labels}
        batch = make_batch(tracer, inputs, False)
        dtype = next((p.dtype for p in objective.parameters()), torch.float32)
        if dtype != torch.float32:  # the caller passes inputs of the dtype of the weights
            batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}
        with autocast(CPU, precision):
            outputs = workload.predict(objective, batch)
        del outputs, batch
    return tracer.finish()
