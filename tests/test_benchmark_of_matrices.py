"""The benchmark of the methods that work on matrices, on small ones."""

import pytest

from benchmarks import matrices


def test_every_method_has_a_row_and_the_last_column_is_the_ratio():
    found = matrices.table([(40, 30)], clients=2, repeats=1)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines() if line.startswith("| 40")]
    assert [row[1] for row in rows] == ["`tsv_m`", "`iso_c`", "`iso_cts`", "`svc`", "`wudi`", "`regmean`"]
    assert [row[4] for row in rows] == ["2", "1", "3", "1", "1", "1"]
    assert all(float(row[7]) > 0 for row in rows)


def test_counts_of_operations_by_hand():
    assert matrices.svd_operations(3, 2) == matrices.svd_operations(2, 3) == 14 * 3 * 4 + 8 * 8
    # two clients, 3 x 2: products with 2 x 2 Gram matrices, a Cholesky factor, a solve
    assert matrices.operations("regmean", 3, 2, 2) == pytest.approx(2 * 24 + 8 / 3 + 24)
