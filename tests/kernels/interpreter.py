"""Triton's interpreter as the tests use it: it rounds as GPUs do, multiplies matrices as one of their instructions
may, takes half the time, and can be watched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
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

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        a, b, total = a.data, b.data, d.data.copy()  # NumPy's product rounds elements of different tiles differently
        with np.errstate(invalid="ignore", over="ignore"):
            for k in range(a.shape[1]):
                total += a[:, k, None] * b[None, k]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The kernel has patched the language for its functions; other modules' (tl.sum) stay patched, so once
        # is enough. The interpreter patches at every call, which is half of its time.
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def implicit_cvt(argument: Any) -> Any:
        """Converts what a launch passes to a kernel, and each item of a tuple: Triton takes a Python float in fp32,
        where the interpreter would leave it as it is, so that what is lost on a GPU would be there."""
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)

    patched: set[str] = set()
    convert = interpreter._implicit_cvt
    for name in ("create_fp_to_si", "create_fp_to_ui", "create_si_to_fp", "create_ui_to_fp"):
        assert getattr(_Builder, name), "the interpreter has changed: look at cast_impl again"
    _Builder.cast_impl, _Builder.create_dot = cast_impl, create_dot
    interpreter.InterpretedFunction.__call__ = call
    interpreter._implicit_cvt = implicit_cvt


@dataclass
class Launch:
    """One launch: its tensors by argument name, and how often each of their elements was read and written."""

    kernel: str
    tensors: dict[str, Tensor]
    reads: dict[str, np.ndarray] = field(default_factory=dict)
    writes: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.addresses = {name: np.unique(_addresses(t)) for name, t in self.tensors.items()}
        for name, addresses in self.addresses.items():
            self.reads[name], self.writes[name] = (np.zeros(len(addresses), np.int32) for _ in range(2))

    def count(self, counts: dict[str, np.ndarray], addresses: np.ndarray, names: list[str]) -> None:
        for name in names:
            valid = self.addresses[name]
            if len(valid) and len(addresses):
                at = np.searchsorted(valid, addresses).clip(max=len(valid) - 1)
                inside = valid[at] == addresses
                np.add.at(counts[name], at[inside], 1)
                addresses = addresses[~inside]
        assert not len(addresses), f"{self.kernel}: {len(addresses)} accesses outside of every tensor's elements"

    def of(self, counts: dict[str, np.ndarray], name: str) -> np.ndarray:
        """Returns the counts in the tensor's shape."""
        at = np.searchsorted(self.addresses[name], _addresses(self.tensors[name]))
        return counts[name][at]


def _addresses(t: Tensor) -> np.ndarray:
    """Returns the address of each element, in the tensor's shape."""
    at = np.full(t.shape, t.data_ptr(), np.uint64)
    for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        steps = np.arange(size, dtype=np.uint64) * np.uint64(stride * t.element_size())
        at += steps.reshape([-1 if d == dim else 1 for d in range(t.dim())])
    return at


@contextlib.contextmanager
def watched() -> Iterator[list[Launch]]:
    """Counts what the kernels read and write. An access to anything but an element of an argument is an error:
    that sees more than poisoned guard regions, which a masked or ignored value can pass through."""
    launches: list[Launch] = []
    load, store = _Builder.create_masked_load, _Builder.create_masked_store
    init = interpreter.GridExecutor._init_args_hst

    def begin(self: Any, args: Any, kwargs: Any) -> Any:
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = {name: t for name, t in named.items() if isinstance(t, Tensor)}
        launches.append(Launch(self.fn.__name__, tensors))
        return init(self, args, kwargs)

    def active(ptrs: Any, mask: Any) -> np.ndarray:
        return ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].count(launches[-1].reads, active(ptrs, mask), list(launches[-1].tensors))
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        outputs_first = list(launches[-1].tensors)[::-1]
        launches[-1].count(launches[-1].writes, active(ptrs, mask), outputs_first)
        return store(self, ptrs, value, mask, *rest)

    _Builder.create_masked_load, _Builder.create_masked_store = masked_load, masked_store
    interpreter.GridExecutor._init_args_hst = begin
    try:
        yield launches
    finally:
        _Builder.create_masked_load, _Builder.create_masked_store = load, store
        interpreter.GridExecutor._init_args_hst = init
