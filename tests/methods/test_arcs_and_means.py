"""NuSLERP, Karcher mean, MultiSLERP, Model Stock: what their options do to tensors. The formulas are in tests/ops."""

import math

import pytest
import torch

from fl_merge import merge
from fl_merge.methods import karcher, model_stock, multislerp, nuslerp, slerp, weighted_average

F64 = torch.float64


def model(values):
    return {"w": torch.as_tensor(values, dtype=F64)}


def models(*shape, count=3, common=1.0, seed=0):
    """A base and clients whose deltas have a common part."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw, dtype=F64)
    shared = common * torch.randn(shape, generator=draw, dtype=F64)
    return model(base), [model(base + shared + torch.randn(shape, generator=draw, dtype=F64)) for _ in range(count)]


def test_nuslerp_of_deltas_is_slerp_of_deltas():
    base, clients = models(6, 5)
    ours, theirs = (merge(method, base, clients, [1, 2, 3])["w"] for method in (nuslerp(), slerp(on="deltas")))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    ours, theirs = (merge(method, base, clients)["w"] for method in (nuslerp(on="weights"), slerp()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_nuslerp_takes_an_arc_where_slerp_takes_a_line():
    """An angle of 1 degree, cosine 0.99985: the arc half way is longer than the chord by 1 / cos(0.5 degrees)."""
    turned = math.radians(1.0)
    clients = [model([1.0, 0.0]), model([math.cos(turned), math.sin(turned)])]
    found = [merge(method, model([0.0, 0.0]), clients)["w"].norm() for method in (nuslerp(), slerp(on="deltas"))]
    assert [float(length) for length in found] == pytest.approx([1.0, math.cos(turned / 2)], abs=1e-12)


def test_nuslerp_by_rows_and_by_columns_by_hand():
    """Row 0 turns by a right angle, row 1 does not turn; columns turn by an angle whose cosine is 1 / sqrt(2)."""
    base = model([[0.0, 0.0], [0.0, 0.0]])
    clients = [model([[2.0, 0.0], [1.0, 1.0]]), model([[0.0, 2.0], [1.0, 1.0]])]
    by_rows = merge(nuslerp(vectors="rows"), base, clients)["w"]
    assert by_rows[0].tolist() == pytest.approx([math.sqrt(2)] * 2)
    assert by_rows[1].tolist() == [1.0, 1.0]
    # columns (2, 1) and (0, 1), (0, 1) and (2, 1): cosine 1 / sqrt(5), half way the sum over 2 cos(W / 2)
    half = math.cos(math.acos(1 / math.sqrt(5)) / 2)
    by_columns = merge(nuslerp(vectors="columns"), base, clients)["w"]
    assert by_columns.flatten().tolist() == pytest.approx([1 / half] * 4)


@pytest.mark.parametrize("on", ["deltas", "weights"])
@pytest.mark.parametrize("lengths", ["arc", "linear"])
@pytest.mark.parametrize("shape", [(700, 300), (3, 90_000), (90_000, 3), (40, 30, 5, 5), (2, 7), (9,), ()])
def test_each_row_or_column_is_merged_for_itself(shape, on, lengths):
    """Tensors that are gone through in several parts, by parts of any size, give what their rows and columns give."""
    base, clients = models(*shape)
    some = [0, -1] if len(shape) > 1 else [...]
    for vectors in ("rows", "columns"):
        method = nuslerp(vectors=vectors, on=on, lengths=lengths)
        found = merge(method, base, clients, [1, 2, 3])["w"]
        again = merge(method, base, clients, [1, 2, 3], slice_elements=16384, threads=3)["w"]
        assert torch.equal(found, again)
        for index in some:

            def vector(tensor, vectors=vectors, index=index):
                if tensor.ndim < 2:
                    return tensor
                return tensor.flatten(0, -2)[index] if vectors == "rows" else tensor.flatten(1)[:, index]

            alone = [model(vector(client["w"])) for client in clients]
            wanted = merge(nuslerp(on=on, lengths=lengths), model(vector(base["w"])), alone, [1, 2, 3])["w"]
            torch.testing.assert_close(vector(found), wanted, rtol=0, atol=1e-12)


def test_linear_lengths():
    """Half way between (1, 0) and (0, 3) in direction, of length 2; by the plain formula (1, 3) / sqrt(2)."""
    base, clients = model([0.0, 0.0]), [model([1.0, 0.0]), model([0.0, 3.0])]
    assert merge(nuslerp(lengths="linear"), base, clients)["w"].tolist() == pytest.approx([math.sqrt(2)] * 2)
    assert merge(nuslerp(), base, clients)["w"].tolist() == pytest.approx([math.sqrt(0.5), 3 * math.sqrt(0.5)])


@pytest.mark.parametrize("method", [karcher(), multislerp(on="weights")])
def test_means_of_weights_keep_the_length_and_forget_the_base(method):
    base, clients = models(30, 20)
    found = merge(method, base, clients, [1, 2, 5])["w"]
    lengths = [float(client["w"].norm()) for client in clients]
    assert float(found.norm()) == pytest.approx(sum(w * n for w, n in zip([1, 2, 5], lengths, strict=True)) / 8)
    average = merge(weighted_average(), base, clients, [1, 2, 5])["w"]
    assert float(average.norm()) < 0.95 * float(found.norm())
    torch.testing.assert_close(merge(method, clients[0], clients, [1, 2, 5])["w"], found, rtol=0, atol=1e-13)


def test_the_order_of_clients_matters_to_folded_arcs_and_not_to_the_mean():
    base, clients = models(6, 5)
    turned = clients[::-1]
    for method, near in ((karcher(), True), (multislerp(), True), (nuslerp(), False)):
        apart = float((merge(method, base, clients)["w"] - merge(method, base, turned)["w"]).norm())
        assert (apart < 1e-12) == near, (method, apart)


def test_model_stock_goes_t_of_the_way_to_the_equal_mean():
    base, clients = models(30, 20)
    deltas = [(client["w"] - base["w"]).flatten() for client in clients]
    cosines = [torch.nn.functional.cosine_similarity(deltas[i], deltas[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    c = float(sum(cosines)) / 3
    mean = merge(weighted_average(), base, clients)["w"]
    wanted = base["w"] + 3 * c / (1 + 2 * c) * (mean - base["w"])
    torch.testing.assert_close(merge(model_stock(), base, clients, [1, 7, 2])["w"], wanted, rtol=0, atol=1e-13)


def test_model_stock_by_filters_has_a_ratio_for_each_row():
    """Row 0: the same delta twice. Row 1: at a right angle. Row 2: opposite, where an unclamped t would be infinite."""
    base = model(torch.zeros(3, 2))
    clients = [model([[1.0, 2.0], [1.0, 0.0], [1.0, 1.0]]), model([[1.0, 2.0], [0.0, 1.0], [-1.0, -1.0]])]
    assert merge(model_stock(filter_wise=True), base, clients)["w"].tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]


def test_model_stock_at_negative_cosine_stays_at_the_base():
    """mergekit's formula, t not clamped: N c / (1 + (N - 1) c) of cosine -0.6 is -3, away from both clients."""
    base, clients = model([1.0, 1.0]), [model([2.0, 1.0]), model([0.4, 1.8])]
    deltas = [client["w"] - base["w"] for client in clients]
    c = float(deltas[0] @ deltas[1] / deltas[0].norm() / deltas[1].norm())
    assert 2 * c / (1 + c) == pytest.approx(-3.0)
    assert torch.equal(merge(model_stock(), base, clients)["w"], base["w"])


def test_model_stock_does_not_depend_on_the_size_of_the_deltas():
    """Deltas of 1e-4: a floor of 1e-6 under the product of their norms would make them look nearly orthogonal."""
    base, clients = models(30, 20)
    small = [model(base["w"] + 1e-5 * (client["w"] - base["w"])) for client in clients]
    large, little = (merge(model_stock(), base, each)["w"] - base["w"] for each in (clients, small))
    assert float((little * 1e5 - large).norm() / large.norm()) < 1e-9
