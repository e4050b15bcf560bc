"""The check that every update passes before anything of it is used."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fl_merge import kernels
from fl_merge.errors import MetricError, NonFiniteError, StatisticsError, TensorMismatchError, WeightError, one_line
from fl_merge.kernels.passes import largest_magnitude, readable
from fl_merge.naming import COUNT, FISHER, HIDDEN, misfit
from fl_merge.structures.rows import mlp_inputs
from fl_merge.types import TensorSource, TensorSpec, Update, compute_dtype

MAX_NUM_EXAMPLES = 1e9
"""More examples than this are taken for a mistake or an attack: such a client alone would be the whole average."""

MIN_NUM_EXAMPLES = 1e-6
"""Fewer are no weight: a share that is rounded to nothing cannot be divided by."""

MAX_MAGNITUDE = 1e30
"""A larger element would overflow in sums and squares of float32. It is refused, unless the base has just that value
(masks are often stored as the most negative number that there is)."""

_PIECE = 1 << 20

_ROWS = 512

_SLACK = 0.01
"""What rounding (of sums in float16, at worst) may make of the symmetry of a Gram matrix."""


def check_update(
    update: Update,
    base: Mapping[str, TensorSpec],
    *,
    max_num_examples: float = MAX_NUM_EXAMPLES,
    values: TensorSource | None = None,
    tied: Mapping[str, str] | None = None,
    statistics: tuple[str, ...] = (),
) -> None:
    """Check an update whole against the base: number of examples, names, shapes, dtypes, finite values, tied weights.

    And the statistics that were asked for: names, shapes, values that such statistics can have.

    Floating tensors may come in another floating dtype than the base's (float16 of a float32 model, say).

    Args:
        update: not changed.
        base: the base's tensors.
        max_num_examples: the largest weight a client may claim.
        values: the base itself, for the check that an element beyond `MAX_MAGNITUDE` is the base's own.
        tied: names that are another name's tensor, and that name; the update's must be equal.
        statistics: the kinds that were asked for ("fisher", "gram").

    Raises:
        UpdateError: of the kind that says what is wrong, naming the client and the tensor.
    """
    try:
        check_num_examples(update.num_examples, max_num_examples)
        check_specs(update.tensors.specs(), base)
        check_values(update.tensors, base, values)
        for name, first in (tied or {}).items():
            if not torch.equal(update.tensors.read(name), update.tensors.read(first)):
                raise TensorMismatchError(f"differs from '{first}', to which it is tied in the base", tensor=name)
        if statistics:
            check_statistics(update.statistics, base, statistics, max_num_examples)
    except (WeightError, TensorMismatchError, NonFiniteError, StatisticsError) as error:
        raise error.of_client(update.client_id) from None


def check_statistics(
    found: TensorSource | None,
    base: Mapping[str, TensorSpec],
    kinds: tuple[str, ...],
    max_num_examples: float = MAX_NUM_EXAMPLES,
) -> None:
    """Statistics of these kinds and no others, of shapes that fit the base, with values that they can have.

    Of means of hidden states there has to be one a layer. Fisher information and the diagonal of a Gram matrix are not
    negative; a Gram matrix is symmetric, and no element of it is larger than the two on the diagonal allow. Whether
    they are those of the client's data nobody can tell.

    Raises:
        StatisticsError: naming the statistic.
    """
    specs = found.specs() if found is not None else {}
    for kind in kinds:
        if not any(name.startswith(f"{kind}/") for name in specs):
            raise StatisticsError(f"sent no statistics '{kind}'; this method needs them")
    if found is None or COUNT not in specs:
        raise StatisticsError(f"sent statistics without '{COUNT}', the number of examples that they are sums over")
    hidden = mlp_inputs(base) if HIDDEN in kinds else {}
    for name in hidden:
        if name not in specs:
            raise StatisticsError("statistics: is missing, wanted one for each layer", tensor=name)
    for name, spec in specs.items():
        problem = misfit(name, spec, base, kinds, hidden) or _no_such_values(name, found.read(name), max_num_examples)
        if problem:
            raise StatisticsError(f"statistics: {problem}", tensor=name)


def _no_such_values(name: str, values: Tensor, max_num_examples: float) -> str | None:
    """What is wrong with a statistic's values; None if nothing is."""
    if name == COUNT:
        count = float(values)
        return None if MIN_NUM_EXAMPLES <= count <= max_num_examples else f"{count:g} examples, wanted a number > 0"
    wide = values if values.dtype == torch.float64 else values.float()
    if not bool((wide.abs() <= MAX_MAGNITUDE).all()):
        return f"holds NaN, infinity or a magnitude above {MAX_MAGNITUDE:g}"
    if name.startswith(f"{HIDDEN}/"):
        return None
    diagonal = wide.diagonal(dim1=-2, dim2=-1) if wide.dim() > 1 and not name.startswith(f"{FISHER}/") else wide
    if bool((diagonal < 0).any()):
        return f"{float(diagonal.min()):g} where a sum of squares or a count stands, wanted none below 0"
    if diagonal is not wide:
        root = diagonal.sqrt()
        for rows in range(0, wide.shape[-1], _ROWS):  # or it would take three more matrices of that size
            part = slice(rows, rows + _ROWS)
            allowed = root[..., part, None] * root[..., None, :]
            slack = _SLACK * allowed + torch.finfo(wide.dtype).tiny
            apart = (wide[..., part, :] - wide[..., part].mT).abs()
            if bool((wide[..., part, :].abs() > allowed + slack).any() | (apart > slack).any()):
                return "is not symmetric, or has elements larger than its diagonal allows: no Gram matrix"
    return None


LOCAL_STEPS = "local-steps"
MAX_STEPS = 10**6
"""More local steps in a round are not believed: they would raise the mean of all clients' steps."""


def check_metrics(metrics: Mapping[str, Any], sends: Sequence[str]) -> None:
    """Check the metrics that a method needs ("steps": `local-steps`, a whole number from 1 to a million).

    Raises:
        MetricError: naming the metric.
    """
    if "steps" not in sends:
        return
    steps = metrics.get(LOCAL_STEPS)
    number = steps if isinstance(steps, int | float) and not isinstance(steps, bool) else 0
    if not 1 <= number <= MAX_STEPS or number != int(number):
        found = "is missing" if steps is None else f"is {steps!r}"
        raise MetricError(f"metric '{LOCAL_STEPS}' {found}, wanted the whole number of local steps, 1 to {MAX_STEPS:,}")


def check_values(tensors: TensorSource, base: Mapping[str, TensorSpec], values: TensorSource | None = None) -> None:
    """Every floating tensor that the base has is finite, and not enormous.

    Args:
        tensors: whose values are read once, on all cores.
        base: names, and the dtypes in which the values must have a place.
        values: a model whose own elements are accepted, however large.

    Raises:
        NonFiniteError: as `check_finite`.
    """
    for name, tensor in _not_plainly_finite({name: tensors.read(name) for name in base}, base):
        check_finite(name, tensor, base[name].dtype, values)


def check_num_examples(value: object, maximum: float = MAX_NUM_EXAMPLES) -> float:
    """The number of examples as a float.

    Raises:
        WeightError: unless it is a finite number (not a bool, not a list) from 1e-6 to `maximum`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WeightError(f"number of examples is {one_line(repr(value), 40)}, wanted one number")
    if not MIN_NUM_EXAMPLES <= value <= maximum or not math.isfinite(value):
        raise WeightError(f"number of examples is {one_line(repr(value), 40)}, wanted a number > 0 and <= {maximum:g}")
    return float(value)


def check_specs(found: Mapping[str, TensorSpec], base: Mapping[str, TensorSpec]) -> None:
    """Names, shapes and dtypes against the base's.

    Raises:
        TensorMismatchError: for the first difference, with how many more there are.
    """
    problems = [(name, "is missing") for name in base if name not in found]
    problems += [(name, f"{found[name]} is not in the base") for name in found if name not in base]
    for name in base.keys() & found.keys():
        wanted, got = base[name], found[name]
        if got.shape != wanted.shape:
            problems.append((name, f"shape {got.shape}, base has {wanted.shape}"))
        elif got.dtype != wanted.dtype and not (got.is_floating and wanted.is_floating):
            problems.append((name, f"dtype {_short(got.dtype)}, base has {_short(wanted.dtype)}"))
    if problems:
        name, problem = min(problems)
        more = f" (and {len(problems) - 1} more tensors do not fit)" if len(problems) > 1 else ""
        raise TensorMismatchError(problem + more, tensor=name)


def _not_plainly_finite(tensors: Mapping[str, Tensor], base: Mapping[str, TensorSpec]) -> Iterable[tuple[str, Tensor]]:
    """The tensors that have to be looked at more closely: all but those whose largest magnitude is within limits.

    The largest magnitudes are found by a compiled pass on all cores; without it, all tensors are looked at.
    """
    module = kernels.after(sum(tensor.numel() for tensor in tensors.values()))
    flat = {name: tensor.reshape(-1) for name, tensor in tensors.items() if tensor.dtype.is_floating_point}
    if module is None:
        return [(name, tensors[name]) for name in flat]
    pieces = [
        (name, start, min(start + _PIECE, flat_S.numel()))
        for name, flat_S in flat.items()
        if readable(flat_S)
        for start in range(0, flat_S.numel(), _PIECE)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda piece: largest_magnitude(module, flat[piece[0]], *piece[1:]), pieces)
        largest = {name: 0.0 for name, _, _ in pieces}
        for (name, _, _), magnitude in zip(pieces, found, strict=True):
            if not math.isnan(largest[name]) and not magnitude <= largest[name]:
                largest[name] = magnitude
    return [(name, tensors[name]) for name in flat if not _fits(largest.get(name, math.nan), base[name].dtype)]


def _fits(magnitude: float, base_dtype: torch.dtype) -> bool:
    return bool(torch.tensor(magnitude, dtype=torch.float64).to(base_dtype).double() <= MAX_MAGNITUDE)


def check_finite(name: str, tensor: Tensor, base_dtype: torch.dtype, values: TensorSource | None = None) -> None:
    """Every element is finite, also in the base's dtype (70000 has no place in a float16 model), and not enormous.

    Raises:
        NonFiniteError: with the first element that is not, and its place.
    """
    if not tensor.dtype.is_floating_point:
        return
    flat_S = tensor.reshape(-1)
    for start in range(0, flat_S.numel(), _PIECE):
        piece_S = flat_S[start : start + _PIECE].to(base_dtype).to(compute_dtype(base_dtype))
        if piece_S.abs().amax() <= MAX_MAGNITUDE:  # false for NaN too
            continue
        usable_S = torch.isfinite(piece_S) & (piece_S.abs() <= MAX_MAGNITUDE)
        if values is not None:
            base_S = values.read(name).reshape(-1)[start : start + _PIECE].to(piece_S.dtype)
            usable_S |= torch.isfinite(piece_S) & (piece_S == base_S)
        if not usable_S.all():
            first = start + int(torch.nonzero(~usable_S)[0])
            raise NonFiniteError(
                f"element {first} is {float(flat_S[first])}, wanted {_wanted(flat_S[first], base_dtype)}", tensor=name
            )


def _wanted(found: Tensor, base_dtype: torch.dtype) -> str:
    if not torch.isfinite(found):
        return "finite numbers"
    if not torch.isfinite(found.to(base_dtype).to(compute_dtype(base_dtype))):
        return f"numbers that {_short(base_dtype)} has"
    return f"magnitudes up to {MAX_MAGNITUDE:g}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
