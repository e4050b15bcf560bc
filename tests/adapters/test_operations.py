"""What each operation promises, on factors alone."""

import itertools
import math

import pytest
import torch
from random_adapters import PREFIX, SIZES, adapter, combined, config, distance, of_adapter, products, tensors

from fl_merge import MergeError, RecipeError, UpdateError, build, merge
from fl_merge.adapters import Adapter, merge_adapters
from fl_merge.ops.lowrank import Factors, compress, gram, inner, kept_rank, knots_basis, norm, stack, tail_norms

MODULES = [PREFIX + module for module in SIZES]


def three(dtype=torch.float32):
    return [
        adapter("a", 1, rank=4, alpha=16, dtype=dtype),
        adapter("b", 2, rank=8, alpha=8, dtype=dtype),
        adapter("c", 3, rank=5, alpha=1, dtype=dtype, use_rslora=True),
    ]


SHARES = [0.5, 0.3, 0.2]


def test_stacking_adds_up_ranks_and_is_the_exact_sum():
    merged = merge_adapters("lora_stack", three(), [5, 3, 2])
    assert distance(products(merged.tensors), combined(three(), SHARES)) < 1e-6
    assert {len(t) for name, t in merged.tensors.items() if "lora_A" in name} == {17}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_the_full_rank_product_is_the_exact_sum(dtype, tolerance):
    merged = merge_adapters(build("lora_svd", rank=17), three(dtype), [5, 3, 2])
    assert distance(products(merged.tensors), combined(three(dtype), SHARES)) < tolerance
    assert merged.error == 0.0


@pytest.mark.parametrize("rank", [1, 3, 9, 16])
def test_the_truncation_error_is_that_of_eckart_and_young_and_as_reported(rank):
    merged = merge_adapters(build("lora_svd", rank=rank), three(torch.float64), [5, 3, 2])
    dense = combined(three(torch.float64), SHARES)
    found = products(merged.tensors)
    for module, product in dense.items():
        best = float(torch.linalg.svdvals(product)[rank:].square().sum().sqrt())
        error = float((found[module] - product).norm())
        assert error == pytest.approx(best, rel=1e-6)
        assert merged.manifest["modules"][module]["error"] == pytest.approx(best, rel=1e-6)
    assert merged.error == pytest.approx(distance(found, dense), rel=1e-6)
    assert any("cut off" in note for note in merged.notes)


def test_energy_and_tolerance_keep_the_fewest_that_suffice():
    dense = combined(three(), SHARES)
    for share in (0.5, 0.9, 0.99):
        merged = merge_adapters(build("lora_svd", energy=share), three(), [5, 3, 2])
        within = merge_adapters(build("lora_svd", tolerance=math.sqrt(1 - share)), three(), [5, 3, 2])
        for module, product in dense.items():
            squares = torch.linalg.svdvals(product).square()
            wanted = int((squares.cumsum(0) < share * squares.sum()).sum()) + 1
            assert len(merged.tensors[module + ".lora_A.weight"]) == wanted
            assert len(within.tensors[module + ".lora_A.weight"]) == wanted
    both = merge_adapters(build("lora_svd", energy=0.99, rank=2), three())
    assert {len(t) for name, t in both.tensors.items() if "lora_A" in name} == {2}


def test_a_worked_example_on_paper():
    """Two rank-1 products, 3 e1 e1^T and 4 e2 e2^T with equal weights: singular values 2 and 1.5."""
    one = Factors(torch.tensor([[3.0], [0.0]]).double(), torch.tensor([[1.0, 0.0, 0.0]]).double())
    two = Factors(torch.tensor([[0.0], [4.0]]).double(), torch.tensor([[0.0, 1.0, 0.0]]).double())
    whole = stack([one, two], [0.5, 0.5])
    assert (whole.b_OR @ whole.a_RI).tolist() == [[1.5, 0.0, 0.0], [0.0, 2.0, 0.0]]
    best = compress(whole, 1)
    torch.testing.assert_close(best.factors.b_OR @ best.factors.a_RI, torch.tensor([[0, 0, 0], [0, 2, 0]]).double())
    assert (best.error, best.norm) == (pytest.approx(1.5), pytest.approx(2.5))
    assert float(best.factors.b_OR[1, 0]) == pytest.approx(math.sqrt(2))
    assert float(inner(one, two)) == 0.0
    assert gram([one, two]).tolist() == [[9.0, 0.0], [0.0, 16.0]]
    assert norm(whole) == pytest.approx(2.5)
    values = torch.tensor([2.0, 1.5]).double()
    assert tail_norms(values).tolist() == [2.5, 1.5, 0.0]
    assert [kept_rank(values, energy=e) for e in (0.6, 0.64, 0.65, 1.0)] == [1, 1, 2, 2]
    assert [kept_rank(values, tolerance=t) for t in (0.61, 0.6, 0.59, 0.0)] == [1, 1, 2, 2]


def test_zeros_merge_to_zeros():
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors(1).items()}
    for name in ("lora_stack", "lora_svd", "lora_factor_mean", "lora_residual", "lora_zero_pad", "lora_merge"):
        merged = merge_adapters(name, [Adapter.of(str(i), config(), zeros) for i in range(2)])
        assert all(not t.any() for t in merged.tensors.values())
        assert merged.error == 0.0


def test_the_residual_makes_the_factor_mean_exact():
    adapters = [adapter(str(seed), seed) for seed in (1, 2, 3, 4)]
    merged = merge_adapters("lora_residual", adapters)
    mean = products(merge_adapters("lora_factor_mean", adapters).tensors)
    assert distance(products(merged.tensors), mean) == 0.0
    rest = products(merged.residual)
    exact = combined(adapters, [0.25] * 4)
    assert distance({name: mean[name] + rest[name] for name in mean}, exact) < 1e-6
    assert {len(t) for name, t in merged.residual.items() if "lora_A" in name} == {3 * 4}
    short = merge_adapters(build("lora_residual", max_rank=2), adapters)
    assert {len(t) for name, t in short.residual.items() if "lora_A" in name} == {2}
    assert 0 < short.error < 1


def test_freezing_one_factor_makes_the_mean_exact():
    """FFA-LoRA: with one A for all, the mean of the B is the mean of the products."""
    shared = tensors(0)
    clients = []
    for seed in (1, 2, 3):
        own = tensors(seed)
        clients.append(Adapter.of(str(seed), config(), {n: shared[n] if "lora_A" in n else own[n] for n in own}))
    merged = merge_adapters(build("lora_factor_mean", share="B"), clients, [1, 2, 1])
    assert distance(products(merged.tensors), combined(clients, [0.25, 0.5, 0.25])) < 1e-6
    with pytest.raises(MergeError, match="A was to stay frozen, and it differs between client '1' and client '2'"):
        merge_adapters(build("lora_factor_mean", share="B"), [adapter("1", 1), adapter("2", 2)])


def test_zero_padding_averages_what_only_some_have_with_zeros():
    small, large = adapter("a", 1, rank=2), adapter("b", 2, rank=4)
    merged = merge_adapters("lora_zero_pad", [small, large])
    name = MODULES[0] + ".lora_A.weight"
    want = torch.cat([small.plain.read(name), torch.zeros(2, 30)]) / 2 + large.plain.read(name) / 2
    torch.testing.assert_close(merged.tensors[name], want)


def merged_dense(method, adapters, weights, **settings):
    """A method for models on the multiplied-out products, by the ordinary engine; the base is zero."""
    models = [{name: product.float() for name, product in of_adapter(each).items()} for each in adapters]
    base = {name: torch.zeros_like(tensor) for name, tensor in models[0].items()}
    return merge(build(method, **settings), base, models, weights)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("ties", {"density": 0.3}), ("ties", {}), ("fedgma", {}), ("slerp", {"on": "deltas"}), ("task_arithmetic", {})],
)
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_a_method_on_blocks_of_products_is_that_on_dense_ones(monkeypatch, method, settings, block):
    monkeypatch.setattr("fl_merge.on_products.MADE_AT_ONCE", block)
    adapters = [adapter(str(seed), seed) for seed in (1, 2, 3)]
    wanted = merged_dense(method, adapters, [3, 1, 2], **settings)
    one = build("lora_merge", method=method, settings=settings, rank=64)
    found = products(merge_adapters(one, adapters, [3, 1, 2]).tensors)
    assert distance(found, {name: tensor.double() for name, tensor in wanted.items()}) < 1e-6


@pytest.mark.parametrize(("method", "settings"), [("ties", {"density": 0.3}), ("fedgma", {}), ("slerp", {})])
def test_knots_from_factors_is_knots_from_dense_products(method, settings):
    adapters = [adapter(str(seed), seed) for seed in (1, 2, 3)]
    dense = [of_adapter(each) for each in adapters]
    wanted = {}
    for module in dense[0]:
        u, s, vt = torch.linalg.svd(torch.cat([each[module] for each in dense], dim=1), full_matrices=False)
        u, s, vt = u[:, :12], s[:12], vt[:12]
        parts = vt.split([each[module].shape[1] for each in dense], dim=1)
        models = [{"v": part.float()} for part in parts]
        v = merge(build(method, **settings), {"v": torch.zeros_like(models[0]["v"])}, models, [3, 1, 2])["v"]
        wanted[module] = u @ torch.diag(s) @ v.double()
    one = build("lora_merge", method=method, settings=settings, space="knots", rank=12)
    found = products(merge_adapters(one, adapters, [3, 1, 2]).tensors)
    assert distance(found, wanted) < 1e-5


def test_the_basis_of_knots_gives_each_product_back():
    parts = [Factors(torch.randn(20, r).double(), torch.randn(r, 15).double()) for r in (2, 3, 0)]
    left, right = knots_basis(parts)
    for part, each in zip(parts, right, strict=True):
        torch.testing.assert_close(left @ each, part.b_OR @ part.a_RI)


def test_spaces_agree_for_weighted_sums_and_differ_for_ties():
    adapters = [adapter(str(seed), seed) for seed in (1, 2, 3)]

    def run(method, space):
        return products(merge_adapters(build("lora_merge", method=method, space=space, rank=12), adapters).tensors)

    for one, other in itertools.combinations(("full", "knots", "core"), 2):
        assert distance(run("weighted_average", one), run("weighted_average", other)) < 1e-6
        assert distance(run("ties", one), run("ties", other)) > 0.01


def test_modules_to_save_are_averaged_over_those_that_have_them():
    head = f"{PREFIX}head.weight"
    one = {**tensors(1), head: torch.full((2, 2), 1.0)}
    two = {**tensors(2), head: torch.full((2, 2), 4.0)}
    adapters = [Adapter.of("a", config(modules_to_save=["head"]), one), Adapter.of("b", config(), two), adapter("c", 3)]
    merged = merge_adapters("lora_svd", adapters, [2, 1, 7])
    assert merged.tensors[head].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert any("head" in note and "'c'" in note for note in merged.notes)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora .DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"init_lora_weights": "corda"}, "'corda'"),
        ({"init_lora_weights": "loftq"}, "'loftq'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "LOHA"}, "type 'LOHA', wanted LORA"),
        ({"r": 0}, "wanted a whole number >= 1"),
        ({"lora_alpha": math.nan}, "wanted a number"),
    ],
)
def test_what_is_no_product_is_refused_by_name(settings, message):
    with pytest.raises(RecipeError, match=f"^adapter 'x': .*{message}"):
        adapter("x", 1, **settings)


def test_initialisations_that_leave_the_base_alone_are_taken():
    for init in (True, False, "gaussian", "eva", "orthogonal"):
        adapter("x", 1, init_lora_weights=init)


def broken(change):
    given = tensors(1)
    change(given)
    return given


Q_A, Q_B = f"{PREFIX}layers.0.q.lora_A.weight", f"{PREFIX}layers.0.q.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({Q_B: torch.zeros(40, 1)}), "has rank 4 and B .40, 1. rank 1.*not broadcast"),
        (lambda t: t.update({Q_A: torch.zeros(2, 30), Q_B: torch.zeros(40, 2)}), "rank 2, the configuration has 4"),
        (lambda t: t.pop(Q_B), "has no .*lora_B.weight' beside it"),
        (lambda t: t.update({f"{PREFIX}layers.0.q.lora_magnitude_vector": torch.zeros(40)}), "cannot be merged"),
        (lambda t: t.update({Q_A: torch.zeros(4, 30, dtype=torch.int8)}), "wanted floating"),
        (lambda t: t.clear(), "wanted a LoRA adapter"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, message):
    with pytest.raises(UpdateError, match=message):
        Adapter.of("x", config(), broken(change))


def test_other_shapes_values_weights_and_alphas_are_refused():
    good = adapter("a", 1)
    other = adapter("b", 2, sizes={**SIZES, "layers.0.q": (41, 30)})
    with pytest.raises(
        MergeError, match=r"client 'b', module '.*layers.0.q': a product of 41 x 30, the adapter's is 40"
    ):
        merge_adapters("lora_svd", [good, other])
    with pytest.raises(RecipeError, match="weights: found 1 of them, wanted one for each of the 2"):
        merge_adapters("lora_svd", [good, adapter("b", 2)], [1.0])
    for name in ("lora_factor_mean", "lora_residual"):
        with pytest.raises(MergeError, match=r"rank 4 at client 'a' and 8 at client 'b'"):
            merge_adapters(name, [good, adapter("b", 2, rank=8)])
        with pytest.raises(MergeError, match=r"by 2 at client 'a' and by 4 at client 'b'; one alpha"):
            merge_adapters(name, [good, adapter("b", 2, alpha=16)])
    bad = tensors(2)
    bad[Q_A][0, 0] = math.nan
    with pytest.raises(UpdateError, match=r"client 'b', tensor .*lora_A"):
        merge_adapters("lora_svd", [good, Adapter.of("b", config(), bad)])
    with pytest.raises(RecipeError, match="'b': fan_in_fan_out is True, 'a' has None"):
        merge_adapters("lora_svd", [good, adapter("b", 2, fan_in_fan_out=True)])
    with pytest.raises(RecipeError, match="a method for models; wanted one for adapters"):
        merge_adapters("ties", [good])
    with pytest.raises(RecipeError, match=r"lora_svd.* merges LoRA adapters, whose scalings are not"):
        merge("lora_svd", {"w": torch.zeros(2, 2)}, [{"w": torch.zeros(2, 2)}])


def test_lora_merge_refuses_what_cannot_run_on_products():
    with pytest.raises(
        RecipeError, match="parameter 'method' of lora_merge: unknown merge method 'tise'; did you mean"
    ):
        build("lora_merge", method="tise")
    with pytest.raises(RecipeError, match="parameter 'method' of lora_merge: ties has no parameter 'densty'"):
        build("lora_merge", settings={"densty": 0.2})
    with pytest.raises(RecipeError, match="wanted a method for models"):
        build("lora_merge", method="lora_svd")
    with pytest.raises(RecipeError, match="surveys the whole model"):
        merge_adapters(build("lora_merge", settings={"scope": "model"}), [adapter("a", 1), adapter("b", 2)])
