"""A Sparsifier whose channels are chosen once, when its warm-up is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sparsekit.sparsify.sparsifier import Sparsifier
from sparsekit.structure.masks import Masks, Scores


class LateChoice:
    """Wraps a Sparsifier of automatic strength, and has it settle on keep-masks before step number `at`.

    `choose` gets the importance that was learned so far and returns keep-masks and notes on how they were found (plain
    data). `masks` and `notes` are empty until then.
    """

    def __init__(
        self,
        sparsifier: Sparsifier,
        at: int,
        choose: Callable[[Scores], tuple[Masks, Mapping[str, Any]]],
    ) -> None:
        self.masks: Masks = {}
        self.notes: Mapping[str, Any] = {}
        self._sparsifier, self._at, self._choose = sparsifier, at, choose
        self._steps = 0

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Choose the masks if it is time, then let the Sparsifier step."""
        if not self.masks and self._steps >= self._at:
            self.masks, self.notes = self._choose(self._sparsifier.importance())
            self._sparsifier.settle(self.masks)
        self._steps += 1
        self._sparsifier.step(optimizer)

    def project_(self, model: nn.Module) -> None:
        """Set the held zeros to zero in a copy of the model."""
        self._sparsifier.project_(model)

    def progress(self) -> dict[str, float]:
        """Return the Sparsifier's figures."""
        return self._sparsifier.progress()

    def check_processes(self) -> None:
        """Check that all processes hold the same zeros."""
        self._sparsifier.check_processes()

    def shortfall(self) -> str:
        """Say how far from its target the phase is; "" once it is met."""
        return self._sparsifier.shortfall()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {
            "steps": self._steps,
            "masks": dict(self.masks),
            "notes": dict(self.notes),
            "sparsifier": self._sparsifier.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state that `state_dict` returned."""
        self._steps, self.masks, self.notes = state["steps"], state["masks"], state["notes"]
        self._sparsifier.load_state_dict(state["sparsifier"])
