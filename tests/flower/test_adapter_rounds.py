"""FedMerge with methods for adapters: clients with ranks, scalings and modules of their own."""

import re

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_merge import MergeError, Recipe, RecipeError, build
from fl_merge.adapters import load_adapter, plain_adapter
from fl_merge.exchange import Form, exchange_of, fit, form_in_state
from fl_merge.execute import MergeReport
from fl_merge.flower import FedMerge, server_app
from fl_merge.flower.apps import LoadedApp, run_app
from fl_merge.flower.client import receive, receive_adapter, reply
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.flower.records import to_record
from fl_merge.flower.watch import Watcher
from fl_merge.methods import lora_factor_mean, lora_merge, lora_residual, lora_stack, lora_svd, ties
from fl_merge.optimizers import adam, server_optimizer
from fl_merge.running_products import RunningProducts
from fl_merge.store import MemorySource
from fl_merge.types import Update

MODULES = {"base_model.model.q": (24, 20), "base_model.model.up": (18, 26)}
RANKS, ALPHAS = (4, 8, 16), (8.0, 8.0, 4.0)


def adapter(rank, seed, *, trained=False, dtype=torch.float32, modules=MODULES):
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for module, (outputs, inputs) in modules.items():
        found[f"{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=draw).to(dtype)
        b = torch.randn(outputs, rank, generator=draw) if trained else torch.zeros(outputs, rank)
        found[f"{module}.lora_B.weight"] = b.to(dtype)
    return found


def products(tensors, scaling=1.0):
    return {
        module: scaling * (tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double())
        for module in MODULES
        if f"{module}.lora_A.weight" in tensors
    }


def distance(found, wanted):
    assert found.keys() == wanted.keys()
    apart = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return (apart / sum(float(tensor.square().sum()) for tensor in wanted.values())) ** 0.5


class Clients:
    """Clients that move both factors by numbers of their own; they note what they received and what they sent."""

    def __init__(self, ranks=RANKS, alphas=ALPHAS, *, dtype=None, change=None, says=None):
        self.received, self.sent, self.configs, self.raw = {}, {}, {}, {}
        self.app = ClientApp()

        @self.app.train()
        def train(message: Message, context: Context) -> Message:
            number = int(context.node_config["partition-id"])
            server_round = int(message.content["config"]["server-round"])
            rank, scaling = ranks[number % 3], alphas[number % 3] / ranks[number % 3]
            here = receive_adapter(message, adapter(rank, 100 + number), scaling)
            self.received[server_round, number] = products(here, scaling)
            self.configs[server_round, number] = dict(message.content["config"])
            self.raw[server_round, number] = receive(message)
            moved = adapter(rank, 1000 * server_round + number, trained=True)
            tensors = {name: tensor.float() + 0.2 * moved[name] for name, tensor in here.items()}
            self.sent[server_round, number] = products(tensors, scaling)
            metrics = {"lora-scalings": scaling} if says is None else says(number, rank, scaling)
            if change is not None:
                tensors = change(number, tensors)
            return reply(message, tensors, number + 1, metrics, dtype)

    def run(self, method, rounds=2, nodes=3, initial=None, **options):
        strategy = FedMerge(method, **{"fraction_evaluate": 0.0, **options})
        first = adapter(max(RANKS), 7) if initial is None else initial
        with InProcessGrid(self.app, nodes, workers=0) as grid:
            strategy.start(grid, to_record(first), num_rounds=rounds)
        return strategy


def total(sent, server_round, weights=(1, 2, 3)):
    shares = [weight / sum(weights) for weight in weights]
    return {
        module: sum(share * sent[server_round, number][module] for number, share in enumerate(shares))
        for module in MODULES
    }


def best(product, rank):
    u, s, vt = torch.linalg.svd(product, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]


def test_each_client_gets_a_prefix_of_one_decomposition_in_its_own_rank_and_scaling():
    clients = Clients()
    strategy = clients.run(lora_svd(rank=16))
    assert all(not product.any() for number in range(3) for product in clients.received[1, number].values())
    merged = {module: best(product, 16) for module, product in total(clients.sent, 1).items()}
    for number, rank in enumerate(RANKS):
        wanted = {module: best(product, rank) for module, product in merged.items()}
        assert distance(clients.received[2, number], wanted) < 1e-5
        assert clients.configs[1, number]["lora-fitted"] is False
        assert clients.configs[2, number]["lora-fitted"] is True
        assert clients.raw[2, number]["base_model.model.q.lora_A.weight"].shape == (rank, 20)
    merged = {module: best(product, 16) for module, product in total(clients.sent, 2).items()}
    assert distance(products(strategy.model.master()), merged) < 1e-5


def test_a_client_that_is_not_known_yet_fits_the_plain_factors_itself():
    plain, own = adapter(8, 1, trained=True), adapter(4, 2)
    assert distance(products(fit(plain, adapter(8, 3), 2.0), 2.0), products(plain)) < 1e-6
    wide = fit(plain, adapter(12, 3), 0.5)
    assert distance(products(wide, 0.5), products(plain)) < 1e-6
    assert torch.equal(
        wide["base_model.model.q.lora_A.weight"][8:], adapter(12, 3)["base_model.model.q.lora_A.weight"][8:]
    )
    assert fit(plain, own, 2.0)["base_model.model.q.lora_A.weight"].shape == (4, 20)


def test_a_client_of_a_larger_rank_gets_rows_that_can_be_trained():
    clients = Clients()
    clients.run(lora_svd(rank=2))
    a, b = (clients.raw[2, 2][f"base_model.model.q.lora_{which}.weight"] for which in "AB")
    assert a.shape == (16, 20)
    assert bool(a[2:].abs().sum(1).gt(0).all())
    assert not b[:, 2:].any()
    assert bool(b[:, :2].any())


def test_what_clients_train_from_does_not_depend_on_whether_they_evaluate():
    """Rows that fill up A are drawn in every round; an evaluation between two of them draws none of theirs."""
    found = []
    for fraction in (0.0, 1.0):
        clients = Clients()

        @clients.app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            return reply(message, None, 1, {"loss": 0.0})

        clients.run(lora_svd(rank=2), fraction_evaluate=fraction)
        found.append(clients.raw[2, 2])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_bfloat16_over_the_wire_and_float32_between_rounds():
    clients = Clients(dtype="bfloat16")
    strategy = clients.run(lora_svd(rank=16), initial=adapter(16, 7, dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in strategy.model.tensors().values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in strategy.model.master().values()} == {torch.float32}
    assert {tensor.dtype for tensor in clients.raw[2, 0].values()} == {torch.bfloat16}
    wanted = {module: best(product, 16) for module, product in total(clients.sent, 2).items()}
    assert distance(products(strategy.model.master()), wanted) < 5e-3


def test_alpha_may_be_said_in_place_of_the_scaling():
    def by_alpha(number, rank, scaling):
        return {"lora-alpha": scaling * rank**0.5, "lora-rslora": 1} if number else {"lora-alpha": scaling * rank}

    wanted = Clients().run(lora_svd(rank=16)).model.master()
    found = Clients(says=by_alpha).run(lora_svd(rank=16)).model.master()
    assert distance(products(found), products(wanted)) < 1e-6


Q_A, Q_B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"


def without(*names):
    return lambda number, tensors: tensors if number else {n: t for n, t in tensors.items() if n not in names}


def put(**changed):
    return lambda number, tensors: tensors if number else {**tensors, Q_A: changed["a"], Q_B: changed["b"]}


class Refusals(Watcher):
    def __init__(self):
        self.reasons, self.reports = [], []

    def replied(self, round_number, client_id, refusal, seconds):
        self.reasons += [str(refusal)] if refusal else []

    def round_ended(self, report, model):
        self.reports.append(report)


@pytest.mark.parametrize(
    ("change", "says", "reason"),
    [
        (put(a=torch.ones(4, 20), b=torch.ones(24, 1)), None, r"A \(4, 20\) has rank 4 and B \(24, 1\) rank 1"),
        (put(a=torch.ones(4, 21), b=torch.ones(24, 4)), None, "a product of 24 x 21, wanted 24 x 20"),
        (put(a=torch.ones(400, 20), b=torch.ones(24, 400)), None, "rank 400, which is more than"),
        (put(a=torch.full((4, 20), torch.nan), b=torch.ones(24, 4)), None, "element 0 is nan"),
        (without(Q_B), None, "is missing"),
        (lambda n, t: t if n else {**t, "x.lora_A.weight": torch.ones(1, 2)}, None, "is not in the base"),
        (None, lambda n, r, s: {"lora-scalings": s} if n else {}, "say neither 'lora-scalings' nor 'lora-alpha'"),
        (None, lambda n, r, s: {"lora-scalings": s} if n else {"lora-scalings": [1.0]}, "has 1 numbers for 2 modules"),
        (None, lambda n, r, s: {"lora-scalings": s} if n else {"lora-scalings": 0.0}, "wanted numbers other than 0"),
    ],
)
def test_a_bad_adapter_is_refused_by_name_and_the_others_are_merged(change, says, reason):
    watcher = Refusals()
    strategy = Clients(change=change, says=says).run(lora_svd(rank=16), rounds=1, watchers=[watcher])
    assert len(watcher.reasons) == 1
    assert watcher.reports[0].refused[0].client_id == "1000"
    assert re.search(reason, watcher.reasons[0]), watcher.reasons[0]
    good = Clients()
    with InProcessGrid(good.app, 3, workers=0) as grid:
        fresh = FedMerge(lora_svd(rank=16), fraction_evaluate=0.0)
        messages = list(fresh.configure_train(1, to_record(adapter(16, 7)), _config(), grid))
        replies = list(grid.send_and_receive(messages))[1:]
        fresh.aggregate_train(1, replies)
    found, wanted = strategy.model.master(), fresh.model.master()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def _config():
    from flwr.app import ConfigRecord

    return ConfigRecord({})


def test_a_module_that_a_client_does_not_have_counts_as_zero_and_is_said():
    watcher = Refusals()
    clients = Clients(change=without(Q_A, Q_B), says=lambda n, r, s: {"lora-scalings": s})
    strategy = clients.run(lora_svd(rank=16), rounds=2, watchers=[watcher])
    assert watcher.reports[0].merge.notes[Q_A] == "clients without this module: 1000"
    product = sum(share * clients.sent[2, number]["base_model.model.q"] for number, share in ((1, 1 / 3), (2, 1 / 2)))
    found = products(strategy.model.master())
    assert distance({"q": found["base_model.model.q"]}, {"q": best(product, 16)}) < 1e-5
    assert 0 < watcher.reports[0].merge.found["lora-relative-error"] < 1


def test_the_mean_of_factors_takes_clients_of_the_global_rank_only():
    watcher = Refusals()
    Clients(alphas=(4.0, 4.0, 4.0)).run(
        lora_factor_mean(), rounds=1, nodes=5, initial=adapter(4, 7), watchers=[watcher], max_failures=0.9
    )
    assert len(watcher.reasons) == 3
    assert all("wanted the rank of the global adapter, 4" in reason for reason in watcher.reasons)


def test_an_alpha_that_disagrees_leaves_the_old_model():
    watcher = Refusals()
    clients = Clients(ranks=(4, 4, 4), alphas=(4.0, 8.0, 4.0))
    with pytest.raises(Exception, match="no round of 1 made a model"):
        clients.run(lora_factor_mean(), rounds=1, initial=adapter(4, 7), watchers=[watcher])
    assert "by 1 at client '1000' and by 2 at client '1001'; one alpha is wanted" in watcher.reports[0].failure


def test_rolora_says_which_factor_to_train():
    clients = Clients(ranks=(4,) * 3, alphas=(4.0,) * 3, change=lambda n, t: {**adapter(4, 7), **_only_b(t)})
    clients.run(lora_factor_mean(share="alternate"), rounds=1, initial=adapter(4, 7))
    assert clients.configs[1, 0]["lora-trains"] == "B"
    exchange = exchange_of(lora_factor_mean(share="alternate"))
    assert [exchange.trains(server_round) for server_round in (1, 2, 3)] == ["B", "A", "B"]


def _only_b(tensors):
    return {name: tensor for name, tensor in tensors.items() if "lora_B" in name}


def test_a_stack_stays_within_its_cap_from_round_to_round():
    watcher = Refusals()
    clients = Clients()
    strategy = clients.run(lora_stack(max_rank=12), rounds=3, watchers=[watcher])
    assert {len(t) for name, t in strategy.model.master().items() if "lora_A" in name} == {12}
    assert all(0 < report.merge.found["lora-relative-error"] < 1 for report in watcher.reports)
    free = Clients()
    strategy = free.run(lora_stack(), rounds=2)
    assert {len(t) for name, t in strategy.model.master().items() if "lora_A" in name} == {28}
    assert distance(products(strategy.model.master()), total(free.sent, 2)) < 1e-6


def test_the_residuals_of_all_rounds_add_up():
    clients = Clients(ranks=(4,) * 3, alphas=(4.0,) * 3)
    strategy = clients.run(lora_residual(), rounds=2, initial=adapter(4, 7))
    master = strategy.model.master()
    rest = products({name.removeprefix("residual."): t for name, t in master.items() if name.startswith("residual.")})
    first = {name.removeprefix("residual."): t for name, t in clients.raw[2, 0].items() if name.startswith("residual.")}
    before = products(first)
    found = products(master)
    whole = total(clients.sent, 2)
    added = {module: found[module] + rest[module] - before[module] for module in MODULES}
    assert distance(added, whole) < 1e-5


def test_a_server_optimizer_round_adapters_is_refused():
    with pytest.raises(RecipeError, match="a server optimizer steps along tensors"):
        FedMerge(server_optimizer(lora_svd(), adam()))
    with pytest.raises(RecipeError, match="found no 'lora_A'"):
        Clients().run(lora_svd(), initial={"w": torch.ones(2, 2)})


def test_forms_are_kept_with_the_model():
    strategy = Clients().run(build("lora_svd", rank=16), rounds=1)
    specs = strategy.model.specs()
    form = form_in_state(strategy.model.optimizer_state, "1001", specs)
    assert form == Form(dict.fromkeys(MODULES, 8), dict.fromkeys(MODULES, 1.0))
    assert form_in_state(strategy.model.optimizer_state, "7", specs) is None


def test_a_resumed_run_gives_the_same_numbers(tmp_path):
    from fl_merge.flower.journal import Journal

    whole = Clients().run(lora_svd(rank=6), rounds=3).model.master()
    Clients().run(lora_svd(rank=6), rounds=2, watchers=[Journal(tmp_path / "run", {})])
    clients, strategy = Clients(), FedMerge(lora_svd(rank=6), fraction_evaluate=0.0)
    with InProcessGrid(clients.app, 3, workers=0) as grid:
        strategy.start(grid, to_record(adapter(16, 7)), num_rounds=3, resume=tmp_path / "run")
    found = strategy.model.master()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_updates_kept_on_disk_give_the_same_bytes(tmp_path):
    wanted = Clients().run(lora_svd(rank=6)).model.master()
    found = Clients().run(lora_svd(rank=6), spill_folder=tmp_path).model.master()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_running_sum_of_adapters_is_the_sum_and_holds_no_adapter():
    """Ranks 4 + 8 + 16 are within four times the rank that is kept: nothing is cut before the end."""
    watcher = Refusals()
    wanted = Clients().run(lora_svd(rank=8))
    found = Clients().run(lora_svd(rank=8), running_sum=True, watchers=[watcher])
    assert distance(products(found.model.master()), products(wanted.model.master())) < 1e-6
    assert watcher.reports[0].merge.found["lora-cut-while-running"] == 0.0
    assert watcher.reports[0].merge.clients == ("1000", "1001", "1002")
    assert watcher.reports[0].merge.weights == pytest.approx((1 / 6, 1 / 3, 1 / 2))


def test_a_running_sum_cuts_within_its_room_and_says_so():
    base = MemorySource({name: torch.zeros_like(t) for name, t in adapter(2, 0).items()}, {})
    running = RunningProducts(2, base)
    clients = [adapter(4, seed, trained=True) for seed in range(6)]
    for seed, tensors in enumerate(clients):
        running.add(Update(str(seed), 1.0, MemorySource(tensors)))
        assert max(running.ranks.values()) <= 8
    total = running.total().tensors
    found = products({name: total.read(name) for name in total.specs()})
    exact = {module: sum(products(each)[module] for each in clients) / 6 for module in MODULES}
    cut = running.reported(MergeReport((), (), 0, 0, 0, 0.0)).found["lora-cut-while-running"]
    assert distance(found, exact) > 0
    apart = (
        sum(float((found[m] - exact[m]).norm()) for m in MODULES)
        / sum(float(p.square().sum()) for p in found.values()) ** 0.5
    )
    assert apart <= cut * (1 + 1e-9)
    with pytest.raises(MergeError, match="is in the sum already"):
        running.add(Update("3", 1.0, MemorySource(clients[0])))


@pytest.mark.parametrize(
    "method", [lora_svd(), lora_stack(), lora_factor_mean(), lora_svd(rank=2, missing="renormalise")]
)
def test_other_methods_for_adapters_are_no_running_sum(method):
    with pytest.raises(RecipeError, match=r"running_sum: found lora_.*, wanted a sum of adapters that keeps a rank"):
        FedMerge(method, running_sum=True)


@pytest.mark.parametrize("space", ["full", "knots", "core"])
def test_any_method_on_products_in_a_federation_whose_recipe_is_written_down(tmp_path, space):
    method = lora_merge(method=ties(density=0.3), space=space)
    strategy = Clients().run(method, rounds=1, run_folder=tmp_path / "run")
    again = Recipe.load(tmp_path / "run/recipe.yaml").build()
    found = Clients().run(again, rounds=1)
    assert any(tensor.any() for name, tensor in found.model.sent.items() if "lora_B" in name)
    assert all(torch.equal(tensor, strategy.model.sent[name]) for name, tensor in found.model.sent.items())


def test_a_run_may_start_from_a_peft_adapter_and_leaves_one(tmp_path):
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q", "up"], "task_type": "CAUSAL_LM"}
    plain_adapter(adapter(8, 7, trained=True), {**about, "base_model_name_or_path": "a/model"}).save(tmp_path / "first")
    clients = Clients(dtype="bfloat16")
    run_config = {
        "initial-model": str(tmp_path / "first"),
        "merge-method": "lora_svd",
        "num-server-rounds": 1,
        "fraction-evaluate": 0.0,
        "run-folder": str(tmp_path / "run"),
    }
    run_app(LoadedApp(server_app.app, clients.app, run_config=run_config), nodes=3, workers=0)
    assert distance(clients.received[1, 1], products(adapter(8, 7, trained=True))) < 1e-6
    left = load_adapter(tmp_path / "run" / "adapter")
    tensors = {name: left.plain.read(name) for name in left.plain.specs()}
    wanted = {module: best(product, 16) for module, product in total(clients.sent, 1).items()}
    assert distance(products(tensors), wanted) < 5e-3
    assert left.config.raw["base_model_name_or_path"] == "a/model"
    assert left.config.raw["target_modules"] == ["q", "up"]
    assert left.config.scaling_of("base_model.model.q") == 1.0


def test_an_adapter_config_that_cannot_be_merged_is_refused_before_anyone_trains(tmp_path):
    clients = Clients()
    with pytest.raises(RecipeError, match="use_dora"):
        clients.run(lora_svd(), run_folder=tmp_path / "run", adapter_config={"use_dora": True})
    assert not clients.received
