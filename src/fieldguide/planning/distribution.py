"""Memory and time of several devices: replicated weights with reduced gradients (DDP), or sharded state (FSDP)."""

from __future__ import annotations

from dataclasses import dataclass

from fieldguide.core.errors import SettingsError

STRATEGIES = ("ddp", "fsdp")
BUCKET_BYTES = 25 << 20  # of a gradient bucket of DistributedDataParallel; the first one has 1 MiB
FSDP_UNITS = 12  # blocks that are gathered one after the other, if nothing is known about the network
LINK_BYTES_PER_SECOND = 50e9  # between devices (assumed: PCIe 5 or a slow NVLink share)


@dataclass(frozen=True)
class Sharing:
    """How devices share a run. Raises `SettingsError` for an unknown strategy."""

    devices: int = 1
    strategy: str = "ddp"

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
    of whole gradients exist at a time (arXiv:1910.02054, stage 3).
    """
    if sharing.devices == 1:
        return {**parts, "communication": 0}
    shared = dict(parts)
    if sharing.strategy == "ddp":
        return {**shared, "communication": max(parts["weights"], 0)}
    for name in ("weights", "gradients", "optimizer", "average", "best"):
        shared[name] = -(-parts.get(name, 0) // sharing.devices)
    shared["communication"] = 3 * -(-parts["weights"] // FSDP_UNITS)
    return shared
