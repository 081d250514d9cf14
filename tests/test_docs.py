"""What the documentation shows runs, and what is generated is not stale.

Every >>> in the package and every Python block of the README and of the guides is executed.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel
from torch import Tensor, nn

import sparsekit
from sparsekit.coupling import trace
from sparsekit.coupling.rules import meeting, norms, reductions, table
from sparsekit.recipe.recipe import Recipe
from sparsekit.recipe.specs import nested_spec
from sparsekit.sparsify import prox

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
MODULES = sorted(module.name for module in pkgutil.walk_packages(sparsekit.__path__, "sparsekit."))


def _python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_the_examples_in_docstrings_are_right(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_some_docstrings_have_examples() -> None:
    found = doctest.DocTestFinder().find(importlib.import_module("sparsekit.sparsify.schedules"))
    assert any(test.examples for test in found)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/your_finished_model.md",
        "docs/your_loop.md",
        "docs/architecture.md",
        "docs/from_torch_pruning.md",
    ],
)
def test_the_python_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, so that a later block may go on where an earlier one ended.

    What blocks measure is measured in a hurry: no figure of it is looked at, and they ask for less speed than the page
    does, because on a busy machine so small a model may look as if it could not get that fast.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sparsekit.latency.search._MAX_TRIALS", 2)
    monkeypatch.setattr("sparsekit.latency.search._ROUNDS", 10)
    monkeypatch.setattr("sparsekit.latency.layers._ROUNDS", 10)
    monkeypatch.setattr("sparsekit.latency.operators._NARROW", 1.0)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    text = (ROOT / page).read_text(encoding="utf-8")
    for asked, less in (("speedup=1.5", "speedup=1.1"), ('{"latency": 0.6}', '{"latency": 0.9}')):
        text = text.replace(asked, less)
    blocks = _python_blocks(text)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, Python block {number}", "exec"), namespace)


def test_python_blocks_are_found() -> None:
    text = "a\n```python\nx = 1\ny = 2\n```\nb\n```\nnot me\n```\n```python\nz = 3\n```\n"
    assert _python_blocks(text) == ["x = 1\ny = 2\n", "z = 3\n"]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 130


def test_generated_pages_are_not_stale() -> None:
    pages: dict[Path, str] = runpy.run_path(str(DOCS / "generate.py"))["pages"]()
    stale = [path.name for path, text in pages.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run: python docs/generate.py"


def _keys(spec: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    for key, info in spec.model_fields.items():
        yield prefix + key, info.description
        section = nested_spec(info)
        if section is not None:
            yield from _keys(section, f"{prefix}{key}.")


def test_every_key_of_a_recipe_has_a_description() -> None:
    assert [key for key, description in _keys(Recipe) if not description] == []


def test_the_site_shows_every_page() -> None:
    def named(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for one in entry.values() if isinstance(entry, dict) else entry:
                yield from named(one)

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(named(nav)) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_results_pages_name_the_command_that_wrote_them() -> None:
    for page in (DOCS / "results").glob("*.md"):
        assert re.search(r"`python benchmarks/\w+\.py", page.read_text(encoding="utf-8")), page.name


# ------------------------------------------------------------------- what the architecture page shows how to add


def _shown(name: str, module: Any, **also: Any) -> Any:
    """The function of this name that the architecture page shows, as if it stood in `module`, with `also` imported."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^    ```python\n(.*?)^    ```$", text, re.MULTILINE | re.DOTALL)
    (block,) = [textwrap.dedent(one) for one in blocks if f"def {name}(" in one]
    namespace = {**vars(module), **also}
    exec(compile(block, f"architecture.md, {name}", "exec"), namespace)
    return namespace[name]


class _Crosses(nn.Module):
    """Multiplies vectors of three places, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.first(x)
        out: Tensor = self.last(torch.linalg.cross(maps, maps.relu(), dim=3))
        return out


class MeanNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), 1e-2

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[:, None, None] * x / (x.abs().mean(1, keepdim=True) + self.eps)


def test_the_operator_that_the_architecture_page_adds_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    example = torch.randn(1, 3, 8, 3)
    assert "linalg_cross" in sparsekit.find_groups(_Crosses(), example)["first"].frozen
    monkeypatch.setitem(
        table._RULES, "linalg_cross", _shown("cross_product", reductions, combine=meeting.combine)
    )
    assert sparsekit.find_groups(_Crosses(), example)["first"].frozen == ""


def test_the_norm_that_the_architecture_page_adds_can_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), MeanNorm(16), nn.Conv2d(16, 2, 1))
    example = torch.randn(1, 3, 8, 8)
    assert "mixes channels" in sparsekit.find_groups(model, example)["0"].frozen
    monkeypatch.setitem(trace._WHOLE_MODULES, "MeanNorm", "mean_norm")
    monkeypatch.setitem(table._RULES, "mean_norm", _shown("mean_norm", norms))
    assert sparsekit.find_groups(model, example)["0"].frozen == ""


def test_the_penalty_that_the_architecture_page_adds_is_a_proximal_map() -> None:
    generator = torch.Generator().manual_seed(0)
    v, t = torch.randn(3, generator=generator), 0.4
    best = v * _shown("elastic_shrinkage", prox)(v.norm()[None], t)

    def objective(x: Tensor) -> float:
        return float(0.5 * (x - v).square().sum() + t * (x.norm() + 0.5 * x.square().sum()))

    nearby = best + 1e-2 * torch.randn(200, 3, generator=generator)
    assert min(objective(one) for one in nearby) >= objective(best)
