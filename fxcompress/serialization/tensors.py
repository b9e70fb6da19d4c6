"""Tensors in a file of safetensors, and the table beside it that says what becomes of them.

Tensors that share memory (tied weights under two ``Parameter`` objects, a buffer that is a view of another) share it
again when they are read: the bytes that they lie in are stored once. Reading maps the file into memory; nothing is
copied before it is written to.

The file is written here and not by the library, for alignment: kernels take other paths for data that does not begin at
a multiple of 64 bytes, as memory of PyTorch does, and their results differ by rounding. What can be aligned is, as
far as a format without gaps allows; the rest is copied when it is read if it is small.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fxcompress.analysis.storage import extent, memory_blocks
from fxcompress.errors import SerializationError
from fxcompress.serialization.values import Json, damaged, shown

__all__ = ["TensorReader", "TensorWriter", "write_safetensors"]

_AS_OTHERS = {torch.complex128: torch.float64}
_FIELDS = frozenset(("crc32", "dtype", "key", "offset", "order", "parameter", "requires_grad", "shape", "strides"))
_CHUNK = 1 << 22
_ALIGNMENT = 64
_SMALL = 1 << 20
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
_WORDS = {str(dtype)[len("torch.") :]: dtype for dtype in (*_CODES, *_AS_OTHERS)}


class TensorWriter:
    """Gives tensors numbers, and writes them all at the end."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._names: list[str] = []
        self._numbers: dict[int, int] = {}
        self._checksums: dict[str, int] = {}

    def number(self, tensor: Tensor, name: str) -> int:
        """The number of ``tensor``; the same for the same object.

        Args:
            tensor: a dense tensor or parameter.
            name: where it is, dotted; the first one given is its key in the file.

        Raises:
            SerializationError: its kind of tensor cannot be stored.
        """
        if id(tensor) not in self._numbers:
            _check(tensor, name)
            self._numbers[id(tensor)] = len(self._tensors)
            self._tensors.append(tensor)
            self._names.append(name)
        return self._numbers[id(tensor)]

    def table(self) -> tuple[list[Json], dict[str, Tensor]]:
        """What to say of each tensor, by number, and what to store, by key."""
        entries: list[Json] = [None] * len(self._tensors)
        stored: dict[str, Tensor] = {}
        for block in memory_blocks(self._tensors):
            numbers = sorted(self._numbers[id(t)] for t in block.tensors)
            one_by_one = len(numbers) == 1 or block.tensors[0].numel() == 0
            for n in numbers if one_by_one else ():
                entries[n] = self._alone(n, stored)
            if not one_by_one:
                self._together(numbers, entries, stored)
        return entries, stored

    def _alone(self, number: int, stored: dict[str, Tensor]) -> Json:
        tensor = self._tensors[number].detach()
        entry: dict[str, Json] = self._entry(number)
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
        dense = tensor.permute(order)
        if dense.is_contiguous() and not tensor.is_contiguous():
            entry["order"] = order  # as it lies in memory: channels last stays so
            tensor = dense
        return self._store(entry, entry["key"], tensor, stored)

    def _together(self, numbers: list[int], entries: list[Json], stored: dict[str, Tensor]) -> None:
        """One stretch of memory for all, read as each of them sees it."""
        first = self._tensors[numbers[0]].detach()
        places = [extent(self._tensors[n]) for n in numbers]
        start, stop = min(p.start for p in places), max(p.stop for p in places)
        key, size = self._names[numbers[0]], first.element_size()
        if any(self._tensors[n].dtype != first.dtype for n in numbers):
            names = ", ".join(self._names[n] for n in numbers)
            raise SerializationError(f"{names} lie in the same memory with different dtypes; copy one of them")
        whole = first.as_strided(((stop - start) // size,), (1,), start // size)
        for n in numbers:
            tensor = self._tensors[n]
            entry = self._entry(n)
            entry["key"] = key
            entry["strides"] = list(tensor.stride())
            entry["offset"] = int(tensor.storage_offset()) - start // size
            entries[n] = self._store(entry, key, whole, stored)

    def _entry(self, number: int) -> dict[str, Json]:
        tensor = self._tensors[number]
        entry: dict[str, Json] = {
            "key": self._names[number],
            "dtype": str(tensor.dtype)[len("torch.") :],
            "shape": list(tensor.shape),
        }
        if isinstance(tensor, nn.Parameter):
            entry["parameter"] = True
        if tensor.requires_grad:
            entry["requires_grad"] = True
        return entry

    def _store(self, entry: dict[str, Json], key: str, tensor: Tensor, stored: dict[str, Tensor]) -> Json:
        if key not in stored:
            flat = torch.view_as_real(tensor) if tensor.dtype in _AS_OTHERS else tensor
            stored[key] = flat.cpu().contiguous()
            self._checksums[key] = _checksum(stored[key])
        entry["crc32"] = self._checksums[key]
        return entry


def _check(tensor: Tensor, name: str) -> None:
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        kind = f"a tensor of the class {type(tensor).__name__}"
    elif tensor.layout is not torch.strided:
        kind = f"a tensor of layout {tensor.layout}"
    elif tensor.is_meta:
        kind = "a tensor without data, on the meta device"
    elif tensor.is_quantized or tensor.dtype not in _WORDS.values():
        kind = f"a tensor of {tensor.dtype}"
    elif tensor.grad_fn is not None:
        kind = "the result of a computation that is still to be differentiated: detach it first"
    else:
        return
    raise SerializationError(f"{name} is {kind}, which has no form in safetensors")


def _bytes_of(tensor: Tensor) -> Iterator[Any]:
    """The bytes of a contiguous tensor, chunk by chunk."""
    flat = tensor.reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), _CHUNK):
        yield flat[start : start + _CHUNK].numpy().data


def _checksum(tensor: Tensor) -> int:
    total = 0
    for part in _bytes_of(tensor):
        total = zlib.crc32(part, total)
    return total


def write_safetensors(path: Path, stored: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A file in the format of safetensors 0.x, tensor by tensor.

    Args:
        path: where to.
        stored: contiguous tensors on the CPU.
        metadata: for the header.
    """
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in stored.items()}
    # Elements must lie at multiples of their size; whole multiples of the alignment first, then by size of element.
    order = sorted(stored, key=lambda key: (sizes[key] % _ALIGNMENT != 0, -stored[key].element_size(), key))
    header: dict[str, Json] = {"__metadata__": metadata}
    end = 0
    for key in order:
        start, end = end, end + sizes[key]
        code, shape = _CODES[stored[key].dtype], list(stored[key].shape)
        header[key] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            for part in _bytes_of(stored[key]):
                file.write(part)


class TensorReader:
    """Makes tensors from a mapped file, each once.

    Args:
        path: the file of safetensors.
        device: where tensors go.
        check: compare what is stored with its checksums, which reads the whole file.

    Raises:
        SerializationError: there is no such file, or it is damaged.
    """

    def __init__(self, path: Path, device: torch.device, check: bool) -> None:
        self._path, self._device, self._check = path, device, check
        self._tensors: list[Tensor] = []
        self._stored: dict[str, Tensor] = {}
        self._checked: dict[str, int] = {}
        try:
            file: Any = safe_open(path, framework="pt")
            self.metadata: dict[str, str] = file.metadata() or {}
            self._keys = frozenset(file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise SerializationError(f"{path} cannot be read as weights: {error}") from error
        self._file = file

    def read_table(self, entries: Json) -> None:
        """Make all tensors.

        Raises:
            SerializationError: the table does not fit the file.
        """
        if not isinstance(entries, list):
            raise damaged("tensors", "no list")
        self._map({str(entry.get("key")) for entry in entries if isinstance(entry, dict)} & self._keys)
        for number, entry in enumerate(entries):
            where = f"tensor {number}"
            if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
                raise damaged(where, "no entry with a key")
            self._tensors.append(self._read(entry, f"tensor {shown(entry['key'])}"))

    def __getitem__(self, number: Any) -> Tensor:
        """The tensor of that number."""
        if type(number) is not int or not 0 <= number < len(self._tensors):
            raise damaged("tensors", f"there is no tensor {shown(number)}")
        return self._tensors[number]

    def _read(self, entry: dict[str, Json], where: str) -> Tensor:
        dtype = _WORDS.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
        shape = _sizes(entry.get("shape"), where)
        if (
            set(entry) - _FIELDS
            or dtype is None
            or any(type(entry.get(k, True)) is not bool for k in ("parameter", "requires_grad"))
        ):
            raise damaged(where, f"{shown(entry)} is no entry of a tensor")
        value = self._stored_tensor(entry["key"], entry.get("crc32"), where)
        if dtype in _AS_OTHERS:
            if value.dtype != _AS_OTHERS[dtype] or value.dim() == 0 or value.shape[-1] != 2:
                raise damaged(where, f"stored as {value.dtype}, not as pairs of real numbers")
            value = torch.view_as_complex(value)
        if "strides" in entry:
            value = self._seen(value, shape, entry, where)
        elif "order" in entry:
            value = _reordered(value, entry["order"], where)
        if value.dtype != dtype or list(value.shape) != shape:
            raise damaged(where, f"stored as {value.dtype} {tuple(value.shape)}, not as {dtype} {tuple(shape)}")
        needs = bool(entry.get("requires_grad"))
        if needs and not (dtype.is_floating_point or dtype.is_complex):
            raise damaged(where, f"{dtype} has no gradients")
        return nn.Parameter(value, requires_grad=needs) if entry.get("parameter") else value.requires_grad_(needs)

    def _map(self, keys: Set[str]) -> None:
        """Map what is stored under ``keys``, and take its checksums."""
        try:
            found: dict[str, Tensor] = {key: self._file.get_tensor(key) for key in sorted(keys)}
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise SerializationError(f"{self._path} cannot be read: {error}") from error
        if self._check:
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                self._checked = dict(zip(found, pool.map(_checksum, found.values()), strict=True))
        for key, tensor in found.items():
            small = tensor.numel() * tensor.element_size() <= _SMALL
            aligned = tensor.clone() if small and tensor.data_ptr() % _ALIGNMENT else tensor
            self._stored[key] = aligned if self._device.type == "cpu" else aligned.to(self._device)

    def _stored_tensor(self, key: str, crc: Json, where: str) -> Tensor:
        if key not in self._keys:
            raise damaged(where, f"{self._path.name} does not hold it")
        found = self._stored[key]
        if self._check and self._checked[key] != crc:
            raise SerializationError(f"{where} is not what was saved (its checksum differs): {self._path} is damaged")
        return found.detach()  # an object of its own; those of one key share memory

    def _seen(self, whole: Tensor, shape: list[int], entry: dict[str, Json], where: str) -> Tensor:
        strides, offset = _sizes(entry["strides"], where), entry.get("offset")
        fits = whole.dim() == 1 and len(strides) == len(shape) and type(offset) is int and offset >= 0
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=False)) if 0 not in shape else 0
        if not fits or offset + last >= max(whole.numel(), 1):  # type: ignore[operator]
            raise damaged(where, "it lies outside of what is stored")
        return whole.as_strided(shape, strides, int(whole.storage_offset()) + offset)  # type: ignore[operator]


def _sizes(data: Json, where: str) -> list[int]:
    if not isinstance(data, list) or not all(type(n) is int and 0 <= n < 2**62 for n in data) or len(data) > 64:
        raise damaged(where, f"{shown(data)} are no sizes")
    return list(data)


def _reordered(value: Tensor, order: Json, where: str) -> Tensor:
    if not isinstance(order, list) or sorted(map(repr, order)) != sorted(map(repr, range(value.dim()))):
        raise damaged(where, f"{shown(order)} is no order of dimensions")
    return value.permute([order.index(d) for d in range(value.dim())])
