"""Recipes: what loads, what comes back, and what each mistake is told as."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from sparsekit.errors import RecipeError
from sparsekit.recipe import specs
from sparsekit.recipe.reading import default_output, dump_recipe, load_recipe, load_run_recipe, placer
from sparsekit.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "sparsekit" / "recipe" / "template.yaml"
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))

MINIMAL = """\
model: {name: resnet18}
data: {name: digits}
dense: {epochs: 2}
sparsify: {epochs: 3}
cut:
  target: {macs: 0.5}
finetune: {epochs: 1}
"""

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load MINIMAL with `text` after it, and overrides."""

    def load(text: str = "", *overrides: str, base: str = MINIMAL) -> Recipe:
        path = tmp_path / "x.yaml"
        path.write_text(base + text, encoding="utf-8")
        return load_recipe(path, overrides)

    return load


def problems(load: Load, *args: str, **kwargs: str) -> list[str]:
    """The lines of the error, with the temporary directory left out."""
    with pytest.raises(RecipeError) as caught:
        load(*args, **kwargs)
    return re.sub(r"/\S*/x\.yaml", "x.yaml", str(caught.value)).splitlines()


def fields(spec: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, info in spec.model_fields.items():
        yield prefix + key, info
        section = specs.nested_spec(info)
        if section is not None:
            yield from fields(section, f"{prefix}{key}.")


# ----------------------------------------------------------------------------------------------- what is good


@pytest.mark.parametrize("path", [*SHIPPED, TEMPLATE], ids=lambda path: path.name)
def test_shipped_recipes_load_and_come_back_equal(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    again = tmp_path / "recipe.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_open_with_their_command(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"prune recipes/{path.name}" in head


def test_the_recipes_that_the_documentation_names_are_there() -> None:
    names = {
        "quickstart.yaml",
        "finished_model.yaml",
        "cifar10_resnet18.yaml",
        "image_folder.yaml",
        "imagenet_resnet50.yaml",
    }
    assert names <= {path.name for path in SHIPPED}


def test_template_shows_every_key_at_its_default(tmp_path: Path) -> None:
    text = TEMPLATE.read_text(encoding="utf-8")
    shown = re.sub(r"^( *)#(\w+:)", r"\1\2", text, flags=re.M)
    keys = set(re.findall(r"^ *(\w+):", shown, flags=re.M))
    assert {dotted.rpartition(".")[2] for dotted, _ in fields(Recipe)} - keys == {
        "speedup",
        "latency_ms",
        "params",
        "channels",
        "macs",
        "max_accuracy_drop",
        "images",
        "distill_seconds",
    }
    (tmp_path / "shown.yaml").write_text(shown, encoding="utf-8")
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe(TEMPLATE)


def test_every_key_has_a_description() -> None:
    missing = [dotted for dotted, info in fields(Recipe) if not info.description]
    assert not missing


def test_dump_writes_every_default_out(load: Load) -> None:
    values = yaml.safe_load(dump_recipe(load()))
    for dotted, _ in fields(Recipe):
        if dotted.startswith(("sparsify.distill.", "finetune.distill.", "cut.repair.")):
            continue
        value = values
        for key in dotted.split("."):
            assert key in value, dotted
            value = value[key]
    assert values["sparsify"]["distill"] is None
    assert values["finetune"]["distill"] is None
    assert values["cut"]["repair"] is None


def test_texts_that_look_like_something_else_come_back_as_texts(load: Load, tmp_path: Path) -> None:
    words = [
        "no",
        "on",
        "1e-4",
        "1:30",
        "010",
        "null",
        "",
        "2020-01-01",
        "~",
        "0o7",
        "1_000",
        "=",
        "<<",
        " a: b",
    ]
    recipe = load(
        f"training: {{optimizer_args: {{words: {[*words]!r}, size: [1e-5, 1.0, 1e+20, 3, true]}}}}\n"
    )
    assert recipe.training.optimizer_args["words"] == tuple(words)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe
    # Other readers of YAML, by the older rules, see texts too.
    assert yaml.safe_load(dump_recipe(recipe))["training"]["optimizer_args"]["words"] == words


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("0x10", 16),
        ("0o17", 15),
        ("010", 10),
        ("-3", -3),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
    ],
)
def test_yaml_is_read_by_the_core_rules(load: Load, written: str, value: object) -> None:
    got = load(f"training:\n  optimizer_args:\n    x: {written}\n").training.optimizer_args["x"]
    assert got == value
    assert type(got) is type(value)


def test_numbers_without_a_point_and_words_for_booleans(load: Load) -> None:
    recipe = load("training: {optimizer: on, lr: 1e-4}\nprecision: no\n", "sparsify.strength=1e-4")
    assert (recipe.training.optimizer, recipe.precision) == ("on", "no")
    assert (recipe.training.lr, recipe.sparsify.strength) == (1e-4, 1e-4)


def test_overrides_reach_every_depth_and_the_last_one_wins(load: Load) -> None:
    recipe = load(
        "",
        "seed=1",
        "seed=2",
        "finetune.distill.weight=0.7",
        "data.augment.scale=[0.5, 1]",
        "cut.target={params: 0.3}",
        "output=a=b",
    )
    assert recipe.seed == 2
    assert recipe.finetune.distill == specs.DistillSpec(weight=0.7)
    assert recipe.data.augment == specs.AugmentSpec(scale=(0.5, 1.0))
    assert recipe.cut.target == specs.TargetSpec(params=0.3)
    assert recipe.output == Path("a=b")


@pytest.mark.parametrize("value", ["null", "false", ""])
def test_optional_sections_are_turned_off(load: Load, value: str) -> None:
    recipe = load("", f"data.augment={value}", f"finetune.distill={value}")
    assert recipe.data.augment is None
    assert recipe.finetune.distill is None


@pytest.mark.parametrize("value", ["true", "auto", "{}"])
def test_optional_sections_have_defaults(load: Load, value: str) -> None:
    recipe = load("", f"data.augment={value}", f"finetune.distill={value}")
    assert recipe.data.augment == specs.AugmentSpec()
    assert recipe.finetune.distill == specs.DistillSpec()


def test_a_section_without_keys_is_an_empty_one(load: Load) -> None:
    assert load("export:\n  # opset: 17\n").export == specs.ExportSpec()


def test_anchors_are_followed(load: Load) -> None:
    recipe = load("training: {optimizer_args: {a: &a [1, 2], b: *a}}\n")
    assert recipe.training.optimizer_args == {"a": (1, 2), "b": (1, 2)}


def test_home_is_expanded(load: Load) -> None:
    recipe = load("", "data.name=folder", "data.root=~/images")
    assert recipe.data.root == Path.home() / "images"


def test_default_output_is_named_after_the_file() -> None:
    assert default_output(Path("recipes/quickstart.yaml")) == Path("runs/quickstart")


def test_a_recipe_is_frozen_and_can_be_built_in_python(load: Load) -> None:
    built = Recipe(
        model=specs.ModelSpec(name="resnet18"),
        data=specs.DataSpec(name="digits"),
        dense=specs.DenseSpec(epochs=2),
        sparsify=specs.SparsifySpec(epochs=3),
        cut=specs.CutSpec(target=specs.TargetSpec(macs=0.5)),
        finetune=specs.FinetuneSpec(epochs=1),
    )
    assert built == load()
    with pytest.raises(ValidationError, match="frozen"):
        built.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match=r"data\.root is required"):
        Recipe(**{**dict(built), "data": specs.DataSpec()})


def test_importing_recipes_imports_no_torch() -> None:
    code = "import sys, sparsekit.recipe; sys.exit(bool({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ what is not

# (what is added to MINIMAL, overrides, the only line of the message)
ONE_MISTAKE = [
    ("device: 3", "device must be a non-empty text, got 3 (x.yaml, line 8)"),
    ("seed: true", "seed must be an integer >= 0 and <= 4294967295, got true (x.yaml, line 8)"),
    ("seed: 1.0", "seed must be an integer >= 0 and <= 4294967295, got 1.0 (x.yaml, line 8)"),
    ("training:\n  lr: high", "training.lr must be a number > 0, got 'high' (x.yaml, line 9)"),
    ("training:\n  lr: .inf", "training.lr must be a number > 0, got Infinity (x.yaml, line 9)"),
    ("training:\n  ema: 1", "training.ema must be a number > 0 and < 1 or null, got 1 (x.yaml, line 9)"),
    ("training: {lr: '1'}", "training.lr must be a number > 0, got '1' (x.yaml, line 8)"),
    (
        "training: {channels_last: yes}",
        "training.channels_last must be true or false, got 'yes' (x.yaml, line 8)",
    ),
    ("precision: off", "precision must be one of no, bf16, fp16, got 'off' (x.yaml, line 8)"),
    ("output: ''", "output must be a path or null, got '' (x.yaml, line 8)"),
    (
        "training: {optimizer_args: {betas: {a: 1}}}",
        "training.optimizer_args must be a mapping of names to numbers, texts, true/false, null or lists of "
        'these, got {"betas": {"a": 1}} (x.yaml, line 8)',
    ),
    (
        "export: 5",
        "export must be a mapping with keys of opset, batch_size, dynamic_batch, precisions, calibration, got 5 "
        "(x.yaml, line 8)",
    ),
    (
        "benchmark: [1]",
        "benchmark must be a mapping with keys of threads, rounds, warmup, provider, got [1] (x.yaml, line 8)",
    ),
    ("Seed: 1", "unknown key Seed; did you mean seed? (x.yaml, line 8)"),
    ("training:\n  learning: 1", "unknown key training.learning; the keys of training are optimizer, lr, "),
    (
        "training:\n  weight-decay: 1",
        "unknown key training.weight-decay; did you mean training.weight_decay? ",
    ),
    ("training: {clipgrad: 1}", "unknown key training.clipgrad; did you mean training.clip_grad? "),
    ("export: {rounds: 20}", "unknown key export.rounds; did you mean benchmark.rounds? (x.yaml, line 8)"),
    ("strength: 1", "unknown key strength; did you mean sparsify.strength? (x.yaml, line 8)"),
    ("seed: 1\nseed: 2", "seed stands twice, first in x.yaml, line 8 (x.yaml, line 9)"),
    (
        "seed: !!python/object:os.system 1",
        "seed has the YAML tag tag:yaml.org,2002:python/object:os.system, ",
    ),
    (
        "seed: !!int x",
        "seed has the YAML tag tag:yaml.org,2002:int, which a recipe cannot hold (x.yaml, line 8)",
    ),
    ("? [a]\n: 1", "a key must be a text, got a list or mapping (x.yaml, line 8)"),
    ("training: &t {optimizer_args: *t}", "training.optimizer_args must not contain itself, "),
]

ONE_BAD_OVERRIDE = [
    (
        "model={factory: nets.py}",
        "model.factory must be package.module:function, such as nets:build, or null, got 'nets.py' ",
    ),
    (
        "data.batch_size=many",
        "data.batch_size must be an integer >= 1, got 'many' (--set data.batch_size=many)",
    ),
    (
        "seed",
        "an override must be path.to.key=value, such as data.batch_size=32, got 'seed' (--set seed)",
    ),
    (
        ".seed=1",
        "an override must be path.to.key=value, such as data.batch_size=32, got '.seed=1' (--set .seed=1)",
    ),
    (
        "data.batchsize=3",
        "unknown key data.batchsize; did you mean data.batch_size? (--set data.batchsize=3)",
    ),
    ("seed=[1", "not valid YAML: expected ',' or ']', but got '<stream end>' (--set seed=[1)"),
    ("seed.x=1", 'seed must be an integer >= 0 and <= 4294967295, got {"x": 1} (--set seed.x=1)'),
    (
        "data.name=imagenet",
        "data.name must be digits, folder, or a timm dataset name such as torch/cifar10 or ",
    ),
    ("data.mean=[1, x, 1]", 'data.mean must be a list of values, each a number or null, got [1, "x", 1] '),
    (
        "data.augment.scale=[1]",
        "data.augment.scale must be a list of 2 values, each a number > 0, got [1] (--set ",
    ),
    (
        "cut.round_to=half",
        "cut.round_to must be auto or an integer >= 1, got 'half' (--set cut.round_to=half)",
    ),
    ("sparsify.strength=-1", "sparsify.strength must be auto or a number >= 0, got -1 (--set "),
    (
        "cut.ignore=fc",
        "cut.ignore must be a list of values, each a non-empty text, got 'fc' (--set cut.ignore=fc)",
    ),
    # Keys that do not fit together.
    ("data.name=folder", "data.root is required where data.name is folder: "),
    ("data.root=images", "data.root must be left out where data.name is digits "),
    ("data.test=test", "data.test must be null where data.name is digits"),
    ("data.mean=[0.5]", "data.mean must have one number for each of the 3 input channels, got 1 (--set "),
    ("data.augment.scale=[0.9, 0.5]", "data.augment.scale must be [low, high] with low <= high <= 1, got "),
    ("data.augment.ratio=[2, 1]", "data.augment.ratio must be [low, high] with low <= high, got [2.0, 1.0] "),
    ("dense.epochs=0", "dense.epochs 0 needs trained weights: set model.pretrained or model.checkpoint"),
    (
        "sparsify.ramp=0.7",
        "sparsify.warmup, ramp and debias are shares of the phase and must sum to at most 1, ",
    ),
    ("sparsify.warmup_epochs=4", "sparsify.warmup_epochs must be at most sparsify.epochs, 3, "),
    ("cut.target=null", "cut.target is required where sparsify.strength is auto, for example {speedup: 2}"),
    (
        "sparsify.penalty=group_mcp",
        "sparsify.penalty group_mcp spares what is far from zero, so strength auto ",
    ),
    ("sparsify.revive=true", "sparsify.revive is for a strength in numbers: auto chooses anew, "),
    ("cut.repair={images: 8}", "cut.repair.images must be "),
    (
        "cut.importance=lasso",
        "cut.importance lasso needs cut.repair of a finished model (sparsify.epochs 0): it ranks channels by what ",
    ),
    ("cut.importance=fpgm", "cut.importance is read where masks are chosen at the cut, got fpgm although "),
    (
        "cut.target={}",
        "cut.target must have one of speedup, latency_ms, macs, params, channels, max_accuracy_drop, got none",
    ),
    (
        "cut.target={speedup: 2, latency_ms: 5}",
        "cut.target must have one of speedup and latency_ms, got both; ",
    ),
    ("cut.target.speedup=1", ""),
    ("benchmark.provider=abacus", "benchmark.provider must be one of cpu, cuda"),
    ("cut.target.latency_ms=0", ""),
    ("cut.target={macs: 30}", ""),
    ("cut.method=threshold", "cut.method threshold needs cut.threshold, a number > 0 (--set "),
    ("cut.threshold=0.1", "cut.threshold is read only where cut.method is threshold, got method auto"),
    ("training.min_lr=0.2", None),
]


@pytest.mark.parametrize(
    "overrides",
    [
        ["cut.repair={}"],
        ["cut.repair={}", "cut.target={max_accuracy_drop: 0.01}"],
        [
            "cut.repair={}",
            "cut.target=null",
            "sparsify.strength=1e-3",
            "cut.method=gap",
            "cut.importance=fpgm",
        ],
    ],
)
def test_a_sparse_model_is_repaired_whatever_chose_its_channels(load: Load, overrides: list[str]) -> None:
    assert load("", *overrides).cut.repair == specs.RepairSpec()


@pytest.mark.parametrize(
    "target", ["{speedup: 2}", "{latency_ms: 5}", "{macs: 0.5, params: 0.5}", "{max_accuracy_drop: 0.01}"]
)
def test_curves_choose_where_masks_are_chosen_together(load: Load, target: str) -> None:
    recipe = load("", "sparsify.importance=curves", f"cut.target={target}")
    assert recipe.sparsify.importance == "curves"


@pytest.mark.parametrize(("text", "message"), ONE_MISTAKE)
def test_each_mistake_is_one_line_that_says_what_where_and_got(load: Load, text: str, message: str) -> None:
    (line,) = problems(load, f"{text}\n")
    assert line.startswith(message)
    assert re.search(r"\(x\.yaml, line \d+\)$", line)


@pytest.mark.parametrize(("override", "message"), ONE_BAD_OVERRIDE)
def test_each_bad_override_is_told_as_such(load: Load, override: str, message: str | None) -> None:
    lines = problems(load, "", override)
    if message is None:  # one line for every phase
        assert len(lines) == 3
    else:
        assert len(lines) == 1
        assert lines[0].startswith(message)
    assert all(line.endswith(f"(--set {override})") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["cut.target=null", "sparsify.strength=1", "cut.method=budget"],
            "cut.method budget needs cut.target",
        ),
        (["sparsify.epochs=0", "cut.method=zeros"], "cut.method zeros finds nothing to cut"),
        (
            ["cut.target={speedup: 2}", "benchmark.provider=cuda"],
            "cut.target is a speed on the CPU, where layers can be timed one by one, got benchmark.provider cuda",
        ),
        (
            ["cut.target={macs: 0.5, params: 0.5}", "cut.method=gap"],
            "cut.method gap cannot reach a speed, an accuracy or several shares, got a cut.target of macs and "
            "params",
        ),
        (
            ["cut.target={speedup: 2}", "cut.method=threshold", "cut.threshold=0.1"],
            "cut.method threshold cannot reach a speed, an accuracy or several shares, got a cut.target of speedup",
        ),
        (
            ["cut.repair={}", "sparsify.epochs=0", "cut.target={max_accuracy_drop: 0.01}"],
            "cut.repair of a finished model (sparsify.epochs 0) needs a cut.target of speedup, latency_ms, macs, ",
        ),
        (
            ["cut.repair={}", "sparsify.epochs=0", "cut.importance=fpgm"],
            "cut.repair chooses the channels of a finished model (sparsify.epochs 0) by itself: leave cut.method out, ",
        ),
        (
            ["cut.repair={}", "cut.recalibrate=64"],
            "cut.recalibrate is what cut.repair makes needless, got 64 images for it: ",
        ),
        (
            ["sparsify.importance=curves", "cut.target={speedup: 2}", "sparsify.strength=1e-3"],
            "sparsify.importance curves chooses what strength auto takes to zero, got a strength of 0.001; ",
        ),
        (
            ["sparsify.importance=curves", "cut.target={speedup: 2}", "sparsify.epochs=0"],
            "sparsify.importance curves chooses what strength auto takes to zero, got sparsify.epochs 0; ",
        ),
        (
            ["sparsify.importance=curves", "cut.target={params: 0.5, max_accuracy_drop: 0.01}"],
            "sparsify.importance curves needs a cut.target of a speed or of several shares, where the masks of all "
            "groups are chosen together, got params alone, which is met by a threshold; ",
        ),
        (
            ["sparsify.epochs=0", "cut.importance=lasso"],
            "cut.importance lasso needs cut.repair of a finished model ",
        ),
        (
            ["cut.repair={}", "sparsify.strength=0.001", "cut.importance=lasso"],
            "cut.importance lasso needs cut.repair of a finished model ",
        ),
        (
            ["cut.repair={}", "sparsify.epochs=0", "cut.method=gap", "cut.importance=lasso"],
            "cut.repair chooses the channels of a finished model (sparsify.epochs 0) by itself: leave cut.method out, ",
        ),
        (
            ["data.labels=false"],
            "data.labels false needs dense.epochs 0, got 2: without labels the dense model",
        ),
        (
            [
                *("data.labels=false", "dense.epochs=0", "model.pretrained=true"),
                *("data.name=torch/cifar10", "data.root=x"),
            ],
            "data.labels false is for images in folders, got the data set torch/cifar10, which has labels",
        ),
        (
            ["data.labels=false", "dense.epochs=0", "model.pretrained=true", "dense.baseline=true"],
            "dense.baseline needs labels to train the dense model on, got data.labels false",
        ),
        (
            [
                *("data.labels=false", "dense.epochs=0", "model.pretrained=true"),
                *("sparsify.epochs=0", "cut.importance=taylor"),
            ],
            "cut.importance taylor takes gradients at labels, got data.labels false",
        ),
        (["cut.target={speedup: 2}", "sparsify.weigh_by=latency"], "sparsify.weigh_by is read only where"),
        (
            ["export.precisions=[int8]", "export.batch_size=64", "export.calibration=32"],
            "export.calibration must be at least export.batch_size, 64, got 32",
        ),
        (["sparsify.epochs=0", "cut.target=null"], "cut.method auto finds nothing to cut"),
        (["cut.method=threshold", "cut.threshold=2"], "cut.threshold must be a number < 1, a fraction of"),
        (
            ["model.pretrained=true", "model.checkpoint=a.safetensors"],
            "model.pretrained and model.checkpoint ",
        ),
        (
            ["model.factory=nets:build", "data.image_size=32"],
            "model.factory and model.name exclude each other, got nets:build and resnet18: the model is your own or ",
        ),
        (
            ["model={factory: nets:build}"],
            "data.image_size is required where model.factory is set, because nothing else says it: height and ",
        ),
        (
            ["model={factory: nets:build, pretrained: true}", "data.image_size=32"],
            "model.pretrained means timm's weights, got true for the function nets:build; set model.checkpoint, or ",
        ),
        (
            ["model.args={in_chans: 1}"],
            "model.args must not hold in_chans, because it comes from data.in_chans",
        ),
        (["model={}"], "model.name is required: a timm model name, such as resnet18; or model.factory, "),
        (["training.mixup=0.2", "data.batch_size=33"], "data.batch_size must be even for mixup and cutmix"),
        (
            ["data.validation_share=0.5", "data.test_share=0.5"],
            "data.validation_share and data.test_share must",
        ),
        (
            ["data.name=folder", "data.root=x", "data.test=train"],
            "data.test must not be the same split as data",
        ),
        (
            ["data.name=folder", "data.root=x", "data.test=a", "data.validation=a"],
            "data.test must not be the same split as data.validation, got 'a' for both",
        ),
    ],
)
def test_keys_that_exclude_each_other(load: Load, overrides: list[str], message: str) -> None:
    (line,) = problems(load, "", *overrides)
    assert line.startswith(message)


@pytest.mark.parametrize(
    "overrides",
    [
        ["cut.target=null", "sparsify.strength=0.1"],
        ["dense.epochs=0", "model.pretrained=true"],
        ["dense.epochs=0", "model.checkpoint=a.safetensors"],
        ["sparsify.epochs=0"],
        ["sparsify.warmup=0.4", "sparsify.ramp=0.3", "sparsify.debias=0.3"],
        ["cut.method=threshold", "cut.threshold=2", "cut.relative=false"],
        ["data.name=torch/cifar10", "data.root=x", "data.test=test"],
        ["data.in_chans=1", "data.mean=[0.5]", "data.std=[0.5]"],
        ["model={factory: nets:build}", "data.image_size=32", "dense.epochs=0"],
        ["model={factory: my.nets:build, checkpoint: a.safetensors}", "data.image_size=32"],
    ],
)
def test_keys_that_fit_together_load(load: Load, overrides: list[str]) -> None:
    load("", *overrides)


def test_all_mistakes_are_shown_at_once_in_the_order_of_the_file(load: Load) -> None:
    base = """\
seed: -1
model: {nam: resnet18}
data:
  name: digits
  batch_size: many
  augment: {ratio: [2, 1]}
dense: {epochs: 0}
sparsify: {epochs: 3, strength: high, warmup: 0.9}
finetune:
"""
    assert problems(load, "", "data.in_chans=0", base=base) == [
        "seed must be an integer >= 0 and <= 4294967295, got -1 (x.yaml, line 1)",
        "model.name is required: a timm model name, such as resnet18; or model.factory, for a network of your own "
        "(x.yaml, line 2)",
        "unknown key model.nam; did you mean model.name? (x.yaml, line 2)",
        "data.batch_size must be an integer >= 1, got 'many' (x.yaml, line 5)",
        "data.augment.ratio must be [low, high] with low <= high, got [2.0, 1.0] (x.yaml, line 6)",
        "dense.epochs 0 needs trained weights: set model.pretrained or model.checkpoint, or train for some "
        "epochs (x.yaml, line 7)",
        "sparsify.strength must be auto or a number >= 0, got 'high' (x.yaml, line 8)",
        "sparsify.warmup, ramp and debias are shares of the phase and must sum to at most 1, got 1.55 "
        "(x.yaml, line 8)",
        "finetune.epochs is required: epochs of this phase (x.yaml, line 9)",
        "data.in_chans must be one of 1, 3, got 0 (--set data.in_chans=0)",
    ]


def test_arguments_of_a_model_are_any_json(load: Load) -> None:
    recipe = load("", "model.args={stages: [{width: 8, sizes: [3, 5.5]}, null], note: off}")
    assert recipe.model.args == {"stages": [{"width": 8, "sizes": [3, 5.5]}, None], "note": "off"}
    (line,) = problems(load, "", "model.args={width: .nan}")
    assert line.startswith("model.args must be a mapping of names to numbers, ")


def test_a_function_is_taken_from_the_recipe_of_a_run_only_if_a_person_names_it(tmp_path: Path) -> None:
    text = MINIMAL.replace("name: resnet18", "factory: os:system, args: {command: ls}")
    text = text.replace("name: digits", "name: digits, image_size: 32")
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"add --set model.factory=os:system \(.*recipe\.yaml, line 1\)"):
        load_run_recipe(tmp_path, ["dense.epochs=3"])
    for override in ("model.factory=nets:build", "model={factory: nets:build}"):
        assert load_run_recipe(tmp_path, [override]).model.factory == "nets:build"
    assert load_run_recipe(tmp_path, ["model={name: resnet18}"]).model.factory is None


def test_problems_that_show_later_get_the_place_of_the_key_that_they_begin_with(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(MINIMAL)
    place = placer(tmp_path / "x.yaml", ["model.args={a: 1}"])
    message = (
        "cut.target: no\nmodel.args: no\ndata.root is gone\nmodel.onnx is gone\ndata is gone\nno cut.target"
    )
    assert re.sub(r"/\S*/x", "x", place(message)).splitlines() == [
        "cut.target: no (x.yaml, line 6)",
        "model.args: no (--set model.args={a: 1})",
        "data.root is gone (x.yaml, line 2)",
        "model.onnx is gone",
        "data is gone",
        "no cut.target",
    ]


def test_a_missing_section_is_named(load: Load) -> None:
    assert problems(
        load, base="model: {name: a}\ndata: {name: digits}\nsparsify: {epochs: 1, strength: 1}\n"
    ) == [
        "dense is required: stage 1: the dense model (x.yaml)",
        "finetune is required: stage 4: train the cut model (x.yaml)",
    ]


# A kilobyte that stands for 10^24 values.
ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 25)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; `sparsekit init` writes a recipe to start from"),
        ("# only a comment\n", "is empty"),
        ("- 1\n- 2\n", "a recipe must be a mapping with the keys seed, output, .*, got a list"),
        ("resnet18\n", "a recipe must be a mapping with the keys .*, got 'resnet18'"),
        ("model: {name: a\ndense: 1\n", r"not valid YAML: .* \(x.yaml, line \d\)"),
        ("model:\n\tname: a\n", r"not valid YAML: .*; indent with spaces, not tabs \(x.yaml, line 2\)"),
        ("a: 1\n---\nb: 2\n", r"not valid YAML: .* \(x.yaml, line 2\)"),
        ("a: *b\n", r"not valid YAML: found undefined alias 'b' \(x.yaml, line 1\)"),
        ("a: \x07\n", "not valid YAML: unacceptable character"),
        ("[" * 3000, "nested too deeply"),
        ("a: " + "[" * 300 + "]" * 300 + "\n", r"nested more than 50 deep \(x.yaml\)"),
        ("a: " + "{b: " * 300 + "1" + "}" * 300 + "\n", "nested more than 50 deep"),
        (ALIASES, "more than 10,000 values, counted as often as aliases repeat them"),
        ("a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 90)), "more than 50 deep"),
        ("# " + "x" * 1_000_000, "longer than 1,000,000 characters"),
    ],
)
def test_files_that_are_no_recipe(load: Load, text: str, message: str) -> None:
    (line,) = problems(load, base=text)
    assert re.search(message, line)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"does not exist; did you mean .*quickstart.yaml\?"):
        load_recipe(tmp_path / "quikstart.yaml")
    with pytest.raises(RecipeError, match="does not exist; `sparsekit init` writes one"):
        load_recipe(tmp_path / "nowhere" / "a.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: {name: caf\xe9}\n")
    with pytest.raises(RecipeError, match="must be text in UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "bom.yaml").model.name == "resnet18"
