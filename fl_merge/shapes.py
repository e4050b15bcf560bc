"""The shapes of a merge method: what its author writes, and the plan that comes of it.

    Span         coefficients; the result is a combination of the base and the clients' models
    VectorSpan   the same with coefficients of their own for each row or column of a tensor
    Coordinate   an elementwise function of the deltas, after a survey of a few numbers a client where one is needed
    Matrix       a function of all the deltas of one 2-D tensor
    Tensorwise   a function of the base and all the deltas of one tensor
    (structure)  anything with a `plan` of its own: names and shapes may change

Suffixes: N clients, S elements, K numbers of a survey.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fl_merge.errors import RecipeError
from fl_merge.ops.draws import stream_key, uniform
from fl_merge.ops.scores import scales
from fl_merge.ops.sparsify import keep_random
from fl_merge.types import BASE, CohortSpec, Output, Read, Scope, TensorSpec, Whole

ScopeName = Literal["tensor", "model"]


@dataclass(frozen=True)
class Slice:
    """Where a `combine` stands: which elements it is given, and what is known of the whole tensor.

    Args:
        tensor: its name.
        start, stop: the slice's elements, counted within the flattened tensor.
        scope_start: the first element's place within the scope of the survey (the tensor, or the whole model).
        spec: the cohort.
        survey_NK: (N, K) float64: what the survey of each client's delta gave; (N, 0) where there is none.
        joint_K: (K,) float64: what the function of the Gram matrix gave, and then what the measures gave, in order;
            (0,) where there is none.
        count: counts the method's `tally` over the whole tensor; None where there is none.
        device: where the deltas are.
        row: how many elements a row of the tensor has (one entry of its first dimension; all if it has but one).
    """

    tensor: str
    start: int
    stop: int
    scope_start: int
    spec: CohortSpec
    survey_NK: Tensor
    count: Callable[[], int] | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (it cannot be changed)
    joint_K: Tensor = torch.empty(0, dtype=torch.float64)  # noqa: RUF009
    row: int = 0

    def index_S(self) -> Tensor:
        """(S,) int64: the place of each element within the survey's scope."""
        return torch.arange(self.scope_start, self.scope_start + self.stop - self.start, device=self.device)

    @property
    def tally(self) -> int:
        """The sum of the method's `tally` over the whole tensor, counted when it is first asked for; 0 without one."""
        return self.count() if self.count is not None else 0

    def keep_random(self, deltas_NS: Tensor, density: float | Sequence[float], *, rescale: bool) -> Tensor:
        """The deltas with each element kept with probability `density`, by the draws of `uniform_NS`."""
        return keep_random(deltas_NS, self.uniform_NS(), density, rescale=rescale)

    def uniform_NS(self) -> Tensor:
        """(N, S) float64: one draw from [0, 1) an element and client, the same whatever the slicing or the cohort.

        Keyed by (seed, round, client id, tensor name, element index).
        """
        keys_N = draw_keys(self.spec, self.tensor)
        return torch.stack([uniform(key, self.start, self.stop) for key in keys_N]).to(self.device)


def draw_keys(spec: CohortSpec, tensor: str) -> list[int]:
    """The key of each client's draws for a tensor."""
    return [stream_key(spec.seed, spec.round, client_id, tensor) for client_id in spec.client_ids]


@dataclass(frozen=True)
class Span:
    """theta = theta_0 + sum c_i tau_i (on deltas), or sum c_i theta_i (on weights).

    Args:
        coefficients: from the cohort and the (N, N) float64 Gram matrix of the deltas or weights (None unless `gram`)
            to the N numbers c_i.
        gram: whether the Gram matrix is needed, which costs a pass over the inputs.
        on: "deltas" or "weights": of what the c_i and the Gram matrix are.
        scope: "tensor" for coefficients tensor by tensor, "model" for one set for the whole model.
        running: the factor, where each c_i is the client's share times one factor: the sum can then be kept while
            updates come in (`fl_merge.running`). None for all other coefficients.
    """

    coefficients: Callable[[CohortSpec, Tensor | None], Sequence[float]]
    gram: bool = False
    on: Literal["deltas", "weights"] = "deltas"
    scope: ScopeName = "tensor"
    running: float | None = None

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """One output a tensor; fixed coefficients are computed here, so that their errors come before any work."""
        compute = self if self.gram else self.fixed(spec, None)
        return plan_deltas(spec, compute, self.scope)

    def fixed(self, spec: CohortSpec, gram_NN: Tensor | None) -> WeightedSum:
        """The sum that is left to do once the Gram matrix is known."""
        coefficients_N = tuple(float(c) for c in self.coefficients(spec, gram_NN))
        if len(coefficients_N) != len(spec.client_ids):
            raise ValueError(f"{len(coefficients_N)} coefficients for {len(spec.client_ids)} clients")
        if self.on == "deltas":
            return WeightedSum(1.0, coefficients_N)
        # Where they sum to 1 but for rounding it is 1, or float64 tensors that nobody moved would change in a last bit.
        total, rounding = math.fsum(coefficients_N), len(coefficients_N) * sys.float_info.epsilon
        return WeightedSum(1.0 if abs(total - 1.0) <= rounding else total, coefficients_N)


@dataclass(frozen=True)
class VectorSpan:
    """As `Span` with a Gram matrix, but each row or column of a tensor is a vector for itself.

    A row runs along the last dimension, a column along the first; a tensor with fewer than two dimensions is one
    vector.

    Args:
        coefficients: from the cohort and the (V, N, N) float64 Gram matrices of V vectors to their coefficients,
            (V, N) float64. A vector's may depend on its own Gram matrix only.
        along: "rows" or "columns".
        on: "deltas" or "weights": of what the coefficients and the Gram matrices are.
    """

    coefficients: Callable[[CohortSpec, Tensor], Tensor]
    along: Literal["rows", "columns"] = "rows"
    on: Literal["deltas", "weights"] = "deltas"

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """One output a tensor."""

        def of_one_vector(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
            assert gram_NN is not None
            coefficients_N: list[float] = self.coefficients(spec, gram_NN[None])[0].tolist()
            return coefficients_N

        one_vector = Span(of_one_vector, gram=True, on=self.on)
        for output in plan_deltas(spec, self, "tensor"):
            yield replace(output, compute=one_vector) if _is_vector(output, self) else output

    def fixed(self, spec: CohortSpec, gram_VNN: Tensor) -> tuple[Tensor, Tensor]:
        """What is left to do once the Gram matrices are known: factors of the base (V,) and of the deltas (V, N)."""
        coefficients_VN = self.coefficients(spec, gram_VNN)
        total_V = coefficients_VN.sum(dim=1)
        rounding = coefficients_VN.shape[1] * sys.float_info.epsilon
        sums_to_1_V = (total_V - 1.0).abs() <= rounding
        return torch.where(sums_to_1_V | (self.on == "deltas"), 1.0, total_V), coefficients_VN


def _is_vector(output: Output, compute: object) -> bool:
    return output.compute is compute and len(output.spec.shape) < 2


@dataclass(frozen=True)
class WeightedSum:
    """base_coefficient * theta_0 + sum c_i tau_i.

    A sum of weights c_i theta_i is written as (sum c_i) theta_0 + sum c_i tau_i: what nobody moved
    keeps its value bit for bit, but for -0.0, which becomes 0.0.
    """

    base_coefficient: float
    coefficients_N: tuple[float, ...]


@dataclass(frozen=True)
class Sums:
    """Numbers that are sums over the elements of a tensor.

    Args:
        function: from a block of the deltas, the weights and the block's `Slice` to its K summands, float64.
        compiled: the compiled pass that gives the same, where there is one (`fl_merge.measuring`).
    """

    function: Callable[[Tensor, Tensor, Slice], Tensor]
    compiled: Literal["kept squares"] | None = None


@dataclass(frozen=True)
class Maxima:
    """Numbers that are maxima over the elements of a tensor.

    Args:
        function: as that of `Sums`; gives the K maxima of a block.
        compiled: as that of `Sums`.
    """

    function: Callable[[Tensor, Tensor, Slice], Tensor]
    compiled: Literal["products"] | None = None


@dataclass(frozen=True)
class Cuts:
    """Where to cut so that so many elements with the largest scores stay, the lower index winning a tie: two numbers a
    row of scores, as `ops.sparsify.above_cut` takes them. Without a compiled pass the scores of a whole tensor are in
    memory meanwhile.

    Args:
        score: from a slice of the deltas to the scores (R, S), >= 0, in the dtype of the deltas.
        count: how many stay of a row, from its number of elements and how many of them have a score above 0.
        compiled: the scores that a compiled pass counts, where there is one: of `kernels.rows.SCORES`.
    """

    score: Callable[[Tensor, Tensor, Slice], Tensor]
    count: Callable[[int, int], int]
    compiled: Literal["variance", "balance"] | None = None


Measure = Sums | Maxima | Cuts


@dataclass(frozen=True)
class Elements:
    """An elementwise method for which there is a compiled pass; its `combine` is the definition, which the pass equals.

    Args:
        kind: of `kernels.passes.KINDS`.
        numbers: up to three of the kind.
        scale: multiplies the merged delta, where the kind has it.
        count: from the number of clients to how many values are averaged, where the kind does.
        weighted: whether the deltas are added with the clients' weights; else with 1.
        chosen: whether the joint numbers are the places of the clients that take part.
    """

    kind: str
    numbers: tuple[float, ...] = ()
    scale: float = 1.0
    count: Callable[[int], int] = lambda clients: clients
    weighted: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class Balanced:
    """The mean of the deltas, each element weighed by its balance (`ops.scores.balance`) if that is above a cut.

    The joint numbers are the 2 N largest magnitudes by which balances are measured, and then the N cuts.

    Args:
        scale: multiplies the merged delta.
    """

    scale: float

    @staticmethod
    def scales(joint_K: Tensor, clients: int) -> tuple[Tensor, bool]:
        """(2, N) float32: what multiplies deltas and their sum, or divides them if that is True."""
        largest_N, product_N = joint_K[: 2 * clients].reshape(2, clients)
        return scales(largest_N, product_N, torch.float32)

    @staticmethod
    def cutoffs_N2(joint_K: Tensor, clients: int) -> Tensor:
        """(N, 2) float64: threshold and last index of each client."""
        return joint_K[2 * clients :].reshape(clients, 2)


@dataclass(frozen=True)
class Coordinate:
    """theta = theta_0 + combine(deltas), element by element.

    Args:
        combine: from a slice of the deltas (N, S), the weights (N,) float64 and a `Slice` to the merged delta (S,).
            An element's result may depend on its own deltas, its index and the slice's survey, draws and tally only.
        survey: from one client's whole delta, flattened, to K float64 numbers (thresholds, norms).
        surveys: in place of `survey`, where it is not the same for all clients: from a client's id to its survey.
        tally: elementwise like `combine`, giving whole numbers; their sum over the tensor is `Slice.tally`
            (a pass over the tensor, made only if it is asked for).
        measures: numbers that need all clients and are found slice by slice; each may use those before it.
        gram: from the cohort and the (N, N) float64 Gram matrix of the deltas in scope to K float64 numbers.
        scope: what the survey and the Gram matrix run over: each tensor, or the whole model's delta as one vector (in
            order of name).
        stages: what this is made of, where the executor has a compiled pass for it: `Elements`, `Balanced`, or the
            `Stages` or `Selected` of `fl_merge.stages`.
        rows: whether an element's result may depend on its whole row too: slices are then whole rows.
        check: raises a MergeError, when the merge is planned, for a cohort that the method cannot merge.
    """

    combine: Callable[[Tensor, Tensor, Slice], Tensor]
    survey: Callable[[Tensor], Tensor] | None = None
    tally: Callable[[Tensor, Tensor, Slice], Tensor] | None = None
    scope: ScopeName = "tensor"
    stages: object | None = None
    surveys: Callable[[str], Callable[[Tensor], Tensor]] | None = None
    measures: tuple[Measure, ...] = ()
    gram: Callable[[CohortSpec, Tensor], Tensor] | None = None
    rows: bool = False
    check: Callable[[CohortSpec], None] | None = None

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """One output a tensor."""
        if self.check is not None:
            self.check(spec)
        return plan_deltas(spec, self, self.scope)

    def survey_of(self, client_id: str) -> Callable[[Tensor], Tensor] | None:
        """The survey of one client's delta, if there is any."""
        return self.surveys(client_id) if self.surveys is not None else self.survey


@dataclass(frozen=True)
class Matrix:
    """theta = theta_0 + merge(deltas) for 2-D tensors and, taken as out x rest, convolution kernels.

    Tensors with fewer than two dimensions get the weighted average.

    Args:
        merge: from the deltas (N, rows, columns) and the weights (N,) float64 to the merged delta (rows, columns).
    """

    merge: Callable[[Tensor, Tensor], Tensor]

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """One output a tensor."""
        average = WeightedSum(1.0, spec.weights_N)
        for output in plan_deltas(spec, self, "tensor"):
            if output.compute is self and len(output.spec.shape) < 2:
                yield Output(output.name, output.spec, output.reads, average, output.scope)
            else:
                yield output


@dataclass(frozen=True)
class Tensorwise:
    """theta = theta_0 + merge(theta_0, deltas): a function of one tensor's base and deltas as a whole.

    Args:
        merge: from the base (the tensor's shape), the deltas (N, and that shape) and the weights (N,) float64 to the
            merged delta, in that shape.
    """

    merge: Callable[[Tensor, Tensor, Tensor], Tensor]

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """One output a tensor."""
        return plan_deltas(spec, self, "tensor")


@dataclass(frozen=True)
class Copy:
    """The one tensor that is read, unchanged."""


def plan_deltas(spec: CohortSpec, compute: object, scope: ScopeName) -> Iterator[Output]:
    """The plan of a method that gives each floating tensor of the base a merged one of the same name and shape."""
    for name, tensor in spec.tensors.items():
        if tensor.dtype.is_complex:
            raise RecipeError(f"tensor '{name}': dtype {str(tensor.dtype).removeprefix('torch.')} cannot be merged")
    floating = {name: tensor for name, tensor in spec.tensors.items() if tensor.is_floating and tensor.numel > 0}
    whole_model = Scope.over(floating) if scope == "model" else None
    clients = range(len(spec.client_ids))
    for name, tensor in spec.tensors.items():
        if name not in floating:
            yield _plan_counter(name, tensor, clients)
            continue
        reads = (Read(BASE, name), *(Read(client, name) for client in clients))
        yield Output(name, tensor, reads, compute, whole_model or Scope.over({name: tensor}))


def _plan_counter(name: str, tensor: TensorSpec, clients: range) -> Output:
    """Integers and booleans are not averaged: the base's are kept, and BatchNorm's count of batches is the largest."""
    if name.rpartition(".")[2] == "num_batches_tracked":
        reads = (Read(BASE, name), *(Read(client, name) for client in clients))
        return Output(name, tensor, reads, Whole(_largest))
    return Output(name, tensor, (Read(BASE, name),), Copy())


def _largest(*counters: Tensor) -> Tensor:
    return torch.stack(counters).amax(dim=0)
