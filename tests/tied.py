"""Support for peers of transformers with tied tensors, which files store once."""

from __future__ import annotations

from torch import nn


class Tied(nn.Module):
    def tied(self) -> dict[str, str]:
        """Return the names of tied tensors -> the name in files."""
        first, again = {}, {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if (known := first.setdefault(id(tensor), name)) != name:
                again[name] = known
        return again

    def load_state_dict(self, state, strict=True):
        return super().load_state_dict(state | {again: state[name] for again, name in self.tied().items()}, strict)
