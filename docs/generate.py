"""Write the pages that the code itself can write, so that they cannot lie.

    python docs/generate.py            write them
    python docs/generate.py --check    write nothing; exit 1 if one is stale

docs/reference/recipe.md         every key of a recipe, from its specs
docs/reference/command_line.md   every command, from typer
docs/reference/operators.md      every operator with a rule, from the table of rules
docs/reference/api.md            everything in `sparsekit.__all__`, from signatures and docstrings
docs/architecture.md             the tree between its two marks, from the first sentences of the docstrings
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.models import ArgumentInfo

import sparsekit
from sparsekit import cli
from sparsekit.coupling.rules import table
from sparsekit.recipe import messages
from sparsekit.recipe.recipe import Recipe
from sparsekit.recipe.specs import nested_spec

DOCS = Path(__file__).parent
PACKAGE = Path(sparsekit.__file__).parent
_WIDTH = 100


def main(*, check: bool) -> int:
    """Write the pages, or say which are stale; returns the exit code."""
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(DOCS.parent)} is stale; run: python docs/generate.py", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages()[path], "utf-8")
            print(f"wrote {path.relative_to(DOCS.parent)}")
    return 1 if check and stale else 0


def pages() -> dict[Path, str]:
    """The text of every page that is generated, by its path."""
    architecture = DOCS / "architecture.md"
    return {
        DOCS / "reference" / "recipe.md": recipe_page(),
        DOCS / "reference" / "command_line.md": command_line_page(),
        DOCS / "reference" / "operators.md": operators_page(),
        DOCS / "reference" / "api.md": api_page(),
        architecture: with_tree(architecture.read_text("utf-8")),
    }


def _written_by() -> str:
    return "*Written by `python docs/generate.py`.*"


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return re.sub(r"<(?=[a-zA-Z/!])", "&lt;", " ".join(text.split()).replace("|", "\\|"))


# ---------------------------------------------------------------------------------------------- the operators


def operators_page() -> str:
    """Every operator with a rule, by the file of the rule and by the rule."""
    lines = [
        "# Operators",
        "",
        "`find_groups` follows the channels of a model through each operator that one forward pass executes. This page "
        "says what becomes of them, operator by operator, in the words of the [architecture page]"
        "(../architecture.md#words): labels say which channel each element of a tensor belongs to.",
        "",
        "- An operator in place (`relu_`) follows the rule of its name without the `_`.",
        "- An operator that is not listed, and that torch tags as pointwise or as a view, works element by element, or "
        "moves its labels.",
        "- Any other fixes all channels that enter it: their group stays whole, and its reason names the operator.",
        "- Many functions are made of others. `einsum`, `lp_pool2d` and `instance_norm` are followed by their parts.",
        "- Names without a torch operator are told as a whole by the name of a module or function: "
        + ", ".join(f"`{name}`" for name in sorted(table.OURS))
        + ". Four are torchvision's: `deform_conv2d`, `roi_align`, `roi_pool` and their `ps_` kin.",
    ]
    file = ""
    for rule, names in table.KINDS.items():
        module = sys.modules[rule.__module__]
        if module.__name__ != file:
            title = module.__name__.rpartition(".")[2].capitalize().replace("Table", "New tensors")
            sentence = (module.__doc__ or "").strip().splitlines()[0]
            lines += ["", f"## {title}", "", *([] if module is table else [_cell(sentence), ""])]
            lines += ["| what becomes of channels | operators |", "|---|---|"]
            file = module.__name__
        shown = ", ".join(f"`{name}`" for name in names.split())
        lines.append(f"| {_cell(inspect.cleandoc(rule.__doc__ or ''))} | {shown} |")
    return "\n".join([*lines, "", _written_by(), ""])


# ------------------------------------------------------------------------------------------------- the recipe


def recipe_page() -> str:
    """Every key, section by section, in the order of a recipe."""
    lines = [
        "# Recipe",
        "",
        "A recipe is a YAML file that says what one run does. `sparsekit init` writes one to start from, and "
        "`sparsekit validate` shows every mistake in one at once. `--set path.to.key=value` overrides any key.",
        "",
        "YAML is read by the core rules of YAML 1.2: `1e-4` is a number, `no`, `on` and `off` are texts, and only "
        "`true` and `false` are booleans. Relative paths start at the directory you run the command from.",
        "",
        "## Outside of all sections",
        "",
        *_keys(Recipe, ""),
    ]
    for path, spec in _sections(Recipe, ""):
        lines += ["", f"{'#' * (2 + path.count('.'))} {path}", "", inspect.cleandoc(spec.__doc__ or ""), ""]
        lines += _keys(spec, f"{path}.")
    return "\n".join([*lines, "", _written_by(), ""])


def _sections(spec: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for key, info in spec.model_fields.items():
        section = nested_spec(info)
        if section is not None:
            yield prefix + key, section
            yield from _sections(section, f"{prefix}{key}.")


def _keys(spec: type[BaseModel], prefix: str) -> list[str]:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, info in spec.model_fields.items():
        section = nested_spec(info)
        anchor = f"{prefix}{key}".replace(".", "")
        name = f"`{prefix}{key}`" if section is None else f"[`{prefix}{key}`](#{anchor})"
        # The words that a message about a wrong value uses.
        value = "a section" if section is not None else messages._expected_of(info)
        if section is not None and not info.is_required() and _default(info) is None:
            value = "a section or null"
        shown = "required" if info.is_required() else "" if section else f"`{json.dumps(_default(info))}`"
        if value == "a section or null":
            shown = "`null`"
        rows.append(f"| {name} | {_cell(value)} | {shown} | {_cell(info.description or '')} |")
    return rows


def _default(info: FieldInfo) -> Any:
    value = info.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


# ------------------------------------------------------------------------------------------- the command line


def command_line_page() -> str:
    """Every command with its arguments and options."""
    commands = {
        command.callback.__name__: command.callback
        for command in cli._app.registered_commands
        if command.callback
    }
    lines = [
        "# Command line",
        "",
        str(cli._app.info.help),
        "",
        "Exit codes: 0 done; 2 the input is wrong (one message a problem, no traceback); 1 a failure of ours or of the "
        "machine; 130 interrupted. Results go to stdout, progress and errors to stderr.",
        "",
        "| command | what it does |",
        "|---|---|",
        *(
            f"| [`sparsekit {name}`](#sparsekit-{name}) | {_cell(_first_sentence(inspect.getdoc(command) or ''))} |"
            for name, command in commands.items()
        ),
        "",
        "`sparsekit --version` prints the version, and `--help` after a command prints what stands here.",
    ]
    for name, command in commands.items():
        rows = [_Row.of(parameter, hint) for parameter, hint in _parameters(command)]
        usage = " ".join([f"sparsekit {name}", *(row.name for row in rows if row.is_argument), "[OPTIONS]"])
        lines += ["", f"## sparsekit {name}", "", inspect.getdoc(command) or "", "", f"    {usage}", ""]
        lines += ["| name | default | meaning |", "|---|---|---|"]
        lines += [f"| {_cell(f'`{row.name}`')} | {row.default} | {_cell(row.help)} |" for row in rows]
    return "\n".join([*lines, "", _written_by(), ""])


def _parameters(command: Any) -> Iterator[tuple[inspect.Parameter, Any]]:
    """The parameters of a command, and what typer is told of each: Annotated[type, ArgumentInfo or OptionInfo]."""
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        yield parameter, hints[parameter.name]


@dataclass(frozen=True)
class _Row:
    """One argument or option, in the words of the page."""

    name: str
    default: str
    help: str
    is_argument: bool

    @staticmethod
    def of(parameter: inspect.Parameter, hint: Any) -> _Row:
        kind, info = get_args(hint)[:2]
        required = parameter.default is parameter.empty
        shown = "" if parameter.default in (None, False) else f"`{parameter.default}`"
        if isinstance(info, ArgumentInfo):
            name = str(info.metavar or parameter.name.upper())
            return _Row(name, "required" if required else shown, info.help or "", True)
        # Inside Annotated typer keeps the first spelling where a default would stand.
        spelt = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
        if not spelt:
            long = parameter.name.replace("_", "-")
            spelt = [f"--{long}", f"--no-{long}"] if kind is bool else [f"--{long}"]
        if kind is bool:
            return _Row(
                " / ".join(spelt), f"`{spelt[0]}`" if parameter.default else "", info.help or "", False
            )
        return _Row(f"{', '.join(spelt)} {info.metavar or _metavar(kind)}", shown, info.help or "", False)


def _metavar(kind: Any) -> str:
    """What stands for a value of this type."""
    inside = [one for one in get_args(kind) or (kind,) if one is not type(None)]
    if get_args(inside[0]):
        return _metavar(inside[0])
    return {int: "N", float: "X", Path: "PATH"}.get(inside[0], "NAME")


# ---------------------------------------------------------------------------------------------------- the API

# Where each public name stands on its page. A name that is missing here, or too many, is an error.
SUBJECTS: dict[str, str] = {
    "Finished models": "prune PruneResult PruneStep forecast Forecast SpeedForecast input_statistics "
    "InputStatistics repair_weights",
    "Channels that go together": "find_groups ChannelGroups ChannelGroup Rounding",
    "What they cost": "measure_layers LatencyTable channel_macs channel_latencies count_macs count_params",
    "Training to zeros": "Sparsifier AutoStrength ConstantStrength PhaseShares fit TrainOptions StepHook "
    "Distillation EpochMetrics",
    "Which channels stay": "importance keep_masks keep_carriers choose_channels search_speed SpeedSearch SpeedTrial",
    "The cut and its proof": "make_plan compose PrunePlan apply_plan verify_cut Agreement recalibrate_batchnorms",
    "Training goes on": "transplant transplant_ema rebind_scheduler",
    "Files": "save load export_onnx check_parity Parity summarise_graph GraphSummary",
    "Measurements": "compare_latency LatencyComparison Latency Interval describe_machine library_versions",
    "Runs": "read_report RunReport",
    "Errors": "SparsekitError InputError RecipeError DataError ModelError FileError RunError TrainingError "
    "VerificationError",
}


def api_page() -> str:
    """Every public name with its signature and docstring, by subject."""
    placed = [name for names in SUBJECTS.values() for name in names.split()]
    if sorted(placed) != sorted(sparsekit.__all__):
        wrong = sorted(set(placed) ^ set(sparsekit.__all__))
        raise SystemExit(
            f"SUBJECTS in docs/generate.py must hold each name of sparsekit.__all__ once: {wrong}"
        )
    lines = [
        "# API",
        "",
        "Everything here is a name of `sparsekit`: `import sparsekit as sk`. An example input is a tensor, or a tuple "
        "of tensors for a model with several inputs.",
    ]
    for subject, names in SUBJECTS.items():
        lines += ["", f"## {subject}"]
        for name in names.split():
            lines += ["", f"### {name}", "", *_described(name, getattr(sparsekit, name))]
    return "\n".join([*lines, "", _written_by(), ""])


def _described(name: str, thing: Any) -> list[str]:
    if not callable(thing):
        return [f"`{name} = {thing!r}`"]
    lines = ["```python", _signature(name, thing), "```", "", _docstring(thing)]
    if inspect.isclass(thing):
        for key, member in vars(thing).items():
            if not key.startswith("_") and _is_told(member):
                function = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
                lines += ["", f"#### {name}.{key}", ""]
                if isinstance(member, property):
                    lines += ["*property*", "", _docstring(member)]
                else:
                    lines += ["```python", _signature(key, function), "```", "", _docstring(function)]
    return lines


def _is_told(member: Any) -> bool:
    """Whether a member of a class has something to say: methods and properties with a docstring."""
    plain = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
    return (inspect.isfunction(plain) or isinstance(plain, property)) and bool(plain.__doc__)


def _docstring(thing: Any) -> str:
    """The docstring as Markdown; `Raises:` and the like, which stand before an indented block, stand apart."""
    text = inspect.cleandoc(thing.__doc__ or "")
    return re.sub(r"^(Raises|Args|Returns):\n((?:    .*\n?)+)", _sections_as_list, text, flags=re.MULTILINE)


def _sections_as_list(found: re.Match[str]) -> str:
    items = re.sub(r"\n\s{4,}", " ", textwrap.dedent(found[2]))
    return f"{found[1]}:\n\n" + "".join(f"- {item}\n" for item in items.strip().splitlines())


def _signature(name: str, thing: Any) -> str:
    """As in the source, one parameter a line where it is long."""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return f"class {name}({thing.__base__.__name__})"
    signature = inspect.signature(thing)
    parts, star = [], False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
        star = star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        parts.append(_parameter(parameter))
    kept = inspect.isclass(thing) or signature.return_annotation is signature.empty
    returns = "" if kept else f" -> {_annotation(signature.return_annotation)}"
    head = f"class {name}" if inspect.isclass(thing) else name
    if inspect.isclass(thing) and not is_dataclass(thing) and not parts:
        return head
    line = f"{head}({', '.join(parts)}){returns}"
    return (
        line if len(line) <= _WIDTH else "\n".join([f"{head}(", *(f"    {p}," for p in parts), f"){returns}"])
    )


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return text
    equals = " = " if parameter.annotation is not parameter.empty else "="
    # A dataclass's factory has no value to show.
    factory = type(parameter.default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS"
    return f"{text}{equals}{'...' if factory else repr(parameter.default)}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


# --------------------------------------------------------------------------------------------------- the tree

_BEGIN, _END = "<!-- tree: written by docs/generate.py -->\n", "<!-- end of tree -->"
# From top to bottom: imports point only downwards.
ROOMS = (
    *(
        "cli.py",
        "runs",
        "report",
        "integrations",
        "finished",
        "latency",
        "artifact",
        "repair",
        "sparsify",
        "selection",
    ),
    *("coupling", "surgery", "export", "training", "recipe", "structure"),
    *("options.py", "errors.py", "files.py", "machine.py", "evaluation.py"),
)


def with_tree(page: str) -> str:
    """The page with the tree as it is now, between its marks."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{tree()}\n\n{_END}{after}"


def tree() -> str:
    """A list of rooms and files, each with the first sentence of its docstring."""
    top = {p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    missing = top - {*ROOMS, "__init__.py", "__main__.py"} | set(ROOMS) - top
    if missing:
        raise SystemExit(f"ROOMS in docs/generate.py must name what lies in sparsekit/: {sorted(missing)}")
    lines = ["| room, file | what is in it |", "|---|---|"]
    for name in ROOMS:
        path = PACKAGE / name
        if path.is_file():
            lines.append(f"| `{name}` | {_cell(_says(path))} |")
            continue
        lines.append(f"| **`{name}/`** | **{_cell(_says(path / '__init__.py')).removesuffix('.')}** |")
        for file in sorted(path.rglob("*")):
            inside = f"{name}/{file.relative_to(path).as_posix()}"
            if file.suffix == ".py" and file.name != "__init__.py":
                lines.append(f"| `{inside}` | {_cell(_says(file))} |")
            elif file.suffix in (".yaml", ".jinja"):
                lines.append(f"| `{inside}` | {_DATA[file.name]} |")
    return "\n".join(lines)


_DATA = {
    "template.yaml": "The commented recipe that `sparsekit init` writes.",
    "page.html.jinja": "The HTML of a report.",
}


def _says(file: Path) -> str:
    return _first_sentence(ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "")


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", paragraph)[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the generated pages of the documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    sys.exit(main(check=parser.parse_args().check))
