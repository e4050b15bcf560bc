"""Adapters in a federation: what a client may send, and what it is sent, where clients have ranks of their own.

The server keeps the global adapter in plain factors: a module's product is B A, with scaling 1. Clients have scalings
of their own (alpha / rank) and say them in their replies' metrics:

    lora-scalings   one number for all modules, or one a module in order of name
    lora-alpha      in place of it: alpha, over the rank of each module (its square root where lora-rslora is 1)

A client that has replied is sent the adapter in its rank, B divided by its scaling: it loads it as it is. One that has
not is sent the plain factors, which it fits itself (`fl_merge.flower.client.receive_adapter`); `lora-fitted` in the
config of a message says which. The adapter that a run starts from has B = 0, so its scaling does not matter; a trained
one has to have it in B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fl_merge.errors import DecodeError, MergeError, RecipeError, TensorMismatchError
from fl_merge.lowrank import SCALINGS, Exchange
from fl_merge.ops.draws import stream_key, uniform
from fl_merge.ops.lowrank import Factors, compress
from fl_merge.pairs import RESIDUAL, Pair, factors, pairs_of
from fl_merge.types import MergeMethod, TensorSource, TensorSpec, Update, compute_dtype

PLAIN = "lora-plain"
"""Key of the config that a server's own evaluation is given: whether the model is an adapter in plain factors."""

FITTED, TRAINS, SHARE = "lora-fitted", "lora-trains", "lora-share"
"""Keys of a message's config: whether the factors are in the client's rank and scaling; which of them it is to train
in this round; and which travel at all (it keeps the others)."""


def exchange_of(method: MergeMethod) -> Exchange | None:
    """How a method for adapters travels; None for a method for models.

    Raises:
        RecipeError: for a method for adapters inside a server optimizer.
    """
    found = getattr(getattr(method, "shape", method), "exchange", None)
    if found is None and getattr(method, "optimizer", None) is not None:
        inner = exchange_of(method.method)  # type: ignore[attr-defined]
        if inner is not None:
            raise RecipeError(
                f"{method}: a server optimizer steps along tensors, and the factors of an adapter are not the same "
                "from round to round; wanted the method without it"
            )
    return found if isinstance(found, Exchange) else None


def require_apart(specs: Mapping[str, TensorSpec]) -> None:
    """Refuse the factors of fused experts as PEFT has them, which lie across each other and are no product.

    Their names give them away: PEFT wraps the module whose parameters they are, twice where two are adapted.

    Raises:
        RecipeError: naming the module.
    """
    for module in pairs_of(specs)[0]:
        if module.endswith((".experts", ".base_layer")):
            raise RecipeError(
                f"module '{module}': the factors of fused experts in one; wanted each expert's for itself, "
                "as fl_merge.adapters.experts_apart gives them"
            )


@dataclass(frozen=True)
class Form:
    """The form in which a client has its adapter.

    Args:
        ranks: by module.
        scalings: likewise.
    """

    ranks: Mapping[str, int]
    scalings: Mapping[str, float]


_FORM = "lora-form/"


def forms_as_state(forms: Mapping[str, Form]) -> dict[str, Tensor]:
    """Forms by client as tensors, in which they are kept with the model: a run that is resumed knows them too.

    (2, modules) float64, in order of the modules' names, without which they are of no use: ranks and scalings.
    """
    return {
        _FORM + client: torch.tensor(
            [[float(form.ranks[module]), form.scalings[module]] for module in sorted(form.ranks)], dtype=torch.float64
        ).T.contiguous()
        for client, form in forms.items()
    }


def form_in_state(state: Mapping[str, Tensor], client: str, specs: Mapping[str, TensorSpec]) -> Form | None:
    """A client's form, if it is known and its modules are those of the adapter."""
    found = state.get(_FORM + client)
    modules = sorted(pairs_of({n: s for n, s in specs.items() if not n.startswith(RESIDUAL)})[0])
    if found is None or found.shape != (2, len(modules)):
        return None
    ranks, scalings = found.tolist()
    return Form(
        {module: int(rank) for module, rank in zip(modules, ranks, strict=True)},
        dict(zip(modules, scalings, strict=True)),
    )


class _Plain:
    """A client's tensors with every scaling in B; what it did not send of a pair is the global adapter's."""

    def __init__(self, theirs: TensorSource, ours: TensorSource, names: Mapping[str, float | None]) -> None:
        self._theirs, self._ours, self._names = theirs, ours, names
        sent = theirs.specs()
        self._specs = {
            name: _widened(sent[name] if name in sent else ours.specs()[name], wide=".lora_" in name) for name in names
        }

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> Tensor:
        factor = self._names[name]
        source = self._ours if factor is None else self._theirs
        tensor = source.read(name).to(self._specs[name].dtype)
        return tensor if factor is None or factor == 1.0 else tensor * factor

    def aliases(self) -> Mapping[str, str]:
        return {}


def _widened(spec: TensorSpec, *, wide: bool) -> TensorSpec:
    return TensorSpec(spec.shape, compute_dtype(spec.dtype)) if wide and spec.is_floating else spec


def expected(update: Update, sent: Mapping[str, TensorSpec], exchange: Exchange) -> dict[str, TensorSpec]:
    """What a client's tensors have to be for it to take part in its own ranks.

    Args:
        update: not read, but for the descriptions of its tensors.
        sent: the adapter's that it was sent.
        exchange: of the method.

    Raises:
        TensorMismatchError: if factors do not fit each other, or the modules of the adapter.
    """
    ours = {name: spec for name, spec in sent.items() if not name.startswith(RESIDUAL)}
    theirs = update.tensors.specs()
    wanted, others = pairs_of(ours)
    result = {name: ours[name] for name in others}
    for pair in wanted.values():
        a, b = theirs.get(pair.a), theirs.get(pair.b)
        if a is None and b is None:
            continue  # a module that this client does not have
        keeps = {"A": pair.b, "B": pair.a}.get(exchange.share)
        for name, spec in ((pair.a, a), (pair.b, b)):
            if spec is None and name != keeps:
                raise TensorMismatchError("is missing", tensor=name)
        a, b = a or pair.a_spec, b or pair.b_spec
        found = Pair(pair.module, pair.a, pair.b, a, b)
        problem = found.problem()
        if problem is None and (a.shape[1:], b.shape[:1]) != (pair.a_spec.shape[1:], pair.b_spec.shape[:1]):
            problem = f"a product of {found.outputs} x {found.inputs}, wanted {pair.outputs} x {pair.inputs}"
        if problem is None and found.rank > max(pair.outputs, pair.inputs):
            problem = f"rank {found.rank}, which is more than a matrix of {pair.outputs} x {pair.inputs} can have"
        if problem is None and not (exchange.ordered or exchange.prefix) and found.rank != pair.rank:
            problem = (
                f"rank {found.rank}, wanted the rank of the global adapter, {pair.rank}, as the method averages factors"
            )
        if problem is not None:
            raise TensorMismatchError(problem, tensor=pair.a)
        a_spec, b_spec = pair.of_rank(found.rank)
        result |= {name: spec for name, spec in ((pair.a, a_spec), (pair.b, b_spec)) if name in theirs}
    return result


def plain(update: Update, sent: TensorSource) -> tuple[Update, Form]:
    """An update that has been checked, with every scaling in B, and the form in which the client has its adapter.

    Raises:
        DecodeError: if the client does not say its scalings.
    """
    pairs, _ = pairs_of({n: s for n, s in sent.specs().items() if not n.startswith(RESIDUAL)})
    theirs = update.tensors.specs()
    modules = sorted(module for module, pair in pairs.items() if pair.a in theirs or pair.b in theirs)
    names: dict[str, float | None] = dict.fromkeys(theirs, 1.0)
    ranks = {
        module: theirs[pairs[module].a].shape[0] if pairs[module].a in theirs else theirs[pairs[module].b].shape[1]
        for module in modules
    }
    scalings = _scalings(update.metrics, modules, ranks)
    for module in modules:
        pair = pairs[module]
        for name in (pair.a, pair.b):
            names.setdefault(name, None)
        if pair.b in theirs:
            names[pair.b] = scalings[module]
    metrics: dict[str, Any] = {**update.metrics, SCALINGS: [scalings[module] for module in modules]}
    return replace(update, tensors=_Plain(update.tensors, sent, names), metrics=metrics), Form(ranks, scalings)


def reported(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A client's metrics without what only says the form of its adapter, of which there is no mean."""
    return {key: value for key, value in metrics.items() if not key.startswith("lora-")}


def _scalings(metrics: Mapping[str, Any], modules: list[str], ranks: Mapping[str, int]) -> dict[str, float]:
    said = metrics.get(SCALINGS)
    if said is None and "lora-alpha" in metrics:
        alpha, stable = metrics["lora-alpha"], metrics.get("lora-rslora", 0)
        if isinstance(alpha, int | float) and isinstance(stable, int | float):
            said = [alpha / (math.sqrt(ranks[module]) if stable else ranks[module]) for module in modules]
    if said is None:
        raise DecodeError(
            f"the metrics say neither '{SCALINGS}' nor 'lora-alpha'; without the scaling of its factors an adapter "
            "cannot be merged"
        )
    each = said if isinstance(said, list) else [said] * len(modules)
    if len(each) != len(modules):
        raise DecodeError(f"'{SCALINGS}' has {len(each)} numbers for {len(modules)} modules")
    for value in each:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) < 1e6:
            raise DecodeError(f"'{SCALINGS}': found {value!r}, wanted numbers other than 0, up to a million")
    return {module: float(value) for module, value in zip(modules, each, strict=True)}


class Downlinks:
    """The global adapter in the form of each client; what is common to all clients is worked out once.

    Args:
        master: the adapter in plain factors.
        exchange: of the method.
    """

    def __init__(self, master: Mapping[str, Tensor], exchange: Exchange) -> None:
        self._master = master
        self._exchange = exchange
        specs = {n: TensorSpec.of(t) for n, t in master.items() if not n.startswith(RESIDUAL)}
        self._pairs, others = pairs_of(specs)
        self._rest = {name: master[name] for name in master if name in others or name.startswith(RESIDUAL)}
        self._products: dict[str, Factors] = {}

    def fitted(self, form: Form, key: tuple[int, int]) -> dict[str, Tensor]:
        """In a client's ranks and scalings; of the modules that it has. Float32.

        Args:
            form: the client's.
            key: (seed, round), of the random rows that fill up A for a client of a larger rank; their B is zero.
        """
        found = dict(self._rest)
        for module, rank in form.ranks.items():
            pair = self._pairs[module]
            a_spec, b_spec = pair.of_rank(rank)
            b_OR, a_RI = self._product(pair)
            kept = min(rank, len(a_RI))
            a = torch.empty(rank, pair.inputs, dtype=torch.float64)
            b = torch.zeros(pair.outputs, rank, dtype=torch.float64)
            a[:kept], b[:, :kept] = a_RI[:kept], b_OR[:, :kept] / form.scalings[module]
            if rank > kept:  # a row of zeros in both factors would never be trained
                drawn = uniform(stream_key(*key, "", pair.a), 0, (rank - kept) * pair.inputs)
                a[kept:] = (2.0 * drawn.view(-1, pair.inputs) - 1.0) / math.sqrt(pair.inputs)
            found[pair.a] = a.to(compute_dtype(a_spec.dtype)).view(a_spec.shape)
            found[pair.b] = b.to(compute_dtype(b_spec.dtype)).view(b_spec.shape)
        return {name: found[name] for name in self._master if name in found}

    def _product(self, pair: Pair) -> Factors:
        if pair.module not in self._products:
            product = factors(self._master[pair.a], self._master[pair.b])
            moved = self._exchange.ordered and bool(product.b_OR.any())  # an untrained adapter keeps its A
            self._products[pair.module] = compress(product).factors if moved else product
        return self._products[pair.module]


def fit(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], scalings: Mapping[str, float] | float
) -> dict[str, Tensor]:
    """The client's side: plain factors in its own ranks and scalings.

    Of a lower own rank the leading part is taken; a larger one is filled up with the client's own rows of A, and zeros
    in B: the product stays the same.

    Args:
        tensors: plain factors, as the server keeps them.
        own: the client's tensors, which say the shapes.
        scalings: by module, or one for all.

    Raises:
        MergeError: if they are no factors of the client's modules.
    """
    found = {name: tensors.get(name, tensor) for name, tensor in own.items()}
    for module, pair in pairs_of({name: TensorSpec.of(tensor) for name, tensor in own.items()})[0].items():
        if pair.a not in tensors or pair.b not in tensors:
            continue
        a, b = tensors[pair.a].to(own[pair.a].dtype), tensors[pair.b].to(own[pair.b].dtype)
        if (a.shape[1:], b.shape[:1]) != (pair.a_spec.shape[1:], pair.b_spec.shape[:1]):
            raise MergeError(f"module '{module}': factors {tuple(a.shape)}, {tuple(b.shape)} do not fit the client's")
        kept = min(pair.rank, a.shape[0])
        scaling = scalings if isinstance(scalings, int | float) else scalings[module]
        fitted_a, fitted_b = own[pair.a].clone(), torch.zeros_like(own[pair.b])
        fitted_a[:kept], fitted_b[:, :kept] = a[:kept], b[:, :kept] / scaling
        found[pair.a], found[pair.b] = fitted_a, fitted_b
    return found
