"""Asked and measured speed-ups in ONNX Runtime, beside Torch-Pruning's global magnitude pruning.

    python benchmarks/speed.py

For each model (224 px, batch 1, one thread) and each speed-up asked (weights are random, of seed 0, scales of norms
|N(1, 0.25)| because timm starts some at 0; --pretrained takes timm's):

    ours        search_speed: the most importance under the latency, predicted from the table of this machine, measured
                and corrected; widths under LayerNorm stay whole
    unaligned   Torch-Pruning, MagnitudePruner with GroupMagnitudeImportance, global, cut to our MACs ratio
    aligned     the same with round_to=16
    dense       the model itself, twice: the second is the null

All five files run interleaved. Torch-Pruning is then cut further, to the speed that was measured for ours, and measured
again, up to five times: the importance that it retains at equal speed is read off the line between the cuts beside it.

Retained importance: a channel is as important as the share that it has in the squared norms of the layers that make it,
in their multiply-accumulates (`sparsekit.importance`, "magnitude"), over all groups, those under LayerNorm included; a
cut retains the share of all importance that its channels have. What Torch-Pruning kept is read off tags that travel
with its cut. The table of latencies starts empty for each model, in --cache (by default a temporary folder).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
import torch_pruning as tp
from common import machine_text, save_figure, versions_text, write_json, write_text
from peers import PeerCuts, global_cut
from rich.console import Console
from torch import Tensor, nn

import sparsekit as sk

HERE = Path(__file__).parent
Row = Mapping[str, Any]
MODELS = (
    "resnet18",
    "resnet50",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "convnext_tiny",
    "deit_tiny_patch16_224",
    "regnety_004",
)
ASKED = (1.5, 2.0, 3.0)
EXAMPLE = torch.zeros(1, 3, 224, 224)
PEERS = {"unaligned": None, "aligned": 16}
ROUNDS = 60
# Further cuts of the peer, to get as fast as ours.
MOST_CUTS = 5
# Least efficiency (speed-up / MACs ratio) asked of the ResNets, and of every other.
EFFICIENT = {"resnet": 0.95, "": 0.85}


# ---- Torch-Pruning ---------------------------------------------------------------------------------------------------


def peer_cuts(model: nn.Module, round_to: int | None) -> PeerCuts:
    """Cuts by Torch-Pruning's global magnitude pruning, in multiples of `round_to`."""

    def cut(ratio: float) -> nn.Module:
        importance = tp.importance.GroupMagnitudeImportance()
        return global_cut(model, EXAMPLE, ratio, importance=importance, round_to=round_to, num_classes=1000)

    return PeerCuts(model, EXAMPLE, cut)


# ---- importance ------------------------------------------------------------------------------------------------------


def tag_(model: nn.Module, groups: sk.ChannelGroups) -> dict[str, str]:
    """Write each channel's number into a vector of it that no importance is read off; returns its name for each group.

    A running mean, or the bias of a layer or LayerNorm: what magnitudes are not read off.
    """
    state, tags = model.state_dict(), {}
    with torch.no_grad():
        for group in groups:
            found = [m for m in group.members if m.tensor.endswith("running_mean")]
            found += [
                m for m in group.members if m.tensor.endswith("bias") and m.role in ("producer", "layer_norm")
            ]
            for member in found:
                vector = state[member.tensor]
                if vector.dim() == 1 and member.repeat * group.n_channels == len(vector):
                    numbers = torch.arange(group.n_channels).repeat_interleave(member.repeat)
                    vector[list(member.positions)] = numbers.to(vector)
                    tags[group.name] = member.tensor
                    break
    return tags


def kept_by_tags(pruned: nn.Module, group: sk.ChannelGroup, tag: str) -> Tensor:
    """Which share of each channel is left, (n_channels,)."""
    numbers = pruned.state_dict()[tag].round().long()
    repeat = next(member.repeat for member in group.members if member.tensor == tag)
    return torch.bincount(numbers, minlength=group.n_channels)[: group.n_channels] / repeat


def retained(importance: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> float:
    """The share of all importance that is kept; groups that `kept` does not name are kept whole."""
    total = sum(float(values.sum()) for values in importance.values())
    lost = sum(
        float((importance[name] * (1 - share.double())).sum())
        for name, share in kept.items()
        if name in importance
    )
    return 1 - lost / total


def draw_norms_(model: nn.Module) -> None:
    """Scales of BatchNorms as they might be after training, in place."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(1.0, 0.25).abs_()


# ---- one model -------------------------------------------------------------------------------------------------------


class Subject:
    """A model with its measured groups, and how its cuts are exported and timed."""

    def __init__(self, name: str, folder: Path, cache: Path, pretrained: bool) -> None:
        torch.manual_seed(0)
        self.name, self.folder = name, folder
        self.model = timm.create_model(name, pretrained=pretrained).eval()
        if not pretrained:
            draw_norms_(self.model)
        groups = sk.find_groups(self.model, EXAMPLE, round_to="auto", min_channels=8)
        started = time.perf_counter()
        self.groups = sk.measure_layers(self.model, groups, EXAMPLE, table=sk.LatencyTable(cache=cache))
        self.table_seconds = time.perf_counter() - started
        ranked = sk.find_groups(self.model, EXAMPLE, through_layer_norm=True)
        found = sk.importance(self.model, ranked, "magnitude")
        self.importance = {name: values for name, values in found.items() if bool(values.isfinite().all())}
        self.tags = tag_(self.model, ranked)
        self.tagged = {group.name: group for group in ranked.free if group.name in self.tags}
        missing = sorted(set(self.importance) - set(self.tagged))
        if missing:
            warnings.warn(f"{name}: no tag for {len(missing)} groups, which count as kept", stacklevel=2)
        self.dense = self.export(self.model)
        self.peers = {peer: peer_cuts(self.model, round_to) for peer, round_to in PEERS.items()}

    def export(self, model: nn.Module) -> Path:
        """A new file."""
        return sk.export_onnx(model, self.folder / f"{len(list(self.folder.iterdir()))}.onnx", EXAMPLE)

    def macs_ratio(self, model: nn.Module) -> float:
        """Dense over cut."""
        return sk.count_macs(self.model, EXAMPLE) / sk.count_macs(model, EXAMPLE)

    def peer_retained(self, pruned: nn.Module) -> float:
        """The importance that a cut of Torch-Pruning retains."""
        kept = {n: kept_by_tags(pruned, group, self.tags[n]) for n, group in self.tagged.items()}
        return retained(self.importance, kept)

    def row(self, asked: float, say: Callable[[str], None]) -> dict[str, Any]:
        """Ours and both variants of the peer at one speed."""
        started = time.perf_counter()
        importance = {
            group.name: self.importance.get(group.name, torch.full((group.n_channels,), torch.inf))
            for group in self.groups.free
        }
        search = sk.search_speed(self.model, self.groups, importance, EXAMPLE, speedup=asked)
        seconds = time.perf_counter() - started
        plan = sk.make_plan(self.groups, search.masks)
        ours = sk.apply_plan(self.model, plan)
        sk.verify_cut(self.model, ours, plan)
        cuts: dict[str, nn.Module] = {"ours": ours}
        for peer in PEERS:
            try:
                cuts[peer] = self.peers[peer].to_macs(self.macs_ratio(ours))
            except Exception as error:
                say(f"{self.name} {asked:g}x: Torch-Pruning, {peer}, failed: {type(error).__name__}: {error}")
        files = [self.dense, *(self.export(cut) for cut in cuts.values())]
        compared = sk.compare_latency(files, rounds=ROUNDS)
        figures = {
            name: {
                "macs_ratio": self.macs_ratio(cut),
                "measured": speed.value,
                "low": speed.low,
                "high": speed.high,
                "efficiency": speed.value / self.macs_ratio(cut),
            }
            for (name, cut), speed in zip(cuts.items(), compared.speedups, strict=True)
        }
        ours_figures = figures.pop("ours")
        for peer in list(figures):
            try:
                figures[peer]["retained_importance"] = self.peer_retained(cuts[peer])
                figures[peer] |= self._at_equal_speed(peer, figures[peer], ours_figures["measured"])
            except Exception as error:
                say(f"{self.name} {asked:g}x: Torch-Pruning, {peer}, failed: {type(error).__name__}: {error}")
                del figures[peer]
        return {
            "model": self.name,
            "asked": asked,
            **ours_figures,
            "retained_importance": retained(self.importance, search.masks),
            "torch_pruning": figures,
            "null": compared.null.value,
            "trustworthy": compared.trustworthy,
            "trials": [[trial.predicted, trial.measured] for trial in search.trials],
            "remark": search.remark,
            "search_seconds": seconds,
            "table_seconds": self.table_seconds,
            "dense_ms": compared.latencies[0].median_ms,
        }

    def _at_equal_speed(self, peer: str, figures: Row, speed: float) -> dict[str, Any]:
        """Torch-Pruning, cut until it is as fast as ours: what it retains, between the two cuts beside that speed.

        None if it does not get there.
        """
        points = [(figures["measured"], figures["retained_importance"], figures["macs_ratio"])]
        for _ in range(MOST_CUTS):
            measured, _, macs_ratio = max(points) if max(points)[0] < speed else min(points)
            if abs(measured / speed - 1) < 0.01 or min(points)[0] <= speed <= max(points)[0]:
                break
            # Further each time: a cut that is nearest may be one that was made before.
            step = (
                max((speed / measured) ** 1.3, 1 + 0.02 * len(points))
                if measured < speed
                else (speed / measured) ** 1.3
            )
            pruned = self.peers[peer].to_macs(macs_ratio * step)
            compared = sk.compare_latency([self.dense, self.export(pruned)], rounds=30)
            points.append((compared.speedups[0].value, self.peer_retained(pruned), self.macs_ratio(pruned)))
        points.sort()
        speeds, kept = [p[0] for p in points], [p[1] for p in points]
        reached = speed <= 1.01 * speeds[-1]
        return {
            "cuts": [list(point) for point in points],
            "retained_at_our_speed": float(np.interp(speed, speeds, kept)) if reached else None,
        }


# ---- the page --------------------------------------------------------------------------------------------------------


def page(rows: Sequence[Row], picture: str, command: str) -> str:
    """The results as Markdown, with what they say."""
    versions = versions_text("torch", "timm", "torch-pruning", "onnxruntime")
    lines = [
        "# Asked and measured: speed-ups in ONNX Runtime",
        "",
        f"Written by `{command}`, whose docstring says what was run. Efficiency: speed-up / MACs ratio. Torch-Pruning "
        "(TP) is cut to the same MACs ratio, without and with multiples of 16; what it retains at our speed is that of "
        "a further cut. Retained: the share of all importance that the channels kept have.",
        "",
        f"- machine: {machine_text()}, one thread, batch 1; versions: {versions}",
        "",
        f"![asked and measured]({picture})",
        "",
        "| model | asked | measured | 95 % interval | MACs ratio | efficiency | retained | TP | TP, 16 "
        "| TP retained at our speed | TP, 16 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        peers = [r["torch_pruning"].get(peer) for peer in PEERS]
        speeds = " | ".join("-" if p is None else f"{p['measured']:.2f}x" for p in peers)
        at_speed = " | ".join(retained_text(p) for p in peers)
        mark = "" if r["trustworthy"] else " (noisy)"
        lines.append(
            f"| {r['model']} | {r['asked']:g}x | {r['measured']:.2f}x{mark} | {r['low']:.2f} to {r['high']:.2f} "
            f"| {r['macs_ratio']:.2f} | {r['efficiency']:.2f} | {r['retained_importance']:.3f} "
            f"| {speeds} | {at_speed} |"
        )
    return "\n".join([*lines, "", *claims(rows), ""])


def retained_text(peer: Row | None) -> str:
    """What it retains at our speed, if it got there."""
    if peer is None:
        return "failed"
    share = peer["retained_at_our_speed"]
    return "not as fast" if share is None else f"{share:.3f}"


def claims(rows: Sequence[Row]) -> list[str]:
    """What was to be reached, and what was."""
    near = sum(abs(r["measured"] / r["asked"] - 1) <= 0.03 for r in rows)
    efficient = [
        r for r in rows if r["efficiency"] >= EFFICIENT["resnet" if r["model"].startswith("resnet") else ""]
    ]
    at_speed = [
        (r["retained_importance"], p["retained_at_our_speed"])
        for r in rows
        for p in r["torch_pruning"].values()
    ]
    compared = [(ours, theirs) for ours, theirs in at_speed if theirs is not None]
    errors = [abs(trial[0] / trial[1] - 1) for r in rows for trial in r["trials"]]
    seconds = {r["model"]: r["table_seconds"] for r in rows}
    return [
        f"- measured within 3 % of what was asked: {near} of {len(rows)}",
        f"- efficiency of at least {EFFICIENT['resnet']} (ResNets) or {EFFICIENT['']} (others): "
        f"{len(efficient)} of {len(rows)}",
        "- more importance retained than by Torch-Pruning at the same speed: "
        f"{sum(ours > theirs for ours, theirs in compared)} of {len(compared)} comparisons; in "
        f"{len(at_speed) - len(compared)} more none of its cuts got as fast",
        f"- error of the predicted speed-up of whole networks, over {len(errors)} cuts: median "
        f"{100 * statistics.median(errors):.1f} %, largest {100 * max(errors):.1f} %",
        "- table of latencies built, whole model timed included, in: "
        + ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items()),
        *(f"- {r['model']} at {r['asked']:g}x: {r['remark']}" for r in rows if r["remark"]),
    ]


def plot(rows: Sequence[Row], file: Path) -> None:
    """Measured over asked, and speed-up over MACs ratio."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    for number, name in enumerate(dict.fromkeys(r["model"] for r in rows)):
        mine = [r for r in rows if r["model"] == name]
        left.plot(
            [r["asked"] for r in mine], [r["measured"] for r in mine], "o", color=f"C{number}", label=name
        )
        right.plot([r["macs_ratio"] for r in mine], [r["measured"] for r in mine], "o", color=f"C{number}")
        for peer, marker in zip(PEERS, "x+", strict=True):
            theirs = [r["torch_pruning"][peer] for r in mine if peer in r["torch_pruning"]]
            right.plot(
                [p["macs_ratio"] for p in theirs], [p["measured"] for p in theirs], marker, color=f"C{number}"
            )
    for panel, label in ((left, "asked"), (right, "MACs ratio (x: Torch-Pruning, +: its multiples of 16)")):
        limit = max(panel.get_xlim()[1], panel.get_ylim()[1])
        panel.plot([1, limit], [1, limit], color="grey", linewidth=0.8)
        panel.set(xlabel=label, ylabel="measured speed-up")
    left.legend(fontsize=7)
    save_figure(figure, file)
    plt.close(figure)


def main() -> None:
    """Run all models, print and write the rows."""
    parser = argparse.ArgumentParser(description="asked and measured speed-ups")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--asked", type=float, nargs="+", default=list(ASKED))
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--cache", type=Path, help="folder of latency tables; a temporary one by default")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "speed.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "results" / "speed.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    kept = arguments.resume and arguments.output.exists()
    rows: list[dict[str, Any]] = json.loads(arguments.output.read_text()) if kept else []

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    for name in arguments.models:
        missing = [a for a in arguments.asked if (name, a) not in {(r["model"], r["asked"]) for r in rows}]
        if not missing:
            continue
        with TemporaryDirectory() as folder, TemporaryDirectory() as cache:
            subject = Subject(name, Path(folder), arguments.cache or Path(cache), arguments.pretrained)
            say(f"{name}: table in {subject.table_seconds:.1f} s")
            for asked in missing:
                rows.append(subject.row(asked, say))
                write_json(arguments.output, rows)
                say(json.dumps(rows[-1]))
    rows.sort(key=lambda r: ([*MODELS, r["model"]].index(r["model"]), r["asked"]))
    write_json(arguments.output, rows)
    command = "python benchmarks/speed.py" + (" --pretrained" if arguments.pretrained else "")
    write_text(arguments.docs, page(rows, arguments.docs.with_suffix(".svg").name, command))
    plot(rows, arguments.docs.with_suffix(".svg"))
    for claim in claims(rows):
        say(claim)


if __name__ == "__main__":
    main()
