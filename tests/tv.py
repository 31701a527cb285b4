"""Import torchvision, and timm which needs it, also where its compiled operators do not fit the torch.

Then `import torchvision` fails because it describes operators that nobody defined; defining their signatures
is enough for the networks, which do not call them.
"""

from __future__ import annotations

import sys
import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # third-party import-time warnings are none of ours
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

    import timm
    import transformers


def __getattr__(name: str):
    """Import `smp` and `diffusers`, which also need torchvision, on first use."""
    if name not in ("smp", "diffusers"):
        raise AttributeError(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "smp":
            import segmentation_models_pytorch.decoders.unet.decoder

            return segmentation_models_pytorch
        import diffusers

        return diffusers


__all__ = ["timm", "torchvision", "transformers"]
