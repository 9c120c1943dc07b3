"""How many bytes of tensors are alive, and the most that ever were, while code runs on tensors without memory.

Under `fake_tensors`, tensors have a shape, a dtype and a device, and no numbers. `LiveBytes` counts the bytes of every
storage that an operation makes. It counts them until the last tensor on that storage is gone. A tensor that autograd
keeps for backward counts too. Memory that a kernel takes and gives back inside one operation is not counted. Knows
tensors. Does not know what they mean.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def fake_tensors() -> FakeTensorMode:
    """Under it, new tensors hold no numbers. They may meet real ones later, outside it: what is computed from real
    tensors alone (indices, lengths) stays real, so code may read it."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_beside(module: nn.Module) -> FakeTensorMode:
    """The same, for tensors that are to meet this module's: those of two modes would be converted at every meeting."""
    own = (value.fake_mode for value in module.parameters() if isinstance(value, FakeTensor))
    return next(own, None) or fake_tensors()


@contextmanager
def without_torch_messages() -> Iterator[None]:
    """Without the traceback that torch logs before it raises for an operation on tensors without numbers."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Counts storages that operations under it make; those that were there before count nothing.

    `now`: bytes alive. `most`: the most since `phase` was last entered. `most_small`: the most ever in storages of at
    most `small` bytes each.
    """

    def __init__(self, small: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.small = small
        self.now, self.most = 0, 0
        self._small_now, self.most_small = 0, 0
        self._followed: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @contextmanager
    def phase(self, name: str, into: dict[str, int]) -> Iterator[None]:
        """Put the most bytes alive at once within it, those alive at its start included, into `into[name]`."""
        self.most = self.now
        yield
        into[name] = max(self.most, into.get(name, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor, made_here=False)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._follow(tensor, made_here=True)
        return result

    def _follow(self, tensor: Tensor, *, made_here: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._followed:
            return
        size = storage.nbytes() if made_here else 0

        def gone(_: object) -> None:
            del self._followed[key]
            self._add(-size)

        self._followed[key] = weakref.ref(storage, gone)
        self._add(size)

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)
        if abs(size) <= self.small:
            self._small_now += size
            self.most_small = max(self.most_small, self._small_now)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of their storages, each once."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
