"""Outputs of operations that were traced before: the repeated layers of a network call each with the same arguments.

Torch has a cache of fake operations too, but its keys cost several times the operation. Here, only operations are kept whose
outputs are new tensors, views of their first argument, or their first argument changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

IN_PLACE, NEW, VIEW, NEVER = "in place", "new", "view", "never"
Layout = tuple[Any, ...]  # sizes, strides, dtype and offset of an output
PLAIN = (int, float, bool, str, torch.dtype, torch.device, torch.memory_format, torch.layout)
CPU = torch.device("cpu")
CHANGES_LAYOUT = (
    "resize",
    "set_",
    "as_strided",
    "squeeze_",
    "unsqueeze_",
    "transpose_",
    "swapaxes_",
    "swapdims_",
    "t_",
    "detach_",
)


class OpCache:
    """Layouts of outputs by operation and arguments. A key is None for an operation that is not kept."""

    def __init__(self, fake: FakeTensorMode):
        self.fake = fake
        self.kinds: dict[Any, str] = {}
        self.lists: set[Any] = set()  # operations that return a list of views
        self.attributes = dict(FakeTensor(fake, torch.empty(1, device="meta"), CPU).__dict__)
        self.layouts: dict[Any, tuple[str, tuple[Layout, ...]]] = {}

    def kind_of(self, func: Any) -> str:
        kind = self.kinds.get(func)
        if kind is None:
            returns, tags = func._schema.returns, func.tags
            name = func._overloadpacket.__name__
            dynamic = torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags
            aliases = [r.alias_info for r in returns]
            if dynamic or not returns or name.startswith(CHANGES_LAYOUT):
                kind = NEVER
            elif all(alias is None for alias in aliases):
                kind = NEW
            elif len(aliases) == 1 and aliases[0].is_write and name.endswith("_"):
                kind = IN_PLACE
            elif len(aliases) == 1 and not aliases[0].is_write:
                kind = VIEW
            else:
                kind = NEVER
            self.kinds[func] = kind
        return kind

    def make_key(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        if self.kind_of(func) is NEVER:
            return None
        try:
            parts = tuple(describe(x) for x in args)
            return (func, parts, tuple((name, describe(x)) for name, x in kwargs.items())) if kwargs else (func, parts)
        except TypeError:
            return None

    def find(self, key: Any, func: Any, args: tuple) -> Any:
        """Return the outputs, or `NotImplemented` if they are not known."""
        if key not in self.layouts:
            return NotImplemented
        kind, layouts = self.layouts[key]
        if kind is IN_PLACE:
            return args[0]
        if kind is VIEW:
            storage = args[0].untyped_storage()
            with torch.inference_mode(args[0].is_inference()):
                made = [self.make_view(storage, layout) for layout in layouts]
            return made if func in self.lists else made[0]
        made = [self.make(layout) for layout in layouts]
        return made[0] if len(func._schema.returns) == 1 else tuple(made)

    def keep(self, key: Any, func: Any, args: tuple, out: Any) -> None:
        """Keep the layouts of the outputs, if they can be made again."""
        if self.kinds[func] is IN_PLACE:
            if out is args[0]:
                self.layouts[key] = (IN_PLACE, ())
            return
        outputs = out if isinstance(out, list | tuple) else (out,)
        if not all(type(x) is FakeTensor for x in outputs):
            return
        storages = {x.untyped_storage()._cdata for x in outputs}
        layouts = tuple((tuple(x.shape), x.stride(), x.dtype, x.storage_offset()) for x in outputs)
        first = args[0] if args and type(args[0]) is FakeTensor else None
        if first is not None and storages == {first.untyped_storage()._cdata}:  # also of operations such as _unsafe_view
            if isinstance(out, list | tuple):
                self.lists.add(func)
            if not any(x is first for x in outputs):
                self.layouts[key] = (VIEW, layouts)
        elif (
            self.kinds[func] is NEW
            and not isinstance(out, list)
            and len(storages) == len(outputs) == len(func._schema.returns)  # some kernels return a tensor twice
            and not storages & {x.untyped_storage()._cdata for x in args if type(x) is FakeTensor}
            and all(is_whole(x) for x in outputs)
        ):
            self.layouts[key] = (NEW, layouts)

    def make(self, layout: Layout) -> Tensor:
        sizes, strides, dtype, _ = layout
        return self.wrap(torch.empty_strided(sizes, strides, dtype=dtype, device="meta"))

    def make_view(self, storage: torch.UntypedStorage, layout: Layout) -> Tensor:
        sizes, strides, dtype, offset = layout
        made = torch.empty(0, dtype=dtype, device="meta").set_(storage, offset, sizes, strides)
        return self.wrap(made)

    def wrap(self, made: Tensor) -> Tensor:
        """Return a meta tensor as a fake one. The attributes are those of one that torch has made, which takes longer."""
        fake = Tensor._make_subclass(FakeTensor, made, False, dispatch_device=True, device_for_backend_keys=CPU)
        fake.__dict__.update(self.attributes)
        return fake


def is_whole(x: Tensor) -> bool:
    """Return whether a tensor is on the CPU and is all of its storage, so that strides and sizes define it."""
    if x.device != CPU or x.storage_offset():
        return False
    needed = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
    return x.untyped_storage().nbytes() == needed * x.element_size()


def describe(x: Any) -> Any:
    """Return a hashable description of an argument. Raises `TypeError` if it cannot be one."""
    if isinstance(x, FakeTensor):
        # the size of the storage is part of the work; a known tensor of no dimensions acts like a number on types
        return (x.dtype, tuple(x.shape), x.stride(), x.storage_offset(), x.untyped_storage().nbytes(), x.fake_device.type)
    if x is None:
        return None
    if isinstance(x, PLAIN):
        return (type(x), x)
    if isinstance(x, list | tuple):
        return tuple(describe(y) for y in x)
    raise TypeError(type(x))
