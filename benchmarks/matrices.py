"""How fast the methods that work on matrices are, beside a plain singular value decomposition of the same matrices.

    python -m benchmarks.matrices [--sizes 512x512,2048x512] [--clients 8] [--repeats 3] [--markdown FILE]

One thread, as the executor runs each matrix; times are processor time, so that other work on the machine hardly shows,
the shortest of the repeats.
GFLOP/s are operations of the definition by seconds, by the usual counts: 14 m n^2 + 8 n^3 for a singular value
decomposition of (m, n) with m >= n, 2 m n k for a product, n^3 / 3 for a Cholesky factor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fl_merge import build
from fl_merge.naming import GramLayout
from fl_merge.ops.evidence import Evidence, regression_mean

SIZES = "256x256,512x512,1024x256,256x1024"


def svd_operations(rows: int, columns: int) -> float:
    """Of a thin singular value decomposition with vectors (Golub & Van Loan)."""
    m, n = max(rows, columns), min(rows, columns)
    return 14.0 * m * n**2 + 8.0 * n**3


def operations(name: str, rows: int, columns: int, clients: int) -> float:
    """Of a method's definition."""
    small, product = min(rows, columns), 2.0 * rows * columns
    svd = svd_operations(rows, columns)
    solved = clients * product * columns + columns**3 / 3 + product * columns
    return {
        "tsv_m": clients * svd + svd_operations(rows, small) + svd_operations(columns, small) + product * small,
        "iso_c": svd + product * small,
        "iso_cts": (clients + 1) * svd + svd_operations(rows, small) + svd_operations(columns, small) + product * small,
        "svc": svd + (clients + 2) * product * small,
        "wudi": clients * product * columns + solved,
        "regmean": solved,
    }[name]


def decompositions(name: str, clients: int) -> int:
    """How many plain decompositions a method is put beside: as many as its definition has, one where it has none."""
    return {"tsv_m": clients, "iso_cts": clients + 1}.get(name, 1)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The shortest of so many runs, after one that does not count."""
    work()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def work_of(name: str, deltas_NRC: Tensor) -> Callable[[], Tensor]:
    """One merge of these deltas, nothing of reading or writing in it."""
    clients, rows, columns = deltas_NRC.shape
    if name == "regmean":
        base = (torch.zeros(rows, columns),)
        inputs = torch.randn(clients, 256, columns)
        sent = [
            Evidence(1 / clients, 1 / (256 * clients), x.T @ x, (delta,), base)
            for x, delta in zip(inputs, deltas_NRC, strict=True)
        ]
        layout = GramLayout(1, columns, constant=False)
        return lambda: regression_mean(sent, layout, 0.9, 0.01)
    merged = build(name).shape.merge  # type: ignore[attr-defined]  # these methods are of the shape Matrix
    weights_N = torch.full((clients,), 1 / clients, dtype=torch.float64)
    return lambda: merged(deltas_NRC, weights_N)


def table(sizes: list[tuple[int, int]], clients: int, repeats: int) -> str:
    """The measurements as Markdown."""
    lines = [
        f"{clients} clients, float32, one thread, shortest of {repeats}; torch {torch.__version__}",
        "",
        "| matrix | method | seconds | GFLOP/s | plain SVDs | seconds | GFLOP/s | method / SVDs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rows, columns in sizes:
        torch.manual_seed(rows + columns)
        deltas_NRC = torch.randn(clients, rows, columns)
        one = seconds(lambda deltas=deltas_NRC: torch.linalg.svd(deltas[0], full_matrices=False), repeats)
        for name in ("tsv_m", "iso_c", "iso_cts", "svc", "wudi", "regmean"):
            count = decompositions(name, clients)
            taken = seconds(work_of(name, deltas_NRC), repeats)
            rate = operations(name, rows, columns, clients) / taken / 1e9
            plain = svd_operations(rows, columns) / one / 1e9
            ours, theirs = f"{taken:.3f} | {rate:.1f}", f"{count * one:.3f} | {plain:.1f}"
            lines.append(
                f"| {rows} x {columns} | `{name}` | {ours} | {count} | {theirs} | {taken / (count * one):.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default=SIZES, help="rows x columns, joined with commas")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [(int(size.partition("x")[0]), int(size.partition("x")[2])) for size in options.sizes.split(",")]
    found = table(sizes, options.clients, options.repeats)
    print(found, end="")
    if options.markdown is not None:
        options.markdown.write_text(found)


if __name__ == "__main__":
    main()
