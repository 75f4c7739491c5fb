"""Triton's interpreter as the tests use it: it rounds as GPUs do, takes half the time, and can be watched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder


def install() -> None:
    cast = _Builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:  # GPUs round, the interpreter truncates
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            rounded = np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded)
            return interpreter.TensorHandle(rounded, dst_type.scalar)
        return cast(self, src, dst_type)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The kernel has patched the language for its functions; other modules' (tl.sum) stay patched, so once
        # is enough. The interpreter patches at every call, which is half of its time.
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    patched: set[str] = set()
    for name in ("create_fp_to_si", "create_fp_to_ui", "create_si_to_fp", "create_ui_to_fp"):
        assert getattr(_Builder, name), "the interpreter has changed: look at cast_impl again"
    _Builder.cast_impl = cast_impl
    interpreter.InterpretedFunction.__call__ = call


class Accesses:
    """What was read and written of each watched tensor: times per byte of its storage."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.storages = {name: t.untyped_storage() for name, t in tensors.items()}
        self.reads = {name: np.zeros(s.nbytes(), np.int32) for name, s in self.storages.items()}
        self.writes = {name: np.zeros(s.nbytes(), np.int32) for name, s in self.storages.items()}
        self.strange: list[int] = []

    def count(self, counts: dict[str, np.ndarray], addresses: np.ndarray, size: int) -> None:
        for address in addresses.tolist():
            for name, storage in self.storages.items():
                at = address - storage.data_ptr()
                if 0 <= at <= storage.nbytes() - size:
                    counts[name][at : at + size] += 1
                    break
            else:
                self.strange.append(address)

    def times(self, counts: dict[str, np.ndarray], name: str) -> np.ndarray:
        """Per element of the tensor."""
        t = self.tensors[name]
        flat = counts[name].reshape(-1, t.element_size())[:, 0]
        strides = tuple(s * flat.itemsize for s in t.stride())
        return np.lib.stride_tricks.as_strided(flat[t.storage_offset() :], t.shape, strides)


@contextlib.contextmanager
def watched(**tensors: Tensor) -> Iterator[Accesses]:
    """Counts the kernels' accesses; an address outside of the given tensors' storages is strange."""
    accesses = Accesses(tensors)
    load, store = _Builder.create_masked_load, _Builder.create_masked_store

    def active(ptrs: Any, mask: Any) -> tuple[np.ndarray, int]:
        on = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
        return ptrs.data[on], ptrs.get_element_ty().primitive_bitwidth // 8

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        accesses.count(accesses.reads, *active(ptrs, mask))
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        accesses.count(accesses.writes, *active(ptrs, mask))
        return store(self, ptrs, value, mask, *rest)

    _Builder.create_masked_load, _Builder.create_masked_store = masked_load, masked_store
    try:
        yield accesses
    finally:
        _Builder.create_masked_load, _Builder.create_masked_store = load, store
