"""Statistics in a federation: asked for in the round's config, sent in a record of their own, checked, merged."""

import logging

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from fl_merge import merge
from fl_merge.flower import FedMerge, RunFailedError, collect_if_asked, statistics_asked, to_record, to_tensors
from fl_merge.flower.client import receive, reply
from fl_merge.flower.inprocess import FIRST_NODE_ID, InProcessGrid
from fl_merge.flower.watch import Watcher
from fl_merge.methods import fisher, regmean, ties, weighted_average
from fl_merge.optimizers import momentum, server_optimizer
from fl_merge.statistics import collect


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))


BASE = {name: tensor.clone() for name, tensor in network().state_dict().items()}


def trained(state, number):
    """What client `number` makes of the model, and its inputs."""
    draw = torch.Generator().manual_seed(number)
    model = network()
    model.load_state_dict({n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in state.items()})
    return model, torch.randn(8 + number, 4, generator=draw)


class Seen(Watcher):
    def __init__(self):
        self.reports = []

    def round_ended(self, report, model):
        self.reports.append(report)


def federation(method, change=lambda number, statistics: statistics, rounds=1, **options):
    """A run with four clients, which change what they send of statistics as told; also what they were asked for."""
    app, asked, seen = ClientApp(), [], Seen()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = context.node_id - FIRST_NODE_ID
        asked.append(statistics_asked(message))
        model, inputs = trained(receive(message), number)
        statistics = change(number, collect_if_asked(message, model, [inputs]))
        return reply(message, model.state_dict(), len(inputs), statistics=statistics)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        assert statistics_asked(message) == ()
        return reply(message, None, 1)

    strategy = FedMerge(method, watchers=[seen], **options)
    with InProcessGrid(app, 4, workers=0) as grid:
        result = strategy.start(grid, to_record(BASE), num_rounds=rounds, timeout=60)
    return to_tensors(result.arrays), seen.reports, asked


def offline(method, kind, without=()):
    pairs = {str(FIRST_NODE_ID + n): trained(BASE, n) for n in range(4) if n not in without}
    return merge(
        method,
        BASE,
        {client: model.state_dict() for client, (model, _) in pairs.items()},
        {client: len(inputs) for client, (_, inputs) in pairs.items()},
        statistics={client: collect(model, [inputs], kind) for client, (model, inputs) in pairs.items()},
    )


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("method", "kind"), [(regmean(), "gram"), (fisher(), "fisher")], ids=["regmean", "fisher"])
@pytest.mark.parametrize("spilled", [False, True])
def test_a_round_is_the_merge_of_models_and_statistics(method, kind, spilled, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="flwr"):
        found, (report,), asked = federation(method, spill_folder=tmp_path if spilled else None)
    assert asked == [(kind,)] * 4
    assert equal(found, offline(method, kind))
    assert not equal(found, offline_average())
    sent = sum(t.numel() for t in collect(*[trained(BASE, 0)[0], [torch.zeros(2, 4)]], kind).values())
    assert report.accepted[0].num_bytes == 4 * (sum(t.numel() for t in BASE.values()) + sent)
    line = "round 1: weighted average, for want of statistics 'gram': 1.weight, 1.bias"
    assert (line in caplog.text) == (kind == "gram")
    assert set(report.merge.notes) == ({"1.weight", "1.bias"} if kind == "gram" else set())
    assert list(tmp_path.iterdir()) == []


def offline_average():
    pairs = [trained(BASE, n) for n in range(4)]
    return merge("weighted_average", BASE, [m.state_dict() for m, _ in pairs], [len(x) for _, x in pairs])


def test_methods_without_statistics_ask_for_none_and_keep_none(tmp_path):
    unasked = {"count": torch.tensor(1.0), "gram/0": torch.full((9, 9), torch.nan)}
    for method in (weighted_average(), ties()):
        plain, _, asked = federation(method)
        assert asked == [()] * 4
        with_more, (report,), _ = federation(method, lambda number, statistics: unasked, spill_folder=tmp_path)
        assert equal(plain, with_more)
        assert report.accepted[0].num_bytes == 4 * sum(tensor.numel() for tensor in BASE.values())


def test_a_server_optimizer_asks_for_what_its_method_needs():
    method = server_optimizer(regmean(), momentum(lr=1.0))
    found, reports, asked = federation(method, rounds=2)
    assert asked == [("gram",)] * 8
    assert all(report.failure is None for report in reports)
    assert not equal(found, BASE)


@pytest.mark.parametrize(
    ("change", "tensor", "words"),
    [
        (lambda sent: None, None, "sent no statistics 'gram'; this method needs them"),
        (lambda sent: sent | {"gram/0": sent["gram/0"][:3, :3]}, "gram/0", "statistics: shape (3, 3), for a weight of"),
        (lambda sent: sent | {"gram/0": -sent["gram/0"]}, "gram/0", "where a sum of squares or a count stands"),
        (lambda sent: sent | {"gram/0": sent["gram/0"] * torch.nan}, "gram/0", "statistics: holds NaN"),
        (lambda sent: {k: v for k, v in sent.items() if k != "count"}, None, "sent statistics without 'count'"),
    ],
)
def test_bad_statistics_cost_that_clients_update_and_no_more(change, tensor, words):
    found, (report,), _ = federation(regmean(), lambda number, sent: change(sent) if number == 2 else sent)
    (refusal,) = report.refused
    assert (refusal.client_id, refusal.tensor) == (str(FIRST_NODE_ID + 2), tensor)
    assert words in refusal.reason
    assert equal(found, offline(regmean(), "gram", without=[2]))


def test_a_run_in_which_nobody_sends_them_says_so():
    with pytest.raises(RunFailedError, match="0 usable replies of 4 clients"):
        federation(regmean(), lambda number, statistics: None)


def test_the_users_own_config_stays(caplog):
    strategy = FedMerge(regmean())
    with InProcessGrid(ClientApp(), 2, workers=0) as grid:
        messages = list(strategy.configure_train(1, to_record(BASE), ConfigRecord({"lr": 0.5}), grid))
    assert dict(messages[0].content["config"]) == {"lr": 0.5, "server-round": 1, "fl-merge.statistics": "gram"}
