"""Learn from the dense model for a while: gently, without labels, and keep what was best on images kept apart."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from sparsekit.errors import TrainingError
from sparsekit.evaluation import copied, eval_mode
from sparsekit.repair.divergence import Divergence, compared, kl
from sparsekit.repair.held_out import HeldOut
from sparsekit.structure.plan import PrunePlan

# Ten times as much destroys what the repair has won.
_LR = 5e-5
_WARMUP_STEPS = 10
_BATCH = 16
# Mild: the few images there are stay what they are.
_CROP = (0.6, 1.0)
_CHECKS = 8
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Learned:
    """The model that was best on the images kept apart, its divergence there, and whether Ctrl-C ended the learning."""

    model: nn.Module
    divergence: Divergence
    interrupted: bool = False


@dataclass(frozen=True)
class DistillProgress:
    """One moment of learning: steps taken, the share of the time that is over, and the loss now."""

    steps: int
    share: float
    loss: float


def distill(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PrunePlan,
    images: Tensor,
    held_out: HeldOut,
    *,
    seconds: float = math.inf,
    steps: int | None = None,
    stages: Sequence[str] = (),
    at_once: int = _BATCH,
    lr: float = _LR,
    seed: int = 0,
    progress: Callable[[DistillProgress], None] | None = None,
) -> Learned:
    """Return the pruned model after learning from the dense one, and its divergence on the images kept apart.

    The loss is the divergence of the outputs, KL(dense || pruned), and for each of `stages` the squared difference of
    the channels that stayed, over their variance. Adam, with ten steps of warm-up and a cosine; norms and dropout as in
    evaluation; random crops of 0.6 to 1 of an image, and flips, for images of four dimensions. It takes `steps` of 16
    images, of which `at_once` pass together, or, where these are None, `seconds`; Ctrl-C ends it. Both models stay as
    they are; the result is the best seen: the start, eight moments, and three weights between start and end.

    Raises TrainingError if the loss is not finite from the first step on.
    """
    student = copied(pruned)
    best, best_state = held_out.of(student), _state(student)
    flags = [(p, p.requires_grad) for p in student.parameters()]
    trained = [p for p in student.parameters() if p.is_floating_point()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    stages = [stage for stage in stages if not any(stage.startswith(f"{b.module}.") for b in plan.blocks)]
    started, n, check, interrupted = time.monotonic(), 0, 1, False
    with ExitStack() as open_, torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        open_.enter_context(eval_mode(dense))
        open_.enter_context(eval_mode(student))
        theirs = open_.enter_context(_noting(dense, stages))
        ours = open_.enter_context(_noting(student, stages))
        rows = _kept_rows(student, plan, stages)
        try:
            for batch in _batches(images, generator):
                share = _share(time.monotonic() - started, seconds, n, steps)
                if share >= check / _CHECKS:
                    check = int(share * _CHECKS) + 1
                    best, best_state = _better(student, held_out, best, best_state)
                if share >= 1:
                    between, found = held_out.nearest_between(pruned, student)
                    if found.kl < best.kl:
                        best, best_state = found, _state(between)
                    break
                for settings in optimizer.param_groups:
                    warm = min((n + 1) / _WARMUP_STEPS, 1.0)
                    settings["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * share))
                optimizer.zero_grad()
                with torch.no_grad():
                    target = compared(dense(batch), held_out.kind)
                loss = 0.0
                for part in _parts(batch, [*target, *theirs.values()], at_once):
                    output = compared(student(batch[part]), held_out.kind)
                    own = _loss(part, target, output, theirs, ours, rows)
                    own = own * ((part.stop - part.start) / len(batch))
                    loss += float(own.detach())
                    torch.autograd.backward(own)
                if not math.isfinite(loss):
                    if n == 0:
                        raise TrainingError(
                            "learning from the dense model: the loss is not finite at the first step"
                        )
                    break
                optimizer.step()
                n += 1
                if progress is not None:
                    progress(DistillProgress(n, min(share, 1.0), loss))
        except KeyboardInterrupt:
            interrupted = True
    with torch.no_grad():
        for tensor, values in zip(_tensors(student), best_state, strict=True):
            tensor.copy_(values)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
        parameter.grad = None
    return Learned(student, best, interrupted)


def _share(spent: float, seconds: float, done: int, steps: int | None) -> float:
    """How much of the steps is over or, without steps, of the seconds; 1 or more at the end."""
    if steps is not None:
        return done / steps if steps else 1.0
    return spent / seconds if seconds > 0 else 1.0


def _parts(batch: Tensor, given: Sequence[Tensor], at_once: int) -> Iterator[slice]:
    """Split a batch into parts of about one size; whole, if what the dense model gives cannot be split by image."""
    n = len(batch)
    if any(tensor.dim() == 0 or len(tensor) % n for tensor in given):
        at_once = n
    count = -(-n // at_once)
    for i in range(count):
        yield slice(i * n // count, (i + 1) * n // count)


def _of_part(tensor: Tensor, part: slice, output: Tensor) -> Tensor:
    """What a tensor of the whole batch has for a part of it: some models stack windows of an image along the batch."""
    each = len(output) // (part.stop - part.start)
    return tensor[part.start * each : part.stop * each]


def _loss(
    part: slice,
    target: Sequence[Tensor],
    output: Sequence[Tensor],
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    rows: Mapping[str, Sequence[Tensor]],
) -> Tensor:
    """The loss of a part of a batch. `target` and `theirs` are of the whole batch, which variances are taken from."""
    loss = torch.zeros((), device=output[0].device)
    for t, o in zip(target, output, strict=True):
        loss = loss + kl(_of_part(t, part, o), o, variance=t.float().var())
    for name, features in ours.items():
        wanted = _of_what_stays(theirs[name].detach(), features, rows[name])
        if wanted is not None:
            error = (features - _of_part(wanted, part, features)).square().mean()
            loss = loss + error / wanted.var().clamp_min(_SMALLEST)
    return loss


def _better(
    student: nn.Module, held_out: HeldOut, best: Divergence, state: list[Tensor]
) -> tuple[Divergence, list[Tensor]]:
    found = held_out.of(student)
    return (found, _state(student)) if found.kl < best.kl else (best, state)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _state(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in _tensors(model)]


def _batches(images: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw batches without end: all images once, in another order each time, slightly changed."""
    while True:
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, max(len(order) - _BATCH + 1, 1), _BATCH):
            batch = images[order[start : start + _BATCH].to(images.device)]
            yield _changed(batch) if batch.dim() == 4 else batch


def _changed(batch: Tensor) -> Tensor:
    size = (batch.shape[2], batch.shape[3])
    change = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=_CROP, ratio=(0.9, 1.1), antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    changed = torch.stack([change(image) for image in batch])
    if batch.is_contiguous(memory_format=torch.channels_last):
        changed = changed.contiguous(memory_format=torch.channels_last)
    return changed


@contextmanager
def _noting(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Hold what each named module gives, as of the latest run."""
    noted: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: noted.update({name: output.clone()})

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


def _kept_rows(model: nn.Module, plan: PrunePlan, stages: Sequence[str]) -> dict[str, list[Tensor]]:
    """Return by stage what its layers keep of their outputs, where they lose any; the last layer first."""
    cuts = {
        cut.tensor.rpartition(".")[0]: cut
        for cut in plan.cuts
        if cut.role == "producer" and cut.tensor.endswith("weight")
    }
    return {
        stage: [
            torch.tensor(cuts[name].keep)
            for name, _ in reversed(list(model.named_modules()))
            if name in cuts and (name == stage or name.startswith(f"{stage}."))
        ]
        for stage in stages
    }


def _of_what_stays(wanted: Tensor, features: Tensor, rows: Sequence[Tensor]) -> Tensor | None:
    """Return the channels of a dense stage's output that the pruned one still has; None if they are not found."""
    if wanted.shape[1:] == features.shape[1:]:
        return wanted
    dim = 1 if wanted.dim() == 4 and wanted.shape[2:] == features.shape[2:] else -1
    for keep in rows:
        if len(keep) == features.shape[dim] and int(keep.max()) < wanted.shape[dim]:
            stays = wanted.index_select(dim, keep.to(wanted.device))
            return stays if stays.shape[1:] == features.shape[1:] else None
    return None
