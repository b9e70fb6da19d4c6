"""Which tensors lie in the same memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

__all__ = ["Extent", "MemoryBlock", "extent", "memory_blocks"]


@dataclasses.dataclass(frozen=True, order=True)
class Extent:
    """The bytes ``start`` to ``stop`` of a storage, from a tensor's first element to its last."""

    storage: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class MemoryBlock:
    """Tensors, each with the one before it overlapping in memory, and the bytes from the first to the last of them."""

    tensors: tuple[torch.Tensor, ...]
    bytes: int

    @property
    def elements(self) -> int:
        """Elements with overlaps counted once: a matrix tied to its own transpose, or to its own view, is one."""
        return min(sum(t.numel() for t in self.tensors), self.bytes // self.tensors[0].element_size())


def extent(tensor: torch.Tensor) -> Extent:
    """Where ``tensor`` lies. Tensors without a strided storage (sparse, oneDNN-prepacked) count as alone."""
    if tensor.layout is not torch.strided:
        return Extent(id(tensor), 0, tensor.numel() * tensor.element_size())
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    length = (int(last) + 1) * tensor.element_size() if tensor.numel() else 0
    # The storage object and not its address: tensors on the meta device all have address 0.
    return Extent(tensor.untyped_storage()._cdata, start, start + length)


def memory_blocks(tensors: Iterable[torch.Tensor]) -> list[MemoryBlock]:
    """Group ``tensors`` (each object once) so that tensors of different blocks share no memory.

    Slices of one storage that lie apart, as the weights of a cuDNN LSTM do, are apart. Slices that interleave count as
    overlapping, which errs on the safe side.
    """
    unique = {id(tensor): tensor for tensor in tensors}
    placed = sorted(((extent(t), t) for t in unique.values()), key=lambda pair: pair[0])
    groups: list[tuple[Extent, list[torch.Tensor]]] = []
    for place, tensor in placed:
        last = groups[-1][0] if groups else None
        if last and last.storage == place.storage and (place.start < last.stop or place == last):
            groups[-1][1].append(tensor)
            groups[-1] = (Extent(last.storage, last.start, max(last.stop, place.stop)), groups[-1][1])
        else:
            groups.append((place, [tensor]))
    return [MemoryBlock(tuple(members), place.stop - place.start) for place, members in groups]
