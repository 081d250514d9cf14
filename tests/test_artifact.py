from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models_by_hand
import pytest
import timm
import torch
from models_by_hand import build, random_masks
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekit
from sparsekit.analysis import find_groups
from sparsekit.artifact import check_round_trip, load, read_structure, save
from sparsekit.complexity import count_params
from sparsekit.errors import FileError, InputError, VerificationError
from sparsekit.plan import PrunePlan, make_plan
from sparsekit.surgery import apply_plan

TESTS = Path(__file__).parent


def cut(model: nn.Module, images: torch.Tensor) -> tuple[nn.Module, PrunePlan]:
    groups = find_groups(model, images)
    plan = make_plan(groups, random_masks(groups, 0.5))
    return apply_plan(model, plan).eval(), plan


def small_resnet(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("test_resnet", num_classes=4, **arguments)
    return model.eval()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    pruned, plan = cut(small_resnet(), torch.randn(1, 3, 32, 32))
    return save(pruned, tmp_path / "pruned", plan=plan, info={"classes": ["a", "b", "c", "d"]})


def edit(path: Path, **changes: Any) -> None:
    structure = json.loads((path / "structure.json").read_text())
    structure.update(changes)
    (path / "structure.json").write_text(json.dumps(structure))


# What survives


LOAD_AND_RUN = """
import sys, torch
from safetensors.torch import load_file, save_file
import sparsekit
torch.set_num_threads(1)
folder, images, result, maker = sys.argv[1:]
factory = None
if maker:
    import models_by_hand
    factory = models_by_hand.BY_HAND[maker]
model = sparsekit.load(folder, factory=factory)
with torch.no_grad():
    save_file({"logits": model(load_file(images)["images"])}, result)
"""


def logits_of_a_fresh_process(folder: Path, images: torch.Tensor, maker: str = "") -> torch.Tensor:
    inputs, result = folder.parent / "images.safetensors", folder.parent / "logits.safetensors"
    save_file({"images": images}, inputs)
    subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN, str(folder), str(inputs), str(result), maker],
        check=True,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        cwd=folder.parent,
        timeout=200,
    )
    return load_file(result)["logits"]


def test_a_fresh_process_loads_a_pruned_resnet18_with_equal_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    pruned, plan = cut(timm.create_model("resnet18", num_classes=4), images)
    save(pruned, tmp_path / "pruned", plan=plan)
    with torch.no_grad():
        assert torch.equal(logits_of_a_fresh_process(tmp_path / "pruned", images), pruned(images))


def test_a_fresh_process_loads_a_module_of_ones_own_with_its_factory(tmp_path: Path) -> None:
    model, (images,) = build("Residual")
    pruned, plan = cut(model, images)
    save(pruned, tmp_path / "pruned", plan=plan, factory=models_by_hand.Residual)
    found = logits_of_a_fresh_process(tmp_path / "pruned", images, "Residual")
    assert found.dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(found, pruned(images))


def loaded_logits(
    path: Path, images: torch.Tensor, factory: Callable[[], nn.Module] | None = None
) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load(path, factory=factory)(images)
    return logits


def test_a_vision_transformer_of_another_image_size_needs_its_arguments(tmp_path: Path) -> None:
    arguments = {"num_classes": 4, "img_size": 64, "in_chans": 1}
    images = torch.randn(2, 1, 64, 64)
    pruned, plan = cut(timm.create_model("test_vit", **arguments), images)
    path = save(pruned, tmp_path / "pruned", model_name="test_vit", model_args=arguments, plan=plan)
    with torch.no_grad():
        assert torch.equal(loaded_logits(path, images), pruned(images))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "legacy_seresnet18", "test_convnext"])
def test_other_architectures_survive(tmp_path: Path, name: str) -> None:
    model, (images,) = build(name)
    pruned, _ = cut(model.float(), images.float())
    path = save(pruned, tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(loaded_logits(path, images.float()), pruned(images.float()))


@pytest.mark.parametrize(
    "name", ["Depthwise", "Transposed", "TiedWeights", "UsedTwice", "FlattenBeforeLinear"]
)
def test_modules_of_ones_own_survive_with_their_sizes(tmp_path: Path, name: str) -> None:
    model, (inputs,) = build(name)
    pruned, _ = cut(model, inputs)
    factory = models_by_hand.BY_HAND[name]
    path = save(pruned, tmp_path / "pruned", factory=factory)
    loaded = load(path, factory=factory)
    with torch.no_grad():
        assert torch.equal(loaded(inputs), pruned(inputs))
    assert repr(loaded) == repr(pruned)  # channels, features and convolution groups
    assert count_params(loaded) == count_params(pruned)  # tied weights stay tied


def no_bias() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False)
    )


def test_a_bias_that_a_folded_constant_made_survives(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 8, 8)
    model = no_bias().eval()
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = 0, 0.7
    groups = find_groups(model, images)
    mask = torch.ones(6, dtype=torch.bool)
    mask[2] = False
    pruned = apply_plan(model, make_plan(groups, {"0": mask}))
    assert pruned[3].bias is not None
    path = save(pruned, tmp_path / "pruned", factory=no_bias)
    loaded = load(path, factory=no_bias)
    assert torch.equal(loaded[3].bias, pruned[3].bias)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images))


def test_a_model_cut_twice_loads_like_any_other(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    once, _ = cut(small_resnet(), images)
    twice, plan = cut(once, images)
    assert count_params(twice) < count_params(once)
    with torch.no_grad():
        assert torch.equal(loaded_logits(save(twice, tmp_path / "pruned", plan=plan), images), twice(images))


def test_a_loaded_model_can_be_saved_cut_and_trained_on(tmp_path: Path, artifact: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    loaded = load(artifact)
    again = load(save(loaded, tmp_path / "again"))
    with torch.no_grad():
        assert torch.equal(again(images), loaded(images))
    smaller, _ = cut(again, images)
    assert count_params(smaller) < count_params(again)
    again.train()(images).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in again.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    pruned, _ = cut(small_resnet(), torch.randn(1, 3, 32, 32))
    pruned = pruned.to(dtype)
    loaded = load(save(pruned, tmp_path / "pruned"))
    state, found = pruned.state_dict(), loaded.state_dict()
    assert list(state) == list(found)
    assert all(state[key].dtype == found[key].dtype for key in state)
    assert all(torch.equal(state[key], found[key]) for key in state)


def test_a_model_comes_back_in_eval_mode_and_is_saved_as_it_is(tmp_path: Path) -> None:
    model = small_resnet()
    model.train()
    model.bn1.eval()
    flags = [m.training for m in model.modules()]
    loaded = load(save(model, tmp_path / "dense"))
    assert not any(m.training for m in loaded.modules())
    assert [m.training for m in model.modules()] == flags


def test_neither_saving_nor_loading_moves_the_random_state(tmp_path: Path) -> None:
    model = small_resnet()
    state = torch.get_rng_state()
    load(save(model, tmp_path / "dense"))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_caller_adds_and_the_plan_can_be_read_without_the_weights(artifact: Path) -> None:
    (artifact / "model.safetensors").unlink()
    structure = read_structure(artifact)
    assert structure["info"] == {"classes": ["a", "b", "c", "d"]}
    assert structure["source"] == {"timm": "test_resnet", "args": {"num_classes": 4}}
    assert structure["versions"]["sparsekit"] == sparsekit.__version__
    groups = find_groups(small_resnet(), torch.randn(1, 3, 32, 32))
    assert PrunePlan.from_json(structure["plan"]) == make_plan(groups, random_masks(groups, 0.5))


def test_an_artifact_holds_nothing_but_safetensors_and_json_and_no_pickle(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(p.name for p in artifact.iterdir()) == ["model.safetensors", "structure.json"]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was pickled")

    for module, name in (
        (torch, "load"),
        (torch, "save"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
    ):
        monkeypatch.setattr(module, name, refuse)
    save(load(artifact), artifact.parent / "again")
    weights = (artifact / "model.safetensors").read_bytes()
    assert json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])["__metadata__"] == {
        "format": "pt"
    }
    assert weights[:2] != b"PK"


def test_saving_again_replaces_the_artifact(artifact: Path) -> None:
    model = small_resnet()
    assert save(model, artifact) == artifact
    assert count_params(load(artifact)) == count_params(model)


# What is refused


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"is no sparsekit artifact: it has no structure\.json"):
        load(tmp_path)
    with pytest.raises(FileError, match="is no sparsekit artifact"):
        load(tmp_path / "nowhere")


def test_an_artifact_without_its_weights_is_refused(artifact: Path) -> None:
    (artifact / "model.safetensors").unlink()
    with pytest.raises(FileError, match=r"no model\.safetensors; the artifact is incomplete"):
        load(artifact)


def test_weights_that_are_cut_short_changed_or_replaced_are_refused(artifact: Path) -> None:
    weights = artifact / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-10], content[:20], b"", content[:-1] + bytes([content[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(FileError, match=r"does not have the hash that structure\.json records"):
            load(artifact)
    weights.write_bytes(content)
    load(artifact)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": ', "\xff"])
def test_a_structure_that_is_damaged_is_refused(artifact: Path, text: str) -> None:
    (artifact / "structure.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FileError, match=r"structure\.json"):
        load(artifact)


@pytest.mark.parametrize("key", ["format", "source", "attributes", "tensors", "sha256"])
def test_a_structure_that_lacks_a_key_is_refused(artifact: Path, key: str) -> None:
    structure = json.loads((artifact / "structure.json").read_text())
    del structure[key]
    (artifact / "structure.json").write_text(json.dumps(structure))
    with pytest.raises(FileError, match=rf"lacks \['{key}'\]"):
        load(artifact)


def test_a_newer_format_is_refused(artifact: Path) -> None:
    edit(artifact, format="sparsekit/2")
    with pytest.raises(FileError, match=r"'sparsekit/2'.*reads 'sparsekit/1'"):
        load(artifact)


@pytest.mark.parametrize(
    "changes",
    [
        {"attributes": {"nowhere": {"groups": 2}}},
        {"attributes": {"conv1": {"nothing": 2}}},
        {"attributes": []},
        {"tensors": {}},
        {"tensors": {"fc.weight": ["float32"]}},
        {"source": {"timm": "test_resnet", "args": {"num_classes": "many"}}},
        {"source": {"timm": "no_such_model", "args": {}}},
        {"source": {"timm": "test_vit", "args": {"num_classes": 4}}},
    ],
)
def test_a_structure_that_does_not_fit_is_refused(artifact: Path, changes: dict[str, Any]) -> None:
    edit(artifact, **changes)
    with pytest.raises(FileError):
        load(artifact)


@pytest.mark.parametrize("dtype", ["float33", "nn", "Tensor"])
def test_an_unknown_dtype_is_refused(artifact: Path, dtype: str) -> None:
    tensors = read_structure(artifact)["tensors"]
    tensors["fc.weight"][0] = dtype
    edit(artifact, tensors=tensors)
    with pytest.raises(FileError, match=f"unknown dtype '{dtype}'"):
        load(artifact)


def test_a_module_of_ones_own_needs_its_factory_and_no_other(tmp_path: Path) -> None:
    model, (images,) = build("Residual")
    pruned, _ = cut(model, images)
    path = save(pruned, tmp_path / "pruned", factory=models_by_hand.Residual)
    with pytest.raises(FileError, match=r"holds a models_by_hand\.Residual.*pass load\(\.\.\., factory="):
        load(path)
    for wrong in ("Concatenation", "Depthwise", "ChunkGate"):
        with pytest.raises(FileError, match="does not fit"):
            load(path, factory=models_by_hand.BY_HAND[wrong])


def test_saving_what_cannot_be_built_again_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    model, _ = build("Residual")
    with pytest.raises(InputError, match=r"cannot tell how to build Residual again.*factory="):
        save(model, tmp_path / "pruned")
    with pytest.raises(InputError):
        save(model, tmp_path / "pruned", factory=models_by_hand.Depthwise)
    with pytest.raises(InputError, match="no_such_model"):
        save(model, tmp_path / "pruned", model_name="no_such_model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("info", [{"accuracy": float("nan")}, {"folder": Path()}, {"scores": torch.ones(2)}])
def test_notes_that_are_not_json_are_refused_before_an_artifact_is_touched(artifact: Path, info: Any) -> None:
    before = {p.name: p.read_bytes() for p in artifact.iterdir()}
    with pytest.raises(InputError, match="cannot be described in JSON"):
        save(small_resnet(), artifact, info=info)
    assert {p.name: p.read_bytes() for p in artifact.iterdir()} == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pruned").write_text("mine")
    with pytest.raises(FileError, match="it is a file; name a folder"):
        save(small_resnet(), tmp_path / "pruned")
    assert (tmp_path / "pruned").read_text() == "mine"


def test_the_round_trip_is_checked_against_the_model_itself(artifact: Path, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    pruned = load(artifact)
    random_state = torch.get_rng_state()
    assert check_round_trip(pruned.train(), artifact, images) == 0.0
    assert pruned.training
    assert torch.equal(torch.get_rng_state(), random_state)
    other = shutil.copytree(artifact, tmp_path / "other")
    with torch.no_grad():
        pruned.fc.bias += 1
    with pytest.raises(VerificationError, match="gives other logits than the model: off by"):
        check_round_trip(pruned, other, images)


def test_a_model_built_with_other_modules_than_its_name_says_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=10, act_layer="silu")
    with pytest.raises(InputError, match="model_args"):
        save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    save(model, tmp_path / "a", model_name="test_resnet", model_args={"num_classes": 10, "act_layer": "silu"})
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(load(tmp_path / "a")(image), model.eval()(image))
