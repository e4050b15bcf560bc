"""fl-merge: list methods, check recipes, merge files, simulate federations.

Wrong input ends with one line that says what to do, and exit code 2; a run that made no model with exit code 1.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fl_merge
from fl_merge.errors import FlMergeError, RecipeError, UpdateError, counted
from fl_merge.hyperparameters import describe
from fl_merge.lora_cli import lora
from fl_merge.method import METHODS, MethodEntry, find
from fl_merge.offline import commands as offline
from fl_merge.offline.adapters import merges_adapters, plan_recipe
from fl_merge.offline.config import names_models
from fl_merge.recipe import Recipe
from fl_merge.store import SafetensorsSource
from fl_merge.yaml_text import read_yaml

app = typer.Typer(
    help="Federated learning in which model merging is the aggregation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lora, name="lora")
out = Console()
err = Console(stderr=True)


app.command("merge")(offline.merge)
app.command("plan")(offline.plan)
app.command("inspect")(offline.inspect_models)


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context, show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    if show:
        out.print(fl_merge.__version__)
        raise typer.Exit


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method, for all about it; module:function for your own.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the list as a Markdown table.")] = False,
) -> None:
    """List the merge methods, or explain one."""
    if name is not None:
        _explain(find(name))
        return
    if markdown:
        sys.stdout.write(methods_table())
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("method", *(heading for heading, _ in _FACTS), "what it does"):
        table.add_column(heading, no_wrap=heading == "method")
    for entry in METHODS.values():
        table.add_row(entry.name, *(fact(entry) for _, fact in _FACTS), escape(entry.summary))
    out.print(table)


_FACTS: tuple[tuple[str, Callable[[MethodEntry], str]], ...] = (
    ("base", lambda entry: "yes" if entry.base else "no"),
    ("sends", lambda entry: ", ".join(entry.sends) or "models"),
    ("passes", lambda entry: entry.passes),
    ("sums", lambda entry: "yes" if entry.additive else "no"),
)
"""What the table says of each method: whether its result depends on the base, what clients send beyond their models,
how often each model is read, whether the result is a function of sums over the clients."""


def methods_table() -> str:
    """The methods as a Markdown table: the README's."""
    headings = ["method", "what it does", "settings", *(heading for heading, _ in _FACTS), "paper"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for entry in METHODS.values():
        settings = ", ".join(f"`{key}={_default(parameter)}`" for key, parameter in entry.parameters.items())
        facts = [fact(entry) for _, fact in _FACTS]
        lines.append(f"| {' | '.join([f'`{entry.name}`', entry.summary, settings, *facts, entry.paper])} |")
    return "\n".join(lines) + "\n"


def _default(parameter: inspect.Parameter) -> str:
    return "..." if parameter.default is inspect.Parameter.empty else repr(parameter.default)


def _explain(entry: MethodEntry) -> None:
    out.print(f"[bold]{entry.name}[/bold]\n", highlight=False)
    out.print(escape(entry.description), highlight=False)
    sends = f"models and {' and '.join(entry.sends)}" if entry.sends else "models, nothing else"
    out.print(f"\nResult depends on the base: {'yes' if entry.base else 'no'}. Clients send: {sends}.", highlight=False)
    sums = "yes" if entry.additive else "no"
    out.print(f"Passes over each model: {entry.passes}. A function of sums over clients: {sums}.", highlight=False)
    out.print(f"Paper: {escape(entry.paper)}", highlight=False)
    if not entry.parameters:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("parameter", "default", "allowed"):
        table.add_column(heading)
    for key, parameter in entry.parameters.items():
        default = "required" if parameter.default is inspect.Parameter.empty else repr(parameter.default)
        table.add_row(key, default, escape(describe(parameter.annotation)))
    out.print()
    out.print(table)


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    base: Annotated[
        Path | None, typer.Option(help="The base model (a safetensors file or folder): check the rules against it too.")
    ] = None,
) -> None:
    """Check a recipe before anything runs: against its models if it names any, or a base model if one is given."""
    content = read_yaml(recipe)
    if names_models(content):
        if base is not None:
            raise RecipeError(f"--base: recipe '{recipe}' names its own models")
        if merges_adapters(content):
            offline.show_adapters(plan_recipe(content, recipe), tensors=False)
        else:
            offline.show_plan(offline.planned(recipe))
        return
    method = Recipe.load(recipe).build(SafetensorsSource(base).specs() if base is not None else None)
    out.print(f"{escape(str(method))}", highlight=False)


@app.command()
def simulate(
    folder: Annotated[Path, typer.Argument(help="The folder of a Flower app.")],
    nodes: Annotated[
        int | None, typer.Option("--nodes", "-n", min=1, help="Clients; by default what the app's pyproject.toml says.")
    ] = None,
    run_config: Annotated[
        list[str] | None, typer.Option("--run-config", "-c", help="key=value of the app's run config; may be repeated.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe in YAML for the app's server.")] = None,
    workers: Annotated[
        str,
        typer.Option(
            help="Worker processes: a number, 0 for none (client code then runs in this process), or auto.",
            metavar="N|auto",
        ),
    ] = "auto",
    seed: Annotated[int | None, typer.Option(help="Of the clients' random numbers.", show_default="0")] = None,
    run_folder: Annotated[
        Path | None, typer.Option(help="Where journal and model go.", show_default="runs/<time>-<app>")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the run in this folder: its config, nodes and seed unless others are given."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Resume although the method, the server's seed or the model is another.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Flower's log too.")] = False,
) -> None:
    """Run a Flower app, unmodified, with all its clients on this machine: no network, no Ray.

    The result does not depend on the number of worker processes.
    """
    from fl_merge.flower.simulate import simulate as run

    if workers != "auto" and not workers.isdigit():
        raise RecipeError(f"--workers: found '{workers}', wanted a number of processes or auto")
    result = run(
        folder,
        nodes=nodes,
        overrides=run_config or [],
        recipe=recipe,
        workers="auto" if workers == "auto" else int(workers),
        seed=seed,
        run_folder=run_folder,
        resume=resume,
        force=force,
        verbose=verbose,
        console=out,
    )
    errors = f", {result.errors} of them with an error" if result.errors else ""
    out.print(f"{counted(result.messages, 'reply', 'replies')}{errors} in {result.seconds:.1f} s", highlight=False)
    if result.run_folder is not None:
        out.print(f"journal and model: {result.run_folder}", highlight=False, soft_wrap=True)


def main() -> None:
    """The command `fl-merge`."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a recipe may name a method in a module beside it
    try:
        app()
    except (RecipeError, UpdateError) as error:
        _complain(error)
        sys.exit(2)
    except FlMergeError as error:
        _complain(error)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)
    except SystemExit as ended:  # typer turns Ctrl-C within a command into this
        if ended.code == 130:
            err.print("stopped")
        raise


def _complain(error: Exception) -> None:
    err.print(f"[red]error:[/red] {escape(' '.join(str(error).split()))}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
