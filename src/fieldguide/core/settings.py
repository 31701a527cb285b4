"""Training settings with their defaults and meanings. None means: chosen from data and machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fieldguide.core.errors import SettingsError, nearest
from fieldguide.core.hardware import cores
from fieldguide.core.options import option_types, parse_value, rename_aliases


@dataclass(frozen=True)
class Settings:
    steps: int | None = None  # number of optimizer steps
    epochs: float | None = None  # passes over the training rows, if `steps` is not set
    minutes: float = 10.0  # time for everything, from reading the data to the report; 0 = no limit
    batch_size: int | None = None  # examples per optimizer step, over all processes and accumulation steps
    grad_accum_steps: int = 1  # micro-batches per optimizer step, to save memory
    optimizer: str = "adamw"  # adamw | sgd | muon
    embedding_optimizer: str = (
        "same"  # same | adagrad: sparse gradients and row-wise Adagrad for tables that are only looked up, for millions of rows
    )
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.01  # applied to matrices and kernels, never to biases, norms and embeddings
    momentum: float = 0.9  # momentum of sgd and muon
    beta1: float = 0.9  # beta1 of adamw; 0.5 is usual for GANs
    beta2: float = 0.999  # beta2 of adamw
    warmup: float = 0.05  # fraction of the steps with a rising learning rate
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    grad_clip: float = 1.0  # maximum norm of the gradient; 0 = no clipping
    ema: float = 0.0  # decay of the exponential moving average of the weights; 0 = off
    label_smoothing: float = 0.0  # label smoothing
    mixup: float = 0.0  # alpha of the Beta distribution of mixup; 0 = off
    augmentation: str = "none"  # none | light | standard; each task defines its own
    class_weights: bool = False  # weight classes by inverse frequency
    patience: int = 20  # evaluations without improvement before training stops; 0 = never
    eval_steps: int | None = None  # steps between evaluations
    checkpoint_seconds: float = 60.0  # seconds between checkpoints
    finetune: str = "whole"  # whole | frozen | lora: which part of a pretrained network is trained
    keep_frozen: bool = (
        True  # finetune=whole: leave out parts that are frozen as published, such as the convolutions of Wav2Vec 2.0
    )
    lora_rank: int = 8  # rank of the LoRA update of each matrix
    lora_scale: float = 2.0  # factor of the LoRA update (alpha / rank)
    layer_decay: float = 1.0  # learning rate of each layer relative to the next layer towards the output
    unfreeze_fraction: float = 0.0  # fraction of the steps over which layers are unfrozen, from the output down
    gradient_checkpointing: bool = False  # recompute activations in the backward pass, to save memory
    teacher: str | None = None  # run folder of the teacher for distillation
    distillation: str = "hard"  # hard | soft: learn the teacher's predicted class or its probabilities
    loss: str | None = (
        None  # GANs: non-saturating | hinge | wasserstein | relativistic | least-squares; None = as published with the model
    )
    penalty: str = "none"  # GANs: none | gp (WGAN-GP) | r1 | r1r2: gradient penalty of the critic
    penalty_weight: float | None = None  # factor of the penalty; None = as published: gp 10, r1 10 (halved), r1r2 1 (halved)
    penalty_interval: int = (
        1  # GANs: steps of the critic from one penalty to the next, which counts as often more (lazy regularization)
    )
    path_length_weight: float = 0.0  # GANs with styles: factor of the path-length regularization, 2 for StyleGAN 2; 0 = none
    path_length_interval: int = (
        4  # GANs with styles: steps from one path-length regularization to the next, which counts as often more
    )
    style_mixing: float = 0.0  # GANs with styles: probability that the styles of a training image come from two noises
    augment_critic: str = "none"  # GANs: none | ada: augment all images that the critic sees, as often as its overfitting needs
    ada_target: float = 0.6  # GANs with ada: mean sign of the critic's scores of training images above which more is augmented
    ada_images: int = (
        500_000  # GANs with ada: images after which the probability of each augmentation can have risen from 0 to 1
    )
    critic_steps: int = 1  # GANs: steps of the critic per step of the generator, each with its own batch
    weight_clip: float = 0.0  # GANs: largest absolute value of the critic's parameters, 0.01 for WGAN; 0 = no clipping
    precision: str = "auto"  # auto | float32 | bfloat16
    channels_last: bool | None = None  # memory layout of images
    metric: str | None = None  # score that selects the best weights and the model; None = chosen from task and data
    subgroup: str | None = None  # column whose groups of test rows get scores of their own in the report
    num_workers: int = 0  # processes that prepare batches
    tracker: str = "none"  # none | tensorboard | mlflow | wandb, in addition to metrics.jsonl
    seed: int = 0  # seed of splits, initial weights, order, augmentation and dropout
    refit: bool = False  # train again on training and validation rows together at the end, with what was chosen before
    deterministic: bool = False  # give the same result again on this machine: nothing depends on measured time
    threads: int | None = None  # CPU threads; None = as many as torch chooses

    def with_(self, changes: Mapping[str, Any]) -> Settings:
        """Return these settings with changes applied; values may be text. Raises `SettingsError` for unknown keys
        and values.
        """
        return replace(self, **{key: parse(key, value) for key, value in canonical(changes).items()})

    @property
    def resolved_batch_size(self) -> int:
        """The batch size after planning, when it is always set."""
        assert self.batch_size is not None
        return self.batch_size

    @property
    def resolved_steps(self) -> int:
        """The number of steps after planning, when it is always set."""
        assert self.steps is not None
        return self.steps

    @property
    def resolved_eval_steps(self) -> int:
        """The steps between evaluations after planning, when they are always set."""
        assert self.eval_steps is not None
        return self.eval_steps

    def override(self, requested: Mapping[str, Any]) -> Settings:
        """Return a recipe with the user's settings applied.

        The recipe's learning rate belongs to its optimizer: another optimizer brings its own, unless the user
        sets a rate too.
        """
        requested = canonical(requested)
        other = "lr" not in requested and requested.get("optimizer", self.optimizer) != self.optimizer
        return self.with_({"lr": RATE_BY_OPTIMIZER.get(requested["optimizer"], self.lr), **requested} if other else requested)

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
    "num_threads": "threads",
    "lora_r": "lora_rank",
}

RATE_BY_OPTIMIZER = {"adamw": 1e-3, "sgd": 0.05, "muon": 4e-3}  # by optimizer, where a recipe's rate is for another one
CHOICES = {
    "optimizer": ("adamw", "sgd", "muon"),
    "embedding_optimizer": ("same", "adagrad"),
    "schedule": ("cosine", "linear", "constant"),
    "precision": ("auto", "float32", "bfloat16"),
    "augmentation": ("none", "light", "standard"),
    "tracker": ("none", "tensorboard", "mlflow", "wandb"),
    "finetune": ("whole", "frozen", "lora"),
    "distillation": ("hard", "soft"),
    "loss": ("non-saturating", "hinge", "wasserstein", "relativistic", "least-squares"),
    "penalty": ("none", "gp", "r1", "r1r2"),
    "augment_critic": ("none", "ada"),
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
    "penalty_weight": 0,
    "penalty_interval": 1,
    "path_length_weight": 0,
    "path_length_interval": 1,
    "style_mixing": 0,
    "ada_target": -1,
    "ada_images": 1,
    "critic_steps": 1,
    "weight_clip": 0,
    "threads": 1,
}
WORKERS_PER_CORE = 4  # more only take memory and time to start
AT_MOST: dict[str, tuple[float, str]] = {  # the limit and its reason
    "steps": (10**9, "more would take years"),
    "epochs": (10**6, "more would take years"),
    "minutes": (10**6, "that is two years; 0 sets no limit"),
    "batch_size": (10**7, "a batch must fit into memory"),
    "grad_accum_steps": (10**5, "a step would never end"),
    "num_workers": (max(16, WORKERS_PER_CORE * cores()), f"this machine has {cores()} cores, and each worker is a process"),
    "threads": (max(64, WORKERS_PER_CORE * cores()), f"this machine has {cores()} cores"),
    "style_mixing": (1, "it is a probability"),
    "ada_target": (1, "a mean of signs is not larger"),
    "critic_steps": (1000, "the generator would hardly be trained"),
    "lora_rank": (10**4, "a rank above the width of the matrices has no effect"),
    "seed": (2**62, "the generators hold no larger number"),
}
BELOW = {
    "ema": 1,
    "label_smoothing": 1,
    "momentum": 1,
    "beta1": 1,
    "beta2": 1,
    "warmup": 1,
    "unfreeze_fraction": 1,
}  # in [0, 1)


def canonical(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings under their own names. Raises `SettingsError` if one setting is given under two names."""
    return rename_aliases(changes, ALIASES)


def parse(key: str, value: Any) -> Any:
    """Return the value of a setting, parsed if it is text. Raises `SettingsError` naming the key."""
    known = {f.name for f in fields(Settings)}
    if key not in known:
        raise SettingsError(
            f"there is no setting {key!r}.{nearest(key, (*known, *ALIASES))} `fieldguide settings` lists them all. Fields of a "
            "model are written model.FIELD, options of a task task.OPTION, types of columns column.NAME."
        )
    value = parse_value(f"setting {key}", value, option_types(Settings)[key])
    if value is None:
        return None
    if key in CHOICES and value not in CHOICES[key]:
        raise SettingsError(f"setting {key}={value!r} is none of {', '.join(CHOICES[key])}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"setting {key}={value!r} must be a finite number.")
    if key in AT_LEAST and value < AT_LEAST[key]:
        raise SettingsError(f"setting {key}={value!r} must be at least {AT_LEAST[key]}.")
    if key in AT_MOST and value > AT_MOST[key][0]:
        raise SettingsError(f"setting {key}={value!r} must be at most {AT_MOST[key][0]:,}: {AT_MOST[key][1]}.")
    if key in BELOW and not 0 <= value < BELOW[key]:
        raise SettingsError(f"setting {key}={value!r} must be in [0, 1).")
    return value
