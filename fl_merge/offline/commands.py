"""The commands of `fl-merge` that work on files: merge, plan, inspect."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fl_merge
from fl_merge.errors import RecipeError, counted
from fl_merge.lowrank import Merger, Module
from fl_merge.offline.adapters import AdapterPlan, merge_recipe, merges_adapters, plan_recipe
from fl_merge.offline.catalogue import ROWS
from fl_merge.offline.config import OfflineRecipe, Ref, names_models, parse
from fl_merge.offline.estimate import Estimate, estimate
from fl_merge.offline.inspection import Group, as_json, inspect
from fl_merge.offline.models import open_model
from fl_merge.offline.output import require_writable
from fl_merge.offline.plan import OfflinePlan, Part, check, plan_of
from fl_merge.offline.plot import plot
from fl_merge.offline.run import merge_files
from fl_merge.yaml_text import read_yaml

out = Console()
err = Console(stderr=True)

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Recipe = Annotated[Path, typer.Argument(help="A recipe in YAML that names its models: mergekit's form, or ours.")]
Threads = Annotated[int | None, typer.Option(min=1, help="By default one a core.", show_default=False)]
ShardSize = Annotated[str, typer.Option(help="Larger models are cut into files of this size.", metavar="SIZE")]


def load(path: Path) -> OfflineRecipe:
    """The recipe in a file.

    Raises:
        RecipeError: naming the file, and what is wrong with it.
    """
    content = read_yaml(path)
    try:
        if content is not None and not isinstance(content, dict):
            raise RecipeError(f"found a {type(content).__name__}, wanted keys with values, as merge_method: ties")
        if not names_models(content):
            raise RecipeError("it names no models; wanted models or slices (without them it is a federation's recipe)")
        recipe = parse(content, list(ROWS))
        check(recipe)
    except RecipeError as error:
        raise RecipeError(f"recipe '{path}': {error}") from None
    return recipe


def planned(path: Path) -> OfflinePlan:
    """The plan of the recipe in a file."""
    recipe = load(path)
    try:
        return plan_of(recipe, path.resolve().parent)
    except RecipeError as error:
        raise RecipeError(f"recipe '{path}': {error}") from None


def merge(
    recipe: Recipe,
    folder: Annotated[Path, typer.Argument(help="The folder to write.", metavar="OUT")],
    shard_size: ShardSize = "5GB",
    threads: Threads = None,
    device: Annotated[str, typer.Option(help="Where the arithmetic runs: cpu, cuda, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of random draws (DARE, DELLA).")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in OUT.")] = False,
) -> None:
    """Merge models in files into a folder that transformers loads, or adapters into one that PEFT loads."""
    size = _bytes(shard_size)
    content = read_yaml(recipe)
    if merges_adapters(content):
        merged = merge_recipe(content, recipe, folder, seed=seed, threads=threads, force=force)
        for note in merged.notes:
            err.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
        modules = counted(len(merged.manifest["modules"]), "module")
        out.print(
            f"{escape(str(folder))}: an adapter of {modules}, relative error {merged.error:.3g}",
            highlight=False,
            soft_wrap=True,
        )
        return
    plan = planned(recipe)
    require_writable(folder, [model.path for model in plan.models.values()], force=force)
    what = estimate(plan, threads)
    for notice in plan.notices:
        err.print(f"note: {escape(notice)}", highlight=False, soft_wrap=True)
    out.print(
        f"{counted(len(plan.models), 'model')}: reading {_size(what.read)}, writing {counted(what.tensors, 'tensor')}, "
        f"{_size(what.written)}; about {_size(what.memory)} of memory",
        highlight=False,
    )
    report = merge_files(
        plan,
        folder,
        recipe.read_text(encoding="utf-8"),
        version=fl_merge.__version__,
        threads=threads,
        device=device,
        seed=seed,
        shard_bytes=size,
        force=force,
        watch=progress,
    )
    out.print(
        f"{escape(str(folder))}: {counted(report.tensors, 'tensor')} in {report.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def plan(
    recipe: Recipe,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    threads: Threads = None,
) -> None:
    """Show what a merge of files will read, do and write, without doing it."""
    content = read_yaml(recipe)
    if merges_adapters(content):
        show_adapters(plan_recipe(content, recipe, threads), tensors=tensors)
        return
    found = planned(recipe)
    what = estimate(found, threads)
    show_plan(found)
    _show_estimate(what, counted(len(found.models), "model"), _size(what.written), found.notices)
    if tensors:
        show_tensors(found)


def inspect_models(
    models: Annotated[list[str], typer.Argument(help="Folders, safetensors files or names on the hub.")],
    base: Annotated[str | None, typer.Option(help="The model from which deltas are taken.")] = None,
    as_data: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw them into this file.", metavar="FILE.png")
    ] = None,
) -> None:
    """Show how models differ from their base and from each other, layer by layer."""
    opened = [open_model(Ref(model)) for model in models]
    start = open_model(Ref(base)) if base is not None else None
    first = start or opened[0]
    with progress("reading", len(first.source.specs())) as advance:
        groups = inspect(opened, start, advance)
    if as_data:
        sys.stdout.write(json.dumps(as_json(opened, start, groups), indent=2) + "\n")
    else:
        show_groups(models, groups, of_deltas=base is not None)
    if picture is not None:
        plot(models, groups, picture)
        err.print(f"plot: {escape(str(picture))}", highlight=False, soft_wrap=True)


def show_plan(found: OfflinePlan) -> None:
    """The models, and the groups of tensors that are merged alike."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "layers", "tensors", "bytes", ""):
        table.add_column(heading, overflow="fold")
    for ref, model in found.models.items():
        roles = ["base"] * (ref == found.recipe.base_model) + ["config and tokenizer"] * (ref == found.recipe.donor)
        specs = model.source.specs()
        size = _size(sum(spec.nbytes for spec in specs.values()))
        table.add_row(escape(str(ref)), str(model.depth), str(len(specs)), size, ", ".join(roles))
    out.print(table)
    out.print()
    for part in found.parts:
        count = len(part.targets)
        out.print(f"{counted(count, 'tensor')}, {escape(_which(part))}", highlight=False, soft_wrap=True)
        out.print(f"    {escape(_how(part))}", highlight=False, soft_wrap=True)


def show_adapters(found: AdapterPlan, *, tensors: bool) -> None:
    """The adapters, and the modules that are merged alike."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("adapter", "weight", "modules", "ranks", "scalings", "dtype"):
        table.add_column(heading, overflow="fold")
    for name, weight in found.weights.items():
        adapter = found.recipe.adapters[name]
        ranks = sorted({adapter.config.rank_of(module.partition("[")[0]) for module in adapter.plain.scalings})
        row = [escape(name), f"{weight:.4g}", str(len(adapter.plain.scalings)), ", ".join(map(str, ranks))]
        scalings = ", ".join(f"{scaling:.4g}" for scaling in sorted(set(adapter.plain.scalings.values())))
        table.add_row(*row, scalings, str(adapter.dtype).removeprefix("torch."))
    out.print(table)
    out.print(f"\n{escape(str(found.recipe.method))}", highlight=False, soft_wrap=True)
    kinds = Counter(
        (re.sub(r"\.\d+\.", ".*.", re.sub(r"\[\d+\]", "[*]", module.name)), *_becomes(module, merger))
        for module, merger in found.modules
    )
    for (name, size, becomes), count in kinds.items():
        many = f" ({count})" if count > 1 else ""
        out.print(f"    {escape(name)}{many}: {size}, {becomes}", highlight=False, soft_wrap=True)
    written = f"at most {_size(found.estimate.written)}"
    _show_estimate(found.estimate, counted(len(found.weights), "adapter"), written, found.notes)
    if tensors:
        for output in found.outputs:
            out.print(f"{escape(output.name)}  {escape(str(output.spec))}", highlight=False, soft_wrap=True)


def _show_estimate(what: Estimate, inputs: str, written: str, notes: Sequence[str]) -> None:
    """What a merge takes, and what an operator has to know."""
    out.print(
        f"\nreads {_size(what.read)} of {inputs}, writes {counted(what.tensors, 'tensor')}, {written}; "
        f"about {_size(what.memory)} of memory",
        highlight=False,
    )
    for note in notes:
        out.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)


def _becomes(module: Module, merger: Merger | None) -> tuple[str, str]:
    """The size of a module's product, and its ranks at the clients and merged."""
    size = f"{module.outputs} x {module.inputs}"
    if merger is None:
        return size, "which no adapter has"
    ranks = ", ".join(map(str, module.ranks_P))
    return size, f"ranks {ranks} to at most {merger.rank}"


def show_tensors(found: OfflinePlan) -> None:
    """Every tensor: its name, how it is stored, and of what it is made."""
    by_name = {target.name: (part, target) for part in found.parts for target in part.targets}
    for name, spec in found.specs().items():
        part, target = by_name[name]
        places = part.choice.clients or (part.choice.base,)
        made_of = [f"{part.models[place]}:{target.stored[place]}" for place in places]
        out.print(f"{escape(name)}  {escape(str(spec))}  {escape(_how(part))}", highlight=False, soft_wrap=True)
        out.print(f"    of {escape(', '.join(made_of))}", highlight=False, soft_wrap=True)


def show_groups(labels: list[str], groups: tuple[Group, ...], *, of_deltas: bool) -> None:
    """A row a layer."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = [Path(label).name for label in labels]
    headings = ["layer", "elements", *(["base"] if of_deltas else []), *names, "cosine", "least", "conflicts"]
    headings += [f"0 {name}" for name in names]
    for heading in headings:
        table.add_column(escape(heading), justify="left" if heading == "layer" else "right")
    for group in groups:
        cosines = [cosine for _, _, cosine in group.pairs()]
        mean = group.mean_cosine
        row = [group.name, f"{group.elements:,}", *([f"{group.base_squared**0.5:.4g}"] if of_deltas else [])]
        row += [f"{norm:.4g}" for norm in group.norms_N]
        row += [f"{mean:.3f}" if mean is not None else "", f"{min(cosines):.3f}" if cosines else ""]
        row += [f"{group.conflict:.1%}", *(f"{group.sparsity(number):.1%}" for number in range(len(labels)))]
        table.add_row(*row)
    _print_whole(table)
    what = "deltas from the base" if of_deltas else "weights themselves"
    out.print(
        f"\nNorms of the {what}; mean and least cosine of two; share of the moved elements whose signs "
        "conflict; share of elements that are 0.",
        highlight=False,
    )


def _print_whole(table: Table) -> None:
    """Print a table of numbers with nothing cut or folded, whatever the terminal's width."""
    width = out.measure(table, options=out.options.update(max_width=10_000)).maximum
    Console(file=out.file, width=max(width, out.width)).print(table)


AFTER_SECONDS = 2.0
"""What is done sooner needs no bar."""


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal, once the work has taken two seconds."""
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )
    task, lock, shown, over = bar.add_task(what, total=total), threading.Lock(), False, False

    def show() -> None:
        nonlocal shown
        with lock:
            if not over:
                bar.start()
                shown = True

    timer = threading.Timer(AFTER_SECONDS, show)
    timer.daemon = True
    if err.is_terminal:
        timer.start()
    try:
        yield lambda name: bar.advance(task)
    finally:
        timer.cancel()
        with lock:
            over = True
            if shown:
                bar.stop()


def _which(part: Part) -> str:
    """The tensors of a part in few words: names with the layers' numbers left out."""
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", target.name) for target in part.targets)
    shown = [f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items()]
    layers = sorted({target.layer for target in part.targets if target.layer is not None})
    where = f"layers {layers[0]}-{layers[-1]}: " if len(layers) > 1 else f"layer {layers[0]}: " if layers else ""
    return where + ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _how(part: Part) -> str:
    models = ", ".join(
        f"{part.models[place]} x {weight:.4g}"
        for place, weight in zip(part.choice.clients, part.choice.weights_N, strict=True)
    )
    return f"{part.choice.method}: {models or part.models[part.choice.base]}"


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", text.strip().upper())
    unit = found[2] if found else "?"
    unit = f"{unit}B" if unit and not unit.endswith("B") else unit.removeprefix("B") if unit == "B" else unit
    if not found or unit not in _UNITS or float(found[1]) * _UNITS[unit] < 1:
        raise RecipeError(f"--shard-size: found '{text}', wanted a size such as 5GB or 500MB")
    return int(float(found[1]) * _UNITS[unit])


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return counted(count, "byte")
