"""Run a merge of files: from a plan to a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from fl_merge.check import check_values
from fl_merge.errors import NonFiniteError
from fl_merge.execute import MergeReport, execute
from fl_merge.offline.output import readme, require_writable, staged, write_config
from fl_merge.offline.plan import OfflinePlan
from fl_merge.store import SafetensorsSink
from fl_merge.types import TensorSpec

Watch = Callable[[str, int], AbstractContextManager[Callable[[str], None]]]
"""What is done and how many there are of it -> a context in which each that is done is told, by its name."""

CHUNK_BYTES = 2**28
"""Tensors are checked in groups of about this size, each on all cores."""


@contextlib.contextmanager
def unwatched(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Nobody is told."""
    yield lambda name: None


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
    watch: Watch | None = None,
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
        watch: is told of each of the steps.

    Raises:
        RecipeError: if `out` is taken, or the device is not there.
        UpdateError: if a model holds values that are not finite.
        MergeError: if the result cannot be computed or written.
    """
    watch = watch or unwatched
    inputs = [model.path for model in plan.models.values()]
    require_writable(out, inputs, force=force)
    with watch("checking", sum(len(model.source.specs()) for model in plan.models.values())) as checked:
        _require_finite(plan, checked)
    with staged(out) as folder:
        sink = SafetensorsSink(folder, max_shard_bytes=shard_bytes)
        with watch("merging", len(plan.layout.targets)) as merged:
            report = execute(plan, plan.cohort(seed), sink, threads=threads, device=device, on_tensor=merged)
        write_config(plan, folder)
        hashes: dict[str, dict[str, str]] = {}
        with watch("hashing", sum(len(model.files()) for model in plan.models.values())) as hashed:
            for ref, model in plan.models.items():
                for name, digest in model.hashes():
                    hashes.setdefault(str(ref), {})[name] = digest
                    hashed(name)
        text = readme(plan, out.resolve().name, recipe_text, hashes, version)
        (folder / "README.md").write_text(text, encoding="utf-8")
        require_writable(out, inputs, force=force)
    return report


def _require_finite(plan: OfflinePlan, done: Callable[[str], None]) -> None:
    """Refuse models with values that are not finite: some methods would take them for no change at all.

    Raises:
        NonFiniteError: naming the model and the tensor.
    """
    for ref, model in plan.models.items():
        for chunk in _chunks(model.source.specs()):
            try:
                check_values(model.source, chunk, model.source)
            except NonFiniteError as error:
                raise NonFiniteError(f"model '{ref}': {error.problem}", tensor=error.tensor) from None
            for name in chunk:
                done(name)


def _chunks(specs: Mapping[str, TensorSpec]) -> Iterator[dict[str, TensorSpec]]:
    """All tensors in their order, in groups of `CHUNK_BYTES` or a little more."""
    chunk: dict[str, TensorSpec] = {}
    held = 0
    for name, spec in specs.items():
        chunk[name] = spec
        held += spec.nbytes
        if held >= CHUNK_BYTES:
            yield chunk
            chunk, held = {}, 0
    if chunk:
        yield chunk
