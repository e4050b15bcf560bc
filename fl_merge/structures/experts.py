"""Mixtures of experts out of dense models, and mixtures with fewer experts.

Suffixes: E experts, H hidden units.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fl_merge.architectures import Architecture, depth_of
from fl_merge.errors import MergeError, RecipeError, counted
from fl_merge.method import Method
from fl_merge.naming import HIDDEN, hidden_of
from fl_merge.ops.draws import stream_key
from fl_merge.ops.routing import hidden_rows, random_rows
from fl_merge.structures.common import MERGED_SOURCE, Sources, made, shown
from fl_merge.structures.rows import EXPERTS, TOP_K, UPCYCLINGS, Upcycling, sparse_row_of, upcycling_of
from fl_merge.types import CohortSpec, Output, Read, TensorSpec, Whole

Router = Literal["random", "zero", "hidden"]

SHARED_WIDTH = 8
"""Hidden units of the shared expert that Qwen2's mixtures have; its output starts at zero."""


def blocks_of(row: Architecture, names: Mapping[str, object]) -> list[str]:
    """What the names of each layer's tensors begin with; one empty text for a model without layers."""
    if "{i}" not in row.layer:
        return [""]
    return [row.named(number, "") for number in range(depth_of(row, names))]


@dataclass(frozen=True)
class Upcycled:
    """The shape of `moe_upcycle`.

    Args:
        copies: how many times the MLP of `source` is copied; 0 for one expert a client.
        top_k: how many experts a token is given to.
        router: how it begins.
        method: by which everything else is merged.
        source: of the copied MLP, and then of everything else.
    """

    copies: int
    top_k: int
    router: Router
    method: Method
    source: str

    @property
    def sends(self) -> tuple[str, ...]:
        """What clients send beside their models."""
        return (HIDDEN,) if self.router == "hidden" else ()

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """Everything but the MLPs merged, the MLPs as experts, routers.

        Raises:
            RecipeError: if no mixture is known for these tensors.
            MergeError: if there are fewer experts than top_k, or statistics are missing.
        """
        up = upcycling_of(spec.tensors)
        if up is None:
            known = ", ".join(family for row in UPCYCLINGS for family in row.families)
            raise RecipeError(f"moe_upcycle: unknown family ({shown(spec.tensors)}), wanted one of {known}")
        experts = [self.source] * self.copies if self.copies else list(spec.client_ids)
        if self.top_k > len(experts):
            raise MergeError(
                f"moe_upcycle: top_k is {self.top_k}, and {len(experts)} client(s) make as many experts; wanted at "
                "least top_k"
            )
        blocks = blocks_of(up.dense, spec.tensors)
        mlp = {name: self._part(up, blocks, name) for name in spec.tensors}
        kept = [name for name, part in mlp.items() if part is None]
        merged = spec.tensors if MERGED_SOURCE in (*experts, self.source) and self.copies else kept
        sources = Sources.of("moe_upcycle", spec, self.method, merged)
        rest = self.source if self.copies else MERGED_SOURCE
        for name, part in mlp.items():
            if part is None:
                yield sources.take(rest, name, name)
                continue
            block, pattern, ending = part
            for number, source in enumerate(experts):
                yield sources.take(source, name, f"{block}{pattern.replace('{e}', str(number))}.{ending}")
        for number, block in enumerate(blocks):
            yield self._router(up, spec, number, block, len(experts))
            yield from self._shared(up, spec, block)

    def _part(self, up: Upcycling, blocks: list[str], name: str) -> tuple[str, str, str] | None:
        """The block, the pattern in the mixture and the ending of a tensor of an MLP; None for what is no MLP's.

        Raises:
            RecipeError: for a tensor of a layer for which the mixture has no place.
        """
        block = next((block for block in blocks if name.startswith(block)), None)
        if block is None:
            return None
        rest = name.removeprefix(block)
        for dense, sparse in zip(up.dense.mlp, up.sparse.mlp, strict=True):
            for ending in ("weight", "bias") if up.biases else ("weight",):
                if rest == f"{dense}.{ending}":
                    return block, sparse, ending
        if not any(fnmatch.fnmatchcase(rest, glob) for glob in up.keeps):
            raise RecipeError(f"moe_upcycle: tensor '{name}' has no place in a model of family {up.sparse.family}")
        return None

    def _router(self, up: Upcycling, spec: CohortSpec, number: int, block: str, experts: int) -> Output:
        mlp = spec.tensors[f"{block}{up.dense.mlp[0]}.weight"]
        hidden, name = mlp.shape[1], f"{block}{up.sparse.router}.weight"
        output = TensorSpec((experts, hidden), mlp.dtype)
        if self.router == "zero":
            return made(name, output)
        if self.router == "random":
            key = stream_key(spec.seed, "router", name)
            return Output(name, output, (), Whole(lambda: random_rows(key, experts, hidden)))
        statistic = hidden_of(number)
        found = spec.statistics.get(statistic)
        if found is None or found.shape != (hidden,):
            what = "did not all send it" if found is None else f"sent it in shape {found.shape}"
            raise MergeError(
                f"moe_upcycle: router='hidden' needs the statistic '{statistic}', ({hidden},), of every client; they "
                f"{what}"
            )
        reads = tuple(Read(client, statistic, of="statistics") for client in range(experts))
        return Output(name, output, reads, Whole(lambda *means: hidden_rows(torch.stack(means))))

    def _shared(self, up: Upcycling, spec: CohortSpec, block: str) -> Iterator[Output]:
        """An expert that all tokens pass, where the family has one: small, and silent at first."""
        if up.shared is None:
            return
        gate, upward, downward, chooser = up.shared
        mlp = spec.tensors[f"{block}{up.dense.mlp[0]}.weight"]
        hidden, dtype = mlp.shape[1], mlp.dtype
        for part in (gate, upward):
            name = f"{block}{part}.weight"
            key = stream_key(spec.seed, "shared", name)
            wide = TensorSpec((SHARED_WIDTH, hidden), dtype)
            yield Output(name, wide, (), Whole(lambda key=key: random_rows(key, SHARED_WIDTH, hidden)))
        yield made(f"{block}{downward}.weight", TensorSpec((hidden, SHARED_WIDTH), dtype))
        yield made(f"{block}{chooser}.weight", TensorSpec((1, hidden), dtype))

    def reconfigure(self, config: Mapping[str, Any], clients: int | None) -> dict[str, Any]:
        """The config of the mixture.

        Raises:
            RecipeError: for a family without a mixture, or if the number of clients is needed and not given.
        """
        family = config.get("model_type")
        up = next((row for row in UPCYCLINGS if family in row.families), None)
        if up is None:
            known = ", ".join(name for row in UPCYCLINGS for name in row.families)
            raise RecipeError(f"moe_upcycle: unknown family '{family}', wanted one of {known}")
        experts = self.copies or clients
        if experts is None:
            raise RecipeError("moe_upcycle: one expert a client, and the number of clients is not given")
        if self.top_k > experts:
            raise RecipeError(f"moe_upcycle: top_k is {self.top_k}, above the {counted(experts, 'expert')}")
        new = {key: value for key, value in config.items() if key not in up.drops}
        for key, value in up.config.items():
            new[key] = config[value[1:]] if isinstance(value, str) and value.startswith("$") else value
        new |= {up.sparse.experts[0]: experts, TOP_K: self.top_k}
        return new | ({up.wide: SHARED_WIDTH} if up.wide else {})


@dataclass(frozen=True)
class Reduced:
    """The shape of `remove_experts`.

    Args:
        removed: numbers of experts, ascending.
        source: whose mixture it is: "base" or a client's id.
        top_k: how many experts a token is given to from now on; 0 for as many as before.
    """

    removed: tuple[int, ...]
    source: str
    top_k: int

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """The experts that stay, with new numbers; routers without the rows of the others; the rest as it is.

        Raises:
            RecipeError: if this is no mixture, there is no such expert, or none would be left.
        """
        row = sparse_row_of(spec.tensors)
        if row is None:
            raise RecipeError(f"remove_experts: found no router among the tensors ({shown(spec.tensors)})")
        router = f"{row.router}.weight"
        total = next(t.shape[0] for name, t in spec.tensors.items() if name == router or name.endswith(f".{router}"))
        kept = self._kept(total)
        sources = Sources("remove_experts", spec, {})
        chosen = torch.tensor(kept)
        for name, tensor in spec.tensors.items():
            number = re.search(r"(?<=experts\.)\d+(?=\.)", name)
            if number is not None:
                if int(number[0]) in kept:
                    new = kept.index(int(number[0]))
                    yield sources.take(self.source, name, f"{name[: number.start()]}{new}{name[number.end() :]}")
            elif name == router or name.endswith(f".{router}") or _is_fused(name):
                fewer = TensorSpec((len(kept), *tensor.shape[1:]), tensor.dtype)
                read = Read(sources.index(self.source), name)
                yield Output(name, fewer, (read,), Whole(lambda rows: rows.index_select(0, chosen)))
            else:
                yield sources.take(self.source, name, name)

    def _kept(self, total: int) -> list[int]:
        missing = [number for number in self.removed if number >= total]
        if missing:
            raise RecipeError(f"remove_experts: there is no expert {missing[0]}, the mixture has 0 to {total - 1}")
        kept = [number for number in range(total) if number not in self.removed]
        if not kept or self.top_k > len(kept):
            raise RecipeError(
                f"remove_experts: {len(kept)} of {counted(total, 'expert')} would be left, wanted at least "
                f"{max(1, self.top_k)}"
            )
        return kept

    def reconfigure(self, config: Mapping[str, Any], clients: int | None) -> dict[str, Any]:
        """The config with fewer experts.

        Raises:
            RecipeError: if it is no mixture's, or a token is given to more experts than would be left.
        """
        found = [key for key in EXPERTS if key in config]
        if not found:
            raise RecipeError(f"remove_experts: the config of family '{config.get('model_type')}' names no experts")
        kept = self._kept(config[found[0]])
        top_k = self.top_k or config[TOP_K]
        if top_k > len(kept):
            raise RecipeError(
                f"remove_experts: a token is given to {counted(top_k, 'expert')} and {len(kept)} would be left; "
                "set top_k lower"
            )
        return {**config, **dict.fromkeys(found, len(kept)), TOP_K: top_k}


def _is_fused(name: str) -> bool:
    """Whether all experts are one tensor (E, ...), as transformers has them in memory."""
    return bool(re.search(r"experts\.(gate_up_proj|down_proj)$", name))
