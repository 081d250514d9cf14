"""Seed random states, the same in every process and every resumed run."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

from sparsekit.training.options import Loader


def seed_everything(seed: int, phase: str, epoch: int) -> None:
    """Seed Python, NumPy and torch (all devices) from a hash of the three arguments."""
    value = _stable_seed(seed, phase, epoch)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def seed_generators(loader: Loader, key: tuple[object, ...]) -> None:
    """Seed the generators of a loader and its samplers from a hash of the key."""
    holders = (loader, getattr(loader, "sampler", None), getattr(loader.batch_sampler, "sampler", None))
    generators = [getattr(holder, "generator", None) for holder in holders]
    for generator in (*generators, getattr(loader, "synchronized_generator", None)):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(_stable_seed(*key))


def _stable_seed(*values: object) -> int:
    digest = hashlib.sha256("/".join(map(str, values)).encode()).digest()
    return int.from_bytes(digest[:8], "little") % 2**63
