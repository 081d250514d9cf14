"""A callback for Hugging Face's `Trainer`: it takes proximal steps and puts their state beside checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsekit.sparsify.sparsifier import Sparsifier
from sparsekit.training.checkpoint import load_state, save_state

_FILE = "sparsifier.safetensors"


class SparsifierCallback(TrainerCallback):
    """Makes a Sparsifier when training starts and takes a proximal step after every step of the optimizer.

    `make(model, total_steps)` gets the model, on its device, and the number of optimizer steps to come. It returns the
    Sparsifier of the model or of one inside it. Gradient accumulation, and steps that a gradient scaler skips, are
    handled. Each checkpoint folder gets the Sparsifier's state, and a resumed run continues with it. `zero_share` and
    `strength` are added to the Trainer's logs.
    """

    def __init__(self, make: Callable[[nn.Module, int], Sparsifier]) -> None:
        self._make = make
        self._handle: RemovableHandle | None = None
        self.sparsifier: Sparsifier | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the Sparsifier, or give it the state of a checkpoint, and attach it to the optimizer."""
        optimizer = kwargs["optimizer"]
        self.sparsifier = self._make(kwargs["model"], state.max_steps)
        if state.global_step:
            folder = args.resume_from_checkpoint or _checkpoint(args, state)
            self.sparsifier.load_state_dict(load_state(Path(str(folder)) / _FILE))
        self._handle = self.sparsifier.attach(getattr(optimizer, "optimizer", optimizer))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add `zero_share` and `strength` to the logs."""
        if self.sparsifier is not None:
            progress = self.sparsifier.progress()
            for logged in (kwargs.get("logs"), *state.log_history[-1:]):
                if logged is not None:
                    logged.update(progress)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the state to the folder of the checkpoint."""
        assert self.sparsifier is not None
        self.sparsifier.check_processes()
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            save_state(folder / _FILE, self.sparsifier.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach the Sparsifier from the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint of the present step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
