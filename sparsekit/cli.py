"""The command line: parse, call, print, exit code.

Exit codes: 0 done; 2 the input is wrong; 1 a failure of sparsekit or of the machine; 130 interrupted. Results go to
stdout, progress and errors to stderr. A command imports what is slow to import, so that --help answers at once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, ParamSpec, cast

import typer

from sparsekit.errors import FileError, InputError, SparsekitError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from sparsekit.latency.compare import LatencyComparison
    from sparsekit.options import Provider
    from sparsekit.recipe.recipe import Recipe

__all__ = ["main"]

_Arguments = ParamSpec("_Arguments")

_app = typer.Typer(
    name="sparsekit",
    help="Train vision models to exact zeros, cut the zeros out, and measure the speed-up in ONNX Runtime.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH.TO.KEY=VALUE", help="Override a key of the recipe; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line and exit the process."""
    _app()


def _reported(command: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Turn the exceptions of a command into a message on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        try:
            command(*args, **kwargs)
            # At the end of the process it would be too late to handle a reader that went away.
            sys.stdout.flush()
        except SparsekitError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("nothing was finished", 130, word="interrupted")
        except BrokenPipeError:
            _settle_stdout()  # the reader (`| head`) has what it wanted
            raise typer.Exit(1) from None
        except OSError as error:
            _settle_stdout()
            where = f": {error.filename}" if error.filename else ""
            _fail(f"{error.strerror or error}{where}", 1)
        except typer.Exit:
            raise
        except Exception as error:
            _fail_as_bug(error)

    return run


# ----------------------------------------------------------------------------------------------- the commands


def _print_version(wanted: bool) -> None:
    if wanted:
        from sparsekit import __version__

        typer.echo(f"sparsekit {__version__}")
        raise typer.Exit


@_app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@_app.command()
@_reported
def prune(
    recipe: RecipePath,
    output: Annotated[
        Path | None,
        typer.Option(help="The run directory. Default: the recipe's output, else runs/<name of the recipe>."),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
) -> None:
    """Run a recipe: train, sparsify, cut, fine-tune, export, measure."""
    from sparsekit.recipe.reading import default_output, load_recipe

    loaded = load_recipe(recipe, overrides or ())
    directory = output or loaded.output or default_output(recipe)
    from sparsekit.report.terminal import terminal_table
    from sparsekit.runs import pipeline

    try:
        with _placing(recipe, overrides):
            report = pipeline.prune(loaded, output=directory, resume=resume, console=_console(stderr=True))
    except KeyboardInterrupt:
        _fail(_how_to_go_on(directory), 130, word="interrupted")
    if os.environ.get("RANK", "0") == "0":  # only one of several processes prints
        _console().print(terminal_table(report, directory))


@_app.command()
@_reported
def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe, its model and its data.

    All mistakes of the recipe are shown at once. Nothing is trained.
    """
    from sparsekit.recipe.reading import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from sparsekit.runs.rehearsal import check_inputs

    problems = check_inputs(loaded)
    with _placing(recipe, overrides):
        if problems:
            raise InputError("\n".join(problems))
    typer.echo(_summary(recipe, loaded))


@_app.command()
@_reported
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL|RECIPE", help="A timm model name, or a recipe.")],
    image_size: Annotated[int | None, typer.Option(min=1, help="Height and width in pixels.")] = None,
    through_layer_norm: Annotated[
        bool, typer.Option("--through-layer-norm", help="Cut channels under a LayerNorm too.")
    ] = False,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Show which residual blocks can go as a whole.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Show the channel groups of a model.

    Each group is shown with its layers and channels or, if it cannot be cut, the reason.
    """
    recipe = None
    if Path(model).suffix in (".yaml", ".yml"):
        from sparsekit.recipe.reading import load_recipe

        recipe = load_recipe(Path(model))
    from sparsekit.runs import commands

    name = recipe.model.label if recipe else model
    with _placing(Path(model) if recipe else None):
        inspection = commands.inspect_model(
            name, image_size=image_size, recipe=recipe, through_layer_norm=through_layer_norm, blocks=blocks
        )
    if json:
        _print_json(inspection.to_json())
    else:
        _console().print(inspection.table())


@_app.command()
@_reported
def plan(
    source: Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or a run directory.")],
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Show how many channels a target keeps, and the speed-up: predicted, and measured in ONNX Runtime.

    Channels are chosen by cut.importance in the dense model of the run, or in the model that the recipe starts from.
    With cut.repair they are chosen as `prune` does, and several speeds are listed with what they would cost: minutes.
    Nothing is trained.
    """
    from sparsekit.recipe.reading import load_recipe, load_run_recipe

    run = source if source.is_dir() else None
    recipe = load_run_recipe(run, overrides or ()) if run else load_recipe(source, overrides or ())
    from sparsekit.runs import commands

    with _placing(run / "recipe.yaml" if run else source, overrides):
        found = commands.dry_run(recipe, run=run, console=_console(stderr=True))
    if json:
        _print_json(found.to_json())
    else:
        _console().print(found.table())


@_app.command()
@_reported
def bench(
    files: Annotated[
        list[Path], typer.Argument(metavar="A.onnx [B.onnx ...]", help="The ONNX files to compare.")
    ],
    threads: Annotated[int, typer.Option(min=1, help="Threads of ONNX Runtime.")] = 1,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Batch of files that leave it open; may be repeated, for one table each."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=10, help="Timed runs of each file.")] = 100,
    provider: Annotated[
        str, typer.Option(help="Provider of ONNX Runtime: cpu, cuda, tensorrt, openvino, coreml, directml.")
    ] = "cpu",
    json: AsJson = False,
) -> None:
    """Compare the latency of ONNX files with that of the first.

    All run interleaved in one process. Each speed-up has an interval; if the machine is too busy, none is stated.
    """
    from sparsekit.latency.compare import compare_latency

    sizes: list[int | None] = [*batch] if batch else [None]
    with _console(stderr=True).status("measuring"):
        found = [
            compare_latency(
                files, threads=threads, batch=size, rounds=rounds, provider=cast("Provider", provider)
            )
            for size in sizes
        ]
    if json:
        _print_json([one.to_json() for one in found] if len(found) > 1 else found[0].to_json())
        return
    for comparison in found:
        _console().print(_latency_table(comparison))


@_app.command()
@_reported
def export(
    source: Annotated[Path, typer.Argument(metavar="DIR|RUN", help="An artifact or a run directory.")],
    output: Annotated[Path | None, typer.Option(help="The ONNX file to write.")] = None,
    opset: Annotated[int | None, typer.Option(min=17, help="ONNX opset.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Batch of the graph.")] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Leave the batch dimension open.")
    ] = False,
    merge_groups: Annotated[
        bool,
        typer.Option(
            help="Merge narrow groups of grouped convolutions, so that ONNX Runtime runs them fast on this processor."
        ),
    ] = True,
    factory: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION", help="The function that builds the dense model, if that is your own."
        ),
    ] = None,
) -> None:
    """Export the pruned model as ONNX again."""
    from sparsekit.runs import commands

    written = commands.export_again(
        source,
        output=output,
        opset=opset,
        batch_size=batch_size,
        dynamic_batch=dynamic_batch,
        merge_groups=merge_groups,
        factory=factory,
    )
    typer.echo(str(written))


@_app.command()
@_reported
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """Write the report of a run again, and show it."""
    from sparsekit.report.terminal import terminal_table
    from sparsekit.runs import commands

    _console().print(terminal_table(commands.report_again(run), run))


@_app.command()
@_reported
def init(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="The file to write.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented recipe to start from."""
    from importlib.resources import files

    from sparsekit.files import write_text

    if path.is_dir():
        raise FileError(
            f"{path} must be a file to write, got a directory; name a file in it, such as recipe.yaml"
        )
    if path.exists() and not force:
        raise FileError(f"{path} is already there; name another file, or replace it with --force")
    write_text(path, (files("sparsekit.recipe") / "template.yaml").read_text(encoding="utf-8"))
    typer.echo(f"wrote {path}; run it with: sparsekit prune {path}")


# ------------------------------------------------------------------------------ from exceptions to exit codes


def _fail(message: str, code: int, word: str = "error") -> NoReturn:
    """Print each line of `message` as a problem of its own, and exit."""
    for line in message.splitlines():
        typer.echo(f"{word}: {line}", err=True)
    raise typer.Exit(code) from None


@contextmanager
def _placing(recipe: Path | None, overrides: list[str] | None = None) -> Iterator[None]:
    """Say where keys were written also in problems that show after the recipe was read."""
    if recipe is None:
        yield
        return
    from sparsekit.recipe.reading import placer

    placed = placer(recipe, overrides or ())
    try:
        yield
    except InputError as error:
        raise type(error)(placed(str(error))) from error


def _settle_stdout() -> None:
    """Drop what stdout does not take, or Python would complain when it flushes once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail_as_bug(error: Exception) -> NoReturn:
    import traceback

    typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    _fail(
        f"{type(error).__name__} that sparsekit did not expect: a bug of ours, please report the lines above",
        1,
    )


def _how_to_go_on(directory: Path) -> str:
    """Say how to resume the run in `directory`, if there is one yet."""
    if not directory.exists():
        return "nothing was begun"
    import shlex

    again = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return f"go on with: {shlex.join(['sparsekit', *again, '--resume'])}"


# --------------------------------------------------------------------------------------------------- printing


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _summary(path: Path, recipe: Recipe) -> str:
    model, data = recipe.model, recipe.data
    from_nowhere = "from scratch" if model.factory is None else "as the function gives it"
    weights = "pretrained" if model.pretrained else model.checkpoint or from_nowhere
    where = f" in {data.root}" if data.root else ""
    phases = (("dense", recipe.dense), ("sparsify", recipe.sparsify), ("finetune", recipe.finetune))
    return "\n".join(
        [
            f"{path}: ok",
            f"  model   {model.label}, {weights}",
            f"  data    {data.name}{where}",
            f"  epochs  {', '.join(f'{name} {phase.epochs}' for name, phase in phases)}",
        ]
    )


def _latency_table(comparison: LatencyComparison) -> RenderableType:
    """Return a table with one row for each file, and below it how far the figures can be trusted."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    # Narrow padding, so that six columns of figures leave room for names on 80 characters.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("file", overflow="fold", min_width=12)
    for column in ("median", "p10 to p90", "p99", "per s", "speed-up", "95 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for latency, speedup in zip(comparison.latencies, (None, *comparison.speedups), strict=True):
        stated = speedup if comparison.trustworthy else None
        table.add_row(
            Text(latency.path),
            f"{latency.median_ms:.3f}",
            f"{latency.p10_ms:.3f} to {latency.p90_ms:.3f}",
            "" if latency.p99_ms is None else f"{latency.p99_ms:.3f}",
            f"{latency.per_second:.4g}",
            f"{stated.value:.2f}" if stated else "noisy" if speedup else "1",
            f"{stated.low:.2f} to {stated.high:.2f}" if stated else "",
        )
    null = comparison.null
    lines = [
        f"times in ms; batch {comparison.batch}, threads {comparison.threads}, rounds {comparison.rounds}",
        f"null (the first file against itself): {null.value:.3f}, {null.low:.3f} to {null.high:.3f}",
    ]
    if not comparison.trustworthy:
        lines.append(f"no speed-up stated: {comparison.reason}")
    return Group(table, Text("\n".join(lines)))
