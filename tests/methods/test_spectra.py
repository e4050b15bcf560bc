"""TSV-M, Iso-C, Iso-CTS, WUDI, SVC: as methods, with what the battery cannot ask of them."""

import pytest
import torch

from fl_merge import build, merge
from fl_merge.ops.spectral import isotropic, merge_triplets, top_triplets, triplets_each

NAMES = ["tsv_m", "iso_c", "iso_cts", "wudi", "svc"]


def models(generator, count=3, shape=(24, 18), dtype=torch.float64):
    base = {"w": torch.randn(shape, generator=generator).to(dtype), "b": torch.randn(5, generator=generator).to(dtype)}
    clients = [
        {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in base.items()}
        for _ in range(count)
    ]
    return base, clients


def deltas_of(base, clients, name="w"):
    return torch.stack([client[name] - base[name] for client in clients])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tsv_from_factors_that_clients_truncated_is_the_servers_own(dtype, generator):
    base, clients = models(generator, dtype=dtype)
    count = triplets_each(24, 18, len(clients))
    sent = [top_triplets(delta, count) for delta in deltas_of(base, clients)]
    assert sum(factor.numel() for factor in sent[0]) == count * (24 + 18 + 1)
    found, wanted = merge("tsv_m", base, clients)["w"], base["w"] + merge_triplets(sent)
    assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-13 if dtype == torch.float64 else 3e-7)


@pytest.mark.parametrize("name", ["tsv_m", "wudi", "svc"])
def test_one_client_is_that_client_to_rounding(name, generator):
    base, (client,) = models(generator, count=1)
    assert torch.allclose(merge(name, base, [client])["w"], client["w"], rtol=0, atol=1e-14)


def test_iso_of_one_client_is_not_that_client(generator):
    base, (client,) = models(generator, count=1)
    for name in ("iso_c", "iso_cts"):
        assert not torch.allclose(merge(name, base, [client])["w"], client["w"], atol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_matrix_is_averaged(name, generator):
    base, clients = models(generator)
    found = merge(name, base, clients, [1, 2, 5])["b"]
    assert torch.equal(found, merge("weighted_average", base, clients, [1, 2, 5])["b"])


@pytest.mark.parametrize("name", NAMES)
def test_a_convolution_is_taken_as_out_by_rest(name, generator):
    base, clients = models(generator, shape=(8, 3, 3, 2))
    flat = [{name: tensor.reshape(len(tensor), -1) for name, tensor in m.items()} for m in (base, *clients)]
    assert torch.equal(merge(name, base, clients)["w"].reshape(8, 18), merge(name, flat[0], flat[1:])["w"])


@pytest.mark.parametrize("name", NAMES)
def test_scale_multiplies_and_shares_count_when_asked(name, generator):
    base, clients = models(generator)

    def delta(weights=None, **settings):
        return merge(build(name, **settings), base, clients, weights)["w"] - base["w"]

    assert torch.allclose(delta(scale=0.5), 0.5 * delta(), rtol=0, atol=1e-13)
    assert torch.equal(delta(), delta([1, 2, 5]))
    assert torch.allclose(delta([2, 2, 2], weighted=True), delta(), rtol=0, atol=1e-12)
    assert not torch.allclose(delta([1, 2, 5], weighted=True), delta(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 30), (30, 2), (1, 7), (7, 1)])
def test_more_clients_than_rows_or_columns(name, shape, generator):
    base, clients = models(generator, count=5, shape=shape)
    found = merge(name, base, clients)["w"]
    assert found.isfinite().all()
    assert float((found - base["w"]).norm()) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_did_not_move_and_deltas_of_low_rank(name, generator):
    """As after a few steps of training: most directions of the deltas are nothing but rounding."""
    base, _ = models(generator, dtype=torch.float32)
    low = [torch.randn(24, 1, generator=generator) @ torch.randn(1, 18, generator=generator) for _ in range(2)]
    clients = [{**base, "w": base["w"] + 0.1 * delta} for delta in low] + [base]
    found = merge(name, base, clients)["w"] - base["w"]
    values = torch.linalg.svdvals(found.double())
    assert values[1] > 0.02
    assert values[2] < 1e-4, "directions that no client has were raised"


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_torch_threads_does_not_show(name, generator):
    base, clients = models(generator, shape=(300, 260), dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(merge(name, base, clients, threads=threads)["w"])
        assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


def test_iso_c_needs_the_sum_of_the_deltas_only(generator):
    base, clients = models(generator)
    total = deltas_of(base, clients).sum(dim=0)
    assert torch.allclose(merge("iso_c", base, clients)["w"], base["w"] + isotropic(total), rtol=0, atol=1e-13)


def test_wudi_needs_two_sums_over_clients_only(generator):
    base, clients = models(generator)
    sum_of_squares, sum_of_products = 0.0, 0.0
    for delta in deltas_of(base, clients):  # each client adds its own part to both, and nothing else is known of it
        square = delta.T @ delta / delta.square().sum()
        sum_of_squares, sum_of_products = sum_of_squares + square, sum_of_products + delta @ square
    wanted = base["w"] + torch.linalg.solve(sum_of_squares, sum_of_products, left=False)
    assert torch.allclose(merge(build("wudi", ridge=0.0), base, clients)["w"], wanted, rtol=0, atol=1e-8)
