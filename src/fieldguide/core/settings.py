"""Training settings with their defaults and meanings. None means: chosen from data and machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

from fieldguide.core.errors import SettingsError, nearest


@dataclass(frozen=True)
class Settings:
    steps: int | None = None  # optimiser steps in all
    epochs: float | None = None  # passes over the training part, where `steps` is not given
    minutes: float = 10.0  # training time, which ends a run that turns out slower; 0 = no limit
    batch_size: int | None = None  # examples a step, over all processes and accumulations
    grad_accum_steps: int = 1  # parts that a batch is worked through in, to save memory
    optimizer: str = "adamw"  # adamw | sgd | muon
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.01  # on matrices and kernels; never on biases, norms, embeddings
    momentum: float = 0.9  # of sgd and muon
    beta1: float = 0.9  # of adamw; 0.5 for GANs, whose aims move
    beta2: float = 0.999  # of adamw
    warmup: float = 0.05  # part of the steps over which the rate rises
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    ema: float = 0.0  # decay of the running average of weights that is kept; 0 = off
    label_smoothing: float = 0.0  # label smoothing
    mixup: float = 0.0  # Beta(a, a) of mixed pairs; 0 = off
    augmentation: str = "none"  # none | light | standard, in the task's own meaning
    class_weights: bool = False  # weigh classes by inverse frequency
    patience: int = 20  # evaluations without a better score before stopping; 0 = never
    eval_steps: int | None = None  # steps between evaluations
    checkpoint_seconds: float = 60.0  # seconds between checkpoints
    finetune: str = "whole"  # whole | frozen | lora: what of a pretrained network learns
    lora_rank: int = 8  # of the change of each matrix
    lora_scale: float = 2.0  # times which it is added
    layer_decay: float = 1.0  # rate of each layer as a part of that of the next one up
    unfreeze_fraction: float = 0.0  # part of the steps over which layers begin to learn, from the top down
    gradient_checkpointing: bool = False  # blocks are computed again on the way back, to save memory
    teacher: str | None = None  # run folder of a network whose answers are learnt beside the truth
    distillation: str = "hard"  # hard | soft: the class that the teacher names, or its probabilities
    precision: str = "auto"  # auto | float32 | bfloat16
    channels_last: bool | None = None  # memory layout of pictures
    num_workers: int = 0  # processes that prepare batches
    tracker: str = "none"  # none | tensorboard, beside metrics.jsonl
    seed: int = 0  # of splits, initial weights, order, augmentation and dropout

    def with_(self, changes: Mapping[str, Any]) -> Settings:
        """Return these settings with changes applied; values may be text. Raises `SettingsError` for unknown keys
        and values.
        """
        return replace(self, **{key: parse(key, value) for key, value in canonical(changes).items()})

    def overruled(self, asked: Mapping[str, Any]) -> Settings:
        """Return a recipe with the user's settings applied.

        The recipe's learning rate belongs to its optimizer: another optimizer brings its own, unless the user
        sets a rate too.
        """
        asked = canonical(asked)
        other = "lr" not in asked and asked.get("optimizer", self.optimizer) != self.optimizer
        return self.with_({"lr": RATES.get(asked["optimizer"], self.lr), **asked} if other else asked)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Other names that users know, and those of run folders of schema 1 -> the name of the setting.
ALIASES = {
    "batch": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "learning_rate": "lr",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "accumulate": "grad_accum_steps",
    "gradient_accumulation_steps": "grad_accum_steps",
    "clip": "grad_clip",
    "max_grad_norm": "grad_clip",
    "gradient_clip_val": "grad_clip",
    "smoothing": "label_smoothing",
    "label_smoothing_factor": "label_smoothing",
    "augment": "augmentation",
    "evaluate": "eval_steps",
    "eval_every": "eval_steps",
    "checkpoint": "checkpoint_seconds",
    "tune": "finetune",
    "unfreeze": "unfreeze_fraction",
    "recompute": "gradient_checkpointing",
    "distill": "distillation",
    "workers": "num_workers",
    "track": "tracker",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "optim": "optimizer",
    "early_stopping_patience": "patience",
    "random_state": "seed",
    "lora_r": "lora_rank",
}

RATES = {"adamw": 1e-3, "sgd": 0.05, "muon": 4e-3}  # by optimizer, where a recipe's rate is for another one
CHOICES = {
    "optimizer": ("adamw", "sgd", "muon"),
    "schedule": ("cosine", "linear", "constant"),
    "precision": ("auto", "float32", "bfloat16"),
    "augmentation": ("none", "light", "standard"),
    "tracker": ("none", "tensorboard"),
    "finetune": ("whole", "frozen", "lora"),
    "distillation": ("hard", "soft"),
}
AT_LEAST = {
    "steps": 1,
    "epochs": 0,
    "minutes": 0,
    "batch_size": 1,
    "grad_accum_steps": 1,
    "lr": 0,
    "weight_decay": 0,
    "grad_clip": 0,
    "num_workers": 0,
    "patience": 0,
    "eval_steps": 1,
    "checkpoint_seconds": 0,
    "mixup": 0,
    "seed": 0,
    "lora_rank": 1,
    "layer_decay": 0,
}
BELOW = {
    "ema": 1,
    "label_smoothing": 1,
    "momentum": 1,
    "beta1": 1,
    "beta2": 1,
    "warmup": 1,
    "unfreeze_fraction": 1,
}  # these lie in [0, 1)


def canonical(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings under their own names. Raises `SettingsError` if two names of one setting are given."""
    named: dict[str, Any] = {}
    for key, value in changes.items():
        name = ALIASES.get(key, key)
        if name in named:
            raise SettingsError(f"{key} is another name for {name}, which is set already: give one of them.")
        named[name] = value
    return named


def parse(key: str, value: Any) -> Any:
    """Return the value of a setting, parsed if it is text. Raises `SettingsError` naming the key."""
    known = {f.name for f in fields(Settings)}
    if key not in known:
        raise SettingsError(
            f"there is no setting {key!r}.{nearest(key, (*known, *ALIASES))} `fieldguide settings` lists them all. Fields of a "
            "model are written model.FIELD, options of a task task.OPTION, types of columns column.NAME."
        )
    value = from_text(f"setting {key}", value, get_type_hints(Settings)[key])
    if value is None:
        return None
    if key in CHOICES and value not in CHOICES[key]:
        raise SettingsError(f"setting {key}={value!r} is none of {', '.join(CHOICES[key])}.")
    if key in AT_LEAST and value < AT_LEAST[key]:
        raise SettingsError(f"setting {key}={value!r} must be at least {AT_LEAST[key]}.")
    if key in BELOW and not 0 <= value < BELOW[key]:
        raise SettingsError(f"setting {key}={value!r} must lie in [0, 1).")
    return value


def from_text(label: str, value: Any, kind: Any) -> Any:
    """Return `value` as `kind`, a type or a union with None. Raises `SettingsError` for values of another type."""
    kinds = getattr(kind, "__args__", (kind,))
    if value is None or (isinstance(value, str) and value.lower() in ("none", "auto") and type(None) in kinds):
        return None
    want = next(k for k in kinds if k is not type(None))
    try:
        if want is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if want is int and (number := float(value)) == int(number):
            return int(number)
        if want is float:
            return float(value)
        if want is str:
            return str(value)
    except (ValueError, KeyError, OverflowError):
        pass
    raise SettingsError(f"{label}={value!r} is not {'an integer' if want is int else f'a {want.__name__}'}.")


# Other names of prediction options -> their names.
PREDICT_ALIASES = {
    "tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "beams": "num_beams",
    "penalty": "length_penalty",
    "repetition": "repetition_penalty",
    "guidance_scale": "guidance",
    "num_inference_steps": "steps",
    "num_return_sequences": "count",
    "score_threshold": "threshold",
    "iou_threshold": "overlap",
}


def canonical_predict_options(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return prediction options under their own names; unknown keys stay."""
    return {PREDICT_ALIASES.get(key, key): value for key, value in changes.items()}


def asked_of(who: str, asked: Mapping[str, str], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return command-line options with these types. Raises `SettingsError` for unknown keys and wrong values."""
    asked = canonical_predict_options(asked)
    for key in asked:
        if key not in kinds:
            raise SettingsError(f"{who} has no option {key!r}.{nearest(key, kinds)} It has {', '.join(sorted(kinds))}.")
    return {key: from_text(key, value, kinds[key]) for key, value in asked.items()}
