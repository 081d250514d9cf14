"""sparsekit in Hugging Face's Trainer: one callback, and the zeros are there when training ends.

From the repository's root:

    pip install -e '.[transformers]'
    python examples/hugging_face_trainer.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import sparsekit as sk
from sparsekit.integrations.transformers import SparsifierCallback

EXAMPLE = torch.zeros(1, 3, 32, 32)


class Classifier(nn.Module):
    """What the Trainer asks of a model: keywords in, a dictionary with the loss out. Nothing knows of sparsekit."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("test_resnet", num_classes=10)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(images)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def digits() -> list[dict[str, Any]]:
    """1,797 handwritten digits: images (3, 32, 32) in [-1, 1] and labels."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return [{"images": x, "labels": int(y)} for x, y in zip(images, raw.target, strict=True)]


def main(epochs: int, output: Path) -> None:
    """Train with the penalty, cut, prove."""
    model = Classifier()
    groups = sk.find_groups(model.net, EXAMPLE, round_to=8)
    callback = SparsifierCallback(
        lambda model, total_steps: sk.Sparsifier(
            model.net, groups, strength=sk.AutoStrength({"macs": 0.5}, total_steps)
        )
    )
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        remove_unused_columns=False,
    )
    Trainer(model, arguments, train_dataset=digits(), callbacks=[callback]).train()
    net = model.net.eval()
    plan = sk.make_plan(groups, sk.keep_masks(net, groups))
    pruned = sk.apply_plan(net, plan)
    agreement = sk.verify_cut(net, pruned, plan)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (net, pruned))
    print(f"parameters {before:,} -> {after:,}; masked and cut model differ by {agreement.max_rel:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="sparsekit in Hugging Face's Trainer")
    parser.add_argument("--epochs", type=int, default=8)
    with TemporaryDirectory() as folder:
        main(parser.parse_args().epochs, Path(folder))
