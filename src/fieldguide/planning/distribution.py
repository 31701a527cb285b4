"""Memory and time of several devices: replicated weights (DDP), sharded state (FSDP), or split layers (tensor parallelism)."""

from __future__ import annotations

from dataclasses import dataclass

from fieldguide.core.errors import SettingsError

STRATEGIES = ("ddp", "fsdp", "tensor")
BUCKET_BYTES = 25 << 20  # of a gradient bucket of DistributedDataParallel; the first one has 1 MiB
FSDP_UNITS = 12  # blocks that are gathered one after the other, if nothing is known about the network
LINK_BYTES_PER_SECOND = 50e9  # between devices (assumed: PCIe 5 or a slow NVLink share)


@dataclass(frozen=True)
class Sharing:
    """How devices share a run. Raises `SettingsError` for an unknown strategy."""

    devices: int = 1
    strategy: str = "ddp"
    units: int = FSDP_UNITS  # blocks of the network

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise SettingsError(f"strategy={self.strategy!r} is none of {', '.join(STRATEGIES)}.")

    def count_seconds(self, weights: int) -> float:
        """Return the seconds of communication of a step: a ring passes 2 (N - 1) / N of the gradients, and FSDP also gathers
        the weights for the forward and the backward pass (Rajbhandari et al. 2019, arXiv:1910.02054, section 7)."""
        if self.devices == 1:
            return 0.0
        passes = 2 if self.strategy == "ddp" else 3
        return passes * (self.devices - 1) / self.devices * weights / LINK_BYTES_PER_SECOND


def share_parts(parts: dict[str, int], sharing: Sharing) -> dict[str, int]:
    """Return the bytes by part on one of several devices.

    DDP replicates everything, and keeps gradients a second time in buckets, which replace them (`gradient_as_bucket_view` is off
    in the training loop). FSDP shards weights, gradients, the optimizer's state and averages; two blocks of whole weights and one
    of whole gradients exist at a time (arXiv:1910.02054, stage 3). Tensor parallelism, for serving, splits the matrices and the
    heads of each layer (Shoeybi et al. 2019, arXiv:1909.08053).
    """
    if sharing.devices == 1:
        return {**parts, "communication": 0}
    shared = dict(parts)
    if sharing.strategy == "ddp":
        return {**shared, "communication": max(parts["weights"], 0)}
    split = ("weights", "cache") if sharing.strategy == "tensor" else ("weights", "gradients", "optimizer", "average", "best")
    for name in split:
        shared[name] = -(-parts.get(name, 0) // sharing.devices)
    if sharing.strategy == "tensor":
        return {**shared, "communication": 0}
    shared["communication"] = 3 * -(-parts["weights"] // sharing.units)
    return shared
