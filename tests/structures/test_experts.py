"""Mixtures of experts out of dense models: what they compute, what they are made of, experts that leave."""

import math

import pytest
import torch
from small_models import TOKENS, Model

from digits_clients import mixture
from digits_clients import model as digits
from digits_clients.data import client as digits_client
from fl_merge import METHODS, MergeError, RecipeError, merge
from fl_merge.execute import execute
from fl_merge.methods import moe_upcycle, remove_experts, task_arithmetic, ties, weighted_average
from fl_merge.ops.routing import hidden_rows, random_rows
from fl_merge.statistics import collect
from fl_merge.store import MemorySink, MemorySource
from fl_merge.structures import reconfigure
from fl_merge.types import Cohort, CohortSpec, TensorSpec, Update

FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


def upcycled(method, *models, statistics=None):
    """The mixture of these clients; the first is the base too."""
    updates = tuple(
        Update(str(at), 1.0, MemorySource(each.tensors), statistics=statistics and MemorySource(statistics[at]))
        for at, each in enumerate(models)
    )
    sink = MemorySink()
    execute(method, Cohort(MemorySource(models[0].tensors), updates, seed=3), sink)
    return Model(reconfigure(models[0].config, method, len(models)), sink.tensors)


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["random", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_compute_what_the_dense_model_does(make, tmp_path, family, router):
    dense = make(family)
    for copies, top_k in ((4, 2), (3, 1), (2, 2)):
        sparse = upcycled(moe_upcycle(copies=copies, top_k=top_k, router=router), dense)
        assert sparse.config["model_type"] == FAMILIES[family]
        found = sparse.logits(tmp_path / "new")
        torch.testing.assert_close(found, dense.logits(tmp_path / "old"), atol=1e-5, rtol=0)


def test_copies_with_tied_embeddings(make, tmp_path):
    dense = make("qwen2", tie_word_embeddings=True)
    assert "lm_head.weight" not in dense.tensors
    sparse = upcycled(moe_upcycle(copies=2), dense)
    torch.testing.assert_close(sparse.logits(tmp_path / "new"), dense.logits(tmp_path / "old"), atol=1e-5, rtol=0)


def test_copies_of_the_merged_model(make):
    models = [make(seed=seed) for seed in range(2)]
    sparse = upcycled(moe_upcycle(copies=3, method=ties(density=0.5)), *models)
    merged = merge(ties(density=0.5), models[0].tensors, [each.tensors for each in models])
    for expert in range(3):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
        assert torch.equal(sparse.tensors[name], merged["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(sparse.tensors["lm_head.weight"], merged["lm_head.weight"])
    of_base = upcycled(moe_upcycle(copies=2, source="1"), *models)
    assert torch.equal(of_base.tensors["lm_head.weight"], models[1].tensors["lm_head.weight"])


# One expert a client --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [weighted_average(), task_arithmetic(scale=0.7), ties(density=0.5)], ids=str)
def test_each_client_is_an_expert_and_the_rest_is_merged(make, tmp_path, inner):
    models = [make(seed=seed) for seed in range(3)]
    sparse = upcycled(moe_upcycle(method=inner), *models)
    merged = merge(inner, models[0].tensors, [each.tensors for each in models], seed=3)
    part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for name, tensor in sparse.tensors.items():
        if ".experts." in name:
            layer, expert, map_name = name.split(".")[2], int(name.split(".")[5]), name.split(".")[6]
            assert torch.equal(tensor, models[expert].tensors[f"model.layers.{layer}.mlp.{part[map_name]}.weight"])
        elif ".gate." not in name:
            assert torch.equal(tensor, merged[name]), name
    assert sparse.load(tmp_path / "mixture").config.num_local_experts == 3
    assert sparse.generated(tmp_path / "mixture").shape[1] > TOKENS.shape[1]


def test_copies_and_what_is_left_of_a_mixture_generate(make, tmp_path):
    dense = make()
    copies = upcycled(moe_upcycle(copies=4, top_k=2), dense)
    assert torch.equal(copies.generated(tmp_path / "copies"), dense.generated(tmp_path / "dense"))
    fewer = upcycled(remove_experts(experts="1"), copies)
    assert torch.equal(fewer.generated(tmp_path / "fewer"), dense.generated(tmp_path / "dense"))


def test_one_client_alone_is_its_own_model(make, tmp_path):
    dense = make()
    sparse = upcycled(moe_upcycle(top_k=1), dense)
    torch.testing.assert_close(sparse.logits(tmp_path / "new"), dense.logits(tmp_path / "old"), atol=1e-5, rtol=0)


# Routers --------------------------------------------------------------------------------------------------------------


def test_random_rows_are_small_normal_draws_of_the_key():
    rows = random_rows(5, 64, 500)
    assert rows.std().item() == pytest.approx(0.02, rel=0.02)
    assert rows.mean().abs() < 1e-3
    assert (rows.abs() > 0.04).float().mean().item() == pytest.approx(0.0455, abs=0.005)
    assert torch.equal(rows, random_rows(5, 64, 500))
    assert not torch.equal(rows, random_rows(6, 64, 500))


def test_hidden_rows_on_paper():
    """(3, 0), (0, 0), (0, 3) less their mean (1, 1) are (2, -1), (-1, -1), (-1, 2): lengths sqrt 5, sqrt 2, sqrt 5."""
    rows = hidden_rows(torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 3.0]]))
    a, b, c = 2 / math.sqrt(5), -1 / math.sqrt(5), -1 / math.sqrt(2)
    torch.testing.assert_close(rows, torch.tensor([[a, b], [c, c], [b, a]]))
    assert torch.equal(hidden_rows(torch.ones(3, 2)), torch.zeros(3, 2))


def test_a_hidden_router_is_made_of_what_clients_send(make):
    models = [make(seed=seed) for seed in range(2)]
    draw = torch.Generator().manual_seed(0)
    sent = [{f"hidden/{layer}": torch.randn(32, generator=draw) for layer in range(4)} for _ in models]
    sparse = upcycled(moe_upcycle(router="hidden", top_k=1), *models, statistics=sent)
    for layer in range(4):
        means = torch.stack([each[f"hidden/{layer}"] for each in sent])
        router = sparse.tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert torch.equal(router, hidden_rows(means))
        assert (means @ router.T).argmax(1).tolist() == [0, 1]


def test_a_hidden_router_without_what_clients_send_is_refused(make):
    models = [make(seed=seed) for seed in range(2)]
    with pytest.raises(MergeError, match=r"needs the statistic 'hidden/0', \(32,\), of every client; they did not all"):
        upcycled(moe_upcycle(router="hidden"), *models)
    wrong = [{f"hidden/{layer}": torch.zeros(31) for layer in range(4)} for _ in models]
    with pytest.raises(MergeError, match=r"they sent it in shape \(31,\)"):
        upcycled(moe_upcycle(router="hidden"), *models, statistics=wrong)


def test_language_clients_send_the_mean_of_what_each_mlp_reads(make, tmp_path):
    model = make().load(tmp_path / "model")
    found = collect(model, [TOKENS[:1, :-1]], "hidden")
    with torch.no_grad():
        states = model(TOKENS[:1, :-1], output_hidden_states=True).hidden_states
        layer = model.model.layers[2]
        attended = (
            states[2]
            + layer.self_attn(
                layer.input_layernorm(states[2]),
                position_embeddings=model.model.rotary_emb(states[2], torch.arange(19)[None]),
                attention_mask=None,
            )[0]
        )
        wanted = layer.post_attention_layernorm(attended)[0].mean(0)
    assert list(found) == ["count", *(f"hidden/{number}" for number in range(4))]
    torch.testing.assert_close(found["hidden/2"], wanted, atol=1e-5, rtol=1e-4)
    assert not any(layer.mlp._forward_pre_hooks for layer in model.model.layers)


# Opt-out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_mixture_without_an_expert_never_asks_it(make, tmp_path, family):
    """The same as a router whose score for that expert is beyond reach: softmax and top-k over those that are left."""
    models = [make(family, seed=seed) for seed in range(4)]
    sparse = upcycled(moe_upcycle(top_k=2), *models)
    method = remove_experts(experts="1")
    fewer = upcycled(method, sparse)
    assert {fewer.config.get(key, 3) for key in ("num_local_experts", "num_experts")} == {3}
    found = fewer.logits(tmp_path / "new")

    silenced = sparse.load(tmp_path / "old")
    for layer in silenced.model.layers:
        original = layer.mlp.gate.weight.data
        layer.mlp.gate.weight.data = original[[0, 2, 3]]
        for name in ("gate_up_proj", "down_proj"):
            weights = getattr(layer.mlp.experts, name)
            weights.data = weights.data[[0, 2, 3]]
        for part in (layer.mlp, layer.mlp.gate, layer.mlp.experts):
            for name in ("num_experts", "num_local_experts"):
                if hasattr(part, name):
                    setattr(part, name, 3)
    with torch.no_grad():
        torch.testing.assert_close(found, silenced(TOKENS).logits, atol=1e-5, rtol=0)
    assert not torch.allclose(found, sparse.logits(tmp_path / "all"), atol=1e-2)


def test_experts_that_stay_get_new_numbers(make):
    models = [make(seed=seed) for seed in range(4)]
    sparse = upcycled(moe_upcycle(top_k=1), *models)
    fewer = upcycled(remove_experts(experts="0, 2"), sparse)
    for new, old in enumerate((1, 3)):
        name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
        assert torch.equal(fewer.tensors[name.format(new)], models[old].tensors["model.layers.1.mlp.gate_proj.weight"])
        gate = "model.layers.1.block_sparse_moe.gate.weight"
        assert torch.equal(fewer.tensors[gate][new], sparse.tensors[gate][old])
    assert len([name for name in fewer.tensors if ".layers.1." in name and ".experts." in name]) == 6


def test_experts_in_one_tensor_leave_too(make, tmp_path):
    """As transformers has them in memory, which is what its clients send."""
    sparse = upcycled(moe_upcycle(top_k=1), *(make(seed=seed) for seed in range(3)))
    fused = dict(sparse.load(tmp_path / "mixture").state_dict())
    fewer = merge(remove_experts(experts="1"), fused, [fused])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(fewer[name], fused[name][[0, 2]])
    assert torch.equal(fewer["model.layers.0.mlp.gate.weight"], fused["model.layers.0.mlp.gate.weight"][[0, 2]])


# The digits' network --------------------------------------------------------------------------------------------------


def test_the_digits_network_as_a_mixture():
    state, images = digits.initial(0), digits_client(0, 8).test.images_BHW
    for top_k in (1, 2):
        sparse = merge(moe_upcycle(copies=3, top_k=top_k), state, [state])
        torch.testing.assert_close(digits.logits(sparse, images), digits.logits(state, images), atol=1e-5, rtol=1e-5)
    assert list(sparse)[-1] == "router.weight"
    assert sparse["router.weight"].shape == (3, 64)


def test_digits_clients_become_experts_and_can_be_trained_further():
    base = digits.initial(0)
    clients = [digits_client(partition, 8) for partition in (1, 3)]
    trained = [digits.train(base, each.train, epochs=3, learning_rate=0.02, seed=0) for each in clients]
    updates = tuple(
        Update(str(at), 1.0, MemorySource(each), statistics=MemorySource(mixture.mean_pixels(own.train.images_BHW)))
        for at, (each, own) in enumerate(zip(trained, clients, strict=True))
    )
    sink = MemorySink()
    execute(moe_upcycle(router="hidden", top_k=1), Cohort(MemorySource(base), updates), sink)
    for at, own in enumerate(clients):
        shares = digits.network(sink.tensors).shares(own.test.images_BHW)
        assert shares[:, at].mean() > 0.9
    further = digits.train(sink.tensors, clients[0].train, epochs=1, learning_rate=0.02, seed=0)
    assert further.keys() == sink.tensors.keys()
    fewer = merge(remove_experts(experts="0"), sink.tensors, [sink.tensors])
    assert torch.equal(fewer["experts.0.hidden1.weight"], trained[1]["hidden1.weight"])
    config = reconfigure({"model_type": "mlp"}, moe_upcycle(top_k=1), 2)
    assert config == {"model_type": "mlp_moe", "num_experts": 2, "num_experts_per_tok": 1}


# Bad input ------------------------------------------------------------------------------------------------------------


def spec_of(tensors, clients=2, **options):
    ids = tuple(str(at) for at in range(clients))
    return CohortSpec({n: TensorSpec.of(t) for n, t in tensors.items()}, ids, (1 / clients,) * clients, **options)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"copies": 2, "top_k": 3}, "parameter 'top_k' of moe_upcycle: found 3, wanted at most the 2 experts"),
        ({"copies": 2, "router": "hidden"}, "found 'hidden' with copies, wanted one expert a client"),
        ({"source": "base"}, "parameter 'source' of moe_upcycle: found 'base' without copies"),
        ({"method": "lora_svd"}, "found 'lora_svd', wanted a method for models"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_construction(settings, problem):
    with pytest.raises(RecipeError, match=problem):
        moe_upcycle(**settings)


def test_more_experts_a_token_than_clients_are_refused(make):
    dense = make()
    with pytest.raises(MergeError, match=r"top_k is 3, and 2 client\(s\) make as many experts"):
        list(moe_upcycle(top_k=3).plan(spec_of(dense.tensors)))
    with pytest.raises(RecipeError, match="top_k is 3, above the 2 experts"):
        reconfigure(dense.config, moe_upcycle(top_k=3), 2)
    with pytest.raises(RecipeError, match="the number of clients is not given"):
        reconfigure(dense.config, moe_upcycle())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3_text"])
def test_families_without_a_mixture_are_refused(make, family):
    names = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} if family == "gpt2" else {}
    dense = make(family, **names)
    with pytest.raises(RecipeError, match=r"unknown family|has no place in a model of family"):
        list(moe_upcycle().plan(spec_of(dense.tensors)))
    with pytest.raises(
        RecipeError, match=f"unknown family '{family}', wanted one of qwen3, qwen2, llama, mistral, mlp"
    ):
        reconfigure(dense.config, moe_upcycle(), 2)


def test_what_the_mixture_has_no_place_for_is_refused(make):
    dense = make(mlp_bias=True)
    with pytest.raises(
        RecipeError, match=r"'model\.layers\.0\.mlp\.down_proj\.bias' has no place in a model of family mixtral"
    ):
        list(moe_upcycle().plan(spec_of(dense.tensors)))


@pytest.mark.parametrize("text", ["", "one", "-1", "1,", "1.5"])
def test_experts_that_are_no_numbers_are_refused(text):
    with pytest.raises(RecipeError, match=r"parameter 'experts' of remove_experts: found .* wanted numbers >= 0"):
        remove_experts(experts=text)


def test_experts_that_are_not_there_are_refused(make):
    sparse = upcycled(moe_upcycle(top_k=2), *(make(seed=seed) for seed in range(2)))
    with pytest.raises(RecipeError, match="there is no expert 2, the mixture has 0 to 1"):
        list(remove_experts(experts="2").plan(spec_of(sparse.tensors)))
    with pytest.raises(RecipeError, match="0 of 2 experts would be left, wanted at least 1"):
        list(remove_experts(experts="0,1").plan(spec_of(sparse.tensors)))
    with pytest.raises(RecipeError, match="given to 2 experts and 1 would be left; set top_k lower"):
        reconfigure(sparse.config, remove_experts(experts="1"))
    assert reconfigure(sparse.config, remove_experts(experts="1", top_k=1))["num_experts_per_tok"] == 1
    with pytest.raises(RecipeError, match="found no router among the tensors"):
        list(remove_experts().plan(spec_of(make().tensors)))
    with pytest.raises(RecipeError, match="found 'merged', wanted base or a client's id"):
        remove_experts(source="merged")


def test_a_refused_plan_writes_nothing(make):
    dense, begun = make(), []

    class Sink(MemorySink):
        def begin(self, specs):
            begun.append(specs)

    cohort = Cohort(MemorySource(dense.tensors), (Update("0", 1.0, MemorySource(dense.tensors)),))
    with pytest.raises(MergeError, match="top_k is 2"):
        execute(moe_upcycle(), cohort, Sink())
    assert not begun


def test_the_structures_are_registered_as_such():
    found = {name for name, entry in METHODS.items() if entry.merges == "structures"}
    assert found == {"layer_stack", "depth_upscale", "moe_upcycle", "remove_experts"}
