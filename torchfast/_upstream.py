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
        self._seen: dict[Hashable, tuple[float | None, bool]] = {}
        """The last upstream gradient, and whether the one before was the same."""

    def of(self, call: Hashable) -> float | None:
        """The upstream gradient that this call will probably see; None if it changes from one to the next, or if a
        gradient of the forward would be of no use."""
        last, steady = self._seen.get(call, (1.0, True))
        return last if steady else None

    def learn(self, call: Hashable, upstream: float | None) -> None:
        """``upstream`` is None where the backward could not use a gradient of the forward."""
        last, _ = self._seen.get(call, (1.0, True))
        if call not in self._seen and len(self._seen) >= _MOST:
            self._seen.clear()
        self._seen[call] = upstream, upstream == last
