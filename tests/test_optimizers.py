"""Server optimizers: the steps on paper, what they leave alone, what they refuse, that they are the same everywhere."""

import math

import pytest
import torch

from fl_merge import Recipe, RecipeError, adagrad, adam, build, merge, momentum, partition, server_optimizer, yogi
from fl_merge.methods import ties, weighted_average
from fl_merge.model import GlobalModel
from fl_merge.optimizers import OPTIMIZERS, STEPS
from fl_merge.rounds import Round
from fl_merge.running import RunningSum, running_factor
from fl_merge.spill import Spill
from fl_merge.store import MemorySource
from fl_merge.types import Update


def two_clients(model, step):
    """Two equal clients that both moved every floating tensor of the model by the step."""
    tensors = {name: t + step if t.is_floating_point() else t + 1 for name, t in model.sent.items()}
    return tuple(Update(client, 1.0, MemorySource(tensors)) for client in ("0", "1"))


def after(method, model, steps):
    """The model after rounds in which every client moved by these steps."""
    for number, step in enumerate(steps, start=1):
        model, _ = model.merged(method, two_clients(model, step), seed=0, round_number=number)
    return model


# --- on paper --------------------------------------------------------------------------------------------------------

PAPER = {
    # m: 1, then 0.5 * 1 + 2 = 2.5; theta = 0.1 * (1 + 2.5)
    "momentum": (momentum(lr=0.1, beta=0.5), 0.1 * (1 + 2.5)),
    # v: 1, then 1 + 4
    "adagrad": (adagrad(lr=0.1, tau=0.5), 0.1 * (1 / (1 + 0.5) + 2 / (math.sqrt(5) + 0.5))),
    # m: 0.5, then 0.25 + 1 = 1.25; v: 0.25, then 0.1875 + 1 = 1.1875
    "adam, none": (
        adam(lr=0.1, beta_1=0.5, beta_2=0.75, tau=0.5, correction="none"),
        0.1 * (0.5 / (0.5 + 0.5) + 1.25 / (math.sqrt(1.1875) + 0.5)),
    ),
    "adam": (
        adam(lr=0.1, beta_1=0.5, beta_2=0.75, tau=0.5, correction="adam"),
        0.1 * (math.sqrt(0.25) / 0.5 * 0.5 / (0.5 + 0.5) + math.sqrt(0.4375) / 0.75 * 1.25 / (math.sqrt(1.1875) + 0.5)),
    ),
    # v: 0.25, then 0.25 + 0.25 * 4 (it is below 4)
    "yogi": (
        yogi(lr=0.1, beta_1=0.5, beta_2=0.75, tau=0.5),
        0.1 * (0.5 / (0.5 + 0.5) + 1.25 / (math.sqrt(1.25) + 0.5)),
    ),
}


@pytest.mark.parametrize("which", PAPER)
def test_two_steps_on_paper(which):
    optimizer, wanted = PAPER[which]
    model = after(server_optimizer("weighted_average", optimizer), GlobalModel.of({"w": torch.zeros(3)}), [1.0, 2.0])
    assert model.sent["w"].tolist() == pytest.approx([wanted] * 3, rel=1e-6)
    assert set(model.optimizer_state) == {STEPS, *(f"{slot}/w" for slot in optimizer.slots)}
    assert model.optimizer_state[STEPS] == 2


def test_a_square_that_falls_is_forgotten_slowly_by_yogi():
    """After a delta of 2 and one of 0: v = 1 for adam's 0.75 * 1, and stays 1 - 0 for yogi."""
    model = GlobalModel.of({"w": torch.zeros(1)})
    settings = {"beta_1": 0.0, "beta_2": 0.75}
    for optimizer, wanted in ((adam(**settings), 0.75), (yogi(**settings), 1.0)):
        state = after(server_optimizer("weighted_average", optimizer), model, [2.0, 0.0]).optimizer_state
        assert state["v/w"].item() == wanted


def test_momentum_without_momentum_is_the_method():
    base = {"w": torch.randn(50, generator=torch.Generator().manual_seed(1)), "n": torch.tensor(3)}
    plain = after(weighted_average(), GlobalModel.of(base), [0.5, -0.25])
    stepped = after(
        server_optimizer("weighted_average", momentum(lr=1.0, beta=0.0)), GlobalModel.of(base), [0.5, -0.25]
    )
    assert torch.allclose(plain.sent["w"], stepped.sent["w"], rtol=0, atol=1e-6)


# --- what it leaves alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_nobody_moved_stays_bit_for_bit(name):
    base = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16(), "v": torch.randn(7).double()}
    model = after(server_optimizer("weighted_average", name), GlobalModel.of(base), [0.0, 0.0, 0.0])
    assert all(torch.equal(model.tensors()[key], base[key]) for key in base)


def test_integers_and_running_statistics_take_the_merged_value():
    base = {
        "w": torch.zeros(2),
        "norm.running_var": torch.ones(2),
        "norm.num_batches_tracked": torch.tensor(3),
        "positions": torch.arange(3),
    }
    method = server_optimizer("weighted_average", adam())
    model = after(method, GlobalModel.of(base), [0.5])
    assert model.sent["norm.running_var"].tolist() == [1.5, 1.5]
    assert model.sent["norm.num_batches_tracked"] == 4
    assert torch.equal(model.sent["positions"], base["positions"])
    assert set(model.optimizer_state) == {STEPS, "m/w", "v/w"}
    model = after(server_optimizer("weighted_average", momentum(lr=0.5), skip=[]), GlobalModel.of(base), [0.5])
    assert model.sent["norm.running_var"].tolist() == [1.25, 1.25]


def test_tied_names_stay_one_tensor():
    shared = torch.tensor([1.0, 2.0])
    model = GlobalModel.of({"a": shared, "b": shared.clone()}, tied={"b": "a"})
    model = after(server_optimizer("weighted_average", momentum(lr=0.5)), model, [1.0, 1.0])
    assert torch.equal(model.sent["a"], model.sent["b"])
    assert model.sent["a"].tolist() == pytest.approx([1.0 + 0.5 + 0.95, 2.0 + 0.5 + 0.95])
    assert set(model.optimizer_state) == {STEPS, "m/a"}


def test_steps_add_up_in_the_float32_master_of_a_bfloat16_model():
    """Each step is a thousandth, which bfloat16 at 1 does not have."""
    model = GlobalModel.of({"w": torch.ones(2, dtype=torch.bfloat16)})
    method = server_optimizer("weighted_average", momentum(lr=2**-8, beta=0.0))
    model = after(method, model, [0.25] * 8)
    assert model.sent["w"].dtype == torch.bfloat16
    assert model.master()["w"].tolist() == [1 + 8 * 2**-10] * 2
    assert model.optimizer_state["m/w"].dtype == torch.float32


def test_a_step_that_fails_leaves_model_and_state():
    """float16 has no 1e6: the round fails, and the next one goes on as if it had not been."""
    method = server_optimizer("weighted_average", momentum(lr=1e6, beta=0.5))
    model = after(method, GlobalModel.of({"w": torch.zeros(2, dtype=torch.float16)}), [2.0**-10])
    before = {name: tensor.clone() for name, tensor in model.optimizer_state.items()}
    collected = Round(2, model, method, ("0", "1"))
    for update in two_clients(model, 1.0):
        collected.offer(update.client_id, lambda update=update: update)
    made, report = collected.merge()
    assert made is None
    assert report.failure.startswith("tensor 'w': a merged value of magnitude 1.0")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.optimizer_state.items())


# --- everywhere the same ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kept_on_disk_and_as_a_running_sum_it_is_the_same(name, tmp_path):
    """Spilled updates give the same bits; a running sum the same to the last place of the merge below it."""
    method = server_optimizer(weighted_average(), name)
    base = {"w": torch.randn(300_000, generator=torch.Generator().manual_seed(3)), "n": torch.tensor(1)}
    models = {}
    for how in ("memory", "spilled", "running"):
        model = GlobalModel.of(base)
        for number in (1, 2, 3):
            with Spill(tmp_path / how) as spill:
                running = RunningSum(method, MemorySource(model.sent), spill.open()) if how == "running" else None
                kept = None if how == "memory" else spill
                collected = Round(number, model, method, ("0", "1"), spill=kept, running=running)
                for client in ("1", "0"):
                    draw = torch.Generator().manual_seed(10 * number + int(client))
                    moved = {"w": model.sent["w"] + torch.randn(300_000, generator=draw), "n": base["n"]}
                    collected.offer(client, lambda c=client, m=moved: Update(c, 1.0 + int(c), MemorySource(m)))
                model, report = collected.merge()
                assert report.failure is None
        models[how] = model
    assert torch.equal(models["memory"].sent["w"], models["spilled"].sent["w"])
    assert torch.allclose(models["memory"].sent["w"], models["running"].sent["w"], rtol=1e-5, atol=1e-5)
    assert running_factor(method) == 1.0
    with pytest.raises(RecipeError, match=r"^running_sum: found"):
        running_factor(server_optimizer(ties(), name))


def test_it_wraps_any_method():
    model = after(server_optimizer(ties(density=1.0), momentum(lr=0.5)), GlobalModel.of({"w": torch.zeros(3)}), [1.0])
    assert model.sent["w"].tolist() == [0.5] * 3


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adam(lr=0.0), "parameter 'lr' of adam: found 0.0, wanted a number > 0"),
        (lambda: adam(beta_2=1.0), "parameter 'beta_2' of adam: found 1.0, wanted a number in"),
        (lambda: yogi(tau=-1), "parameter 'tau' of yogi: found -1, wanted a number > 0"),
        (lambda: adam(rate=0.1), "adam has no parameter 'rate'"),
        (lambda: adam(correction="kingma"), "parameter 'correction' of adam: found 'kingma', wanted 'flower' or"),
        (lambda: server_optimizer("ties", "adm"), "unknown server optimizer 'adm'; did you mean 'adam'?"),
        (lambda: server_optimizer("ties", ties()), "found Method"),
        (lambda: server_optimizer(ties, adam()), "found <function ties"),
        (lambda: server_optimizer(server_optimizer("ties", "adam"), "adam"), "server_optimizer: found server_optim"),
        (
            lambda: server_optimizer("ties", "adam", skip="*bias"),
            "server_optimizer: skip: found '*bias', wanted a list",
        ),
        (lambda: partition([("*", server_optimizer("ties", "adam"))], otherwise=ties()), "partition: found server_opt"),
        (
            lambda: merge(server_optimizer("ties", "adam"), {"w": torch.zeros(1)}, [{"w": torch.ones(1)}]),
            "merge: found server_optimizer(ties(",
        ),
    ],
)
def test_refused_at_construction(make, message):
    with pytest.raises(RecipeError) as caught:
        make()
    assert str(caught.value).startswith(message)


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_a_recipe_has_it_and_comes_back(tmp_path):
    content = {
        "merge_method": "ties",
        "parameters": {"density": 0.3},
        "rules": [{"match": "*bias", "merge_method": "weighted_average"}],
        "server_optimizer": {"name": "adam", "lr": 0.02, "skip": ["*.norm.*"]},
    }
    method = Recipe.from_dict(content).build()
    rules = [("*bias", weighted_average())]
    wanted = server_optimizer(partition(rules, otherwise=ties(density=0.3)), adam(lr=0.02), skip=["*.norm.*"])
    assert str(method) == str(wanted)
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.of(method).to_yaml())
    assert str(Recipe.load(path).build()) == str(method)


@pytest.mark.parametrize("text", ["adam", "{name: adam, lr: 0.1}"])
def test_a_run_config_has_it(text):
    method = Recipe.from_config({"merge-method": "ties", "server-optimizer": text}).build()
    assert str(method) == str(server_optimizer(ties(), adam()))
    assert str(Recipe.from_config({"server-optimizer": ""}).build()) == str(build("weighted_average"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "sgd"}, "unknown server optimizer 'sgd'"),
        ({"lr": 0.1}, "unknown server optimizer 'None'"),
        ({"name": ["adam"]}, "unknown server optimizer '['adam']'"),
        ({"name": "adam", "learning_rate": 0.1}, "adam has no parameter 'learning_rate'"),
        ([1], "server_optimizer: found [1], wanted {name: adam, lr: 0.01}"),
        ({"name": "adam", "skip": 3}, "server_optimizer: skip: found 3, wanted a list of globs"),
    ],
)
def test_a_recipe_with_a_wrong_one_is_refused(value, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"merge_method": "ties", "server_optimizer": value}).build()
    assert str(caught.value).startswith(message)
