"""fl-merge lora: merge adapters, fold them into a model, look into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fl_merge.adapters import Adapter, MergedAdapter, load_adapter, merge_adapters, plain_adapter, require_free
from fl_merge.adapters import fold as fold_adapters
from fl_merge.codecs import DTYPES
from fl_merge.errors import RecipeError, counted
from fl_merge.method import build
from fl_merge.ops.lowrank import norm
from fl_merge.pairs import factors, pairs_of
from fl_merge.store import load
from fl_merge.types import MergeMethod

lora = typer.Typer(
    help="Merge LoRA adapters (PEFT's format), without the model that they belong to.", no_args_is_help=True
)
out = Console()

Adapters = Annotated[list[Path], typer.Argument(help="Folders with adapter_config.json and adapter_model.safetensors.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder of the merged adapter.")]
Weights = Annotated[
    str | None, typer.Option("--weights", "-w", help="One number an adapter, such as 3,1,1; by default equal.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Of what is written; by default as the adapters are.")]
Missing = Annotated[str, typer.Option("--missing", help="A module that an adapter lacks: zero or renormalise.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is in the folder.")]


@lora.command()
def stack(
    adapters: Adapters,
    out_folder: Out,
    weights: Weights = None,
    max_rank: Annotated[int | None, typer.Option(help="Cut the stack to this rank.")] = None,
    missing: Missing = "zero",
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Concatenate adapters: ranks add up, the product is the exact weighted sum."""
    _merge(build("lora_stack", max_rank=max_rank, missing=missing), adapters, weights, out_folder, dtype, force)


@lora.command()
def svd(
    adapters: Adapters,
    out_folder: Out,
    weights: Weights = None,
    rank: Annotated[int | None, typer.Option(help="The most that is kept; by default the largest rank.")] = None,
    energy: Annotated[float | None, typer.Option(help="The share of the squared singular values to keep.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="The largest relative error.")] = None,
    missing: Missing = "zero",
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Sum adapters and keep the best approximation of a rank; the error is exact and reported."""
    method = build("lora_svd", rank=rank, energy=energy, tolerance=tolerance, missing=missing)
    _merge(method, adapters, weights, out_folder, dtype, force)


@lora.command()
def fold(
    adapters: Adapters,
    base: Annotated[Path, typer.Option(help="The model's folder or safetensors file.")],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="The folder of the new checkpoint.")],
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Add adapters to the weights of their model, into a checkpoint of its own."""
    require_free(out_folder, [*adapters, base], force=force)
    report = fold_adapters([load_adapter(each) for each in adapters], base, out_folder, dtype=_dtype(dtype))
    out.print(f"{counted(report.tensors, 'tensor')} in {out_folder}", highlight=False, soft_wrap=True)


@lora.command()
def export(
    model: Annotated[Path, typer.Argument(help="A federation's adapter: RUN/model.safetensors.")],
    config: Annotated[Path, typer.Option(help="A client's adapter_config.json: of which modules of which model.")],
    out_folder: Out,
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Write the adapter that a federation has merged as one that PeftModel.from_pretrained loads."""
    try:
        raw = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read '{config}': {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"'{config}': found a {type(raw).__name__}, wanted an object")
    require_free(out_folder, [model, config], force=force)
    found = plain_adapter(load(model), raw, str(config))
    found.save(out_folder, _dtype(dtype))
    out.print(f"{counted(len(found.manifest['modules']), 'module')}: {out_folder}", highlight=False, soft_wrap=True)


@lora.command()
def inspect(adapter: Annotated[Path, typer.Argument(help="An adapter's folder.")]) -> None:
    """Show an adapter's modules: rank, scaling, size and norm of what each adds."""
    found = load_adapter(adapter)
    pairs, others = pairs_of(found.plain.specs())
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("module", "rank", "scaling", "product", "norm"):
        table.add_column(heading, justify="left" if heading == "module" else "right", overflow="fold")
    for module, pair in pairs.items():
        product = factors(found.plain.read(pair.a), found.plain.read(pair.b))
        scaling = f"{found.plain.scalings[module]:g}"
        table.add_row(
            escape(module), str(pair.rank), scaling, f"{pair.outputs} x {pair.inputs}", f"{norm(product):.4g}"
        )
    out.print(table)
    for name in others:
        out.print(f"{escape(name)}: {found.plain.specs()[name]}", highlight=False, soft_wrap=True)
    kind = "rsLoRA" if found.config.rslora else "alpha / rank"
    out.print(
        f"{counted(len(pairs), 'module')}, scaled by {kind}, {str(found.dtype).removeprefix('torch.')}, "
        f"sha256 {found.sha256}",
        highlight=False,
        soft_wrap=True,
    )


def _merge(
    method: MergeMethod, folders: list[Path], weights: str | None, folder: Path, dtype: str | None, force: bool
) -> MergedAdapter:
    require_free(folder, folders, force=force)
    adapters: list[Adapter] = [load_adapter(each) for each in folders]
    merged = merge_adapters(method, adapters, _weights(weights))
    merged.save(folder, _dtype(dtype))
    ranks = sorted({entry["rank"] for entry in merged.manifest["modules"].values()})
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    out.print(
        f"{counted(len(adapters), 'adapter')}, {counted(len(merged.manifest['modules']), 'module')}, rank {shown}, "
        f"relative error {merged.error:.3g}: {folder}",
        highlight=False,
        soft_wrap=True,
    )
    for note in merged.notes:
        out.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    return merged


def _weights(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights: found '{text}', wanted numbers such as 3,1,1") from None


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    found = DTYPES.get(name)
    if found is None or not found.is_floating_point:
        known = ", ".join(key for key, dtype in DTYPES.items() if dtype.is_floating_point)
        raise RecipeError(f"--dtype: found '{name}', wanted one of {known}")
    return found
