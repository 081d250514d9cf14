"""The strength of a penalty over a training phase, as a pure function of the progress."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PhaseShares:
    """A sparsifying phase in four parts: warm-up (strength 0), ramp (0 to full), hold, debias (0, zeros held).

    `warmup`, `ramp` and `debias` are fractions of the phase in [0, 1] with a sum of at most 1; hold is the rest. Debias
    trains what stays. Raises ValueError for other fractions.
    """

    warmup: float = 0.05
    ramp: float = 0.1
    debias: float = 0.55

    def __post_init__(self) -> None:
        shares = (self.warmup, self.ramp, self.debias)
        if min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise ValueError(f"warmup, ramp and debias must be >= 0 with a sum of at most 1, got {shares}")

    def factor(self, progress: float) -> float:
        """Return the share of the full strength at `progress` in [0, 1]: 0, then linear to 1, then 1, then 0.

        >>> [PhaseShares(0.2, 0.4, 0.2).factor(p) for p in (0.1, 0.4, 0.7, 0.9)]
        [0.0, 0.5, 1.0, 0.0]
        """
        if progress < self.warmup or progress >= 1 - self.debias:
            return 0.0
        if progress >= self.warmup + self.ramp:
            return 1.0
        return (progress - self.warmup) / self.ramp
