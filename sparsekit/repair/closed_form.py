"""Repair in closed form: what dropped channels brought to their readers goes into the channels that stay."""

from __future__ import annotations

import torch
from torch import nn

from sparsekit.repair.least_squares import absorb
from sparsekit.repair.statistics import InputStatistics
from sparsekit.structure.plan import PrunePlan
from sparsekit.surgery.constants import add_to_bias_, blank_columns_, move_constants_
from sparsekit.surgery.mask import with_plain_readers


def repair_weights(model: nn.Module, plan: PrunePlan, statistics: InputStatistics) -> nn.Module:
    """Return a copy of `model`, of its full size, that no longer needs what `plan` drops; then cut it by the plan.

    Each layer that reads dropped channels gets the weights that change its output least, in the sense of least squares
    over the images of `statistics`: each dropped channel is replaced by its best affine prediction from the channels
    that stay. A dropped channel that is constant is folded exactly, as every cut does. What a layer in
    `statistics.left_out` loses is lost.

        repaired = sk.repair_weights(model, plan, statistics)
        pruned = sk.apply_plan(repaired, plan)
        sk.verify_cut(repaired, pruned, plan)

    `statistics` come from `input_statistics(model, groups, images.split(16))`.
    """
    repaired = with_plain_readers(model, plan)
    repair_(repaired, plan, statistics)
    return repaired


def repair_(model: nn.Module, plan: PrunePlan, statistics: InputStatistics) -> None:
    """As `repair_weights`, in place."""
    readings = {tensor: layer.reading for tensor, layer in statistics.layers.items()}
    move_constants_(model, plan, readings)
    for cut in plan.cuts:
        if cut.role != "consumer" or not cut.drop or cut.tensor not in statistics.layers:
            continue
        layer = model.get_submodule(cut.tensor.rpartition(".")[0])
        known = statistics.layers[cut.tensor]
        reader, device = known.reader, known.moments.mean.device
        weight = reader.weight(layer).to(device)
        kept = torch.ones(weight.shape[0], weight.shape[2], dtype=torch.bool, device=device)
        kept[:, reader.columns_of(torch.tensor(cut.drop, device=device)).flatten()] = False
        new, shift = absorb(weight, kept, known.moments)
        reader.set_weight_(layer, new)
        add_to_bias_(layer, reader.bias_of(shift, layer))
    blank_columns_(model, plan)
