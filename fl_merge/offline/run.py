"""Run a merge of files: from a plan to a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fl_merge.check import check_values
from fl_merge.errors import NonFiniteError
from fl_merge.execute import MergeReport, execute
from fl_merge.offline.output import readme, require_writable, staged, write_config
from fl_merge.offline.plan import OfflinePlan
from fl_merge.store import SafetensorsSink


def merge_files(
    plan: OfflinePlan,
    out: Path,
    recipe_text: str,
    *,
    version: str,
    threads: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    shard_bytes: int = 5 * 10**9,
    force: bool = False,
    on_tensor: Callable[[str], None] | None = None,
) -> MergeReport:
    """Merge the models of a plan into a folder that transformers loads.

    Args:
        plan: what to do.
        out: the folder; it appears when it is whole.
        recipe_text: for the README.
        version: of this package, for the README.
        threads, device: as for `execute`.
        seed: of the random draws.
        shard_bytes: larger models are cut into shards of that size.
        force: replace a model that is there.
        on_tensor: called with the name of each tensor that is done.

    Raises:
        RecipeError: if `out` is taken, or the device is not there.
        UpdateError: if a model holds values that are not finite.
        MergeError: if the result cannot be computed or written.
    """
    inputs = [model.path for model in plan.models.values()]
    require_writable(out, inputs, force=force)
    _require_finite(plan)
    with staged(out) as folder:
        sink = SafetensorsSink(folder, max_shard_bytes=shard_bytes)
        report = execute(plan, plan.cohort(seed), sink, threads=threads, device=device, on_tensor=on_tensor)
        write_config(plan, folder)
        hashes = {str(ref): dict(model.hashes()) for ref, model in plan.models.items()}
        text = readme(plan, out.resolve().name, recipe_text, hashes, version)
        (folder / "README.md").write_text(text, encoding="utf-8")
        require_writable(out, inputs, force=force)
    return report


def _require_finite(plan: OfflinePlan) -> None:
    """Refuse models with values that are not finite: some methods would take them for no change at all.

    Raises:
        NonFiniteError: naming the model and the tensor.
    """
    for ref, model in plan.models.items():
        try:
            check_values(model.source, model.source.specs(), model.source)
        except NonFiniteError as error:
            raise NonFiniteError(f"model '{ref}': {error.problem}", tensor=error.tensor) from None
