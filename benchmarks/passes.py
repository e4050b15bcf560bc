"""What the compiled passes take alone: one thread, inputs in memory, eight clients.

    python -m benchmarks.passes [--elements N] [--dtype bfloat16] [--repeats 5] [--row 944] [--only TEXT ...]

Processor time, the shortest of the repeats, in nanoseconds per element of the merged tensor (an element
of all clients). "read" sums up every byte of the inputs, as the floor of `benchmarks.engine` does.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.data import BASE_SPREAD, CLIENT_SPREAD
from benchmarks.matrices import seconds
from fl_merge import kernels
from fl_merge.cutoffs import Part, largest_cutoffs
from fl_merge.execute import PIECE_ELEMENTS
from fl_merge.kernels.passes import Inputs
from fl_merge.kernels.rows import Rows, combine_balanced, kept_squares, largest_of_products
from fl_merge.ops.gram import BLOCK
from fl_merge.ops.scores import scales as scales_of
from fl_merge.ops.sparsify import rank_line

CLIENTS, DENSITY, VARYING, EPSILON = 8, 0.2, 0.1, 0.2


def works(elements: int, dtype: torch.dtype, row: int) -> dict[str, Callable[[], object]]:
    """Each pass over one tensor, by its name."""
    module = kernels.load()
    if module is None:
        raise SystemExit("the compiled passes cannot be loaded")
    draw = torch.Generator().manual_seed(0)
    base_S = (torch.randn(elements, generator=draw) * BASE_SPREAD).to(dtype)
    clients = [
        (base_S.float() + torch.randn(elements, generator=draw) * CLIENT_SPREAD).to(dtype) for _ in range(CLIENTS)
    ]
    native, out_S = Inputs(module, base_S, clients), torch.empty_like(base_S)
    words = [
        tensor_S.view(torch.uint8).numpy()[: elements * dtype.itemsize // 8 * 8] for tensor_S in (base_S, *clients)
    ]
    weights_N = torch.full((CLIENTS,), 1 / CLIENTS, dtype=torch.float64)
    gram_XNN = torch.empty(math.ceil(elements / BLOCK), CLIENTS, CLIENTS, dtype=torch.float64)
    wanted = [(client, int(DENSITY * elements)) for client in range(CLIENTS)]

    def cuts(rows: Rows, wanted: list[tuple[int, int]]) -> torch.Tensor:
        return largest_cutoffs([Part(rows, 0)], wanted, map, PIECE_ELEMENTS)

    deltas, variance, varying = Rows(native), Rows(native, "variance"), [(0, int(VARYING * elements))]
    cutoffs_N2, varying_2 = cuts(deltas, wanted), cuts(variance, varying).reshape(-1)
    largest_K = largest_of_products(native, 0, elements)
    scales = scales_of(*largest_K.reshape(2, -1), torch.float32)
    balance = Rows(native, "balance", scales)
    balance_N2 = cuts(balance, wanted)
    chances = {"keys_N": range(CLIENTS), "density_N": [0.5] * CLIENTS}

    ranks = {
        "row": row,
        "lines_N2": [rank_line(0.5, EPSILON, row)] * CLIENTS,
        "keys_N": range(CLIENTS),
        "divisor_N": None,
    }

    def pieces(step: int) -> list[tuple[int, int]]:
        return [(start, min(start + step, elements)) for start in range(0, elements, step)]

    def merged(**settings: object) -> None:
        for start, stop in pieces(PIECE_ELEMENTS):
            native.prune_combine(weights_N, start=start, stop=stop, out_S=out_S[start:stop], **settings)

    def summed() -> None:
        for start, stop in pieces(PIECE_ELEMENTS):
            native.weighted_sum(1.0, weights_N.tolist(), start, stop, out_S[start:stop])

    def ranked(**settings: object) -> None:
        for start, stop in pieces(PIECE_ELEMENTS // row * row):
            stop -= (stop - start) % row
            native.rank_combine(weights_N, start=start, stop=stop, out_S=out_S[start:stop], **ranks, **settings)

    return {
        "read": lambda: [np.add.reduce(word.view(np.int64)) for word in words],
        "weighted sum": summed,
        "Gram matrix": lambda: native.gram("deltas", 0, elements, gram_XNN),
        "cuts (ties)": lambda: cuts(deltas, wanted),
        "merge (ties)": lambda: merged(cutoffs_N2=cutoffs_N2, election="total"),
        "merge (dare_ties)": lambda: merged(election="total", factor_N=[2.0] * CLIENTS, **chances),
        "merge (della_linear)": ranked,
        "merge (della)": lambda: ranked(election="total"),
        "cut (sce)": lambda: cuts(variance, varying),
        "squares (sce)": lambda: kept_squares(native, varying_2, 0, elements),
        "merge (sce)": lambda: merged(varying_2=varying_2, election="sum"),
        "largest (pcb)": lambda: largest_of_products(native, 0, elements),
        "cuts (pcb)": lambda: cuts(balance, wanted),
        "merge (pcb)": lambda: combine_balanced(native, scales, balance_N2, 1.0, 0, elements, out_S),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2_000_000, help="of the tensor (default: 2 million)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="passes whose names contain this")
    parser.add_argument("--row", type=int, default=944, help="elements of a row, for ranks (default: 944)")
    found = parser.parse_args()
    torch.set_num_threads(1)
    print("| pass | ns an element |\n|---|---:|")
    for name, work in works(found.elements, getattr(torch, found.dtype), found.row).items():
        if not any(text in name for text in found.only):
            continue
        print(f"| {name} | {seconds(work, found.repeats) / found.elements * 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
