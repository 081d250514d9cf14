"""Measure BatchNorm statistics anew: after a cut of channels that were not zero, the layers left see other inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsekit.errors import InputError
from sparsekit.evaluation import eval_mode


@torch.no_grad()
def recalibrate_batchnorms(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running mean and variance of every BatchNorm by their average over `batches`; returns how many.

    In place; no weight changes. `batches` are inputs as in training, on the model's device; a few dozen are enough.
    Everything but the BatchNorms is in eval mode meanwhile, and training flags and momenta come back. A lossless cut
    needs none of this. Raises InputError if there is no batch. On any error the old statistics come back.

    Source: Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", 2020 (adaptive
    BatchNorm).
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return 0
    before = [(norm, norm.momentum, {k: v.clone() for k, v in norm.named_buffers()}) for norm in norms]
    complete = False
    try:
        with eval_mode(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            for batch in batches:
                model(batch)
                complete = True
        if not complete:
            raise InputError("there is no batch to take BatchNorm statistics from; give at least one")
    except BaseException:
        complete = False
        raise
    finally:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            if not complete:
                for key, buffer in norm.named_buffers():
                    buffer.copy_(buffers[key])
    return len(norms)
