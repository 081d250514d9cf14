"""`sk.prune` on finished models: nearer with each step, nothing but the result is new, and clear refusals."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
import torchvision
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sparsekit as sk
from sparsekit.errors import DataError, InputError, ModelError
from sparsekit.evaluation import flat_tensors
from sparsekit.finished import steps
from sparsekit.repair.distillation import DistillProgress

QUICK: dict[str, Any] = {"keep": {"macs": 0.6}, "distill_steps": 8, "round_to": 4, "min_channels": 4}


def images(n: int = 40, size: int = 32, channels: int = 3) -> Tensor:
    """Smooth ones, so that crops of them look alike."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, channels, 5, 5, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)


def fitted(model: nn.Module, x: Tensor | None = None) -> nn.Module:
    """Norms that fit the images."""
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(images() if x is None else x)
    return model.eval()


class Small(nn.Module):
    """Convolutions with a tied pair of linear layers, dropout, a frozen part and a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(inplace=True))
        self.neck = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.3)
        self.one, self.two = nn.Linear(24, 24), nn.Linear(24, 24)
        self.two.weight = self.one.weight
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.neck(self.body(F.max_pool2d(self.stem(x), 2))).amax((2, 3))
        features = F.relu(self.two(self.drop(F.relu(self.one(features)))))
        return self.head(features), features.mean(1, keepdim=True)


@lru_cache(1)
def _digits() -> tuple[Tensor, Tensor]:
    raw = load_digits()
    return torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(raw.target)


@lru_cache(1)
def _trained() -> nn.Module:
    torch.manual_seed(0)
    model, (x, y) = Small(), _digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(200):
        chosen = torch.arange(step * 64, step * 64 + 64) % 1400
        loss = F.cross_entropy(model(x[chosen])[0], y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def trained() -> nn.Module:
    return copy.deepcopy(_trained())


def accuracy(model: nn.Module) -> float:
    x, y = _digits()
    with torch.no_grad():
        return float((model.eval()(x[1400:])[0].argmax(1) == y[1400:]).double().mean())


def assert_untouched(model: nn.Module, before: nn.Module) -> None:
    assert model.state_dict().keys() == before.state_dict().keys()
    for name, values in model.state_dict().items():
        assert torch.equal(values, before.state_dict()[name]), name
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def assert_sound(result: sk.PruneResult, model: nn.Module) -> None:
    """What holds of every result."""
    assert [step.name for step in result.steps][:2] == ["choice and cut", "closed form"]
    best = math.inf
    for step in result.steps:
        assert step.taken == (step.kl < best)
        best = min(best, step.kl)
        assert step.seconds >= 0
    assert result.kl == best
    assert result.proof.max_rel < 1e-4
    assert result.plan.cuts
    assert 0 < result.kept["params"] < 1
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(
        values.isfinite().all() for values in result.model.state_dict().values() if values.is_floating_point()
    )


STAGES = [[1, 16, 1, 2], [6, 24, 1, 2], [6, 32, 2, 2]]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "torchvision": (
        lambda: torchvision.models.mobilenet_v2(
            width_mult=0.5, inverted_residual_setting=STAGES, num_classes=5
        ),
        {},
    ),
    "timm": (lambda: timm.create_model("test_resnet", num_classes=5, zero_init_last=False), {}),
    "standardised": (lambda: timm.create_model("test_nfnet", num_classes=5), {}),
    "transformer": (
        lambda: timm.create_model(
            "deit_tiny_patch16_224", num_classes=5, depth=2, img_size=32, embed_dim=48, num_heads=3
        ),
        {"through_layer_norm": True},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_step_comes_nearer_or_is_left_out(name: str) -> None:
    torch.manual_seed(0)
    make, options = NETWORKS[name]
    model = fitted(make())
    before = copy.deepcopy(model)
    result = sk.prune(model, images(), **QUICK, **options)
    assert_sound(result, model)
    assert_untouched(model, before)
    assert result.kept["macs"] <= 0.6
    assert result.steps[1].taken  # repair in closed form helps on each of these
    assert result.speed is None
    with torch.no_grad():
        assert result.model(images()).shape == (40, 5)
    assert not result.model.training
    first = next(p for p in result.model.parameters() if p.dim() == 4)
    assert first.is_contiguous()


def test_a_finished_model_hardly_loses_anything() -> None:
    model = trained()
    x, _ = _digits()
    result = sk.prune(model, x[:200], keep={"macs": 0.5}, distill_steps=20, round_to=4, min_channels=4)
    assert_sound(result, model)
    assert accuracy(model) > 0.93
    assert accuracy(result.model) > accuracy(model) - 0.06
    assert result.agreement > 0.9
    assert result.kl < 0.5 * result.steps[0].kl


def test_channels_go_in_the_order_of_a_lasso_where_it_is_asked_for() -> None:
    x, _ = _digits()
    results = [sk.prune(trained(), x[:60], **QUICK, importance=name) for name in ("greedy", "lasso")]
    for result in results:
        assert_sound(result, trained())
    assert results[0].plan != results[1].plan
    assert results[1].kl < 0.5 * results[1].steps[0].kl


def test_a_model_in_training_comes_back_in_training_and_as_it_was() -> None:
    """With dropout, tied weights, frozen parameters and a tuple of outputs."""
    model = trained().train()
    model.body[1].eval()
    model.stem[0].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    with torch.no_grad():
        result = sk.prune(model, _digits()[0][:60], **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert_untouched(model, before)
    assert model.two.weight is model.one.weight
    assert result.model.two.weight is result.model.one.weight
    assert_sound(result, model)
    assert [m.training for m in result.model.modules()] == [m.training for m in model.modules()]
    frozen = [name for name, p in result.model.named_parameters() if not p.requires_grad]
    assert frozen == ["stem.0.weight"]
    with torch.no_grad():
        outputs = result.model(_digits()[0][:3])
    assert [tuple(one.shape) for one in outputs] == [(3, 10), (3, 1)]


def test_the_same_seed_gives_the_same_model() -> None:
    states, steps = [], []
    for own, seed in ((0, 5), (1, 5), (1, 6)):
        torch.manual_seed(own)
        result = sk.prune(trained(), _digits()[0][:60], **QUICK, seed=seed)
        states.append(result.model.state_dict())
        steps.append([(step.name, step.kl, step.agreement, step.taken) for step in result.steps])
    assert steps[0] == steps[1] != steps[2]
    assert all(torch.equal(values, states[1][name]) for name, values in states[0].items())


def test_loaders_and_labels_are_taken_as_tensors_are() -> None:
    x, y = _digits()
    loader = DataLoader(TensorDataset(x[:48], y[:48]), batch_size=16)
    results = [sk.prune(trained(), given, **QUICK).model.state_dict() for given in (x[:48], loader)]
    assert all(torch.equal(values, results[1][name]) for name, values in results[0].items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_result_has_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = trained().to(dtype)
    result = sk.prune(model, _digits()[0][:40], **{**QUICK, "distill_steps": 2})
    assert all(p.dtype == dtype for p in result.model.parameters())
    assert all(out.dtype == dtype for out in flat_tensors(result.model(_digits()[0][:2].to(dtype))))


def test_what_is_to_be_ignored_stays_whole() -> None:
    result = sk.prune(trained(), _digits()[0][:40], **{**QUICK, "keep": {"macs": 0.8}}, ignore=("stem",))
    assert result.model.stem[0].weight.shape == (16, 1, 3, 3)
    assert result.model.body[0].weight.shape[0] < 24


def test_all_limits_hold_together() -> None:
    keep: dict[Any, float] = {"macs": 0.7, "params": 0.5, "channels": 0.8}
    result = sk.prune(trained(), _digits()[0][:40], **{**QUICK, "keep": keep, "distill_steps": 0})
    assert [step.name for step in result.steps] == ["choice and cut", "closed form", "refit layer by layer"]
    assert all(result.kept[quantity] <= share for quantity, share in keep.items())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.gamma = nn.Parameter(torch.full((width,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.down(F.gelu(self.up(self.norm(x))))


def test_whole_blocks_go_where_they_matter_little_and_are_let() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), *(Residual(16) for _ in range(5)), nn.Linear(16, 4)).eval()
    x = torch.randn(60, 12)
    options: dict[str, Any] = {"keep": {"macs": 0.2}, "distill_steps": 8, "round_to": 8, "min_channels": 8}
    with_blocks = sk.prune(model, x, **options)
    assert with_blocks.plan.blocks
    with pytest.raises(InputError, match="out of reach"):
        sk.prune(model, x, **options, blocks=False)
    assert not sk.prune(model, x, **{**options, "keep": {"macs": 0.6}}, blocks=False).plan.blocks
    assert with_blocks.kl < 0.05


def test_an_interruption_while_it_learns_returns_what_was_best(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupting(*args: Any, progress: Callable[[DistillProgress], None], **options: Any) -> Any:
        def stop(now: DistillProgress) -> None:
            progress(now)
            if now.steps == 6:
                raise KeyboardInterrupt

        return learn(*args, progress=stop, **options)

    learn = steps.distill
    monkeypatch.setattr(steps, "distill", interrupting)
    model = trained()
    before = copy.deepcopy(model)
    result = sk.prune(model, _digits()[0][:60], **QUICK)
    assert_sound(result, model)
    assert_untouched(model, before)
    assert [remark for remark in result.remarks if "interrupted" in remark]


def test_the_steps_are_told_on_a_console() -> None:
    written = io.StringIO()
    result = sk.prune(trained(), _digits()[0][:40], **QUICK, console=Console(file=written))
    lines = written.getvalue().splitlines()
    assert len(lines) == len(result.steps) == 4
    for line, step in zip(lines, result.steps, strict=True):
        assert line.startswith(f"{step.name}: ")
        assert line.endswith("not taken") != step.taken


def test_nothing_is_printed_and_nothing_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.prune(trained(), _digits()[0][:40], **QUICK)
    assert capsys.readouterr() == ("", "")


class Doubling(nn.Linear):
    """Does not use its weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


def test_layers_that_could_not_be_repaired_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), Doubling(32, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    result = sk.prune(model.eval(), _digits()[0][:40], **QUICK)
    (remark,) = [remark for remark in result.remarks if "was not repaired" in remark]
    assert remark.startswith("3.weight lost inputs and was not repaired: its weight is computed, shared,")


def test_a_speed_is_measured() -> None:
    torch.manual_seed(0)
    model = fitted(
        nn.Sequential(
            *(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )
    )
    before = copy.deepcopy(model)
    result = sk.prune(model, images(), speedup=1.1, keep={"macs": 0.9}, distill_steps=2)
    assert_untouched(model, before)
    assert_sound(result, model)
    assert result.speed is not None
    assert result.speed.asked == pytest.approx(1.1)
    assert result.speed.found.dense_ms > 0
    assert result.speed.found.measured > 0
    assert result.kept["macs"] <= 0.9
    assert bool(result.speed.remark) == (result.speed.remark in result.remarks)


GOOD = images(32, 8, 1)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no target": ({"keep": None}, r"there is no target: give speedup, latency_ms or keep"),
    "no share": ({"keep": {}}, r"there is no target"),
    "both speeds": ({"speedup": 2.0, "latency_ms": 1.0}, r"give one of speedup and latency_ms, got both"),
    "slower": ({"speedup": 0.5}, r"speedup 0\.5 is met already: it must be above 1"),
    "as fast": ({"speedup": 1.0}, r"speedup 1 is met already"),
    "infinitely fast": ({"speedup": math.inf}, r"speedup must be a finite number > 0, got inf"),
    "no number": ({"speedup": math.nan}, r"speedup must be a finite number > 0, got nan"),
    "no time": ({"latency_ms": 0.0}, r"latency_ms must be a finite number > 0"),
    "all": (
        {"keep": {"macs": 1.0}},
        r"nothing was cut",
    ),
    "none": ({"keep": {"params": 0.0}}, r"keep must be fractions in \(0, 1\].*got params: 0"),
    "latency": ({"keep": {"latency": 0.5}}, r"keep must be fractions.*got latency: 0\.5"),
    "flops": ({"keep": {"flops": 0.5}}, r"keep must be fractions.*got flops"),
    "out of reach": (
        {"keep": {"macs": 0.001}},
        r"macs 0\.001 is out of reach: keeping the fewest channels.*leaves",
    ),
    "negative time": ({"distill_seconds": -1.0}, r"distill_seconds and distill_steps must be >= 0, got -1"),
    "negative steps": ({"distill_steps": -1}, r"distill_seconds and distill_steps must be >= 0"),
    "no number of seconds": (
        {"distill_seconds": math.nan},
        r"distill_seconds and distill_steps must be >= 0",
    ),
    "no end": ({"distill_seconds": math.inf, "distill_steps": None}, r"without end; give distill_steps"),
    "too coarse": ({"round_to": 512, "min_channels": 512}, r"out of reach|nothing was cut"),
    "threads": ({"threads": 0, "speedup": 2.0}, r"threads"),
    "no importance": ({"importance": "magnitude"}, r"importance must be greedy or lasso, got 'magnitude'"),
    "no mapping": ({"keep": 0.5}, r"keep must be fractions by quantity, such as .*got 0.5"),
    "no seconds": ({"distill_seconds": None}, r"distill_seconds must be a number, got None"),
    "negative batch": ({"batch_size": -1}, r"batch_size must be a whole number >= 1, got -1"),
    "some images": ({"max_images": 1.5}, r"max_images must be a whole number >= 1, got 1.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_targets_that_make_no_sense_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    model = Small()
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=f"(?s){message}"):
        sk.prune(model, GOOD, **{**QUICK, **options})
    assert_untouched(model, before)


def exhausted() -> Iterator[Tensor]:
    used = iter(GOOD.split(8))
    list(used)
    return used


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (images(32, 8, 3), ModelError, r"\(1, 3, 8, 8\)"),
        (images(32, 1, 1), ModelError, r"\(1, 1, 1, 1\)"),
        (torch.randn(40, 8), ModelError, r"\(1, 8\)"),
        (GOOD[:8], DataError, r"8 images are too few"),
        (exhausted(), DataError, r"no images"),
        (GOOD.to(torch.uint8), DataError, r"floating-point"),
        ("images/", DataError, r"got str"),
    ],
    ids=["channels", "size", "vectors", "few", "exhausted", "integers", "path"],
)
def test_images_that_do_not_fit_are_refused(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        sk.prune(Small(), given, **QUICK)


@pytest.mark.parametrize("given", [Small, None, {"state_dict": {}}, "resnet18"])
def test_what_is_no_model_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"model must be a torch\.nn\.Module, got (type|NoneType|dict|str)"):
        sk.prune(given, GOOD, **QUICK)


def test_few_images_are_complained_of_where_it_matters() -> None:
    """A wide model, fitted to 26 images by its repair, is much nearer on those than on others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    with torch.no_grad():
        model[5].weight.mul_(60)
    result = sk.prune(model.eval(), torch.randn(32, 1, 8, 8), **{**QUICK, "distill_steps": 0})
    assert any(
        "the images are few for this model" in remark and "more than 32" in remark
        for remark in result.remarks
    )


class Viewing(nn.Module):
    """Flattens a map with a `view`, which refuses the memory format that is faster."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.max_pool2d(self.first(x).relu(), 2).view(len(x), -1))


class Deciding(nn.Module):
    """Gives classes, not logits: nothing can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Viewing()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).argmax(1)


class WithALoss(Viewing):
    """Gives a number for the whole batch beside the logits."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return logits, logits.mean()


@pytest.mark.parametrize("kind", [Viewing, WithALoss])
def test_models_that_view_maps_or_give_a_number_are_pruned(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    images = torch.randn(40, 1, 8, 8)
    result = sk.prune(kind(), images, **{**QUICK, "keep": {"macs": 0.6}, "distill_steps": 2})
    assert 0 < result.kl < math.inf
    assert 0 <= result.agreement <= 1


class Embedding(nn.Module):
    """The trained network's features, of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.network = trained()
        self.network.head = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.network(x)[0], dim=1)


def test_an_embedding_is_compared_as_values_if_it_is_said_to_be_one() -> None:
    given: dict[str, Any] = {"keep": {"params": 0.75}, "distill_seconds": 0.0}
    taken_for_classes = sk.prune(Embedding(), _digits()[0][:64], **given)
    assert any('outputs="values"' in remark for remark in taken_for_classes.remarks)
    found = sk.prune(Embedding(), _digits()[0][:64], outputs="values", **given)
    assert not any('outputs="values"' in remark for remark in found.remarks)
    assert math.isnan(found.agreement)
    assert found.kl > 10 * taken_for_classes.kl  # of nearly uniform probabilities, almost nothing is seen

    def lost(result: sk.PruneResult) -> float:
        with torch.no_grad():
            x = _digits()[0][1400:]
            return float((result.model(x) - Embedding().eval()(x)).square().mean())

    assert lost(found) < 1.2 * lost(taken_for_classes)


def test_a_model_without_outputs_to_compare_is_refused() -> None:
    with pytest.raises(ModelError, match="logits, not decisions"):
        sk.prune(Deciding(), torch.randn(40, 1, 8, 8), **{**QUICK, "keep": {"macs": 0.6}})


def test_a_dataset_is_refused_with_the_way_to_mend_it() -> None:
    dataset = torch.utils.data.TensorDataset(torch.randn(40, 1, 8, 8), torch.zeros(40))
    with pytest.raises(DataError, match="wrap it: DataLoader"):
        sk.prune(Viewing(), dataset, **QUICK)


class Remembering(Viewing):
    """Keeps something in its state that is no tensor, as quantised modules do."""

    def get_extra_state(self) -> Any:
        return {"kind": "none"}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"kind": "none"}


def test_a_state_that_is_no_tensor_is_no_hindrance() -> None:
    result = sk.prune(Remembering(), torch.randn(40, 1, 8, 8), **{**QUICK, "distill_steps": 2})
    assert result.kept["macs"] <= 0.6


def test_a_model_of_which_nothing_can_be_cut_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match=r"nothing of Linear can be cut: .*reaches the model's output"):
        sk.prune(nn.Linear(16, 4), torch.randn(40, 16), **QUICK)
    with pytest.raises(ModelError, match="no convolution or linear layer in floating point; prune before"):
        sk.prune(nn.Sequential(nn.Flatten(), nn.Softmax(1)), torch.randn(40, 16), **QUICK)
