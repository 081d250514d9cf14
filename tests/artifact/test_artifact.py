from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models_by_hand
import pytest
import safetensors.torch
import timm
import torch
from models_by_hand import build, random_masks
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

import sparsekit
from sparsekit.artifact import format as artifact_format
from sparsekit.artifact.format import read_structure
from sparsekit.artifact.load import check_round_trip, load
from sparsekit.artifact.save import save
from sparsekit.coupling.find_groups import find_groups
from sparsekit.errors import FileError, InputError, VerificationError
from sparsekit.evaluation import flat_tensors
from sparsekit.structure.counting import count_params
from sparsekit.structure.plan import PrunePlan, make_plan
from sparsekit.surgery.cut import apply_plan
from sparsekit.surgery.rewrite_code import rewritten_places

TESTS = Path(__file__).parents[1]


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
from pathlib import Path
from safetensors.torch import load_file, save_file
import models_by_hand, sparsekit
from sparsekit.evaluation import flat_tensors
torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    inputs = load_file(folder / "inputs.safetensors")
    model = sparsekit.load(folder / "pruned", factory=models_by_hand.BY_HAND.get(folder.name))
    with torch.no_grad():
        outputs = flat_tensors(model(*(inputs[str(i)] for i in range(len(inputs)))))
    save_file({str(i): y.contiguous() for i, y in enumerate(outputs)}, folder / "outputs.safetensors")
"""
TIMM = [
    "test_resnet",
    "resnet18",
    "mobilenetv3_small_050",
    "legacy_seresnet18",
    "test_convnext",
    "test_vit",
    "test_nfnet",
]


def small(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]:
    """A model, its inputs, and what `save` needs to know to build it again."""
    if name in models_by_hand.BY_HAND:
        return *build(name), {"factory": models_by_hand.BY_HAND[name]}
    if name.startswith("cait"):  # its attention computes sizes from the width of the input
        arguments = {"num_classes": 4, "img_size": 32, "depth": 1}
    else:
        arguments = {"num_classes": 4, **({"img_size": 64} if "vit" in name else {})}
    torch.manual_seed(0)
    side = arguments.get("img_size", 64)
    model = timm.create_model(name, **arguments).eval()
    return model, (torch.randn(2, 3, side, side),), {"model_name": name, "model_args": arguments}


def test_a_fresh_process_loads_every_pruned_architecture_with_the_same_logits(tmp_path: Path) -> None:
    expected: dict[str, list[torch.Tensor]] = {}
    for name in (*models_by_hand.BY_HAND, *TIMM, "cait_xxs24_224"):
        model, inputs, source = small(name)
        groups = find_groups(model, inputs)
        plan = make_plan(groups, random_masks(groups, 0.5))
        pruned = apply_plan(model, plan).eval()
        path = save(pruned, tmp_path / name / "pruned", plan=plan, **source)
        assert bool(read_structure(path)["plain"]) == (name == "test_nfnet")
        save_file({str(i): x for i, x in enumerate(inputs)}, tmp_path / name / "inputs.safetensors")
        with torch.no_grad():
            expected[name] = flat_tensors(pruned(*inputs))
    subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN, str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        timeout=250,
    )
    for name, outputs in expected.items():
        found = load_file(tmp_path / name / "outputs.safetensors")
        assert len(found) == len(outputs)
        for i, output in enumerate(outputs):
            assert found[str(i)].dtype == output.dtype
            # Kernels may sum in another order where memory is aligned otherwise: the last bits, no more.
            torch.testing.assert_close(
                found[str(i)],
                output,
                rtol=1e-12 if output.dtype == torch.float64 else 1e-5,
                atol=1e-12 if output.dtype == torch.float64 else 1e-6,
                msg=name,
            )


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


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("name", ["AttentionOfComputedSizes", "cait_xxs24_224"])
def test_a_model_whose_code_was_rewritten_can_be_cut_and_saved_again(
    tmp_path: Path, name: str, reload: bool
) -> None:
    model, inputs, source = small(name)
    factory = source.get("factory")
    n_places = []
    for step in range(2):
        groups = find_groups(model, inputs)
        plan = make_plan(groups, random_masks(groups, 0.7, step))
        assert plan.rewrites or step
        model = apply_plan(model, plan).eval()
        path = save(model, tmp_path / str(step), plan=plan, **source)
        loaded = load(path, factory=factory)
        with torch.no_grad():
            assert torch.equal(loaded(*inputs), model(*inputs))
        n_places.append(len(read_structure(path)["rewrites"]))
        assert [rewritten_places(m) for m in loaded.modules()] == [
            rewritten_places(m) for m in model.modules()
        ]
        model = loaded if reload else model
    assert 0 < n_places[0] <= n_places[1]


def test_a_rewritten_model_may_become_part_of_another(tmp_path: Path) -> None:
    model, inputs, source = small("AttentionOfComputedSizes")
    pruned, _ = cut(model, *inputs)

    def factory() -> nn.Module:
        return nn.Sequential(nn.Identity(), source["factory"]())

    whole = nn.Sequential(nn.Identity(), pruned)
    loaded = load(save(whole, tmp_path / "whole", factory=factory), factory=factory)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), pruned(*inputs))


class Tabled(nn.Module):
    """A table that is not stored with the model is added to what a layer gives."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(features).relu()) + self.table


def test_buffers_that_a_state_dict_leaves_out_come_back_where_they_changed(tmp_path: Path) -> None:
    features = torch.randn(2, 4, dtype=torch.float64)
    model, _ = cut(Tabled(), features.float())
    path = save(model, tmp_path / "plain", factory=Tabled)
    assert "table" not in read_structure(path)["tensors"]
    model = model.double()
    model.table += 1
    loaded = load(save(model, tmp_path / "changed", factory=Tabled), factory=Tabled)
    assert list(loaded.state_dict()) == list(Tabled().state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(features), model(features))


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_model_with_a_parametrised_layer_comes_back(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    def make() -> nn.Module:
        first, second, third = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        return nn.Sequential(wrap(first), nn.ReLU(), second, nn.ReLU(), third)

    features = torch.randn(2, 3)
    model, _ = cut(make().eval(), features)
    loaded = load(save(model, tmp_path / "parametrised", factory=make), factory=make)
    assert list(loaded.state_dict()) == list(make().state_dict())
    torch.testing.assert_close(loaded(features), model(features))


def test_a_model_of_a_folder_is_saved_as_the_architecture_it_is(tmp_path: Path) -> None:
    config = {"architecture": "test_vit", "pretrained_cfg": {}, "model_args": {"img_size": 32}}
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    name, images = f"local-dir:{tmp_path / 'hub'}", torch.randn(2, 3, 32, 32)
    model = timm.create_model(name, num_classes=4).eval()
    if not hasattr(model, "_model_args"):
        pytest.skip("this timm does not say which arguments a folder held")
    path = save(model, tmp_path / "saved", model_name=name, model_args={"num_classes": 4})
    shutil.rmtree(tmp_path / "hub")
    assert read_structure(path)["source"]["timm"] == "test_vit"
    with torch.no_grad():
        assert torch.equal(loaded_logits(path, images), model(images))


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


KEYS = "format source attributes tensors bypassed plain zeros rewrites sha256 plan info versions"


def test_the_keys_are_those_of_the_documented_format(artifact: Path) -> None:
    assert sorted(json.loads((artifact / "structure.json").read_text())) == sorted(KEYS.split())
    assert artifact_format.__doc__ is not None
    assert all(f"\n    {key} " in artifact_format.__doc__ for key in KEYS.split())


@pytest.mark.parametrize("key", KEYS.split())
def test_a_structure_that_lacks_a_key_is_refused(artifact: Path, key: str) -> None:
    structure = json.loads((artifact / "structure.json").read_text())
    del structure[key]
    (artifact / "structure.json").write_text(json.dumps(structure))
    with pytest.raises(FileError, match=rf"lacks \['{key}'\]"):
        load(artifact)


def test_a_newer_format_is_refused(artifact: Path) -> None:
    edit(artifact, format="sparsekit/2", versions={"sparsekit": "7.5"}, surprise=1)
    with pytest.raises(FileError, match=r"'sparsekit/2'.*reads 'sparsekit/1'.* install .* wrote it, '7\.5'"):
        load(artifact)


REPLACEMENTS: tuple[Any, ...] = (None, True, 7, -2, 2.5, 10**30, "x", [], [[0]], {}, {"a": {"b": 1}})


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place of a JSON value and what stands there; of long lists and tables the first and last entry."""
    if path:
        yield path, value
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    few = not path or len(keys) < 4
    for key in keys if few else (keys[0], keys[-1]):
        yield from nodes(value[key], (*path, key))


def with_replacement(structure: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(structure)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


def json_type(value: Any) -> Any:
    """The type of a JSON value, and for a list that of its entries too."""
    if isinstance(value, list):
        return [json_type(value[0]) if value else Any]
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def refused(folder: Path, factory: Callable[[], nn.Module] | None) -> bool:
    """Whether loading fails with one line that names the folder; any other exception goes through."""
    try:
        load(folder, factory=factory)
    except FileError as error:
        return "\n" not in str(error) and str(folder) in str(error)
    return False


@pytest.mark.parametrize("name", ["Depthwise", "AttentionOfComputedSizes", "test_resnet"])
def test_a_value_of_the_wrong_type_is_refused_wherever_it_stands(tmp_path: Path, name: str) -> None:
    model, inputs, source = small(name)
    pruned, plan = cut(model, *inputs)
    path = save(pruned, tmp_path / "pruned", plan=plan, info={"note": [1]}, **source)
    structure = json.loads((path / "structure.json").read_text())
    places = list(nodes(structure))
    assert {place[0] for place, _ in places} == set(KEYS.split())
    for place, value in places:
        # What the caller notes, timm's arguments and descriptive texts may be anything, but must not crash either.
        inside = place[:1] == ("info",), place[:2] == ("source", "args"), place[2:3] == ("feature_info",)
        free = any(one and len(place) > depth for one, depth in zip(inside, (1, 2, 4), strict=True))
        for other in REPLACEMENTS:
            if json_type(other) in (json_type(value), [Any]) or (place, other) == (("plan",), None):
                continue
            (path / "structure.json").write_text(json.dumps(with_replacement(structure, place, other)))
            assert refused(path, source.get("factory")) or free, (place, other)


@pytest.mark.parametrize(
    "changes",
    [
        {"attributes": {"nowhere": {"groups": 2}}},
        {"tensors": {}},
        {"tensors": {"fc.weight": ["float32"]}},
        {"surprise": 1},
        {"source": {"timm": "test_resnet", "args": {}, "factory": "os.system"}},
        {"source": {"timm": "test_resnet", "args": {"num_classes": "many"}}},
        {"source": {"timm": "test_resnet", "args": {"device": "meta"}}},
        {"source": {"timm": "test_vit", "args": {"num_classes": 4}}},
        {"source": {"factory": "models_by_hand.Residual"}},  # never imported
    ],
)
def test_a_structure_that_does_not_fit_is_refused(artifact: Path, changes: dict[str, Any]) -> None:
    edit(artifact, **changes)
    with pytest.raises(FileError):
        load(artifact)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"format": ' * 50_000, '{"a": "\\ud800"}', "NaN"])
def test_text_that_trips_parsers_is_refused(artifact: Path, text: str) -> None:
    (artifact / "structure.json").write_text(text)
    with pytest.raises(FileError, match=r"structure\.json"):
        load(artifact)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("no_such_model", {}),
        ("resnet18_of_tomorrow", {"num_classes": 4}),
        ("test_resnet", {"an_argument_of_tomorrow": 1}),
    ],
)
def test_a_model_of_another_timm_is_refused_with_both_versions(
    artifact: Path, name: str, args: dict[str, Any]
) -> None:
    versions = {**read_structure(artifact)["versions"], "timm": "99.1"}
    edit(artifact, source={"timm": name, "args": args}, versions=versions)
    with pytest.raises(
        FileError, match=rf"{name}.*written with timm 99\.1 \(installed: {timm.__version__}\)"
    ):
        load(artifact)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("hf-hub:timm/resnet18.a1_in1k", {}, "timm has no model"),
        ("hf_hub:timm/resnet18.a1_in1k", {}, "timm has no model"),
        ("local-dir:{folder}", {}, "timm has no model"),
        ("../{folder}", {}, "timm has no model"),
        ("test_resnet", {"pretrained": True}, "no argument pretrained that"),
        (
            "test_resnet",
            {"checkpoint_path": "{folder}/weights.pth"},
            "no argument checkpoint_path that",
        ),
        (
            "test_resnet",
            {"pretrained_cfg": {"file": "{folder}/weights.pth"}},
            "no argument pretrained_cfg that",
        ),
        (
            "test_resnet",
            {"pretrained_cfg_overlay": {"url": "http://x"}},
            "no argument pretrained_cfg_overlay that",
        ),
        ("test_resnet", {"cache_dir": "{folder}"}, "no argument cache_dir that"),
    ],
)
def test_a_source_that_leads_out_of_the_folder_is_refused(
    artifact: Path, tmp_path: Path, name: str, args: dict[str, Any], message: str
) -> None:
    config = {"architecture": "test_resnet", "num_classes": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(small_resnet().state_dict(), tmp_path / "weights.pth")
    source = json.dumps({"timm": name, "args": args}).replace("{folder}", str(tmp_path))
    edit(artifact, source=json.loads(source))
    with pytest.raises(FileError, match=message):
        load(artifact)
    if args:
        with pytest.raises(InputError, match=message):
            save(small_resnet(), tmp_path / "new", model_name=name, model_args=args)


@pytest.mark.parametrize("name", ["model.safetensors", "structure.json"])
def test_a_file_that_is_a_link_out_of_the_folder_is_refused(
    artifact: Path, tmp_path: Path, name: str
) -> None:
    (artifact / name).rename(tmp_path / name)
    (artifact / name).symlink_to(tmp_path / name)
    with pytest.raises(FileError, match=rf"{name} is a link to .*outside of the artifact"):
        load(artifact)
    (tmp_path / name).unlink()  # now it leads nowhere
    with pytest.raises(FileError, match=name):
        load(artifact)
    (artifact / name).unlink()
    (artifact / name).mkdir()
    with pytest.raises(FileError, match=name):
        load(artifact)


def test_the_folder_itself_may_be_a_link(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(artifact)
    load(tmp_path / "latest")


class Exploit:
    """A pickle of it writes a file where it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.write_text, (self.trace, "executed")


def put_weights(folder: Path, content: bytes) -> None:
    """Other weights, with the hash that fits them."""
    (folder / "model.safetensors").write_bytes(content)
    edit(folder, sha256=hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5, "torch", "torch before 1.6"])
def test_a_pickle_under_the_name_of_the_weights_is_refused_and_never_run(
    artifact: Path, tmp_path: Path, protocol: int | str
) -> None:
    exploit, pickled = Exploit(tmp_path / "trace"), io.BytesIO()
    if isinstance(protocol, int):
        pickle.dump(exploit, pickled, protocol)
    else:
        torch.save(exploit, pickled, _use_new_zipfile_serialization=protocol == "torch")
    put_weights(artifact, pickled.getvalue())
    message = "is a pickle under another name" if protocol not in (0, 1) else "cannot be read"
    with pytest.raises(FileError, match=message):
        load(artifact)
    assert not (tmp_path / "trace").exists()


def test_weights_whose_header_begins_like_a_pickle_are_no_pickle(tmp_path: Path) -> None:
    """The first bytes are the header's length, and 640 reads like the second protocol."""
    model = small_resnet()
    for size in range(200):
        path = save(model, tmp_path / "dense", info={})
        tensors = load_file(path / "model.safetensors")
        save_file(tensors, path / "padded", metadata={"format": "pt", "note": "x" * 8 * size})
        content = (path / "padded").read_bytes()
        if content[0] == 0x80:
            break
    assert content[:1] == b"\x80"
    put_weights(path, content)
    load(path)


def retensored(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    put_weights(folder, safetensors.torch.save(tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.weight"), "lacks fc.weight, which structure.json records"),
        (lambda t: t.update(extra=torch.zeros(1)), "holds extra, which structure.json does not record"),
        (
            lambda t: t.update({"fc.weight": t["fc.weight"].T.contiguous()}),
            r"fc.weight is recorded .* of shape",
        ),
        (lambda t: t.update({"fc.weight": t["fc.weight"].half()}), "fc.weight is recorded .*F16 of shape"),
    ],
)
def test_weights_with_other_tensors_than_recorded_are_refused(
    artifact: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    retensored(artifact, change)
    with pytest.raises(FileError, match=message):
        load(artifact)


@pytest.mark.parametrize(
    "added", ["conv1.extra", "nowhere.weight", "__class__", "forward", "conv1.weight.data"]
)
def test_a_tensor_that_the_model_has_no_place_for_is_refused(artifact: Path, added: str) -> None:
    retensored(artifact, lambda tensors: tensors.update({added: torch.zeros(2)}))
    edit(artifact, tensors={**read_structure(artifact)["tensors"], added: ["float32", [2]]})
    with pytest.raises(FileError, match=f"does not fit .*the dense model has no {re.escape(added)}"):
        load(artifact)


def test_a_tensor_that_both_files_lack_is_refused(artifact: Path) -> None:
    retensored(artifact, lambda tensors: tensors.pop("fc.weight"))
    tensors = read_structure(artifact)["tensors"]
    del tensors["fc.weight"]
    edit(artifact, tensors=tensors)
    with pytest.raises(FileError, match=r"tensors of the dense model are not in the artifact: fc\.weight"):
        load(artifact)


@pytest.mark.parametrize(
    "shape", [[2**40, 2**20], [2**62, 2**62], [10**12], [-4, 8], [-1], [4, 8, 1], [8, 4], [], [2**64]]
)
def test_a_shape_that_the_weights_do_not_have_is_refused_before_anything_is_allocated(
    artifact: Path, shape: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = read_structure(artifact)["tensors"]
    tensors["fc.weight"][1] = shape
    edit(artifact, tensors=tensors)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was allocated or built")

    for name in ("empty", "empty_like", "zeros"):
        monkeypatch.setattr(torch, name, refuse)
    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(FileError, match=r"fc\.weight"):
        load(artifact)


@pytest.mark.parametrize("plain", [["conv1.0"], ["nowhere"], [""]])
def test_only_standardised_convolutions_are_made_plain(artifact: Path, plain: list[str]) -> None:
    edit(artifact, plain=plain)
    with pytest.raises(FileError, match="is no weight-standardised convolution of the dense model"):
        load(artifact)


@pytest.mark.parametrize(
    ("module", "key", "value"),
    [
        ("", "__class__", 1),
        ("", "__dict__", {}),
        ("", "_modules", {}),
        ("", "_non_persistent_buffers_set", []),
        ("conv1", "_parameters", {}),
        ("conv1", "forward", "x"),
        ("conv1", "training", True),
        ("conv1", "weight", 1),
        ("conv1", "nothing", 2),
        ("", "conv1", 1),
        ("", "forward", None),
        ("", "requires_grad_", 1),
        ("", "T_destination", "x"),
    ],
)
def test_an_attribute_that_is_no_plain_one_of_the_model_is_refused(
    artifact: Path, module: str, key: str, value: Any
) -> None:
    edit(artifact, attributes={module: {key: value}})
    with pytest.raises(FileError, match=f"{key} is no plain attribute of the dense model"):
        load(artifact)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kernel_size", 3),
        ("kernel_size", ["3", "3"]),
        ("kernel_size", None),
        ("kernel_size", {"0": 3}),
        ("out_channels", "8"),
        ("out_channels", True),
        ("out_channels", 2.5),
        ("out_channels", [8]),
        ("out_channels", None),
        ("padding_mode", 1),
    ],
)
def test_an_attribute_of_another_kind_is_refused(artifact: Path, key: str, value: Any) -> None:
    edit(artifact, attributes={"conv1.0": {key: value}})
    with pytest.raises(FileError, match=rf"conv1\.0\.{key}\S* must be a \w+ as in the dense model, got "):
        load(artifact)


@pytest.mark.parametrize(
    "change",
    [
        {"module": "nowhere"},
        {"method": "nothing"},
        {"method": "__init__"},
        {"method": "num_heads"},
        {"call": 99},
        {"call": -1},
        {"argument": 99},
        {"argument": -1},
        {"size": -2},
        {"size": 0},
        {"source": "0" * 64},
    ],
)
def test_a_rewrite_that_does_not_fit_the_code_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    model, inputs, source = small("AttentionOfComputedSizes")
    pruned, _ = cut(model, *inputs)
    path = save(pruned, tmp_path / "pruned", **source)
    (place, *others) = read_structure(path)["rewrites"]
    edit(path, rewrites=[{**place, **change}, *others])
    with pytest.raises(FileError, match="does not fit the dense model"):
        load(path, **source)


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


def test_a_factory_of_the_callers_builds_even_a_timm_model(artifact: Path) -> None:
    edit(artifact, source={"timm": "gone_from_timm", "args": {}})
    load(artifact, factory=small_resnet)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: None, "must be a torch.nn.Module, got NoneType"),
        (lambda: models_by_hand.Residual, "must be a torch.nn.Module, got type"),
        (lambda needed: needed, "TypeError"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_factory_that_builds_nothing_is_refused(tmp_path: Path, factory: Any, message: str) -> None:
    model, _ = build("Residual")
    path = save(model, tmp_path / "dense", factory=models_by_hand.Residual)
    with pytest.raises(FileError, match=f"cannot be built: what the factory builds: .*{message}"):
        load(path, factory=factory)
    with pytest.raises(InputError, match=f"what the factory builds: .*{message}"):
        save(model, tmp_path / "again", factory=factory)


def test_a_model_that_a_factory_hands_out_more_than_once_is_never_changed(tmp_path: Path) -> None:
    model, inputs, source = small("AttentionOfComputedSizes")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned, _ = cut(model, *inputs)
    for factory in (lambda: model, source["factory"]):
        path = save(pruned, tmp_path / "pruned", factory=factory)
        loaded = load(path, factory=lambda: model)
        edit(path, attributes={"": {"num_heads": "four"}})  # refused last, when all else is in place
        with pytest.raises(FileError):
            load(path, factory=lambda: model)
        assert not {p.data_ptr() for p in loaded.parameters()} & {p.data_ptr() for p in model.parameters()}
        assert type(model) is models_by_hand.AttentionOfComputedSizes
        assert model.num_heads == 4
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.to("meta"), "holds no numbers that could be saved"),
        (lambda m: m.register_buffer("sparse", torch.eye(2).to_sparse()), "sparse cannot be saved"),
        (lambda m: m.register_buffer("complex", torch.zeros(2, dtype=torch.complex64)), "torch.complex64"),
        (lambda m: m.register_buffer("late", torch.zeros(2)), "the dense model has no late"),
        (lambda m: m.add_module("late", nn.ReLU()), "late is ReLU, rebuilt nothing"),
        (lambda m: m.__delattr__("head"), "head is nothing, rebuilt Linear"),
    ],
)
def test_a_model_that_could_not_be_loaded_is_not_saved(
    tmp_path: Path, spoil: Callable[[nn.Module], Any], message: str
) -> None:
    model, _ = build("Residual")
    spoil(model)
    with pytest.raises(InputError, match=message):
        save(model, tmp_path / "pruned", factory=models_by_hand.Residual)
    assert not list(tmp_path.iterdir())


def test_arguments_that_are_not_json_are_refused(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=4, act_layer=nn.SiLU)
    with pytest.raises(InputError, match="cannot be described in JSON"):
        save(model, tmp_path / "a", model_name="test_resnet", model_args={"act_layer": nn.SiLU})


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


class Versioned(nn.Sequential):
    """Refuses a state dict that does not say which version it has, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_model_that_asks_for_the_version_of_its_state_dict_is_loaded(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return Versioned(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()

    model, images = make(), torch.randn(1, 3, 8, 8)
    groups = find_groups(model, images)
    pruned = apply_plan(model, make_plan(groups, {"0": torch.arange(8) > 3}))
    save(pruned, tmp_path, factory=make)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, factory=make)(images), pruned(images))
