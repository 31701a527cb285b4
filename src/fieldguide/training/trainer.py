"""The training loop, for any objective, any number of phases, and one or several processes.

It handles gradient accumulation and clipping, precision, weight averaging, schedules, logging, checkpoints and early
stopping, and is independent of tasks and architectures. A resumed run gives bit-identical results.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fieldguide.core import distributed
from fieldguide.core.errors import TrainingError
from fieldguide.core.files import report_write_errors, sync, write_atomically
from fieldguide.core.hardware import keep_memory
from fieldguide.core.settings import Settings
from fieldguide.data.loader import Batches, iterate_training_batches, mix_seeds
from fieldguide.objectives.base import Objective
from fieldguide.training import checkpoint
from fieldguide.training.ema import ExponentialMovingAverage
from fieldguide.training.peft import get_frozen_modules
from fieldguide.training.phases import PhaseRunner, require_grad_only
from fieldguide.training.precision import autocast, deterministic_kernels, move_batch, to_channels_last, use_threads
from fieldguide.training.row_adagrad import clip_gradients
from fieldguide.training.state import Callback, Interrupted, State
from fieldguide.training.torch_errors import build_lost_worker_error, explain_errors
from fieldguide.training.tracking import Tracker, open_tracker

MAX_LOG_LINES = 400  # approximate number of loss lines that a run writes to metrics.jsonl
MAX_TIME_OVERRUN = 1.01  # training stops after this factor times its time limit
MAX_BATCH_CHANGE_STEP = 80  # last step at which batches may be enlarged
PACE_CHECK_STEPS = 20  # steps before the time of a step is first measured; then after twice as many steps, and so on
TARGET_TIME_FRACTION = 0.97  # fraction of its time limit that training should use
MIN_REPLAN_CHANGE = 0.1  # relative change of the remaining steps below which the plan is kept
FINAL_CHECKS = (0.75, 0.92)  # of the steps, when their number is reconsidered, so that training ends in time
MIN_FINAL_CHECK_STEPS = 60  # fewer steps are not reconsidered near the end
MIN_FINAL_CHANGE = 0.03  # relative change of the remaining steps below which the plan is kept near the end
MIN_REPORTED_CHANGE = 0.3  # relative change of the remaining steps above which it is logged


class Trainer:
    """Trains an objective.

    Args:
        settings: resolved settings: steps, batch_size, eval_steps, precision and channels_last must not be None.
        folder: the run folder; None saves nothing.
        evaluate: `evaluate(objective)` returns scores. It is called every `settings.eval_steps` steps, with the averaged
            weights in place.
        metric: (name, "max" | "min") of the score that selects the best weights.
        max_steps: if above 0, the steps follow from the minutes: they are replanned during training, up to this number,
            if steps turn out faster or slower than expected.
        time_limit: seconds of training, over all sessions; 0 for no limit, None for the minutes of the settings.
        batch_limit: (examples, steps): batches may be enlarged up to `examples` if steps turn out so fast that at least
            `steps` of them still fit into the time.
    """

    def __init__(
        self,
        objective: Objective,
        batches: Batches,
        settings: Settings,
        *,
        device: torch.device,
        callback: Callback,
        folder: Path | None = None,
        evaluate: Callable[[Objective], dict[str, float]] | None = None,
        metric: tuple[str, str] = ("loss", "min"),
        max_steps: int = 0,
        time_limit: float | None = None,
        batch_limit: tuple[int, int] = (0, 0),
    ):
        self.time_limit = 60 * settings.minutes if time_limit is None else time_limit
        self.batch_limit = batch_limit
        self.settings, self.device, self.callback, self.folder = settings, device, callback, folder
        self.evaluate, self.metric, self.batches = evaluate, metric, batches
        self.objective = objective.to(device)
        if settings.channels_last:
            self.objective = to_channels_last(self.objective)
        self.runners = [PhaseRunner(self.objective, phase, settings, device) for phase in objective.phases]
        self.batches_per_step = max(phase.times for phase in objective.phases)
        self.kept = nn.ModuleDict({name: getattr(self.objective, name) for name in objective.keep})
        self.average = ExponentialMovingAverage(self.kept, settings.ema) if settings.ema else None
        self.state = State(most=max_steps)
        self.best: dict[str, Tensor] | None = None  # the best weights so far
        self.tracker: Tracker | None = None
        self.stopping = False
        self.unwritten: list[dict[str, Any]] = []  # lines of the log while there is no run folder
        self.frozen_modules = get_frozen_modules(self.objective)
        self.pace_start = (0, 0.0)  # step and seconds that the pace is counted from

    def train(self, pause_at: float | None = None) -> State:
        """Train to the last step or until early stopping, and load the best weights into the objective.

        With `pause_at`, training pauses after that many seconds, with a validation score and without loading the best weights;
        a further call continues as if there had been no pause.

        Raises:
            Interrupted: on Ctrl-C, SIGTERM or SIGHUP.
            TrainingError: on a non-finite loss, or if the disk is full. The progress so far is saved in each case.
        """
        settings, state = self.settings, self.state
        if self.device.type == "cpu":
            keep_memory()
        stream = self.make_batch_stream()
        if self.folder and distributed.rank() == 0:
            self.tracker = open_tracker(settings, self.folder, state.step, self.callback.log)
        self.set_train_mode()
        before, saved = state.seconds, time.monotonic()
        started = time.monotonic()
        self.pace_start = (state.step, state.seconds)
        kernels = deterministic_kernels(settings.deterministic)
        with self.handle_signals(), kernels, use_threads(settings.threads), explain_errors():
            while state.step < self.settings.resolved_steps and not state.stopped:
                losses = self.train_step(stream)
                state.step += 1
                state.seconds = before + time.monotonic() - started
                self.log_losses(losses)
                scored = self.evaluate and (
                    state.step % self.settings.resolved_eval_steps == 0 or state.step == self.settings.steps
                )
                if scored:
                    self.evaluate_and_keep_best()
                    state.seconds = before + time.monotonic() - started
                if state.most and self.time_limit and self.is_pace_check() and self.replan_steps():
                    stream = self.make_batch_stream()
                if self.is_true_anywhere(self.stopping):
                    self.save_and_stop()
                if pause_at is not None and state.seconds >= pause_at:
                    if self.evaluate and not scored:
                        self.evaluate_and_keep_best()
                        state.seconds = before + time.monotonic() - started
                    return state
                if (
                    self.time_limit
                    and self.is_true_anywhere(state.seconds > MAX_TIME_OVERRUN * self.time_limit)
                    and not state.stopped
                ):
                    state.repeatable = False
                    state.stopped = f"the time limit of {self.time_limit:.0f} s for training was reached"
                    if self.evaluate and not scored:
                        self.evaluate_and_keep_best()
                if time.monotonic() - saved > settings.checkpoint_seconds:
                    self.save()
                    saved = time.monotonic()
        self.save()
        self.use_best_weights()
        return state

    def limit_time(self, seconds: float) -> None:
        """Change the time limit of training, and plan the steps for it if they follow from the time."""
        self.time_limit = seconds
        if self.state.most and seconds:
            self.replan_steps()

    def start_from_scored(self, score: float) -> None:
        """Take the present weights as the best so far, with this score; training continues from them."""
        self.state.best, self.state.best_step = score, 0
        self.best = {k: t.detach().clone() for k, t in self.kept.state_dict().items()}

    def attach(self, folder: Path) -> None:
        """Use a run folder from now on, and write the log so far to it."""
        self.folder, lines = folder, self.unwritten
        self.unwritten = []
        for line in lines:
            self.log_metrics(line)

    def finish(self) -> State:
        """End training at the present step, and load the best weights so far into the objective.

        If the weights were never evaluated, they are now.
        """
        state = self.state
        if state.step < self.settings.resolved_steps and not state.stopped:
            state.repeatable = False
            state.stopped = f"finished on request after step {state.step:,} of {self.settings.resolved_steps:,}"
        if self.evaluate and self.best is None:
            reason = state.stopped
            with deterministic_kernels(self.settings.deterministic), explain_errors():
                self.evaluate_and_keep_best()
            state.stopped = reason
        self.save()
        self.use_best_weights()
        return state

    def use_best_weights(self) -> None:
        """Load the best weights into the objective, or the averaged ones if none were evaluated, for prediction."""
        if self.best is not None:
            self.kept.load_state_dict(self.best)
        elif self.average:
            self.average.swap_parameters()
        self.objective.eval()

    def save_and_stop(self) -> None:
        """Save the state and raise `Interrupted`."""
        self.save()
        saved = (
            f"the state is saved. Continue with `fieldguide fit --resume {self.folder}`. `fieldguide predict {self.folder}` uses "
            f"the best weights so far, and `fieldguide fit --finish {self.folder}` tests them."
        )
        raise Interrupted(
            f"stopped after step {self.state.step} of {self.settings.steps}; {saved if self.folder else 'nothing is saved.'}"
        )

    def set_train_mode(self) -> None:
        """Put the trainable modules in training mode."""
        self.objective.train()
        for module in self.frozen_modules:
            module.train(False)

    def make_batch_stream(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Return the batches of this process, from the next step to the last."""
        settings, world, rank = self.settings, distributed.get_world_size(), distributed.rank()
        return iterate_training_batches(
            self.batches,
            batch=settings.resolved_batch_size,
            parts=world * settings.grad_accum_steps,
            mine=range(rank * settings.grad_accum_steps, (rank + 1) * settings.grad_accum_steps),
            seed=settings.seed,
            start=self.state.step * self.batches_per_step,
            stop=settings.resolved_steps * self.batches_per_step,
            workers=settings.num_workers,
            pin=self.device.type == "cuda",
        )

    def replan_steps(self) -> bool:
        """Recompute the number of steps, so that the learning-rate schedule ends when the minutes are used up.

        Return whether the number changed. The time of a step is the mean over all steps of this process, including
        evaluations. It is measured each time the number of steps has doubled, so that a short load on the machine has
        little effect.
        """
        settings, state = self.settings, self.state
        if state.step < PACE_CHECK_STEPS:
            self.pace_start = (state.step, state.seconds)  # the first steps include the preparation of kernels
            return False
        steps, seconds = state.step - self.pace_start[0], state.seconds - self.pace_start[1]
        if steps <= 0:  # training has just begun again
            return False
        goal = (0.9 if self.evaluate and state.best is None else 1.0) * (TARGET_TIME_FRACTION * self.time_limit - state.seconds)
        possible = max(1, int(goal * steps / max(seconds, 1e-9)))
        goal, possible = distributed.broadcast((goal, possible))  # clocks differ between processes, but the plan must not
        factor = self.find_batch_factor(possible)
        if factor > 1:
            state.batch, state.most = factor * settings.resolved_batch_size, max(state.step + 1, state.most // factor)
            self.callback.log(
                f"a step takes {seconds / steps:.3g} s, less than expected: {state.batch} examples per step from now on"
            )
        total = min(state.most, state.step + max(1, possible // factor))
        before = settings.resolved_steps
        left, planned = total - state.step, before - state.step
        tolerance = MIN_REPLAN_CHANGE if is_pace_check(state.step) else MIN_FINAL_CHANGE
        changes = abs(left - planned) > tolerance * planned and planned >= MIN_FINAL_CHANGE * before
        if goal <= 0 or not (changes or factor > 1):
            return False
        if abs(left - planned) > MIN_REPORTED_CHANGE * planned:
            self.callback.log(f"a step takes {factor * seconds / steps:.3g} s: {total:,} steps instead of {before:,}")
        state.repeatable = False
        state.steps, state.evaluate = total, max(1, round(settings.resolved_eval_steps * total / before))
        if factor > 1:
            self.pace_start = (state.step, state.seconds)  # steps take longer now
        self.replan()
        return True

    def is_pace_check(self) -> bool:
        """Return whether the number of steps is reconsidered after this step: at its doublings, and twice near the end."""
        steps = self.settings.resolved_steps
        is_final = steps >= MIN_FINAL_CHECK_STEPS and self.state.step in [int(part * steps) for part in FINAL_CHECKS]
        return is_final or is_pace_check(self.state.step)

    def find_batch_factor(self, possible: int) -> int:
        """Return the power of two by which batches can grow, if `possible` more steps of the present size fit into the time."""
        (largest, enough), factor = self.batch_limit, 1
        while (
            2 * factor * self.settings.resolved_batch_size <= largest
            and possible // (2 * factor) >= enough
            and self.state.step <= MAX_BATCH_CHANGE_STEP
        ):
            factor *= 2
        return factor

    def replan(self) -> None:
        """Apply the replanned steps to the settings, and thereby to the schedules."""
        state = self.state
        planned = (("steps", state.steps), ("eval_steps", state.evaluate), ("batch_size", state.batch))
        if counts := {name: count for name, count in planned if count}:
            self.settings = self.settings.with_(counts)
            for runner in self.runners:
                runner.settings = runner.settings.with_(counts)
            self.callback.on_replan(self.settings.resolved_steps)

    def train_step(self, stream: Iterator[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
        """Run one training step: each phase as often as its `times`. Return the losses by name."""
        settings = self.settings
        losses: dict[str, float] = {}
        seed_generators(mix_seeds(settings.seed, self.state.step, distributed.rank()), self.device)  # dropout and noise
        batches = self.load_batches(stream)
        self.objective.progress = self.state.step / settings.resolved_steps
        for runner in self.runners:
            for turn in range(runner.phase.times):
                scope = require_grad_only(runner.parameters, self.objective) if len(self.runners) > 1 else nullcontext()
                with scope:
                    parts = self.compute_gradients(runner, batches[turn])
                    self.apply_gradients(runner, batches[turn], parts)
            prefix = f"{runner.phase.name}." if len(self.runners) > 1 else ""
            losses |= {prefix + name: value for name, value in parts.items()} | {prefix + "lr": runner.lr}
        if self.average:
            self.average.update(self.state.step)
        return losses

    def load_batches(self, stream: Iterator[tuple[int, dict[str, Tensor]]]) -> list[list[dict[str, Tensor]]]:
        """Return the batches of a step: for each turn of a phase, those that are accumulated.

        Raises `Interrupted` if the signal that stops the run has also stopped its workers.
        """
        settings = self.settings
        try:
            return [
                [
                    move_batch(next(stream)[1], self.device, bool(settings.channels_last))
                    for _ in range(settings.grad_accum_steps)
                ]
                for _ in range(self.batches_per_step)
            ]
        except (RuntimeError, OSError, EOFError) as error:
            if self.stopping:  # no weight has changed in this step
                self.save_and_stop()
            if isinstance(error, ConnectionError | EOFError):
                raise build_lost_worker_error() from error
            raise

    def compute_gradients(self, runner: PhaseRunner, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Compute the gradients of the mean loss over accumulated batches and processes. Return the losses."""
        totals: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            module, accumulates = runner.module, number < len(batches) - 1
            with module.no_sync() if accumulates and isinstance(module, DistributedDataParallel) else nullcontext():
                with autocast(self.device, self.settings.precision):
                    parts = module(batch)
                (parts["loss"] / len(batches)).backward()
            for name, value in parts.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / len(batches)
        stacked = torch.stack(list(totals.values()))
        if distributed.get_world_size() > 1:
            dist.all_reduce(stacked)
            stacked /= distributed.get_world_size()
        return dict(zip(totals, stacked.tolist()))

    def apply_gradients(self, runner: PhaseRunner, batches: list[dict[str, Tensor]], parts: dict[str, float]) -> None:
        """Clip and apply the gradients. Raises `TrainingError` before the update if the loss or their norm is not finite."""
        runner.lr = runner.set_lr(self.state.step)
        runner.mask_frozen_grads(self.state.step)
        norm = None
        if self.settings.grad_clip:
            norm = float(clip_gradients(runner.parameters, self.settings.grad_clip))
        if not math.isfinite(parts["loss"]) or (norm is not None and not math.isfinite(norm)):
            self.raise_nonfinite(runner, batches, parts, norm)
        for optimizer in runner.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.objective.after_step(runner.phase.name)

    def raise_nonfinite(
        self, runner: PhaseRunner, batches: list[dict[str, Tensor]], parts: dict[str, float], norm: float | None
    ) -> None:
        """Save the batch and the state, and raise `TrainingError` for a non-finite loss or gradient norm."""
        for optimizer in runner.optimizers:
            optimizer.zero_grad(set_to_none=True)
        name = f"nonfinite-step-{self.state.step}-rank-{distributed.rank()}.safetensors"
        bad = sorted({key for b in batches for key, t in b.items() if t.is_floating_point() and not t.isfinite().all()})
        cause = (
            f"The batch contains NaN or infinity in {', '.join(bad)}"
            if bad
            else "The batch is finite, so the cause is the weights or the learning rate: try a lower lr (--set lr=...), "
            "grad_clip=1 or precision=float32"
        )
        saved = ""
        if self.folder:
            from safetensors.torch import save as pack

            batch = checkpoint.copy_to_cpu({f"{i}.{k}": t for i, b in enumerate(batches) for k, t in b.items()})
            write_atomically(self.folder / name, pack(batch))
            saved = f" The batch is saved in {self.folder / name}, the state before it in {self.folder / 'checkpoints'}."
            self.save()
        what = f"loss {parts['loss']}" if not math.isfinite(parts["loss"]) else f"gradient norm {norm}"
        raise TrainingError(f"{what} at step {self.state.step}, phase {runner.phase.name}. {cause}.{saved}")

    def evaluate_and_keep_best(self) -> None:
        """Evaluate the averaged weights, keep the best ones and apply early stopping."""
        assert self.evaluate is not None
        state, (name, direction) = self.state, self.metric
        self.objective.eval()
        with self.average.average_parameters() if self.average else nullcontext():
            with torch.inference_mode():
                scores = self.evaluate(self.objective)
            value = scores[name]
            better = math.isfinite(value) and (
                state.best is None or (value > state.best if direction == "max" else value < state.best)
            )
            state.stale = 0 if better else state.stale + 1
            # Accuracy on few rows often ties, especially at its maximum; then the later weights are preferred.
            if better or value == state.best:
                state.best, state.best_step = value, state.step
                self.best = {k: t.detach().clone() for k, t in self.kept.state_dict().items()}
        self.set_train_mode()
        self.log_metrics({"step": state.step, "seconds": round(state.seconds, 3), "scores": scores})
        self.callback.on_evaluate(state.step, scores, better)
        if self.settings.patience and state.stale >= self.settings.patience:
            state.stopped = (
                f"{name} has not improved in {state.stale} evaluations; the weights of step {state.best_step} are kept"
            )

    def log_losses(self, losses: dict[str, float]) -> None:
        """Accumulate the losses of a step, and write their means from time to time."""
        state = self.state
        for name, value in losses.items():
            state.sums[name] = state.sums.get(name, 0.0) + value
        state.summed += 1
        self.callback.on_step(state.step, losses)
        if state.step % max(1, self.settings.resolved_steps // MAX_LOG_LINES) == 0 or state.step == self.settings.steps:
            means = {name: total / state.summed for name, total in state.sums.items()}
            self.log_metrics({"step": state.step, "seconds": round(state.seconds, 3), **means})
            state.sums, state.summed = {}, 0

    def log_metrics(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and to the tracker. Raises `WriteError` if writing fails."""
        if self.tracker:
            self.tracker.log_metrics(line)
        if self.folder is None:
            self.unwritten.append(line)
        elif distributed.rank() == 0:
            path = self.folder / "metrics.jsonl"
            with report_write_errors(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Stop after the current step and save on Ctrl-C, SIGTERM or SIGHUP; stop immediately on a further Ctrl-C.

        A signal that is ignored stays so: `nohup` ignores SIGHUP.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self.stopping and number == signal.SIGINT:
                raise KeyboardInterrupt
            if not self.stopping:
                self.stopping = True
                again = "; press Ctrl-C again to stop immediately" if number == signal.SIGINT else ""
                self.callback.log(f"stopping after this step{again}")

        handled = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
        before = {s: signal.signal(s, stop) for s in handled if signal.getsignal(s) != signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def is_true_anywhere(self, flag: bool) -> bool:
        """Return True in all processes if `flag` is True in any."""
        if distributed.get_world_size() == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor)
        return bool(tensor > 0)

    def save(self) -> None:
        """Save a checkpoint in the run folder."""
        if not self.folder or distributed.rank() != 0:
            return
        log = self.folder / "metrics.jsonl"
        if log.exists():
            with report_write_errors(log):
                sync(log)  # it must not end before the checkpoint
        tensors = {f"objective.{k}": t for k, t in self.objective.state_dict().items()}
        numbers: dict[str, Any] = {}
        for r, runner in enumerate(self.runners):
            for o, optimizer in enumerate(runner.optimizers):
                packed, plain = checkpoint.pack_optimizer(optimizer, f"optimizer.{r}.{o}")
                tensors |= packed
                numbers |= plain
        if self.average:
            tensors |= {f"average.{k}": t for k, t in self.average.state_dict().items()}
        if self.best is not None:
            tensors |= {f"best.{k}": t for k, t in self.best.items()}
        checkpoint.save(
            self.folder / "checkpoints", self.state.step, tensors, {"state": vars(self.state).copy(), "optimizers": numbers}
        )

    def resume(self) -> bool:
        """Load the newest intact checkpoint of the run folder. Return False if there is none."""
        assert self.folder is not None, "a trainer without a run folder saves nothing to resume from"
        found = checkpoint.load(self.folder / "checkpoints", self.callback.log)
        if found is None:
            if distributed.rank() == 0:
                (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            return False
        step, tensors, record = found
        part = lambda prefix: {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}
        self.objective.load_state_dict(part("objective."))
        for r, runner in enumerate(self.runners):
            for o, optimizer in enumerate(runner.optimizers):
                checkpoint.unpack_optimizer(optimizer, f"optimizer.{r}.{o}", tensors, record["optimizers"])
        if self.average:
            self.average.load_state_dict(part("average."))
        self.best = {k: t.to(self.device) for k, t in part("best.").items()} or None
        self.state = State(**record["state"])
        self.replan()
        if distributed.rank() == 0:
            truncate_log(self.folder / "metrics.jsonl", step)
        return True


def load_best_weights(kept: nn.ModuleDict, tensors: dict[str, Tensor], settings: Settings) -> bool:
    """Load the best weights of a checkpoint into networks, the averaged or last ones if none were scored yet.

    Return whether they were scored.

    Args:
        kept: the networks of the objective that are stored, by name.
        tensors: the tensors of a checkpoint.
    """
    part = lambda prefix: {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}
    if best := part("best."):
        kept.load_state_dict(best)
        return True
    own = kept.state_dict().keys()
    kept.load_state_dict({name: tensor for name, tensor in part("objective.").items() if name in own})
    if settings.ema:
        average = ExponentialMovingAverage(kept, settings.ema)
        average.load_state_dict(part("average."))
        average.swap_parameters()
    return False


def is_pace_check(step: int) -> bool:
    """Return whether the time of a step is measured after this step: at 3, `PACE_CHECK_STEPS` and its doublings."""
    return step == 3 or (step % PACE_CHECK_STEPS == 0 and (step // PACE_CHECK_STEPS).bit_count() == 1)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the CPU and this device.

    `torch.manual_seed` would also queue a call, with its stack, for each missing kind of device, which costs a millisecond
    per step and growing memory.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def truncate_log(path: Path, step: int) -> None:
    """Drop log lines after the checkpoint from which the run resumes, and a line truncated by a crash."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line)
        except ValueError:
            pass
    write_atomically(path, "".join(line + "\n" for line in lines).encode())
