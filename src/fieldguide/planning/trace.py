"""Trace one training or prediction step on fake tensors: lifetimes of storages by part, and the work of each operation.

`Tracer` is a dispatch mode. Operations run on `FakeTensor`s, which have shapes but no memory, so a step of a network of any
size can be traced on any machine. Autograd, autocast and the optimizers are torch's own; only the kernels are missing.

The values of small integer tensors, such as tokens and masks, are kept, so that operations whose output size depends on them
can be traced. Values that would come from the network are replaced by typical ones: indices chosen by `topk` are spread evenly
(balanced experts), and a condition that nothing is known about holds for `TYPICAL_SHARE` of the elements.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fieldguide.planning import kernels
from fieldguide.planning.op_cache import OpCache
from fieldguide.planning.records import Trace, Work

aten = torch.ops.aten
MAX_KNOWN_VALUES = 1 << 20  # elements of the largest tensor whose values are kept
TYPICAL_SHARE = 0.1  # of the elements for which a condition on unknown values holds
DYNAMIC_INDEX = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)
CHOICES = (aten.topk.default, aten.argmax.default, aten.argmin.default, aten.multinomial.default)


class Tracer(TorchDispatchMode):
    """Records storages and work of all operations inside. Enter it inside of its `fake` mode; see `trace_steps`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave out the import of torch's compiler, which takes seconds."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.cache = OpCache(self.fake)
        self.works: dict[Any, Work] = {}  # by key in the cache, and phase
        self.trace = Trace()
        self.phase = "forward"
        self.off = False  # True while own tensors are made
        self.numbers: dict[int, tuple[weakref.ref, int]] = {}  # key of a storage -> (itself, its number in the trace)
        self.alive: dict[int, int] = {}  # number -> bytes
        self.count = 0
        self.values: dict[int, tuple[weakref.ref, Tensor]] = {}  # id of a fake tensor -> (itself, its values)

    # Storages

    def number_of(self, tensor: Tensor) -> int:
        """Return the number of a tensor's storage in the trace, which is recorded as an allocation if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (entry := self.numbers.get(key)) is not None and entry[0]() is not None:
            return entry[1]
        number = self.allocate(storage.nbytes())
        self.numbers[key] = (weakref.ref(storage, lambda _: self.forget(key, number)), number)
        return number

    def forget(self, key: int, number: int) -> None:
        if (entry := self.numbers.get(key)) is not None and entry[1] == number:
            del self.numbers[key]
        self.release(number)

    def allocate(self, size: int, part: str = "") -> int:
        self.count += 1
        if size:
            self.trace.events.append((self.count, size))
        self.alive[self.count] = size
        if part:
            self.trace.parts[self.count] = part
        return self.count

    def release(self, number: int) -> None:
        if size := self.alive.pop(number, 0):
            self.trace.events.append((number, -size))

    def label(self, tensor: Tensor, part: str) -> None:
        """Assign the storage of a tensor to a part."""
        self.trace.parts[self.number_of(tensor)] = part

    def label_rest(self, part: str) -> None:
        """Assign all storages that belong to no part yet to one."""
        for number in self.alive:
            self.trace.parts.setdefault(number, part)

    def begin_steps(self) -> None:
        """Take what is alive as the state before the first step."""
        self.trace.initial = {number: size for number, size in self.alive.items() if size}
        self.trace.events.clear()
        self.trace.work.clear()

    def finish(self) -> Trace:
        """Return the trace. What is released later, such as the objects of the traced step themselves, is not part of it."""
        finished, self.trace = self.trace, Trace()
        return finished

    # Fake tensors

    def fake_tensor(self, tensor: Tensor, keep_values: bool = True, channels_last: bool = False) -> Tensor:
        """Return a fake CPU tensor of the same shape and strides. The values of small integer tensors are kept."""
        layout = {"memory_format": torch.channels_last} if channels_last and tensor.ndim == 4 else {}
        self.off = True
        try:
            with self.fake:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                made = made.contiguous(**layout) if layout else made
            if keep_values and not tensor.is_meta and not isinstance(tensor, FakeTensor) and is_index(tensor):
                self.remember(made, tensor.detach().cpu().clone())
        finally:
            self.off = False
        return made

    def fake_module(self, module: nn.Module, channels_last: bool = False) -> Any:
        """Return a copy of a module with fake tensors in the place of all its tensors; nothing is allocated.

        The copy is on the CPU and in its layout, and `to` leaves it as it is.
        """
        memo: dict[int, Any] = {}
        storages: dict[int, Tensor] = {}
        for tensor in find_tensors(module):
            key = tensor.untyped_storage()._cdata
            fake = self.fake_tensor(tensor, keep_values=False, channels_last=channels_last)
            if key in storages and tensor.numel() == storages[key].numel():
                fake = storages[key].view(tensor.shape) if tensor.shape != storages[key].shape else storages[key]
            storages.setdefault(key, fake)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fake
        made: Any = copy.deepcopy(module, memo)
        made._apply = lambda function, recurse=True: made  # fake parameters cannot be exchanged in place
        return made

    # Values of integers

    def remember(self, tensor: Tensor, values: Tensor) -> None:
        key = id(tensor)
        self.values[key] = (weakref.ref(tensor, lambda _: self.values.pop(key, None)), values)

    def value_of(self, x: Any) -> Any:
        """Return the values of a tensor, or `None` if they are unknown."""
        if not isinstance(x, FakeTensor):
            return x
        entry = self.values.get(id(x))
        return entry[1] if entry is not None and entry[0]() is x else None

    def compute_values(
        self, func: Any, args: tuple, kwargs: Mapping[str, Any], inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Compute an operation on known values too, if all of its inputs are known."""
        if not outputs or any(x.numel() > MAX_KNOWN_VALUES for x in outputs):
            return
        if func in CHOICES:
            options = inputs[0].shape[args[2] if len(args) > 2 and func is aten.topk.default else -1] if inputs[0].ndim else 1
            chosen = outputs[-1]
            self.remember(chosen, (torch.arange(chosen.numel()) % max(options, 1)).view(chosen.shape))
            return
        if torch.Tag.nondeterministic_seeded in func.tags:
            return
        if inputs and not all(self.value_of(x) is not None for x in inputs):
            for x in outputs:
                if any(x is y for y in inputs):  # written in place with unknown values
                    self.values.pop(id(x), None)
            return
        if not inputs and not is_index(outputs[0]):
            return
        real_args, real_kwargs = tree_map(self.value_of, (args, kwargs))
        if "device" in real_kwargs:
            real_kwargs = {**real_kwargs, "device": "cpu"}
        for fake, real in zip(outputs, find_in((func(*real_args, **real_kwargs),))):
            if is_index(real) or real.numel() <= 4096:
                self.remember(fake, real)

    # Operations whose output depends on values

    def find_nonzero(self, x: Tensor) -> Tensor:
        """Return fake indices of the elements that are not 0, as many as there are or as is typical."""
        known = self.value_of(x)
        if known is not None:
            values = known.nonzero()
        else:
            count = max(1, round(TYPICAL_SHARE * x.numel()))
            places = torch.arange(count) * max(1, x.numel() // count)
            values = (
                torch.stack(torch.unravel_index(places.clamp(max=x.numel() - 1), x.shape), 1) if x.ndim else places[:, None]
            )
        with self.fake:
            made = torch.empty(values.shape, dtype=torch.int64, device="cpu")
        self.remember(made, values)
        return made

    def read_scalar(self, x: Tensor) -> Any:
        known = self.value_of(x)
        if known is not None:
            return known.item()
        return 1.0 if x.is_floating_point() else True if x.dtype == torch.bool else 1

    def replace_masks(self, args: tuple) -> tuple:
        """Replace boolean indices by the integer indices of their true elements."""
        indices: list[Tensor | None] = []
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                indices.extend(self.record(aten.nonzero.default, (index,), {}, self.find_nonzero(index)).unbind(1))
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])

    # Dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device
        kwargs = dict(kwargs or {})
        inputs = find_in(args, kwargs)
        if self.off or func.namespace == "prim" or (inputs and not any(isinstance(x, FakeTensor) for x in inputs)):
            return func(*args, **kwargs)
        if func in DYNAMIC_INDEX:
            args = self.replace_masks(args)
        if func is aten.nonzero.default and isinstance(args[0], FakeTensor):
            return self.record(func, args, kwargs, self.find_nonzero(args[0]))
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self.read_scalar(args[0])
        if func is aten.is_pinned.default:
            return False
        if func is aten.equal.default and isinstance(args[0], FakeTensor):
            known = [self.value_of(x) for x in args[:2]]
            return bool(torch.equal(*known)) if all(x is not None for x in known) else True
        if func is aten.masked_select.default:
            args = self.replace_masks((args[0], [args[1].expand(args[0].shape) if args[1].shape != args[0].shape else args[1]]))
            func = aten.index.Tensor
        if func._can_decompose() and func not in kernels.WHOLE:
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if (special := kernels.SHAPES.get(func)) is not None:
            with self.fake:
                return self.record(func, args, kwargs, special(*args, **kwargs))
        key = self.cache.make_key(func, args, kwargs)
        if key is not None:
            self.off = True
            try:
                out = self.cache.find(key, func, args)
            finally:
                self.off = False
            if out is not NotImplemented:
                return self.record(func, args, kwargs, out, key)
        with self.fake:
            out = func(*args, **kwargs)
        if key is not None:
            self.cache.keep(key, func, args, out)
        return self.record(func, args, kwargs, out, key)

    def record(self, func: Any, args: tuple, kwargs: Mapping[str, Any], out: Any, key: Any = None) -> Any:
        """Record the storages and the work of an operation. Return its output. `key` is its key in the cache of operations."""
        inputs = find_in(args, kwargs)
        outputs: list[Tensor] = [x for x in find_in((out,)) if isinstance(x, FakeTensor)]
        buffers: dict[str, int] = {}
        for action, name, size in kernels.buffers(func, args, outputs):
            if action == "allocate":
                buffers[name] = self.allocate(size, "kernel")
            elif action == "release":
                self.release(buffers.pop(name))
            elif int(name) < len(outputs):
                self.number_of(outputs[int(name)])
        for x in outputs:
            self.number_of(x)
        for number in buffers.values():
            self.release(number)
        work = self.works.get((key, self.phase)) if key is not None else None
        if work is None:
            work = kernels.measure_work(func, args, kwargs, inputs, outputs, out, self.phase)
            if key is not None:
                self.works[key, self.phase] = work
        self.trace.work.append(work)
        self.compute_values(func, args, kwargs, inputs, outputs)
        return out


def find_in(args: Iterable[Any], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """Return the tensors among the arguments of an operation, and in lists of them."""
    found: list[Tensor] = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found.extend(find_in(x))
    return found


def is_index(tensor: Tensor) -> bool:
    """Return whether the values of a tensor are kept: a small one of integers or booleans."""
    return not (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() <= MAX_KNOWN_VALUES


def find_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters, buffers and other tensor attributes of a module, each once."""
    seen: set[int] = set()
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values(), *part.__dict__.values()):
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


T = TypeVar("T")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore torch's random state afterwards: fake operations do not draw, but seeding changes the state.

    Cycles of objects are not collected meanwhile: that takes time, and would release storages at random.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if collecting:
            gc.enable()
