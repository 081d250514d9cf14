"""sparsekit in Lightning's Trainer: one callback, and the zeros are there when training ends.

From the repository's root:

    pip install -e '.[lightning]'
    python examples/lightning_trainer.py
"""

from __future__ import annotations

import argparse

import lightning
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sparsekit as sk
from sparsekit.integrations.lightning import SparsifierCallback

EXAMPLE = torch.zeros(1, 3, 32, 32)


class Classifier(lightning.LightningModule):
    """Any LightningModule; nothing in it knows of sparsekit."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("test_resnet", num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def digits() -> TensorDataset:
    """1,797 handwritten digits: images (3, 32, 32) in [-1, 1] and labels."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return TensorDataset(images, torch.tensor(raw.target))


def main(epochs: int) -> None:
    """Train with the penalty, cut, prove."""
    lightning.seed_everything(0, verbose=False)
    module = Classifier()
    groups = sk.find_groups(module.net, EXAMPLE, round_to=8)
    callback = SparsifierCallback(
        lambda module, total_steps: sk.Sparsifier(
            module.net, groups, strength=sk.AutoStrength({"macs": 0.5}, total_steps)
        )
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(digits(), batch_size=64, shuffle=True))
    net = module.net.eval()
    plan = sk.make_plan(groups, sk.keep_masks(net, groups))
    pruned = sk.apply_plan(net, plan)
    agreement = sk.verify_cut(net, pruned, plan)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (net, pruned))
    print(f"parameters {before:,} -> {after:,}; masked and cut model differ by {agreement.max_rel:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="sparsekit in Lightning's Trainer")
    parser.add_argument("--epochs", type=int, default=8)
    main(parser.parse_args().epochs)
