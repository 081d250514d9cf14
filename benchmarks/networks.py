"""How far sparsekit gets through networks of all kinds: the whole chain on each, Torch-Pruning beside it.

    python benchmarks/networks.py                          all that can be made here
    python benchmarks/networks.py --only UNet tv_resnet18
    python benchmarks/networks.py --page

The networks are those of `written_networks.py`, which people write by hand, and small ones of libraries: torchvision's
classification, segmentation, detection, video and optical flow (tv_), Hugging Face's vision models from configurations
(hf_), segmentation_models.pytorch (smp_), MONAI (monai_) and ultralytics (yolo_). Those of a library that is not
installed are left out, and the page says so. All have random weights; norms and what starts at zero are made random.

Each network runs in a process of its own, within a time limit. The stages:

    analyse    find_groups
    cut        each free group loses a random share, from none to three quarters of its units, and verify_cut
    apart      each free group alone, and all but it, in a random order, as many as fit into --apart-seconds
    train      ten steps with the penalty, where the network runs in training mode and has outputs to sum up
    again      find_groups of the cut model, half of each group, verify_cut
    save       an artifact, loaded again: equal outputs
    export     ONNX, and the largest difference of all outputs, relative to the largest
    through    where a norm keeps channels: half of everything with through_layer_norm, as `share` and its proof

A stage that fails has its message; later ones that need its result are left out. "unsound" counts the cuts that
find_groups calls free and that fail. Torch-Pruning removes half of every layer (group magnitude; layers that make the
outputs, by our trace, are ignored), and its result has to run and to return outputs of the dense shapes. `share` is
that of the parameters that a cut of half of everything removes. Rows are appended as they come, and not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import machine_text, random_mask, versions_text, wake_constants_, write_text
from network_makers import Made, all_names, maker_of
from rich.console import Console

HERE = Path(__file__).parent
Row = dict[str, Any]
STEPS = 10
# What a row shows of its stages.
SHOWN = ("share", "through", "peer", "proof", "train", "again", "save", "export")


# ---- the chain of one network ----------------------------------------------------------------------------------------


def unsettle_norms_(model: Any, generator: Any) -> None:
    """Give running statistics random values, in place: those of a fresh model are alike."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.copy_(
                0.2 * (torch.rand(module.running_mean.shape, generator=generator) - 0.5)
            )
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))


def chain(name: str, make: Callable[[], Made], apart_seconds: float) -> Iterator[Row]:
    """Run the stages, and give what is known after each, so that a time limit leaves the earlier ones."""
    import torch

    import sparsekit as sk
    from sparsekit.evaluation import as_inputs, flat_tensors

    torch.manual_seed(0)
    model, example = make()
    generator = torch.Generator().manual_seed(1)
    wake_constants_(model.eval(), generator)
    unsettle_norms_(model, generator)
    row: Row = {"name": name, "params": sk.count_params(model), "unsound": []}
    arguments = as_inputs(example)
    with torch.no_grad():
        started = time.perf_counter()
        dense = flat_tensors(arguments.call(model))
        row["pass_seconds"] = time.perf_counter() - started
    started = time.perf_counter()
    groups = sk.find_groups(model, example, round_to=1, min_channels=1)
    row |= {
        "seconds": time.perf_counter() - started,
        "groups": len(groups),
        "free": len(groups.free),
        "frozen": Counter(group.frozen for group in groups if group.frozen).most_common(3),
        "unread": len(groups.unread),
    }
    yield row
    half = {g.name: torch.arange(g.n_channels) >= g.n_channels // 2 for g in groups.free}
    row["share"] = share_gone(model, sk.apply_plan(model, sk.make_plan(groups, half)))
    yield row
    draw = random.Random(name)
    masks = {g.name: random_mask(g, draw) for g in groups.free}
    plan = sk.make_plan(groups, masks)
    try:
        cut = sk.apply_plan(model, plan)
        row["proof"] = sk.verify_cut(model, cut, plan).max_rel
    except Exception as error:
        row["proof"], row["unsound"] = said(error), ["random shares"]
        yield row
        return
    yield row
    row["train"] = stage(lambda: train(model, example, groups))
    yield row
    row["again"] = stage(lambda: cut_again(cut, example))
    yield row
    row["save"] = stage(lambda: save(cut, plan, make, example))
    yield row
    row["export"] = stage(lambda: export(cut, example))
    yield row
    if any("mixes channels" in group.frozen for group in groups):
        row["through"] = stage(lambda: through_layer_norm(model, example))
        yield row
    row |= apart(model, groups, masks, apart_seconds, draw)
    yield row
    yield from peer(row, model, example, groups, dense)  # last: it does not end on some


def stage(run: Callable[[], Any]) -> Any:
    """What it returns, or the message with which it fails."""
    try:
        return run()
    except Exception as error:
        return said(error)


def said(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def apart(model: Any, groups: Any, masks: Any, seconds: float, draw: random.Random) -> Row:
    """Each group alone, and all but it, within the time: how many were tried, and which failed."""
    import torch

    import sparsekit as sk

    whole = {g.name: torch.ones(g.n_channels, dtype=torch.bool) for g in groups.free}
    some = {g.name: torch.arange(g.n_channels) % 3 != 0 for g in groups.free}
    some = {
        name: mask if int(mask.sum()) >= groups[name].least else whole[name] for name, mask in some.items()
    }
    tries = [(name, alone) for name in whole for alone in (True, False)]
    draw.shuffle(tries)
    started, failed, tried = time.perf_counter(), [], 0
    for name, alone in tries:
        if time.perf_counter() - started > seconds:
            break
        chosen = {**whole, name: some[name]} if alone else {**some, name: whole[name]}
        plan = sk.make_plan(groups, chosen)
        tried += 1
        try:
            sk.verify_cut(model, sk.apply_plan(model, plan), plan)
        except Exception as error:
            failed.append(f"{name} {'alone' if alone else 'whole'}: {said(error)}")
    return {"tried": tried, "tries": len(tries), "unsound": failed}


def train(model: Any, example: Any, groups: Any) -> Any:
    """Steps with the penalty; how many channels are zero after them, if training mode gives something to sum up."""
    import torch

    import sparsekit as sk
    from sparsekit.evaluation import flat_tensors

    trained = copy.deepcopy(model).train()
    arguments = groups.inputs.draw(3, trained, 2)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
    sparsifier = sk.Sparsifier(
        trained, groups, strength=sk.AutoStrength({"params": 0.7}, total_steps=STEPS, importance="magnitude")
    )
    for _ in range(STEPS):
        outputs = [t for t in flat_tensors(arguments.call(trained)) if t.requires_grad]
        loss = sum((t.float().square().mean() for t in outputs), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        sparsifier.step(optimizer)
    masks = sk.keep_masks(trained, groups, method="zeros")
    plan = sk.make_plan(groups, masks)
    sk.verify_cut(trained, sk.apply_plan(trained, plan), plan)
    return sum(int((~mask).sum()) for mask in masks.values())


def share_gone(model: Any, cut: Any) -> float:
    """The share of the parameters that a cut took."""
    import sparsekit as sk

    return 1 - sk.count_params(cut) / sk.count_params(model)


def through_layer_norm(model: Any, example: Any) -> float:
    """The share that goes where widths under LayerNorm are asked for; verify_cut raises if that cut is not exact."""
    import torch

    import sparsekit as sk

    groups = sk.find_groups(model, example, round_to=1, min_channels=1, through_layer_norm=True)
    masks = {g.name: torch.arange(g.n_channels) >= g.n_channels // 2 for g in groups.free}
    plan = sk.make_plan(groups, masks)
    cut = sk.apply_plan(model, plan)
    sk.verify_cut(model, cut, plan)
    return share_gone(model, cut)


def cut_again(cut: Any, example: Any) -> Any:
    """The proof of a second cut."""
    import torch

    import sparsekit as sk

    groups = sk.find_groups(cut, example, round_to=1, min_channels=1)
    masks = {
        g.name: torch.arange(g.n_channels) >= min(g.n_channels // 2, g.n_channels - g.least)
        for g in groups.free
    }
    plan = sk.make_plan(groups, masks)
    return sk.verify_cut(cut, sk.apply_plan(cut, plan), plan).max_rel


def save(cut: Any, plan: Any, make: Callable[[], Made], example: Any) -> Any:
    """Whether an artifact gives the same outputs."""
    import torch

    import sparsekit as sk
    from sparsekit.evaluation import as_inputs, flat_tensors

    with tempfile.TemporaryDirectory() as folder:
        sk.save(cut, folder, factory=lambda: make()[0], plan=plan)
        loaded = sk.load(folder, factory=lambda: make()[0])
    arguments = as_inputs(example)
    with torch.no_grad():
        pairs = zip(
            flat_tensors(arguments.call(cut.eval())), flat_tensors(arguments.call(loaded.eval())), strict=True
        )
        return all(torch.equal(one, other) for one, other in pairs) or "other outputs"


def export(cut: Any, example: Any) -> Any:
    """The largest difference of all outputs of the ONNX file, relative to the largest."""
    import onnxruntime
    import torch

    import sparsekit as sk
    from sparsekit.evaluation import as_inputs, flat_tensors

    arguments = as_inputs(example)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = sk.export_onnx(cut, Path(folder) / "cut.onnx", example, output_names=())
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    given = {e.name: t.numpy() for e, t in zip(session.get_inputs(), arguments.tensors, strict=False)}
    found = [torch.from_numpy(one) for one in session.run(None, given)]
    with torch.no_grad():
        expected = flat_tensors(arguments.call(cut.eval()))
    if [tuple(t.shape) for t in expected] != [tuple(t.shape) for t in found]:
        return "outputs of other shapes"
    scale = max(float(t.abs().max()) for t in expected if t.numel())
    return (
        max(
            float((a.double() - b.double()).abs().max())
            for a, b in zip(expected, found, strict=True)
            if a.numel()
        )
        / scale
    )


def peer(row: Row, model: Any, example: Any, groups: Any, dense: list[Any]) -> Iterator[Row]:
    """What Torch-Pruning removes, and whether its result runs with outputs of the same shapes."""
    import torch
    import torch_pruning as tp

    from sparsekit.evaluation import as_inputs, flat_tensors

    try:
        pruned, arguments = copy.deepcopy(model), as_inputs(example)
        last = {m.module for g in groups if "model's output" in g.frozen for m in g.of_role("producer")}
        inputs = dict(arguments.keyword) if arguments.keyword else arguments.positional
        pruner = tp.pruner.MagnitudePruner(
            pruned,
            inputs,
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.5,
            ignored_layers=[m for n, m in pruned.named_modules() if n in last],
        )
        pruner.step()
        with torch.no_grad():
            outputs = flat_tensors(arguments.call(pruned.eval()))
        alike = [t.shape for t in outputs] == [t.shape for t in dense]
        row["peer"] = share_gone(model, pruned) if alike else "outputs of other shapes"
    except Exception as error:
        row["peer"] = said(error)
    yield row


# ---- one process, and the parent -------------------------------------------------------------------------------------


def run_one(name: str, file: Path, apart_seconds: float, threads: int) -> None:
    """In the child: the row of a network, written after every stage."""
    import logging

    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    row: Row = {"name": name}
    try:
        for row in chain(name, maker_of(name), apart_seconds):
            write_text(file, json.dumps(row))
    except Exception as error:
        write_text(file, json.dumps({**row, "failed": said(error)}))


def run_all(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Run what is missing, one process after the other."""
    every, missing = all_names()
    for library in missing:
        say(f"{library} is not installed: its networks are left out")
    known = {row["name"] for row in read_rows(arguments.results)}
    names = [name for name in arguments.only or every if arguments.again or name not in known]
    for number, name in enumerate(names, start=1):
        row = run_child(name, arguments)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with arguments.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        say(f"{number} of {len(names)} {name}: {summary(row)}")


def run_child(name: str, arguments: argparse.Namespace) -> Row:
    """The row of one network, by a process of its own; with what it had when the time was up."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--one", name, "--results", str(file)]
        command += ["--apart-seconds", str(arguments.apart_seconds), "--threads", str(arguments.threads)]
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        try:
            process.wait(arguments.timeout)
            ended = "" if process.returncode == 0 else f"the process ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = f"not done within {arguments.timeout:g} s"
        row: Row = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"name": name}
    return {**row, "failed": ended} if ended and "failed" not in row else row


def read_rows(file: Path) -> list[Row]:
    """The latest row of each network."""
    rows: dict[str, Row] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        row = json.loads(line)
        rows[row["name"]] = row
    return list(rows.values())


def summary(row: Row) -> str:
    """A row in a line."""
    if "free" not in row:
        return str(row.get("failed", "nothing"))
    parts = [f"{row['free']} of {row['groups']} free", f"{row['seconds']:.1f} s"]
    parts += [f"{key} {shown(row[key])}" for key in SHOWN if key in row]
    parts += [f"{row['tried']} of {row['tries']} apart"] if "tried" in row else []
    parts += [f"UNSOUND: {row['unsound']}"] if row["unsound"] else []
    return ", ".join([*parts, *([row["failed"]] if row.get("failed") else [])])


def shown(value: Any) -> str:
    """A value of a row as a person reads it."""
    if isinstance(value, bool):
        return "equal" if value else "differs"
    if isinstance(value, float):
        return f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.0e}"
    return str(value)


# ---- the page --------------------------------------------------------------------------------------------------------


def deepest(row: Row) -> float:
    """The larger share of a row."""
    return max(row["share"], row["through"] if isinstance(row.get("through"), float) else 0.0)


def page(rows: list[Row], missing: list[str]) -> str:
    """The results as Markdown."""
    done = [row for row in rows if "share" in row]
    runs = [row for row in done if isinstance(row.get("peer"), float)]
    deeper = [row for row in runs if deepest(row) >= row["peer"] - 0.005]
    tried = sum(row.get("tried", 0) for row in rows)
    unsound = [row for row in rows if row.get("unsound")]
    lines = [
        "# Networks of all kinds",
        "",
        "Written by `python benchmarks/networks.py --page`, from what `python benchmarks/networks.py` measured. The "
        "docstring of that file says what the stages are; the networks have random weights.",
        "",
        f"- {len(rows)} networks; {len(done)} analysed. Cuts tried of single groups and of all but one: {tried}; "
        f"networks with a cut called free that failed: {len(unsound)}",
        f"- Torch-Pruning's result runs with outputs of the dense shapes on {len(runs)}; ours removes at least as much "
        f"on {len(deeper)} of these, counted with widths under LayerNorm, which Torch-Pruning always takes",
        f"- analysis takes more than three passes and five seconds on "
        f"{sum(row['seconds'] > 3 * row['pass_seconds'] + 5 for row in done)}",
        *(f"- not installed, so left out: {library}" for library in missing),
        f"- machine: {machine_text()}",
        f"- versions: {versions_text('sparsekit', 'torch', 'torchvision', 'torch-pruning', 'onnxruntime')}",
        "",
        "| network | params | free groups | share cut | through LayerNorm | Torch-Pruning | proof | zeros trained "
        "| again | loaded | ONNX | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [shown(row[key]) if key in row else "" for key in SHOWN]
        cells = [cell.split(": ")[0] if len(cell) > 30 else cell for cell in cells]
        free = f"{row['free']} of {row['groups']}" if "free" in row else ""
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
        lines.append(
            f"| {row['name']} | {row.get('params', 0) / 1e6:.2f} M | {free} | {' | '.join(cells)} | {seconds} |"
        )
    lines += ["", "What stays whole, and what failed:", ""]
    for row in rows:
        said_of = [
            f"{count} groups: {reason}" for reason, count in row.get("frozen", []) if "output" not in reason
        ]
        said_of += [f"{key}: {row[key]}" for key in SHOWN[1:] if isinstance(row.get(key), str)]
        said_of += [f"unsound: {one}" for one in row.get("unsound", [])]
        said_of += [str(row["failed"])] if row.get("failed") else []
        lines += [f"- {row['name']}: {'; '.join(said_of)}"] if said_of else []
    return "\n".join([*lines, ""])


def main() -> None:
    """Run what is missing, write the page, or, in a child, one network."""
    parser = argparse.ArgumentParser(description="the whole chain on networks of all kinds")
    parser.add_argument("--only", nargs="+", help="names of networks; by default all")
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for a network")
    parser.add_argument(
        "--apart-seconds", type=float, default=30.0, help="for cuts of single groups and all but one"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "networks.jsonl")
    parser.add_argument("--page", action="store_true", help="write the page from the results")
    parser.add_argument(
        "--docs", type=Path, default=HERE.parent / "docs" / "results" / "networks.md", help="the page"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    if arguments.one:
        run_one(arguments.one, arguments.results, arguments.apart_seconds, arguments.threads)
    elif arguments.page:
        write_text(arguments.docs, page(read_rows(arguments.results), all_names()[1]))
        say(str(arguments.docs))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run_all(arguments, say)


if __name__ == "__main__":
    main()
