"""Large memory that is used again, seen from Python: csrc/memory/regions.h has it."""

from __future__ import annotations

import ctypes
import functools

from torchfast import _native

_NAMES = ("in_use_bytes", "kept_bytes", "most_in_use_bytes", "mapped", "reused")


@functools.cache
def _library() -> ctypes.CDLL | None:
    return None if _native.unavailable_reason else ctypes.CDLL(str(_native.LIBRARY))


def empty_cache() -> None:
    """Gives the memory that is kept for the next calls back to the system.

    Gradients of the softmax and sigmoid losses (and sigmoid losses of each element) of 4 MB and more on the CPU, of
    logits without gaps, use memory again which earlier ones have returned, since fresh memory costs more time than the
    loss. So does what metrics sort in. There is never more of it than was in use at once, and at most an eighth of the
    machine's memory is kept. The system may take its pages whenever it needs some; its addresses count against a limit
    of these (``ulimit -v``) until this function returns them. ``TORCHFAST_CACHE=0`` in the environment turns it off.
    torch 2.10 lacks the means for outputs. The storage of such an output cannot be resized, also not to 0.

    Example:
        >>> import torchfast
        >>> torchfast.empty_cache()
        >>> torchfast.memory_stats()["kept_bytes"]
        0
    """
    if library := _library():
        library.torchfast_empty_cache()


def memory_stats() -> dict[str, int]:
    """Says how much of this memory is in use, and how much is kept for the next calls (see :func:`empty_cache`).

    Returns:
        ``in_use_bytes``; ``kept_bytes``; ``most_in_use_bytes`` since the last :func:`empty_cache`; and how often memory
        was ``mapped`` and ``reused``. All are 0 where memory is not used again: without the compiled kernels, on
        another system than Linux, with ``TORCHFAST_CACHE=0``.

    Example:
        >>> import torchfast
        >>> sorted(torchfast.memory_stats())
        ['in_use_bytes', 'kept_bytes', 'mapped', 'most_in_use_bytes', 'reused']
    """
    values = (ctypes.c_int64 * len(_NAMES))()
    if library := _library():
        library.torchfast_memory_stats(values)
    return dict(zip(_NAMES, values, strict=True))
