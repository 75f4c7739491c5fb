"""Guesses the upstream gradient of a loss, with which its forward can compute the gradient in the same walk.

It is 1 where the loss itself is differentiated, a constant where losses are weighted or gradients accumulated, and
changes at each step under other schemes. A guess is right or the gradient is computed again, by the backward op: so
no result depends on it.
"""

from __future__ import annotations

from collections.abc import Hashable

_MOST = 256  # annealed options make new calls at each step


class Guess:
    """What calls of an op with the same options saw last."""

    def __init__(self) -> None:
        self._last: dict[Hashable, float] = {}
        self._steady: dict[Hashable, bool] = {}

    def of(self, call: Hashable) -> float | None:
        """The upstream gradient that this call will probably see; None if it changes from one to the next."""
        return self._last.get(call, 1.0) if self._steady.get(call, True) else None

    def learn(self, call: Hashable, upstream: float) -> None:
        if len(self._last) >= _MOST:
            self.__init__()  # type: ignore[misc]
        self._steady[call] = upstream == self._last.get(call, 1.0)
        self._last[call] = upstream
