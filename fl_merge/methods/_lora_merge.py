import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from fl_merge.errors import RecipeError
from fl_merge.hyperparameters import Range
from fl_merge.lowrank import Exchange, Merger, Missing, Module, Products
from fl_merge.method import Method, build, find, merge_method
from fl_merge.on_products import merged, planned, require_products
from fl_merge.ops.lowrank import Compressed, Factors, compress, core_basis, gram, knots_basis, stack
from fl_merge.shapes import Span, WeightedSum
from fl_merge.types import CohortSpec, Output

Space = Literal["full", "knots", "core"]


@merge_method(
    paper="KnOTS: Stoica et al., 2024, arXiv:2410.19735; Core Space: Panariello et al., 2025, arXiv:2509.17786",
    identity={"method": "weighted_average"},
    base=False,
    merges="adapters",
    clients=lambda method, settings, **_: _inner(method, settings).clients,
)
def lora_merge(
    *,
    method: str | Method = "ties",
    settings: Mapping[str, Any] | None = None,
    space: Space = "full",
    rank: Annotated[int, Range(1)] | None = None,
    missing: Missing = "zero",
) -> Products:
    """Run any method for models on the products of LoRA adapters, then keep the best approximation of a rank.

    A delta is a client's whole product s_i B_i A_i.

    full:   on the products, which are multiplied out a block of rows at a time
    knots:  [tau_1 ... tau_N] = U S [V_1 ... V_N]^T; the V_i^T are merged to V^T; the result is U S V^T
    core:   tau_i = L M_i R with bases that all clients share; the small M_i are merged to M; the result is L M R

    None of them depends on how a client splits its product into B and A: the bases of `core` are made from the
    canonical factors U sqrt(s), sqrt(s) V^T of each client's product.

    Args:
        method: a method for models by name ("ties", "dare_linear", "tsv_m", ...), or itself.
        settings: its parameters, such as {"density": 0.2}.
        space: where it runs. In `full` the result of an elementwise method has the full rank and is decomposed as a
            matrix of the layer's size, which takes minutes for layers of 4096; weighted sums (averages, task
            arithmetic, SLERP, Krum, ...) are merged by their factors and cost nothing in any space.
        rank: of the result, at most; by default the largest of the clients' ranks. What is cut is reported.
        missing: "zero": a client that does not have a module takes part with a product of zeros; "renormalise": its
            weight is shared among the others.

    Refused by name: methods that need statistics of the clients' data (`fisher`, `regmean`) or survey the whole model
    (`bulyan`, `ties` with scope "model").

    PEFT's `ties` prunes and elects on A and B separately, which is not TIES on what the adapters do; its `ties_svd`
    is `full`.
    """
    inner = _inner(method, settings)
    if isinstance(method, Method) and settings:
        raise RecipeError(f"parameter 'settings' of lora_merge: found {dict(settings)!r}, wanted none beside {method}")
    sends = _sends(inner)

    def prepare(modules: Sequence[Module]) -> dict[str, Merger]:
        cohorts: dict[tuple[str, ...], list[Module]] = {}
        for module in modules:
            cohorts.setdefault(module.spec.client_ids, []).append(module)
        mergers: dict[str, Merger] = {}
        for alike in cohorts.values():
            shapes = {_tensor(module): (module.outputs, module.inputs) for module in alike}
            outputs = planned(inner, alike[0].spec, shapes)
            sums = _ModelSums(alike)
            mergers |= {module.name: merger(module, outputs[_tensor(module)], sums) for module in alike}
        if len(cohorts) > 1 and any(m.survey is not None for m in mergers.values()):
            raise RecipeError(f"lora_merge: {inner} looks at the whole model, which needs missing='zero'")
        return mergers

    def merger(module: Module, output: Output, sums: "_ModelSums") -> Merger:
        most = min(rank or max(module.ranks_P), module.full_rank if _linear(output) else _all_ranks(module))
        compute = output.compute
        whole = isinstance(compute, Span) and compute.scope == "model"

        def merge(parts_P: Sequence[Factors], sent: Factors) -> Compressed:
            spec = module.spec
            if isinstance(compute, WeightedSum):
                return compress(stack(parts_P, compute.coefficients_N), most)
            if isinstance(compute, Span) and (whole or space == "full"):
                total = sums.known(compute) if whole else compute.fixed(spec, gram(parts_P))
                return compress(stack(parts_P, total.coefficients_N), most)
            if space == "full":
                return compress(_split(merged(output, spec, (module.outputs, module.inputs), parts_P)), most)
            if space == "knots":
                left_OK, right_PKI = knots_basis(parts_P)
                shape = right_PKI.shape[1], right_PKI.shape[2]
                right_KI = merged(output, spec, shape, list(right_PKI.float())).double()
                return compress(Factors(left_OK, right_KI), most)
            left_OK, cores_PKL, right_LI = core_basis(parts_P)
            shape = cores_PKL.shape[1], cores_PKL.shape[2]
            small_KL = merged(output, spec, shape, list(cores_PKL.float())).double()
            return compress(Factors(left_OK @ small_KL, right_LI), most)

        survey = (lambda everything: sums.measure(compute, everything)) if whole else None
        return Merger(most, merge, survey, 0 if _linear(output) else _held(module, space))

    return Products(prepare, missing, Exchange(), sends=sends)


class _ModelSums:
    """The coefficients of methods that go by the Gram matrix of whole models: the sum of that of all modules."""

    def __init__(self, modules: Sequence[Module]) -> None:
        self._spec: CohortSpec = modules[0].spec
        self._lock = threading.Lock()
        self._known: dict[int, WeightedSum] = {}

    def measure(self, compute: object, everything: Callable[[], Mapping[str, Sequence[Factors]]]) -> None:
        """Work them out, unless that has been done."""
        assert isinstance(compute, Span)
        with self._lock:
            if id(compute) not in self._known:
                each = everything()
                total = torch.stack([gram(each[name]) for name in sorted(each)]).sum(0)
                self._known[id(compute)] = compute.fixed(self._spec, total)

    def known(self, compute: object) -> WeightedSum:
        """They, measured before."""
        return self._known[id(compute)]


def _inner(method: str | Method, settings: Mapping[str, Any] | None) -> Method:
    """The method that runs on the products, by itself or by its name."""
    if isinstance(method, Method):
        return method
    try:
        return build(method, **(settings or {}))
    except RecipeError as error:
        raise RecipeError(f"parameter 'method' of lora_merge: {error}") from None


def _sends(inner: Method) -> tuple[str, ...]:
    """What clients send for a method beside their adapters, if it can run on the products of adapters at all."""
    entry = find(inner.name)
    if entry.merges != "models":
        raise RecipeError(f"parameter 'method' of lora_merge: found '{inner.name}', wanted a method for models")
    of_tensors = [kind for kind in entry.sends if kind != "steps"]
    if of_tensors:
        raise RecipeError(
            f"parameter 'method' of lora_merge: found '{inner.name}', which needs clients' statistics "
            f"({', '.join(of_tensors)}) of a model's own tensors; wanted one that merges deltas alone, such as ties"
        )
    require_products(inner, inner.shape)
    return entry.sends


def _tensor(module: Module) -> str:
    return f"{module.name}.weight"


def _linear(output: Output) -> bool:
    return isinstance(output.compute, WeightedSum | Span)


def _held(module: Module, space: Space) -> int:
    """Bytes of what is no factor: the deltas in the space, as float64 and as float32, and what is merged of them."""
    parts, rank = len(module.ranks_P), sum(module.ranks_P)
    if space == "knots":
        return (12 * parts + 16) * rank * module.inputs
    if space == "core":
        return (12 * parts + 16) * rank * rank
    numel, least = module.outputs * module.inputs, _all_ranks(module)
    return 36 * numel + 80 * least * least  # products are made in slices; the result is decomposed


def _all_ranks(module: Module) -> int:
    return min(module.outputs, module.inputs)


def _split(dense_OI: Tensor) -> Factors:
    """A matrix as factors, of which the smaller is the identity."""
    dense_OI = dense_OI.double()
    outputs, inputs = dense_OI.shape
    if outputs <= inputs:
        return Factors(torch.eye(outputs, dtype=torch.float64), dense_OI)
    return Factors(dense_OI, torch.eye(inputs, dtype=torch.float64))
