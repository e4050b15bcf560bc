"""Merge plain state dicts, for notebooks and tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import SupportsFloat

import torch
from torch import Tensor

from fl_merge.check import check_metrics, check_update
from fl_merge.errors import MetricError, RecipeError
from fl_merge.execute import execute
from fl_merge.method import METHODS, as_method, sends
from fl_merge.naming import STATISTICS
from fl_merge.optimizers import ServerOptimized
from fl_merge.store import MemorySink, MemorySource, tied_names
from fl_merge.types import Cohort, MergeMethod, Update


def merge(
    method: MergeMethod | str,
    base: Mapping[str, Tensor],
    updates: Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]],
    weights: Sequence[float] | Mapping[str, float] | None = None,
    seed: int = 0,
    *,
    statistics: Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]] | None = None,
    metrics: Mapping[str, Mapping[str, float | int]] | None = None,
    threads: int | None = None,
    slice_elements: int | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Merge finetuned models into one.

    Args:
        method: such as `ties(density=0.2)`, or the name of a method for its defaults.
        base: the state dict that every client started from.
        updates: the clients' state dicts: a list (the clients are then called "0", "1", ...) or by client id.
        weights: one positive number a client (numbers of examples, say), in the same form; equal shares if left out.
        seed: of the random draws (DARE).
        statistics: what `fl_merge.statistics.collect` gave for each client, in the form of `updates`; for methods that
            need it.
        metrics: what each client reported, by client id, for methods that need it (`fednova`: `local-steps`).
        threads, slice_elements, device: as for `execute`; they do not change the result (a device may, in rounding).

    Returns:
        New tensors under the base's names, in the base's dtypes.

    Raises:
        RecipeError: for an unknown method, or settings or weights that do not fit.
        UpdateError: if a client's tensors do not fit the base or are not finite, naming client and tensor.
        MergeError: if the merge gives no model.
    """
    chosen = as_method(method)
    entry = METHODS.get(getattr(chosen, "name", ""))
    if entry is not None and entry.merges == "adapters":
        raise RecipeError(
            f"{chosen} merges LoRA adapters, whose scalings are not in a state dict; wanted "
            "fl_merge.adapters.merge_adapters"
        )
    cohort = cohort_of(chosen, base, updates, weights, seed, statistics=statistics, metrics=metrics)
    sink = MemorySink()
    execute(chosen, cohort, sink, threads=threads, slice_elements=slice_elements, device=device)
    return sink.tensors


def cohort_of(
    chosen: MergeMethod,
    base: Mapping[str, Tensor],
    updates: Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]],
    weights: Sequence[float] | Mapping[str, float] | None = None,
    seed: int = 0,
    *,
    statistics: Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]] | None = None,
    metrics: Mapping[str, Mapping[str, float | int]] | None = None,
) -> Cohort:
    """The cohort of a merge of state dicts, checked.

    Args and Raises: as `merge`.
    """
    if isinstance(chosen, ServerOptimized):
        raise RecipeError(
            f"merge: found {chosen}; a server optimizer steps from round to round, here is one merge: wanted its "
            f"method alone, {chosen.method}"
        )
    _require_tensors("base", base)
    by_id = dict(updates) if isinstance(updates, Mapping) else {str(i): update for i, update in enumerate(updates)}
    for client_id, tensors in by_id.items():
        _require_tensors(f"client '{client_id}'", tensors)
    share = shares(list(by_id), weights)
    measured, reported = _statistics(list(by_id), statistics), metrics or {}
    cohort = Cohort(
        MemorySource(base, _tied(base, by_id)),
        tuple(
            Update(
                client_id,
                share[client_id],
                MemorySource(update),
                dict(reported.get(client_id, {})),
                measured.get(client_id),
            )
            for client_id, update in by_id.items()
        ),
        seed=seed,
    )
    for update in cohort.updates:
        check_update(
            update,
            cohort.base.specs(),
            max_num_examples=math.inf,
            values=cohort.base,
            statistics=tuple(kind for kind in sends(chosen) if kind in STATISTICS),
        )
        try:
            check_metrics(update.metrics, sends(chosen))
        except MetricError as error:
            raise error.of_client(update.client_id) from None
    return cohort


def shares(client_ids: list[str], weights: Sequence[float] | Mapping[str, float] | None) -> dict[str, float]:
    """One weight a client, checked; equal ones if none are given.

    Raises:
        RecipeError: for a weight that is missing, too many, no number, or not positive.
    """
    if weights is None:
        return dict.fromkeys(client_ids, 1.0)
    given = dict(weights) if isinstance(weights, Mapping) else dict(zip(client_ids, weights, strict=False))
    if len(weights) != len(client_ids) or set(given) != set(client_ids):
        found = list(weights) if isinstance(weights, Mapping) else f"{len(weights)} of them"
        raise RecipeError(f"weights: found {found}, wanted one for each of the {len(client_ids)} clients {client_ids}")
    for client_id, weight in given.items():
        if not isinstance(weight, SupportsFloat) or not 0 < float(weight) < math.inf:
            raise RecipeError(f"weights: client '{client_id}': found {weight!r}, wanted a number > 0")
    checked = {client_id: float(weight) for client_id, weight in given.items()}
    try:
        math.fsum(checked.values())
    except OverflowError:
        largest = max(checked, key=checked.__getitem__)
        raise RecipeError(
            f"weights: client '{largest}': found {given[largest]!r}, and no float64 holds the sum of all; wanted "
            "smaller numbers in the same proportions"
        ) from None
    return checked


def _statistics(
    client_ids: list[str], given: Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]] | None
) -> dict[str, MemorySource]:
    if given is None:
        return {}
    by_id = dict(given) if isinstance(given, Mapping) else dict(zip(client_ids, given, strict=False))
    if len(given) != len(client_ids) or set(by_id) != set(client_ids):
        found = list(given) if isinstance(given, Mapping) else f"{len(given)} of them"
        raise RecipeError(f"statistics: found {found}, wanted one dict for each of the clients {client_ids}")
    for client_id, tensors in by_id.items():
        _require_tensors(f"statistics of client '{client_id}'", tensors)
    return {client_id: MemorySource(tensors) for client_id, tensors in by_id.items()}


def _tied(base: Mapping[str, Tensor], updates: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Names of one storage in the base, as far as every update has kept them equal."""
    return {
        name: first
        for name, first in tied_names(base).items()
        if all(name in u and first in u and torch.equal(u[name], u[first]) for u in updates.values())
    }


def _require_tensors(whose: str, tensors: object) -> None:
    if not isinstance(tensors, Mapping):
        raise RecipeError(f"{whose}: found {type(tensors).__name__}, wanted a state dict (tensors by name)")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise RecipeError(f"{whose}, {name!r}: found {type(tensor).__name__}, wanted a torch.Tensor by its name")
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise RecipeError(f"{whose}, '{name}': a tensor without dense values ({tensor.layout}, {tensor.device})")
