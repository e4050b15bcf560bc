"""RegMean (Jin et al., 2023) and Fisher merging (Matena & Raffel, 2022), from statistics to the merged model."""

import pytest
import torch
from torch import nn

from fl_merge import MergeError, RecipeError, build, merge
from fl_merge.errors import StatisticsError
from fl_merge.method import partition, sends
from fl_merge.methods import fisher, regmean, weighted_average
from fl_merge.statistics import collect

F64 = torch.float64


def make(layers, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return layers().double()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def close(found, wanted, tolerance=1e-6):
    assert torch.allclose(found, wanted.to(found.dtype), rtol=0, atol=tolerance), float((found - wanted).abs().max())


def federation(layers, inputs):
    """A base, a model for each client, and what each computes of its inputs."""
    models = [make(layers, seed) for seed in range(1, len(inputs) + 1)]
    return (
        state(make(layers, 0)),
        [state(m) for m in models],
        [collect(m, [x]) for m, x in zip(models, inputs, strict=True)],
    )


def test_linear_regression_gives_the_pooled_least_squares_solution(generator):
    """Each client fits its own data exactly as it can; RegMean fits all clients' data at once."""
    inputs = [torch.randn(30 + 10 * k, 3, dtype=F64, generator=generator) for k in range(3)]
    targets = [torch.randn(len(x), 2, dtype=F64, generator=generator) for x in inputs]

    def fit(x, y):
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=F64)], dim=1), y).solution
        return {"weight": solution[:-1].T.contiguous(), "bias": solution[-1].contiguous()}

    clients = [fit(x, y) for x, y in zip(inputs, targets, strict=True)]
    base = {name: torch.zeros_like(tensor) for name, tensor in clients[0].items()}
    model = nn.Linear(3, 2).double()
    statistics = [collect(model, [x]) for x in inputs]
    sizes = [len(x) for x in inputs]
    found = merge(regmean(alpha=1.0, ridge=0.0), base, clients, sizes, statistics=statistics)
    pooled = fit(torch.cat(inputs), torch.cat(targets))
    close(found["weight"], pooled["weight"], 1e-5)  # the Gram matrices travel as float32
    close(found["bias"], pooled["bias"], 1e-5)
    # a part of the examples stands for all of them: twice the examples, twice the sum, the same model
    statistics[1] = {name: 2 * tensor for name, tensor in statistics[1].items()}
    again = merge(regmean(alpha=1.0, ridge=0.0), base, clients, sizes, statistics=statistics)
    close(again["weight"], found["weight"], 1e-12)


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.1, "ridge": 0.0}, {"alpha": 1.0, "ridge": 1.0}])
def test_equal_gram_matrices_give_the_average(settings, generator):
    inputs = torch.randn(20, 4, dtype=F64, generator=generator)
    base, clients, statistics = federation(lambda: nn.Linear(4, 3), [inputs] * 3)
    found = merge(regmean(**settings), base, clients, [1, 2, 5], statistics=statistics)
    wanted = merge(weighted_average(), base, clients, [1, 2, 5])
    for name in wanted:
        close(found[name], wanted[name], 1e-10)


def explicit(weights, rows, shares, alpha, ridge):
    """(sum W_i G_i + r sum w_i W_i) (sum G_i + r)^-1 with G_i = w_i / n_i X_i^T X_i, from the inputs themselves."""
    grams = [w / n * x.T @ x for w, (n, x) in zip(shares, rows, strict=True)]
    grams = [alpha * g + (1 - alpha) * torch.diag(g.diagonal()) for g in grams]
    total = sum(grams)
    r = ridge * total.diagonal().mean()
    right = sum(w @ g for w, g in zip(weights, grams, strict=True)) + r * sum(
        s * w for s, w in zip(shares, weights, strict=True)
    )
    return torch.linalg.solve(total + r * torch.eye(len(total), dtype=F64), right, left=False)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_with_its_bias_against_the_formula(bias, generator):
    inputs = [torch.randn(n, 4, dtype=F64, generator=generator) for n in (20, 7)]
    base, clients, statistics = federation(lambda: nn.Linear(4, 3, bias=bias), inputs)
    found = merge(regmean(alpha=0.9, ridge=0.05), base, clients, [20, 7], statistics=statistics)

    def joined(tensors):
        return torch.cat([tensors["weight"], tensors["bias"][:, None]], dim=1) if bias else tensors["weight"]

    rows = [(len(x), torch.cat([x, torch.ones(len(x), 1)], dim=1) if bias else x) for x in inputs]
    wanted = explicit([joined(client) for client in clients], rows, [20 / 27, 7 / 27], 0.9, 0.05)
    close(joined(found), wanted)


def test_a_convolution_of_two_groups_against_its_unfolded_inputs(generator):
    inputs = [torch.randn(n, 4, 6, 5, dtype=F64, generator=generator) for n in (6, 3)]
    base, clients, statistics = federation(lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), inputs)
    assert statistics[0]["gram/"].shape == (2, 19, 19)
    found = merge(regmean(ridge=0.02), base, clients, [6, 3], statistics=statistics)
    for group in range(2):
        outs, channels = slice(3 * group, 3 * group + 3), slice(2 * group, 2 * group + 2)
        rows = []
        for x in inputs:
            unfolded = nn.functional.unfold(x[:, channels], 3, padding=1).mT.reshape(-1, 18)
            rows.append((len(x), torch.cat([unfolded, torch.ones(len(unfolded), 1)], dim=1)))
        both = [torch.cat([c["weight"][outs].reshape(3, -1), c["bias"][outs, None]], dim=1) for c in clients]
        wanted = explicit(both, rows, [6 / 9, 3 / 9], 0.9, 0.02)
        close(found["weight"][outs].reshape(3, -1), wanted[:, :-1], 1e-5)
        close(found["bias"][outs], wanted[:, -1], 1e-5)


def test_an_embedding_by_its_token_counts():
    tokens = [torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 2, 2, 2]])]
    base, clients, statistics = federation(lambda: nn.Embedding(4, 2), tokens)
    found = merge(regmean(ridge=0.0), base, clients, statistics=statistics)["weight"]
    first, second = (client["weight"] for client in clients)
    close(found[0], 0.75 * first[0] + 0.25 * second[0], 1e-12)
    close(found[1], first[1], 1e-12)
    close(found[2], second[2], 1e-12)
    close(found[3], 0.5 * (first[3] + second[3]), 1e-12)


@pytest.mark.parametrize("settings", [{"ridge": 0.0, "alpha": 1.0}, {}])
def test_few_examples_and_dead_inputs_do_not_blow_up(settings, generator):
    """Two examples for forty inputs, of which some are always zero: the average where nobody says anything."""
    inputs = [torch.randn(2, 40, dtype=F64, generator=generator) for _ in range(3)]
    for x in inputs:
        x[:, :5] = 0.0
    base, clients, statistics = federation(lambda: nn.Linear(40, 3), inputs)
    found = merge(regmean(**settings), base, clients, statistics=statistics)
    average = merge(weighted_average(), base, clients)
    largest = max(float(client["weight"].abs().max()) for client in clients)
    assert float(found["weight"].abs().max()) < 10 * largest
    close(found["weight"][:, :5], average["weight"][:, :5], 1e-7)
    zeros = [{name: 0 * tensor + (name == "count") for name, tensor in each.items()} for each in statistics]
    nothing = merge(regmean(**settings), base, clients, statistics=zeros)
    close(nothing["weight"], average["weight"], 1e-12)


def test_fisher_by_hand_and_where_no_data_speak():
    base = {"w": torch.zeros(3, dtype=F64)}
    clients = [{"w": torch.tensor([1.0, 1.0, 1.0], dtype=F64)}, {"w": torch.tensor([3.0, 3.0, 3.0], dtype=F64)}]
    sent = [
        {"count": torch.tensor(10.0), "fisher/w": torch.tensor([30.0, 0.0, 0.0])},
        {"count": torch.tensor(2.0), "fisher/w": torch.tensor([2.0, 4.0, 0.0])},
    ]
    # means 3 and 1 in the first element: (3 * 1 + 1 * 3) / 4; the second is client 1's; the third the average
    found = merge(fisher(), base, clients, statistics=sent)["w"].tolist()
    assert found == pytest.approx([1.5, 3.0, 2.0], abs=1e-5)
    # shares of 1/4 and 3/4: (3/4 * 1 + 3/4 * 3) / (3/2), and 1/4 * 1 + 3/4 * 3
    assert merge(fisher(), base, clients, [1, 3], statistics=sent)["w"].tolist() == pytest.approx([2, 3, 2.5], abs=1e-5)


def test_both_need_sums_over_clients_only(generator):
    inputs = [torch.randn(n, 4, dtype=F64, generator=generator) for n in (20, 9, 13)]
    base, clients, statistics = federation(lambda: nn.Linear(4, 3, bias=False), inputs)
    sizes = [20, 9, 13]
    gram, product, models, moment, weighted = 0.0, 0.0, 0.0, 0.0, 0.0
    for client, sent, size in zip(clients, statistics, sizes, strict=True):  # each adds its part, nothing else is known
        part = size / sent["count"] * sent["gram/"].double()
        gram, product, models = gram + part, product + client["weight"] @ part, models + size * client["weight"]
        sent["fisher/weight"] = torch.rand(3, 4, generator=generator)
        information = size / sent["count"] * sent["fisher/weight"].double()
        moment, weighted = moment + information, weighted + information * client["weight"]
    ridge = 0.01 * gram.diagonal().mean()
    wanted = torch.linalg.solve(
        gram + ridge * torch.eye(4, dtype=F64), product + ridge * models / sum(sizes), left=False
    )
    only = [{name: tensor for name, tensor in sent.items() if "fisher" not in name} for sent in statistics]
    found = merge(regmean(alpha=1.0, ridge=0.01), base, clients, sizes, statistics=only)
    close(found["weight"], wanted, 1e-9)
    only = [{name: tensor for name, tensor in sent.items() if "gram" not in name} for sent in statistics]
    floor = 1e-6 * moment.mean()
    wanted = (weighted + floor * models / sum(sizes)) / (moment + floor)
    close(merge(fisher(), base, clients, sizes, statistics=only)["weight"], wanted, 1e-9)


def test_layers_without_statistics_are_averaged_and_named(generator):
    from fl_merge.execute import execute
    from fl_merge.store import MemorySink, MemorySource
    from fl_merge.types import Cohort, Update

    layers = lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))  # noqa: E731
    inputs = [torch.randn(9, 4, dtype=F64, generator=generator) for _ in range(2)]
    base, clients, statistics = federation(layers, inputs)
    updates = tuple(
        Update(str(i), 1.0, MemorySource(client), statistics=MemorySource(sent))
        for i, (client, sent) in enumerate(zip(clients, statistics, strict=True))
    )
    sink = MemorySink()
    report = execute(regmean(), Cohort(MemorySource(base), updates), sink)
    why = "weighted average, for want of statistics 'gram'"
    assert report.notes == {"1.weight": why, "1.bias": why}
    assert torch.equal(sink.tensors["1.weight"], merge("weighted_average", base, clients)["1.weight"])
    assert not torch.equal(sink.tensors["0.weight"], merge("weighted_average", base, clients)["0.weight"])


def test_rules_may_part_a_weight_from_its_bias(generator):
    inputs = [torch.randn(9, 4, dtype=F64, generator=generator) for _ in range(2)]
    base, clients, statistics = federation(lambda: nn.Linear(4, 3), inputs)
    method = partition([("bias", weighted_average())], otherwise=regmean())
    assert sends(method) == ("gram",)
    found = merge(method, base, clients, statistics=statistics)
    close(found["bias"], 0.5 * (clients[0]["bias"] + clients[1]["bias"]), 1e-12)
    # without the constant input, as for a layer that has no bias
    smaller = [{**sent, "gram/": sent["gram/"][:4, :4]} for sent in statistics]
    alone = merge(regmean(), {"weight": base["weight"]}, [{"weight": c["weight"]} for c in clients], statistics=smaller)
    close(found["weight"], alone["weight"], 1e-12)


def test_clients_without_statistics_are_refused_by_name():
    base, client = {"weight": torch.zeros(2, 2)}, {"weight": torch.ones(2, 2)}
    with pytest.raises(StatisticsError, match=r"^client '0': sent no statistics 'gram'; this method needs them$"):
        merge("regmean", base, [client, client])
    given = {"count": torch.tensor(1.0), "fisher/weight": torch.ones(2, 2)}
    with pytest.raises(StatisticsError, match=r"^client '1': sent no statistics 'fisher'; this method needs them$"):
        merge("fisher", base, [client, client], statistics=[given, {}])
    with pytest.raises(RecipeError, match=r"^statistics: found 1 of them, wanted one dict for each of the clients"):
        merge("fisher", base, [client, client], statistics=[given])


def test_statistics_that_only_some_clients_sent_are_not_used():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    clients = [{"a": torch.ones(2), "b": torch.ones(2)}, {"a": 3 * torch.ones(2), "b": 3 * torch.ones(2)}]
    count = {"count": torch.tensor(1.0)}
    one = {**count, "fisher/a": torch.ones(2), "fisher/b": torch.ones(2)}
    found = merge("fisher", base, clients, statistics=[one, {**count, "fisher/a": 3 * torch.ones(2)}])
    assert found["a"].tolist() == pytest.approx([2.5, 2.5], abs=1e-5)
    assert found["b"].tolist() == [2.0, 2.0]
    with pytest.raises(MergeError, match="no statistics 'fisher' that all of the clients sent alike"):
        merge(
            "fisher",
            base,
            clients,
            statistics=[{**count, "fisher/b": torch.ones(2)}, {**count, "fisher/a": torch.ones(2)}],
        )


def good(kind):
    """A layer of 3 outputs and 2 inputs with a bias, and good statistics of it."""
    if kind == "gram":
        return {"count": torch.tensor(4.0), "gram/l": torch.eye(3)}
    return {"count": torch.tensor(4.0), "fisher/l.weight": torch.ones(3, 2), "fisher/l.bias": torch.ones(3)}


@pytest.mark.parametrize(
    ("kind", "change", "tensor", "words"),
    [
        ("gram", {"gram/l": torch.eye(4)}, "gram/l", r"shape \(4, 4\), for a weight of \(3, 2\) wanted \(2, 2\)"),
        ("gram", {"gram/l": torch.eye(3)[:2]}, "gram/l", r"shape \(2, 3\)"),
        ("gram", {"gram/l": torch.eye(3).expand(2, 3, 3)}, "gram/l", r"shape \(2, 3, 3\)"),
        ("gram", {"gram/m": torch.eye(3)}, "gram/m", r"the base has no floating tensor 'm\.weight'"),
        ("gram", {"gram/l": torch.eye(3) * float("nan")}, "gram/l", "holds NaN"),
        ("gram", {"gram/l": torch.eye(3) * 1e31}, "gram/l", r"a magnitude above 1e\+30"),
        ("gram", {"gram/l": -torch.eye(3)}, "gram/l", "-1 where a sum of squares or a count stands"),
        ("gram", {"gram/l": torch.ones(3, 3) + torch.ones(3, 3).triu(1)}, "gram/l", "no Gram matrix"),
        ("gram", {"gram/l": torch.ones(3, 3) * 2 - torch.eye(3)}, "gram/l", "no Gram matrix"),
        ("gram", {"gram/l": torch.eye(3).long()}, "gram/l", "dtype int64"),
        ("gram", {"fisher/l.bias": torch.ones(3)}, "fisher/l.bias", r"was not asked for \(asked for: gram\)"),
        ("gram", {"count": torch.tensor(0.0)}, "count", "0 examples, wanted a number > 0"),
        ("gram", {"count": torch.tensor(float("nan"))}, "count", "nan examples"),
        ("gram", {"count": torch.ones(2)}, "count", "wanted one number"),
        ("gram", {"count": None}, None, "sent statistics without 'count'"),
        ("gram", {"gram/l": None}, None, "sent no statistics 'gram'"),
        ("fisher", {"fisher/l.bias": torch.ones(2)}, "fisher/l.bias", r"shape \(2,\), the tensor has \(3,\)"),
        ("fisher", {"fisher/l.bias": torch.tensor([1.0, -0.5, 1.0])}, "fisher/l.bias", "-0.5 where a sum of squares"),
        ("fisher", {"fisher/l.bias": torch.tensor([1.0, torch.inf, 1.0])}, "fisher/l.bias", "infinity"),
        ("fisher", {"fisher/steps": torch.ones(())}, "fisher/steps", "the base has no floating tensor 'steps'"),
    ],
)
def test_statistics_that_cannot_be_are_refused(kind, change, tensor, words):
    base = {"l.weight": torch.zeros(3, 2), "l.bias": torch.zeros(3), "steps": torch.tensor(0)}
    name = {"gram": "regmean", "fisher": "fisher"}[kind]
    merge(build(name), base, [base, base], statistics=[good(kind), good(kind)])
    bad = {key: value for key, value in (good(kind) | change).items() if value is not None}
    with pytest.raises(StatisticsError, match=words) as caught:
        merge(build(name), base, [base, base], statistics=[good(kind), bad])
    assert (caught.value.client_id, caught.value.tensor) == ("1", tensor)
