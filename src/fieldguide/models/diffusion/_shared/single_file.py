"""Parts of single files of latent diffusion models, which hold all networks of a pipeline with a prefix each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# Part -> prefixes of its tensors: Stable Diffusion 1, then 2, then SDXL, then 3 and FLUX.
PREFIXES = {
    "denoiser": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    "text_2": ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    "text_3": ("text_encoders.t5xxl.transformer.",),
}


def split_single_file(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each part without its prefix.

    Averages of training (`model_ema.`), noise schedules and discriminators (`loss.`) belong to no part. A file of a single network
    has no prefixes, and gives no parts.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for part, prefixes in PREFIXES.items():
        for prefix in prefixes:
            found = {
                name.removeprefix(prefix): tensor
                for name, tensor in state.items()
                if name.startswith(prefix) and not name.startswith(f"{prefix}loss.")
            }
            if found:
                parts[part] = found
    return parts
