"""Memory of large outputs that is used again, seen from Python: csrc/memory/regions.h has it."""

from __future__ import annotations

import ctypes
import functools

from torchfast import _native

_NAMES = ("in_use_bytes", "kept_bytes", "most_in_use_bytes", "mapped", "reused")


@functools.cache
def _library() -> ctypes.CDLL | None:
    return None if _native.unavailable_reason else ctypes.CDLL(str(_native.LIBRARY))


def empty_cache() -> None:
    """Gives the memory that is kept for the next outputs back to the system.

    Gradients and other outputs of 4 MB and more on the CPU use memory again which earlier ones have returned, since
    fresh memory costs more time than the loss. There is never more of it than was in use at once, at most an eighth of
    the machine's memory is kept, and the system may take it whenever it needs memory. ``TORCHFAST_CACHE=0`` in the
    environment turns it off, as torch 2.10 does, which lacks the means. Such outputs cannot be enlarged in place
    (:meth:`torch.Tensor.resize_`).

    Example:
        >>> import torchfast
        >>> torchfast.empty_cache()
        >>> torchfast.memory_stats()["kept_bytes"]
        0
    """
    if library := _library():
        library.torchfast_empty_cache()


def memory_stats() -> dict[str, int]:
    """Says how much memory outputs use, and how much is kept for the next ones (see :func:`empty_cache`).

    Returns:
        ``in_use_bytes``; ``kept_bytes``; ``most_in_use_bytes`` since the last :func:`empty_cache`; and how often memory
        was ``mapped`` and ``reused``. All are 0 without the compiled kernels, and where the system is not Linux.

    Example:
        >>> import torchfast
        >>> sorted(torchfast.memory_stats())
        ['in_use_bytes', 'kept_bytes', 'mapped', 'most_in_use_bytes', 'reused']
    """
    values = (ctypes.c_int64 * len(_NAMES))()
    if library := _library():
        library.torchfast_memory_stats(values)
    return dict(zip(_NAMES, values, strict=True))
