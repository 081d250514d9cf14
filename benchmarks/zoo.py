"""How far sparsekit gets through timm: the whole chain on one architecture of each model file, Torch-Pruning beside it.

    python benchmarks/zoo.py                     the models of benchmarks/zoo.txt
    python benchmarks/zoo.py --all               up to four of every timm model file
    python benchmarks/zoo.py --models names.txt --output /tmp/zoo --docs /tmp/zoo/zoo.md

Each model runs in a process of its own, within a time limit. The first stage that fails is its status:

    build      a dense model with random weights, no scale and no branch left at zero
    forward    a forward and a backward pass at batch 1, the fastest of three: the unit the analysis is timed in
    analyse    find_groups
    cut        half the units of every free group go, drawn at random with a fixed seed
    prove      verify_cut: the cut model equals the masked one; so it does where each group loses a random share of its
               units, from none to three quarters
    api        what timm's own methods promise still holds (only where it held for the dense model)
    train      an SGD step at batch 2; no parameter loses its gradient
    cut_again  half of every group of the cut model
    save, load an artifact, read by a fresh process that must give equal logits
    export, parity   ONNX, and ONNX Runtime within 1e-3 of the largest logit

`repair` is a part of its own, which `--only repair` runs alone. Half the units of every free group go, at random, as
far as their rounding allows, without and with `repair_weights`; both cuts are compared with the dense model on images
that the repair has not seen. Images are coloured blobs: they differ from each other and have fewer dimensions than
pixels, as photographs do, while the outputs of a random network hardly differ on white noise. BatchNorms first get the
statistics of such images, as if they had been trained on them. A constant answer is compared too: an error above its
own says that a cut model has nothing left of what the dense one tells apart.

Torch-Pruning cuts the same dense model (magnitude, half of every layer, the classifier left alone) with the attention
patch of its authors' timm example; its stages are prune, forward, export and parity. Results are written after
every model: `--resume` goes on after an interruption. Fractions lie in [0, 1].
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    flat_tensors,
    machine_text,
    random_mask,
    versions_text,
    wake_constants_,
    write_json,
    write_text,
)
from rich.console import Console
from rich.progress import Progress, track

import sparsekit as sk  # torch comes with the first use of a function, which the parent never makes

if TYPE_CHECKING:
    from torch import Tensor, nn

HERE = Path(__file__).parent
NUM_CLASSES = 1000
MAX_PARAMS = 60e6
MODELS_A_FILE = 4
CUT_TOLERANCE = 1e-4
# Random images that a repair is fitted to, others that it is judged on, and how many run at once.
REPAIR_IMAGES, REPAIR_JUDGED, REPAIR_BATCH = 32, 16, 8
# Each image is a sum of grids of so many points a side, enlarged: a colour, and blobs.
GRIDS = (1, 4)
PARITY_LIMIT = 1e-3
Record = dict[str, Any]

# Runs in a process that has seen nothing of the model, in this folder: artifact, input, output, threads.
LOAD_PROGRAM = """
import sys, torch, sparsekit as sk
from common import flat_tensors
from safetensors.torch import load_file, save_file
artifact, inputs, outputs, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
with torch.no_grad():
    logits = flat_tensors(sk.load(artifact)(load_file(inputs)["input"]))[0]
save_file({"logits": logits.contiguous()}, outputs)
"""


# ---- which models ----------------------------------------------------------------------------------------------------


def read_names(file: Path) -> list[str]:
    """Names, one a line; what follows a # is a comment."""
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def sub_family(name: str) -> str:
    """The leading letters of a name: resnet for test_resnet and resnet50d, resnext for resnext50_32x4d."""
    bare = re.sub(r"^(test|legacy|tf)_", "", name)
    match = re.match(r"[a-z]+", bare)
    return match[0] if match else bare


def pick(n_params: Mapping[str, int], count: int = MODELS_A_FILE) -> list[str]:
    """The smallest of each sub-family, smallest first; the next smallest where there are fewer than `count`."""
    small = sorted((n, name) for name, n in n_params.items() if n < MAX_PARAMS)
    smallest: dict[str, str] = {}
    for _, name in small:
        smallest.setdefault(sub_family(name), name)
    chosen = list(smallest.values())[:count]
    rest = [name for _, name in small if name not in chosen]
    return chosen + rest[: count - len(chosen)]


def names_of_every_file() -> list[str]:
    """Up to four models of each timm model file. Builds all of timm without weights, which takes minutes."""
    import timm

    modules = {module: timm.list_models(module=module) for module in sorted(timm.list_modules())}
    chosen = []
    for names in track(modules.values(), description="counting parameters of every timm model"):
        sizes = {name: _count_without_weights(name) for name in names}
        chosen += pick({name: n for name, n in sizes.items() if n is not None})
    return chosen


def _count_without_weights(name: str) -> int | None:
    import timm
    import torch

    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
    except Exception:  # whatever a model's constructor raises: it cannot be chosen by size
        return None
    return sum(parameter.numel() for parameter in model.parameters())


# ---- the chain of one model ------------------------------------------------------------------------------------------


@dataclass
class Chain:
    """What the stages of one model hand to each other; `figures` end up in its record."""

    name: str
    folder: Path
    threads: int
    figures: Record = field(default_factory=dict)
    model: Any = None
    example: Any = None
    groups: Any = None
    plan: Any = None
    pruned: Any = None


Stage = Callable[[Chain], None]


def build(chain: Chain) -> None:
    """The dense model in eval mode and one example input."""
    import timm
    import torch
    from timm.data.config import resolve_data_config

    torch.manual_seed(0)
    chain.model = timm.create_model(chain.name, num_classes=NUM_CLASSES, pretrained=False)
    size = resolve_data_config({}, model=chain.model)["input_size"]  # type: ignore[no-untyped-call]
    chain.example = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    enliven_(chain.model, size)
    chain.model.eval()


def enliven_(model: nn.Module, input_size: Sequence[int]) -> None:
    """Bring a fresh model nearer to a trained one: no parameter stays constant, BatchNorms get a batch's statistics."""
    import torch

    generator = torch.Generator().manual_seed(1)
    wake_constants_(model, generator)
    settle_norms_(model, [torch.randn(4, *input_size, generator=generator)])


def settle_norms_(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Give every BatchNorm the mean statistics of these batches; the model is left in training mode."""
    import torch

    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with (
        torch.no_grad(),
        contextlib.suppress(Exception),
    ):  # one that does not train keeps the statistics it has
        model.train()
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def forward(chain: Chain) -> None:
    """Seconds of a forward and a backward pass, and the dense MACs."""
    import torch

    model = copy.deepcopy(chain.model).train()
    for module in model.modules():  # at batch 1 a BatchNorm behind global pooling has nothing to normalise by
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        _backward(model(chain.example))
        seconds.append(time.perf_counter() - started)
    chain.figures["forward_backward_seconds"] = min(seconds)
    chain.figures["macs"] = _macs(chain.model, chain.example)


def _macs(model: nn.Module, example: Tensor) -> int:
    """Of a copy without gradients: torch's counter stumbles over a parameter that is itself a module's input."""
    return sk.count_macs(copy.deepcopy(model).requires_grad_(False), example)


def _backward(outputs: Any) -> None:
    import torch

    loss = torch.stack([output.mean() for output in flat_tensors(outputs)]).sum()
    loss.backward()  # type: ignore[no-untyped-call]


def analyse(chain: Chain) -> None:
    """The groups, how long they took to find, and what stays whole."""
    started = time.perf_counter()
    chain.groups = sk.find_groups(chain.model, chain.example)
    seconds = time.perf_counter() - started
    limit = 3 * chain.figures["forward_backward_seconds"] + 5
    chain.figures["analysis_ratio_ok"] = seconds <= limit
    chain.figures |= frozen_share(chain.groups)


def frozen_share(groups: sk.ChannelGroups) -> Record:
    """Share of the parameters in tensors that no free group touches, and why: groups by reason, the main reason."""
    touched = {member.tensor for group in groups.free for member in group.members}
    sizes = {name: math.prod(groups.tensor_shapes[name]) for name in groups.parameters}
    whole = {name: size for name, size in sizes.items() if name not in touched}
    by_reason: Counter[str] = Counter()
    counted: set[str] = set()
    frozen = [group for group in groups if group.frozen]
    for group in frozen:
        tensors = {member.tensor for member in group.members} & whole.keys() - counted
        counted |= tensors
        by_reason[_reason(group.frozen)] += sum(whole[tensor] for tensor in tensors)
    by_reason["in no group"] = sum(size for name, size in whole.items() if name not in counted)
    main, size = by_reason.most_common(1)[0]
    return {
        "frozen": sum(whole.values()) / max(1, sum(sizes.values())),
        "frozen_reasons": dict(Counter(_reason(group.frozen) for group in frozen).most_common()),
        "frozen_main_reason": main if size else None,
    }


def _reason(text: str) -> str:
    return re.sub(r"\d+", "N", text)


def cut(chain: Chain) -> None:
    """Half the units of every free group removed, and what that saved."""
    chain.plan, chain.pruned = halve(chain.model, chain.groups, seed=0)
    chain.figures["params_removed"] = 1 - sk.count_params(chain.pruned) / sk.count_params(chain.model)
    macs = _macs(chain.pruned, chain.example)
    chain.figures["macs_removed"] = 1 - macs / chain.figures["macs"] if chain.figures["macs"] else 0.0


def halve(
    model: nn.Module, groups: sk.ChannelGroups, seed: int, *, rounded: bool = False
) -> tuple[sk.PrunePlan, nn.Module]:
    """Remove n // 2 of the n units of every free group, drawn at random; `rounded`: as many as may go."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in groups.free:
        mask = torch.ones(group.n_channels, dtype=torch.bool)
        order = torch.randperm(group.n_channels, generator=generator)
        mask[order[: group.n_channels - n_kept(group, rounded=rounded)]] = False
        masks[group.name] = mask
    plan = sk.make_plan(groups, masks)
    return plan, sk.apply_plan(model, plan)


def n_kept(group: sk.ChannelGroup, *, rounded: bool) -> int:
    """Half of the units; `rounded`: up to a number that the group's rounding allows."""
    half = group.n_channels - group.n_channels // 2
    if not rounded:
        return half
    multiple, least = group.rounding.multiple, group.rounding.least
    return min(-(-max(half, least) // multiple) * multiple, group.n_channels)


def prove(chain: Chain) -> None:
    """The larger figure of both cuts: sizes that agree by chance differ in one of them."""
    shares = random_shares(chain.groups)
    cuts = ((chain.plan, chain.pruned), (shares, sk.apply_plan(chain.model, shares)))
    found = [sk.verify_cut(chain.model, cut, plan, tolerance=CUT_TOLERANCE).max_rel for plan, cut in cuts]
    chain.figures["max_rel"] = max(found)


def random_shares(groups: sk.ChannelGroups) -> sk.PrunePlan:
    """A plan by which each free group loses a share of its own, drawn at random."""
    draw = random.Random(0)
    return sk.make_plan(groups, {group.name: random_mask(group, draw) for group in groups.free})


def api(chain: Chain) -> None:
    """True where timm's method works on the cut model, False where it did only on the dense one, else None."""
    outcome: dict[str, bool | None] = {}
    complaints = []
    for name, check in API_CHECKS.items():
        complaint = _complaint(check, chain.pruned, chain.example)
        works_dense = not complaint or not _complaint(check, chain.model, chain.example)
        outcome[name] = not complaint if works_dense else None
        if complaint and works_dense:
            complaints.append(f"{name}: {complaint}")
    chain.figures["api"] = outcome
    if complaints:
        raise ValueError("; ".join(complaints))


def _complaint(check: Callable[[Any, Tensor], object], model: nn.Module, example: Tensor) -> str:
    try:
        check(copy.deepcopy(model), example)
    except Exception as error:  # a model's own code may raise anything
        return first_line(error)
    return ""


def _runs_features(model: Any, example: Tensor) -> None:
    import torch

    with torch.no_grad():
        model.forward_features(example)


def _runs_head(model: Any, example: Tensor) -> None:
    import torch

    with torch.no_grad():
        _expect(model.forward_head(model.forward_features(example)), (1, NUM_CLASSES))


def _takes_new_classes(model: Any, example: Tensor) -> None:
    import torch

    model.reset_classifier(7)
    with torch.no_grad():
        _expect(model.eval()(example), (1, 7))


def _runs_in_training(model: Any, example: Tensor) -> None:
    import torch

    model.train()(torch.cat([example, -example]))


def _checkpoints_gradients(model: Any, example: Tensor) -> None:
    import torch

    model.set_grad_checkpointing(True)
    _backward(model.train()(torch.cat([example, -example])))


def _expect(logits: Any, shape: tuple[int, ...]) -> None:
    found = tuple(logits.shape)
    if found != shape:
        raise ValueError(f"expected logits of shape {shape}, got {found}")


API_CHECKS: dict[str, Callable[[Any, Tensor], object]] = {
    "forward_features": _runs_features,
    "forward_head": _runs_head,
    "get_classifier": lambda model, example: model.get_classifier(),
    "reset_classifier": _takes_new_classes,
    "train": _runs_in_training,
    "set_grad_checkpointing": _checkpoints_gradients,
}


def train(chain: Chain) -> None:
    """One step of the cut model, where the dense one can be trained: a finite loss, and no gradient lost."""
    try:
        _, expected = _sgd_step(chain.model, chain.example)
    except Exception as error:
        chain.figures["dense_train_error"] = first_line(error)
        return
    loss, found = _sgd_step(chain.pruned, chain.example)
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    # A gain is gone, not lost, where a standardised convolution became the plain one it computes.
    there = {name for name, _ in chain.pruned.named_parameters()}
    if missing := sorted((expected & there) - found):
        raise ValueError(f"{len(missing)} parameters have lost their gradient: {', '.join(missing[:3])}")


def _sgd_step(model: nn.Module, example: Tensor) -> tuple[float, set[str]]:
    """Loss before a step on two inputs, and the names of the parameters that got a gradient; `model` stays."""
    import torch
    from torch.nn import functional as F

    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    logits = [x for x in flat_tensors(model(torch.cat([example, -example]))) if x.dim() == 2]
    loss = torch.stack([F.cross_entropy(x, torch.tensor([0, 1])) for x in logits]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss), {name for name, p in model.named_parameters() if p.grad is not None}


def cut_again(chain: Chain) -> None:
    """A cut model is a model: analysed, cut and run once more."""
    import torch

    groups = sk.find_groups(chain.pruned, chain.example)
    _, smaller = halve(chain.pruned, groups, seed=1)
    with torch.no_grad():
        smaller.eval()(chain.example)


def save(chain: Chain) -> None:
    """The once cut model, by nothing but its timm name."""
    sk.save(chain.pruned, chain.folder / "artifact", plan=chain.plan)


def load(chain: Chain) -> None:
    """A fresh process reads the artifact and gives the same logits, bit by bit."""
    import torch
    from safetensors.torch import load_file, save_file

    inputs, outputs = chain.folder / "input.safetensors", chain.folder / "logits.safetensors"
    save_file({"input": chain.example}, inputs)
    words = [str(word) for word in (chain.folder / "artifact", inputs, outputs, chain.threads)]
    finished = subprocess.run(
        [sys.executable, "-c", LOAD_PROGRAM, *words], capture_output=True, text=True, cwd=HERE
    )
    if finished.returncode:
        raise RuntimeError((finished.stderr.strip().splitlines() or ["the process died"])[-1])
    # Through train(): it drops tensors that some timm models compute in eval mode and keep.
    model = chain.pruned.train().eval()
    with torch.no_grad():
        expected = flat_tensors(model(chain.example))[0]
    found = load_file(outputs)["logits"]
    if not torch.equal(expected, found):
        raise ValueError(f"the loaded model's logits are off by {float((expected - found).abs().max()):.3g}")


def export(chain: Chain) -> None:
    """ONNX through sparsekit."""
    sk.export_onnx(chain.pruned, chain.folder / "model.onnx", chain.example)


def parity(chain: Chain) -> None:
    """ONNX Runtime gives the logits of the cut model."""
    model = chain.model if chain.pruned is None else chain.pruned
    found = sk.check_parity(model, chain.folder / "model.onnx", chain.example).max_rel
    chain.figures["parity_max_rel"] = found
    if not found <= PARITY_LIMIT:
        raise ValueError(f"ONNX Runtime's logits are off by {found:.3g} of the largest")


# ---- the same with Torch-Pruning alone -------------------------------------------------------------------------------


def peer_prune(chain: Chain) -> None:
    """Half of every layer by magnitude, in place; the attention modules are told what is left of their heads."""
    import torch_pruning as tp
    from peers import classifier_layers, free_attention_, told_of_its_width_

    before = sk.count_params(chain.model)
    attentions = free_attention_(chain.model)
    pruner = tp.pruner.MagnitudePruner(
        chain.model,
        chain.example,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=classifier_layers(chain.model, NUM_CLASSES),
        num_heads={attention.qkv: attention.num_heads for attention in attentions},
        prune_num_heads=False,
        prune_head_dims=True,
    )
    pruner.step()
    told_of_its_width_(attentions, pruner)
    chain.figures["params_removed"] = 1 - sk.count_params(chain.model) / before


def peer_forward(chain: Chain) -> None:
    """The pruned model runs and still names every class."""
    import torch

    with torch.no_grad():
        _expect(chain.model.eval()(chain.example), (1, NUM_CLASSES))


def peer_export(chain: Chain) -> None:
    """ONNX through torch's exporter as it is."""
    import torch

    torch.onnx.export(
        chain.model, (chain.example,), chain.folder / "model.onnx", dynamo=True, external_data=False
    )


# ---- repair, on its own ----------------------------------------------------------------------------------------------


def repair(chain: Chain) -> None:
    """How far the cut model is from the dense one without and with repair; the repaired cut equals the masked one."""
    images = random_images(REPAIR_IMAGES + REPAIR_JUDGED, chain.example.shape[1:], seed=2)
    fitted, judged = (part.split(REPAIR_BATCH) for part in images.split([REPAIR_IMAGES, REPAIR_JUDGED]))
    dense = chain.model
    settle_norms_(dense, fitted)
    dense.eval()
    groups = sk.find_groups(dense, chain.example)
    plan, plainly_cut = halve(dense, groups, seed=0, rounded=True)

    started = time.perf_counter()
    found = sk.input_statistics(dense, groups, fitted, gradients=False)
    whole = sk.repair_weights(dense, plan, found)
    repaired = sk.apply_plan(whole, plan)
    chain.figures["repair_seconds"] = round(time.perf_counter() - started, 3)

    readers = {c.tensor for c in plan.cuts if c.role == "consumer" and c.drop}
    chain.figures["repaired_layers"] = len(readers & found.layers.keys())
    chain.figures["left_out"] = {layer: why for layer, why in found.left_out.items() if layer in readers}

    target = outputs_on(dense, judged)
    always = outputs_on(dense, fitted).mean(0, keepdim=True)
    errors = {
        "cut_error": outputs_on(plainly_cut, judged) - target,
        "repaired_error": outputs_on(repaired, judged) - target,
        "constant_error": always - target,
    }
    for name, difference in errors.items():
        error = float(difference.norm() / target.norm())
        if not math.isfinite(error):
            raise ValueError(f"{name} is {error}")
        chain.figures[name] = error
    sk.verify_cut(whole, repaired, plan, tolerance=CUT_TOLERANCE)


def random_images(n: int, size: Sequence[int], seed: int) -> Tensor:
    """Coloured blobs: sums of random grids that are enlarged to the size of the images."""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(seed)
    channels, *sides = size
    grids = [torch.randn(n, channels, points, points, generator=generator) for points in GRIDS]
    layers = [F.interpolate(grid, sides, mode="bilinear", align_corners=False) for grid in grids]
    return torch.stack(layers).sum(0) / len(GRIDS) ** 0.5


def outputs_on(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """All outputs of a model (images, outputs)."""
    import torch

    # Through train(): it drops tensors that some timm models compute in eval mode and keep.
    model = copy.deepcopy(model)
    model.train()
    model.eval()
    with torch.no_grad():
        rows = [[x.double().flatten(1) for x in flat_tensors(model(batch))] for batch in batches]
    return torch.cat([torch.cat(row, 1) for row in rows])


PARTS: dict[str, dict[str, Stage]] = {
    "sparsekit": {
        "build": build,
        "forward": forward,
        "analyse": analyse,
        "cut": cut,
        "prove": prove,
        "api": api,
        "train": train,
        "cut_again": cut_again,
        "save": save,
        "load": load,
        "export": export,
        "parity": parity,
    },
    "repair": {"build": build, "repair": repair},
    "torch-pruning": {
        "build": build,
        "prune": peer_prune,
        "forward": peer_forward,
        "export": peer_export,
        "parity": parity,
    },
}


def run_stages(part: str, name: str, folder: Path, threads: int) -> None:
    """In the child: stage after stage. The record says at any moment which stage is running or has failed."""
    import timm  # noqa: F401 (the imports take seconds and belong to no stage)
    import torch

    torch.set_num_threads(threads)
    chain, seconds = Chain(name, folder, threads), dict[str, float]()

    def note(status: str, error: str | None = None) -> None:
        write_json(
            folder / "record.json", {"status": status, "error": error, "seconds": seconds, **chain.figures}
        )

    for stage, action in PARTS[part].items():
        note(stage)
        started = time.perf_counter()
        failure = ""
        try:
            action(chain)
        except Exception as error:  # whatever it is, it is the result
            failure = first_line(error).replace(str(folder), ".")
        seconds[stage] = round(time.perf_counter() - started, 3)
        if failure:
            note(stage, failure)
            return
    note("ok")


def first_line(error: Exception) -> str:
    """What went wrong, in a line that fits a table."""
    message = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {message}"[:300]


# ---- the parent: one process after another, results after each -------------------------------------------------------


def run_part(part: str, name: str, threads: int, limit: float) -> Record:
    """The record of one part of one model, from a process that may take `limit` seconds, die or hang."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(prefix="zoo-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, __file__, "--part", part, "--name", name, "--folder", folder]
        log = Path(folder) / "log.txt"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, "--threads", str(threads)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
            end = _wait(process, limit)
        file = Path(folder) / "record.json"
        record: Record = {"status": "build", "error": None, "seconds": {}}
        if file.exists():
            record = json.loads(file.read_text(encoding="utf-8"))
        if end:
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:200]
            record |= {"error": end if end.startswith("no result") else f"{end}; {last}"}
        return record | {"timed_out": end.startswith("no result")}


def _wait(process: subprocess.Popen[bytes], limit: float) -> str:
    """Wait, but not for ever; an empty string, or how the process ended. It and its children die with us."""
    try:
        code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return f"no result within {limit:g} s"
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with code {code}" if code else ""


# What the results hold of each model, besides its name.
KEYS = (
    *("status", "params_removed", "macs_removed", "frozen", "frozen_reasons", "frozen_main_reason"),
    *("seconds", "forward_backward_seconds", "analysis_ratio_ok", "max_rel", "parity_max_rel"),
    *("api", "dense_train_error", "error"),
)
PEER_KEYS = ("status", "seconds", "params_removed", "error")
ERRORS = ("cut_error", "repaired_error", "constant_error")
REPAIR_KEYS = (
    *("status", *ERRORS),
    *("repaired_layers", "left_out", "repair_seconds", "seconds", "error"),
)
# What says that a part has been run.
RUN = {"sparsekit": "status", "repair": "repair", "torch-pruning": "torch_pruning_status"}


def run_model(name: str, arguments: argparse.Namespace) -> Record:
    """What the parts asked for say of one model."""
    record: Record = {"model": name}
    if arguments.only in (None, "repair"):
        repaired = run_part("repair", name, arguments.threads, arguments.timeout)
        record["repair"] = {key: repaired.get(key) for key in REPAIR_KEYS}
    if arguments.only in (None, "sparsekit"):
        found = run_part("sparsekit", name, arguments.threads, arguments.timeout)
        record |= {key: found.get(key) for key in KEYS}
    if arguments.only in (None, "torch-pruning"):
        peer = run_part("torch-pruning", name, arguments.threads, arguments.peer_timeout)
        seconds = {stage: s for stage, s in peer["seconds"].items() if stage != "build"}
        peer["seconds"] = arguments.peer_timeout if peer["timed_out"] else round(sum(seconds.values()), 3)
        peer["status"] = "timeout" if peer["timed_out"] else peer["status"]
        record |= {f"torch_pruning_{key}": peer.get(key) for key in PEER_KEYS}
    return record


def run_all(names: Sequence[str], arguments: argparse.Namespace, console: Console) -> list[Record]:
    """Run what is asked for; results and page are written after each model.

    With `--resume`, models that have the results asked for are left out; with `--only`, the other parts' are kept.
    """
    file = arguments.output / "zoo.json"
    earlier: dict[str, Record] = {}
    if (arguments.resume or arguments.only) and file.exists():
        earlier = {record["model"]: record for record in json.loads(file.read_text(encoding="utf-8"))}
    blank = dict.fromkeys((*KEYS, "repair", *(f"torch_pruning_{key}" for key in PEER_KEYS)))
    records = {name: {"model": name, **blank, **earlier.get(name, {})} for name in [*earlier, *names]}
    wanted = [RUN[part] for part in PARTS if arguments.only in (None, part)]
    open_names = [n for n in names if not (arguments.resume and all(records[n][key] for key in wanted))]
    with Progress(console=console) as progress:
        task = progress.add_task("zoo", total=len(open_names))
        for name in open_names:
            progress.update(task, description=name)
            records[name] |= run_model(name, arguments)
            begun = [r for r in records.values() if any(r[key] for key in RUN.values())]
            write_json(file, begun)
            write_text(arguments.docs, page(begun))
            progress.console.print(
                f"{name}: {_summary(records[name], arguments.only)}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            progress.advance(task)
    return list(records.values())


def _summary(record: Record, only: str | None) -> str:
    """What has just been run, in a line."""
    parts, errors = [], []
    if only in (None, "sparsekit"):
        parts.append(f"{record['status']}, {sum(record['seconds'].values()):.0f} s")
        errors.append(record["error"])
    if only in (None, "repair"):
        found = record["repair"]
        parts.append(f"repair: {found['status']}, {_errors(found)}")
        errors.append(found["error"])
    if only in (None, "torch-pruning"):
        parts.append(f"Torch-Pruning: {record['torch_pruning_status']}")
    return "; ".join([*parts, *(error for error in errors if error)])


def _errors(found: Record) -> str:
    return f"error {_number(found['cut_error'], 3)} cut, {_number(found['repaired_error'], 3)} repaired"


# ---- the page --------------------------------------------------------------------------------------------------------


def page(records: Sequence[Record]) -> str:
    """The results as Markdown: counts, circumstances, a row for each model, what failed and how."""
    machine = sk.describe_machine()
    libraries = ("sparsekit", "torch", "timm", "torch-pruning", "onnx", "onnxruntime")
    circumstances = [
        f"versions: {versions_text(*libraries)}",
        f"machine: {machine_text()}, {machine['os']}, Python {machine['python']}",
        f"command: `{shlex.join(['python', 'benchmarks/zoo.py', *sys.argv[1:]])}`",
    ]
    if "--only" in sys.argv:
        circumstances.append("this command ran one part; the results of the others are those of earlier runs")
    failures = [
        f"- `{record['model']}`, {what['status']}: {_escaped(what['error'] or '')}"
        for record in records
        for what in (record, record["repair"])
        if what and what["status"] not in ("ok", None)
    ]
    return "\n".join(
        [
            "# sparsekit on timm's architectures",
            "",
            "Written by `python benchmarks/zoo.py`, whose docstring says what each stage does. Half the units of "
            "every free group are cut; `removed` and `frozen` are fractions. Frozen parameters lie in tensors that no "
            "free group touches; the reason given is the one that keeps most of them. The status is `ok` or the "
            "first stage that failed.",
            "",
            "Three columns are relative errors of the output against the dense model's, norm over norm, on "
            f"{REPAIR_JUDGED} random images: `cut` of the model that lost half of every free group, as far as the "
            f"rounding allows; `repaired` of the same cut after `repair_weights`, fitted to {REPAIR_IMAGES} other "
            "images; `constant` of the mean of the dense model's outputs on these, whatever the image. The weights "
            "are random: the errors compare the ways, they are not those of trained networks.",
            "",
            *(f"- {line}" for line in counts(records) + circumstances),
            "",
            *table(records),
            *(["", "## What failed", "", *failures] if failures else []),
            "",
        ]
    )


def counts(records: Sequence[Record]) -> list[str]:
    """The figures one wants first."""
    passed = [record for record in records if record["status"] == "ok"]
    lines = [_tally("sparsekit", [record["status"] for record in records if record["status"]])]
    if passed:
        medians = {
            key: statistics.median(record[key] for record in passed)
            for key in ("params_removed", "macs_removed", "frozen")
        }
        nothing = sum(record["params_removed"] == 0 for record in passed)
        lines.append(
            f"of those that are ok, medians: {medians['params_removed']:.2f} of the parameters removed, "
            f"{medians['macs_removed']:.2f} of the MACs, {medians['frozen']:.2f} frozen; nothing to remove in "
            f"{nothing}"
        )
    lines += repair_counts([record["repair"] for record in records if record["repair"]])
    timed = [record["analysis_ratio_ok"] for record in records if record["analysis_ratio_ok"] is not None]
    lines.append(
        f"analysis within 3 forward and backward passes plus 5 s: {sum(timed)} of {len(timed)} analysed"
    )
    if left := sum(record["status"] is None for record in records):
        lines.append(f"not run yet through sparsekit's chain: {left} of {len(records)}")
    peers = [record["torch_pruning_status"] for record in records if record["torch_pruning_status"]]
    return lines + ([_tally("Torch-Pruning", peers)] if peers else [])


def repair_counts(found: Sequence[Record]) -> list[str]:
    """On how many models repair ran, acted, and brought the output nearer."""
    if not found:
        return []
    lines = [_tally("repair", [one["status"] for one in found])]
    acted = [one for one in found if one["status"] == "ok" and one["repaired_layers"]]
    if acted:
        lower = sum(one["repaired_error"] < one["cut_error"] for one in acted)
        below = sum(one["repaired_error"] < one["constant_error"] for one in acted)
        ratio = statistics.median(one["repaired_error"] / one["cut_error"] for one in acted)
        lines.append(
            f"it had layers to repair in {len(acted)}, and lowered the error of the output in {lower} of them: the "
            f"median is {ratio:.2f} of what it was; nearer than a constant answer are {below}"
        )
    return lines


def _tally(who: str, statuses: Sequence[str]) -> str:
    by_status = Counter(statuses)
    failed = ", ".join(f"{status} {n}" for status, n in by_status.most_common() if status != "ok")
    return f"{who}: {by_status['ok']} of {len(statuses)} ok" + (f"; failed in: {failed}" if failed else "")


def table(records: Sequence[Record]) -> list[str]:
    """One row for each model."""
    rows = [
        "| model | status | params removed | MACs removed | cut | repaired | constant | frozen | mainly because "
        "| analysis s | all s | Torch-Pruning |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        cells = [
            record["model"],
            record["status"] or "",
            *(_number(record[key], 2) for key in ("params_removed", "macs_removed")),
            *(_number((record["repair"] or {}).get(key), 3) for key in ERRORS),
            _number(record["frozen"], 2),
            _escaped(record["frozen_main_reason"] or ""),
            _number((record["seconds"] or {}).get("analyse"), 1),
            _number(sum((record["seconds"] or {}).values()), 0),
            record["torch_pruning_status"] or "",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _escaped(text: str) -> str:
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", text)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; the parts that only the script itself uses are not shown."""
    parser = argparse.ArgumentParser(description="sparsekit's whole chain on timm's architectures")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--models", type=Path, default=HERE / "zoo.txt", help="names, one a line, # comments")
    source.add_argument("--all", action="store_true", help="up to four small models of every timm file")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a model")
    parser.add_argument("--peer-timeout", type=float, default=150, help="seconds for Torch-Pruning on it")
    parser.add_argument("--only", choices=PARTS, help="run one part; the results of the others are kept")
    parser.add_argument("--threads", type=int, default=2, help="of torch, in each process")
    parser.add_argument("--resume", action="store_true", help="keep the results there are, run the others")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of zoo.json")
    parser.add_argument(
        "--docs", type=Path, default=HERE.parent / "docs" / "results" / "zoo.md", help="the page"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    """Run the models, or, in a child, one part of one model."""
    arguments = parse()
    if arguments.part:
        run_stages(arguments.part, arguments.name, arguments.folder, arguments.threads)
        return
    console = Console()
    names = names_of_every_file() if arguments.all else read_names(arguments.models)
    try:
        records = run_all(names, arguments, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; {arguments.output / 'zoo.json'} keeps what is done, --resume goes on")
        sys.exit(130)
    console.print(*counts(records), sep="\n", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
