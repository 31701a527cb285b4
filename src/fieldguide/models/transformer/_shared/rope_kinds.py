"""Kinds of scaled rotary positions, as one tuple in a config: `rope_scaling`.

()                                                          none
(factor, low, high, original)                               Llama 3.1, see `scale_llama3`
("yarn", factor, fast, slow, original, attention, truncate)  YaRN, see `scale_yarn`; cosines and sines are multiplied by `attention`
("linear", factor)                                          all positions divided by a factor (Chen et al. 2023, arXiv:2306.15595)
("dynamic", factor, original)                               a larger base for sequences longer than `original`, which are refused here

"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.models.layers.rope_scaling import get_yarn_factor, scale_llama3, scale_yarn

LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
Scaling = Sequence[float | str]


def check_scaling(scaling: Scaling, length: int) -> None:
    """Raise `SettingsError` for a dynamic scaling with a `length` at which it would depend on the lengths of other rows."""
    if scaling and scaling[0] == "dynamic" and length > float(scaling[2]):
        raise SettingsError(
            f"length={length} is more than the {scaling[2]} tokens of the first training. Longer sequences are not supported with "
            "dynamic scaling of rotary positions."
        )


def scale_frequencies(speed: Tensor, scaling: Scaling, theta: float) -> Tensor:  # d/2 -> d/2
    """Return the scaled rotary frequencies."""
    if not scaling or scaling[0] == "dynamic":
        return speed
    if not isinstance(scaling[0], str):
        factor, low, high, original = map(float, scaling)
        return scale_llama3(speed, factor, low, high, original)
    if scaling[0] == "linear":
        return speed / float(scaling[1])
    factor, fast, slow, original, _, truncate = map(float, scaling[1:])
    return scale_yarn(speed, theta, factor, fast, slow, original, bool(truncate))


def get_attention_factor(scaling: Scaling) -> float:
    """Return what cosines and sines are multiplied by."""
    return float(scaling[5]) if scaling and scaling[0] == "yarn" else 1.0


def read_scaling(rope: Mapping[str, Any], length: int) -> tuple[float | str, ...]:
    """Return the scaling in `rope_parameters` of transformers; `length` is max_position_embeddings.

    Raises `WeightsError` for a kind that is not supported.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return ()
    if kind == "llama3":
        return tuple(float(rope[key]) for key in LLAMA3_KEYS)
    if kind == "linear":
        return ("linear", float(rope["factor"]))
    if kind == "dynamic":
        return ("dynamic", float(rope["factor"]), float(length))
    if kind != "yarn":
        raise WeightsError(
            f"rope_type={kind!r} is not supported. Supported are 'llama3' (the scaling of Llama 3.1), 'yarn', 'linear', 'dynamic' and "
            "'default' (none)."
        )
    original = float(rope.get("original_max_position_embeddings") or length)
    factor = float(rope.get("factor") or length / original)
    attention = rope.get("attention_factor")
    if attention is None:
        scale, every = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = get_yarn_factor(factor)
        if scale and every:
            attention = get_yarn_factor(factor, float(scale)) / get_yarn_factor(factor, float(every))
    fast, slow = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    return ("yarn", factor, fast, slow, original, float(attention), float(rope.get("truncate", True)))


def write_scaling(scaling: Scaling) -> dict[str, Any]:
    """Return `rope_parameters` without rope_theta."""
    if not scaling:
        return {"rope_type": "default"}
    if not isinstance(scaling[0], str):
        values = {key: int(x) if key.startswith("orig") else x for key, x in zip(LLAMA3_KEYS, scaling)}
        return {"rope_type": "llama3", **values}
    if scaling[0] != "yarn":
        return {"rope_type": scaling[0], "factor": scaling[1]}
    _, factor, fast, slow, original, attention, truncate = scaling
    return {
        "rope_type": "yarn",
        "factor": factor,
        "beta_fast": fast,
        "beta_slow": slow,
        "original_max_position_embeddings": int(original),
        "attention_factor": attention,
        "truncate": bool(truncate),
    }
