"""A deployment's standing in its vector space: what is known of whether its vectors are those of the others."""

from __future__ import annotations

import math
from collections.abc import Callable

from app.clock import Clock
from app.errors import GatewayError
from app.types import Embedding


class Standing:
    """One deployment's standing. Its canary asks for its vectors and records here what they say; its regular calls
    record what makes a new comparison necessary."""

    def __init__(
        self, clock: Clock, on_change: Callable[[], None], on_length_change: Callable[[int, int], None]
    ) -> None:
        """`on_change` is called when `serves` may have changed, `on_length_change` with the dimensions of the vectors
        before and after they changed."""
        self._clock, self._on_change, self._on_length_change = clock, on_change, on_length_change
        self.out: str | None = None
        """Why it takes no traffic until further notice, if it takes none."""
        self.readmitted_at = -math.inf
        """When it was last let back in."""
        self.unverified = False
        """Whether it is not known to be in its vector space, while others are."""
        self.silent: str | None = None
        """Why it is `unverified`, if it was asked for its vectors and gave none; shown to operators until it does."""
        self.shown = self.compared = False
        """Whether it has shown its vectors, and whether they have been compared, since it was last away."""
        self.length = 0
        """Bytes of its vectors when it chose their length, as last seen; 0 if none has been seen."""

    @property
    def serves(self) -> bool:
        """Whether nothing that its canary found keeps it from taking traffic."""
        return self.out is None and self.silent is None

    def inherit(self, before: Standing) -> None:
        """Takes over what its predecessor knew, and why that was out, if it was: it stays out."""
        self.length, self.out = before.length, before.out

    def take_out(self, reason: str) -> None:
        """Takes it out of the rotation, even as the last: what it would answer is worse than no answer."""
        self.out = reason
        self._on_change()

    def let_in(self) -> None:
        """Its vectors are right."""
        if self.out is not None:
            self.out, self.readmitted_at = None, self._clock.monotonic()
            self._on_change()

    def mark_verified(self, length: int) -> None:
        """Its vectors, of `length` bytes, have been compared. That counts only if it has not been away since it showed
        them."""
        self.length = length
        self.unverified, self.silent, self.compared = False, None, self.shown
        self._on_change()

    def mark_unverified(self, reason: str) -> None:
        """It was asked to show its vectors and did not: others serve in its place."""
        self.unverified, self.silent = True, reason
        self._on_change()

    def mark_away(self) -> None:
        """It could not be reached, and may come back as another model."""
        self.shown = self.compared = False

    def check_length(self, outcome: Embedding | GatewayError) -> None:
        """Compares the length of a vector, where that was left to the model, with the last one's. If they differ,
        another model has taken its place, or answers beside it: until it has been compared, others serve."""
        length = len(outcome.vector) if isinstance(outcome, Embedding) else 0
        if not length or length == self.length:  # an empty vector is that of a sparse embedding
            return
        before, self.length = self.length, length
        if before:
            self._on_length_change(before // 4, length // 4)
            self.unverified, self.shown, self.compared = True, False, False
