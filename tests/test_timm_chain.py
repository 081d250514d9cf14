"""The whole chain on timm's miniatures, one of each kind of architecture: analysed, cut, used as timm's users do."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models_by_hand import random_masks
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekit.artifact.load import load
from sparsekit.artifact.save import save
from sparsekit.coupling.find_groups import find_groups
from sparsekit.evaluation import evaluating, flat_tensors
from sparsekit.export.onnx_file import export_onnx
from sparsekit.export.parity import check_parity
from sparsekit.structure.compose import compose
from sparsekit.structure.counting import count_params
from sparsekit.structure.groups import ChannelGroup, ChannelGroups
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.verify import verify_cut

NAMES = timm.list_models("test_*")
CLASSES = 5
# Parameters that remain once half of every free group is gone: a quarter in plain networks, more where normalised
# streams (and, in NFNets, standardised weights) stay whole.
AT_MOST = {
    "test_byobnet": 0.4,
    "test_coatnet": 0.7,
    "test_convnext": 0.7,
    "test_convnext2": 0.7,
    "test_convnext3": 0.7,
    "test_efficientnet": 0.4,
    "test_efficientnet_evos": 0.4,
    "test_mambaout": 0.7,
    "test_maxvit": 0.7,
    "test_resnet": 0.4,
    "test_vit": 0.7,
    "test_vit2": 0.7,
    "test_vit3": 0.7,
    "test_vit4": 0.7,
    "test_vit_relpos": 0.7,
}


@dataclass(frozen=True)
class Chain:
    """A model, what was found in it, and what is left once half of every free group is gone. Tests use copies."""

    model: Any
    arguments: Mapping[str, Any]
    groups: ChannelGroups
    plan: PrunePlan
    pruned: Any


def arguments_of(name: str) -> dict[str, Any]:
    """With the image size where the architecture needs to know it."""
    sized = name.startswith(("test_vit", "test_coatnet", "test_maxvit"))
    return {"num_classes": CLASSES, **({"img_size": image_size(name)} if sized else {})}


def image_size(name: str) -> int:
    return 32 if name == "test_maxvit" else 64


def images_for(name: str, batch: int = 2) -> Tensor:
    size = image_size(name)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def enliven_(model: nn.Module, images: Tensor) -> None:
    """Random norms and scales, and the statistics of a batch: a fresh model hides branches that start at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(0.2 * (noise - 0.5) if name.endswith("bias") else 0.5 + noise)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = 1.0
        model.train()(images)
        for norm in norms:
            norm.momentum = 0.1


def halved(groups: ChannelGroups, seed: int = 0) -> PrunePlan:
    return make_plan(groups, random_masks(groups, 0.5, seed))


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """One model after the other, each for all tests, so that a test process makes few chains."""
    return str(request.param)


@functools.cache
def chain(name: str) -> Chain:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, **arguments_of(name))
        enliven_(model, images_for(name, 4))
    model.eval()
    groups = find_groups(model, images_for(name, 1))
    plan = halved(groups)
    return Chain(model, arguments_of(name), groups, plan, apply_plan(model, plan))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    with evaluating(model):
        return flat_tensors(model(images))[0]


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / first.abs().max())


def test_the_cut_model_equals_the_masked_one_and_is_smaller(name: str) -> None:
    done = chain(name)
    assert verify_cut(done.model, done.pruned, done.plan).max_rel < 1e-4
    assert relative(logits_of(done.model, images_for(name)), logits_of(done.pruned, images_for(name))) > 1e-2
    assert count_params(done.pruned) < AT_MOST.get(name, 1.0) * count_params(done.model)


def test_a_plan_that_was_json_text_gives_the_same_model(name: str) -> None:
    done = chain(name)
    plan = PrunePlan.from_json(json.loads(json.dumps(done.plan.to_json(), allow_nan=False)))
    assert plan == done.plan
    again = apply_plan(done.model, plan).state_dict()
    assert again.keys() == done.pruned.state_dict().keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in done.pruned.state_dict().items())


def test_what_timm_promises_of_its_models_holds_of_the_cut_one(name: str) -> None:
    pruned, images = copy.deepcopy(chain(name).pruned), images_for(name)
    with torch.no_grad():
        features = pruned.forward_features(images)
        logits = pruned(images)
        assert torch.equal(pruned.forward_head(features), logits)
        hidden = pruned.forward_head(features, pre_logits=True)
    assert pruned.num_features in (features.shape[1], features.shape[-1])
    assert pruned.head_hidden_size == hidden.shape[1]
    assert isinstance(pruned.get_classifier(), nn.Module)
    pruned.reset_classifier(0)
    assert logits_of(pruned, images).shape == hidden.shape


def test_a_cut_model_takes_a_new_classifier(name: str) -> None:
    pruned = copy.deepcopy(chain(name).pruned)
    pruned.reset_classifier(3)
    assert logits_of(pruned, images_for(name)).shape == (2, 3)


def test_features_of_a_cut_model_have_the_channels_that_it_declares(name: str) -> None:
    def widths(model: Any) -> list[tuple[int, int]]:
        with torch.no_grad():
            maps = model.forward_intermediates(images_for(name), intermediates_only=True)
        return [
            (info["num_chs"], found.shape[1]) for info, found in zip(model.feature_info, maps, strict=False)
        ]

    done = chain(name)
    dense, cut = widths(done.model), widths(done.pruned)
    assert dense
    for (declared, found), (declared_cut, found_cut) in zip(dense, cut, strict=True):
        assert declared == found
        assert declared_cut == found_cut


def test_the_cut_model_trains_and_no_parameter_loses_its_gradient(name: str) -> None:
    done = chain(name)
    trained: list[set[str]] = []
    for model in (copy.deepcopy(done.model).train(), copy.deepcopy(done.pruned).train()):
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss = F.cross_entropy(model(images_for(name)), torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(value).all() for value in model.parameters())
        trained.append({key for key, value in model.named_parameters() if value.grad is not None})
        assert any(not torch.equal(value, before[key]) for key, value in model.named_parameters())
    left = {key for key, _ in done.pruned.named_parameters()}
    assert trained[0] & left <= trained[1]


def made_by(groups: Iterable[ChannelGroup]) -> set[str]:
    """The weights that produce the channels of these groups."""
    members = (m for group in groups for m in (*group.of_role("producer"), *group.of_role("depthwise")))
    return {m.tensor for m in members if m.tensor.endswith("weight")}


@functools.cache
def second_cut(name: str) -> tuple[ChannelGroups, PrunePlan, nn.Module]:
    pruned = chain(name).pruned
    groups = find_groups(pruned, images_for(name, 1))
    plan = halved(groups, 1)
    return groups, plan, apply_plan(pruned, plan)


def test_a_cut_model_is_cut_once_more(name: str) -> None:
    done, (groups, plan, twice) = chain(name), second_cut(name)
    assert verify_cut(done.pruned, twice, plan).max_rel < 1e-4
    assert count_params(twice) < count_params(done.pruned)
    # What could go from the dense model can still go, as far as there is anything left to choose from.
    kept = {cut.name: len(cut.kept) for cut in done.plan.groups}
    possible = made_by([group for group in done.groups.free if kept[group.name] > 1])
    assert possible <= made_by(groups.free)


def test_two_cuts_are_one_composed_plan(name: str) -> None:
    done, (_, plan, twice) = chain(name), second_cut(name)
    once = apply_plan(done.model, compose(done.plan, plan))
    assert relative(logits_of(twice, images_for(name)), logits_of(once, images_for(name))) < 1e-5


def test_a_cut_model_is_saved_and_loaded_with_equal_logits(name: str, tmp_path: Path) -> None:
    done = chain(name)
    save(done.pruned, tmp_path, model_name=name, model_args=done.arguments, plan=done.plan)
    assert torch.equal(logits_of(load(tmp_path), images_for(name)), logits_of(done.pruned, images_for(name)))


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext2"])
def test_a_cut_model_is_exported_to_onnx(name: str, tmp_path: Path) -> None:
    path = export_onnx(chain(name).pruned, tmp_path / "cut.onnx", images_for(name, 1))
    assert check_parity(chain(name).pruned, path, images_for(name)).max_rel < 1e-4
