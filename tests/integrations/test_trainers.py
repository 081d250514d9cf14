"""The hook in other people's loops: wrappers, scalers, accumulation, several processes, Lightning, Hugging Face."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from plain import find_groups
from plain import sparsifier as sparsifier_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

import sparsekit as sk
from sparsekit.integrations import lightning as for_lightning
from sparsekit.integrations import transformers as for_transformers

EXAMPLE = torch.zeros(1, 3, 8, 8)
pytestmark = pytest.mark.filterwarnings("ignore")  # what the trainers have to say is not ours


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def images(n: int = 128) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (n,), generator=generator)
    patterns = torch.randn(4, 3, 8, 8, generator=generator)
    return patterns[labels] + 0.5 * torch.randn(n, 3, 8, 8, generator=generator), labels


def sparsified(model: nn.Module, **arguments: Any) -> sk.Sparsifier:
    plain = getattr(model, "_orig_mod", model)
    groups = find_groups(plain, EXAMPLE)
    return sparsifier_of(model, groups, **{"strength": 0.05, **arguments})


def train(model: nn.Module, after: Callable[[torch.optim.Optimizer], object], steps: int = 6) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = images()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after(optimizer)


def test_attached_is_the_same_as_called() -> None:
    called, attached = convnet(), convnet()
    train(called, sparsified(called).step)
    hook = sparsified(attached)
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.1, momentum=0.9)
    handle = hook.attach(optimizer)
    x, y = images()
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(attached(x), y).backward()
        optimizer.step()
    for ours, expected in zip(attached.parameters(), called.parameters(), strict=True):
        assert torch.equal(ours, expected)
    handle.remove()
    optimizer.step()  # the optimizer's alone
    assert hook.state_dict()["steps"] == 6


def test_a_compiled_model_is_sparsified_as_the_model_inside() -> None:
    plain, inside = convnet(), convnet()
    compiled = torch.compile(inside, backend="eager")
    assert isinstance(compiled, nn.Module)
    train(plain, sparsified(plain).step)
    train(compiled, sparsified(compiled).step)
    for ours, expected in zip(inside.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)


def test_what_a_gradient_scaler_skips_is_skipped() -> None:
    model = convnet()
    hook = sparsified(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hook.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x, y = images()
    for step in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert hook.state_dict()["steps"] == 3
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_channels_last_weights_are_shrunk_alike() -> None:
    plain, other = convnet(), convnet().to(memory_format=torch.channels_last)
    for model in (plain, other):
        train(model, sparsified(model, penalty="l1").step)
    for ours, expected in zip(other.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)


PROGRAM = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = sys.argv[1:]
from test_trainers import EXAMPLE, F, convnet, images
import sparsekit as sk
dist.init_process_group("gloo")
rank = dist.get_rank()
model = convnet()
groups = sk.find_groups(model, EXAMPLE, round_to=1, min_channels=1)
wrapped = DistributedDataParallel(model)
hook = sk.Sparsifier(wrapped, groups, strength=sk.AutoStrength({"macs": 0.5}, total_steps=30))
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
hook.attach(optimizer)
x, y = images()
for _ in range(30):
    optimizer.zero_grad()
    F.cross_entropy(wrapped(x[rank::2]), y[rank::2]).backward()
    optimizer.step()
hook.check_processes()
masks = torch.cat([mask for _, mask in sorted(sk.keep_masks(model, groups, method="zeros").items())]).int()
both = [torch.zeros_like(masks) for _ in range(2)]
dist.all_gather(both, masks)
assert torch.equal(*both) and 0 < int(masks.sum()) < len(masks)
if rank == 1:
    hook._alive[: groups.free[0].n_channels].zero_()
try:
    hook.check_processes()
except sk.TrainingError as error:
    print(f"rank {rank}: {error}", flush=True)
dist.barrier()
os._exit(0)  # gloo's threads may abort a process that ends by itself
"""


def test_two_processes_get_the_same_zeros_and_a_drift_is_noticed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, program, Path(__file__).parent, Path(__file__).parents[1]],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the processes disagree on") == 2


# ---------------------------------------------------------------------------------------------- Lightning


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = convnet()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def lightning_run(epochs: int, folder: Path, **arguments: Any) -> tuple[Module, Any]:
    module = Module()
    groups = find_groups(module.net, EXAMPLE)
    callback = for_lightning.SparsifierCallback(
        lambda module, total: sparsifier_of(
            module.net, groups, strength="auto", total_steps=32, target={"macs": 0.5}
        )
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        accumulate_grad_batches=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(TensorDataset(*images()), batch_size=16), **arguments)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    assert callback.sparsifier is not None
    assert callback.sparsifier.state_dict()["steps"] == trainer.global_step
    assert trainer.callback_metrics["zero_share"] == callback.sparsifier.progress()["zero_share"]
    return module, callback


def test_lightning_steps_once_an_update_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    whole, callback = lightning_run(8, tmp_path)
    assert callback.sparsifier.state_dict()["steps"] == 32
    groups = find_groups(whole.net, EXAMPLE)
    plan = sk.make_plan(groups, sk.keep_masks(whole.net, groups, method="zeros"))
    assert plan.cuts
    lightning_run(4, tmp_path)
    resumed, _ = lightning_run(8, tmp_path, ckpt_path=tmp_path / "4.ckpt")
    for ours, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, expected)


# ------------------------------------------------------------------------------------------ Hugging Face


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = convnet()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(images)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def hugging_face_run(folder: Path, resume: str | None = None) -> tuple[Model, Any]:
    model = Model()
    groups = find_groups(model.net, EXAMPLE)
    callback = for_transformers.SparsifierCallback(
        lambda model, total: sparsifier_of(
            model.net, groups, strength="auto", total_steps=total, target={"macs": 0.5}
        )
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=8,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        use_cpu=True,
        save_strategy="steps",
        save_steps=16,
        logging_steps=8,
        report_to=[],
        disable_tqdm=True,
        seed=0,
        remove_unused_columns=False,
    )
    examples = [{"images": x, "labels": int(y)} for x, y in zip(*images(), strict=True)]
    trainer = Trainer(model, arguments, train_dataset=examples, callbacks=[callback])  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume)
    assert callback.sparsifier is not None
    assert callback.sparsifier.state_dict()["steps"] == trainer.state.global_step == 32
    return model, trainer


def test_hugging_face_steps_once_an_update_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    whole, trainer = hugging_face_run(tmp_path)
    assert any("zero_share" in entry for entry in trainer.state.log_history)
    groups = find_groups(whole.net, EXAMPLE)
    assert sk.make_plan(groups, sk.keep_masks(whole.net, groups, method="zeros")).cuts
    resumed, _ = hugging_face_run(tmp_path, str(tmp_path / "checkpoint-16"))
    for ours, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, expected)
