"""A callback for Lightning's `Trainer`: it takes proximal steps and puts their state into checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning
from torch.utils.hooks import RemovableHandle

from sparsekit.errors import InputError
from sparsekit.sparsify.sparsifier import Sparsifier

MakeSparsifier = Callable[[lightning.LightningModule, int], Sparsifier]


class SparsifierCallback(lightning.Callback):
    """Makes a Sparsifier when training starts and takes a proximal step after every step of the optimizer.

    `make(module, total_steps)` gets the LightningModule, on its device, and the number of optimizer steps that the
    trainer expects. It returns the Sparsifier of the module or of a model inside it. Gradient accumulation, and steps
    that a gradient scaler skips, are handled. `zero_share` and `strength` are logged after each epoch.
    """

    def __init__(self, make: MakeSparsifier) -> None:
        self._make = make
        self._handles: list[RemovableHandle] = []
        self._loaded: Mapping[str, Any] | None = None
        self.sparsifier: Sparsifier | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Make the Sparsifier, or give it the state of a checkpoint, and attach it to the optimizers."""
        total_steps = trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise InputError(
                "the trainer has neither max_epochs nor max_steps, but a sparsifying phase needs an end; set one"
            )
        self.sparsifier = self._make(pl_module, int(total_steps))
        if self._loaded is not None:
            self.sparsifier.load_state_dict(self._loaded)
            self._loaded = None
        self._handles = [self.sparsifier.attach(optimizer) for optimizer in trainer.optimizers]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log `zero_share` and `strength`, and check that all processes have the same zeros."""
        assert self.sparsifier is not None
        self.sparsifier.check_processes()
        pl_module.log_dict(self.sparsifier.progress())

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Detach the Sparsifier from the optimizers."""
        self._detach()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Detach the Sparsifier from the optimizers."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for Lightning's checkpoints."""
        return {} if self.sparsifier is None else self.sparsifier.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts and a Sparsifier can take it."""
        self._loaded = state_dict or None

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
