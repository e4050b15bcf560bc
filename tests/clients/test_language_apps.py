"""The Flower apps of the language clients, and whole federations in process with a tiny model."""

import json

import peft
import pytest
import torch
import transformers
from flwr.app import ConfigRecord, RecordDict

from fl_merge.adapters import fold, load_adapter
from fl_merge.flower.apps import LoadedApp, run_app
from fl_merge.flower.client import receive
from fl_merge.flower.inprocess import FIRST_NODE_ID, InProcessGrid
from fl_merge.flower.records import to_record
from fl_merge.store import load
from language_clients import base, client_app, corpus, local, lora, server_app, weights
from language_clients.settings import Settings


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return {
        "layers": 2,
        "hidden": 32,
        "pretraining-steps": 3,
        "cache-folder": str(tmp_path_factory.mktemp("cache")),
        "local-steps": 3,
        "batch-size": 4,
        "sequence-length": 64,
        "learning-rate": 0.01,
        "train-bytes": 20_000,
        "evaluation-bytes": 1_000,
    }


def answer(kind, state, run_config, partition=1, server_round=1, node_config=None):
    """What client `partition` of four replies to a train or evaluate message with this global model."""
    content = RecordDict({"arrays": to_record(state), "config": ConfigRecord({"server-round": server_round})})
    nodes = [node_config or {} if at == partition else {} for at in range(4)]
    with InProcessGrid(client_app.app, 4, workers=0, run_config=run_config, node_configs=nodes) as grid:
        node = FIRST_NODE_ID + partition
        (reply,) = grid.send_and_receive([grid.create_message(content, kind, node, str(server_round))])
    assert not reply.has_error(), reply.error
    return reply, next(iter(reply.content.metric_records.values()))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("adapters", [{}, {"adapter-rank": "2,4", "adapter-alpha": "4,16"}], ids=["whole", "lora"])
def test_training_sends_what_training_gives_in_bfloat16(config, adapters):
    config = config | adapters
    settings, state = Settings.read(config), server_app.initial(config)
    reply, metrics = answer("train", state, config)
    own = corpus.client(1, 4, train_bytes=20_000)
    here = local.with_adapter(settings, 4, 16.0, state) if adapters else local.with_weights(settings, state)
    here.finetune(own.train, (0, 1, 1))
    wanted = {name: tensor.to(torch.bfloat16) for name, tensor in here.tensors().items()}
    assert equal(receive(reply), wanted)
    assert metrics["num-examples"] == 20_000 // 64
    assert metrics["bits-per-byte"] == pytest.approx(here.bits_per_byte(own.validation)[0])
    assert metrics["partition-id"] == 1
    if adapters:
        assert (metrics["lora-rank"], metrics["lora-alpha"]) == (4, 16.0)
        assert metrics["lora-scalings"] == 4.0
        assert lora.rank_of(receive(reply)) == 4
    again, _ = answer("train", state, config)
    assert equal(receive(again), wanted)
    later, _ = answer("train", state, config, server_round=2)
    assert not equal(receive(later), wanted)


def test_evaluation_is_on_the_clients_own_test_documents(config):
    settings, state = Settings.read(config), server_app.initial(config)
    reply, metrics = answer("evaluate", state, config, partition=3)
    bits, measured = local.with_weights(settings, state).bits_per_byte(corpus.client(3, 4).test)
    assert metrics["bits-per-byte"] == pytest.approx(bits)
    assert metrics["num-examples"] == int(measured)
    assert not reply.content.array_records


def test_a_client_may_have_text_of_its_own(config, tmp_path):
    for number in range(5):
        text = "\n".join(f"line {at} of the notes that are numbered {number}" for at in range(50))
        (tmp_path / f"{number}.txt").write_text(text)
    node_config = {"text-folder": str(tmp_path)}
    _, metrics = answer("train", server_app.initial(config), config, node_config=node_config)
    own = corpus.client_of_folder(tmp_path)
    assert metrics["num-examples"] == (sum(map(len, own.train)) + len(own.train)) // 64


def test_the_server_judges_every_domain(config):
    report = server_app.evaluate(config, 0, server_app.initial(config))
    by_domain = [report[f"bits-per-byte/{domain}"] for domain in corpus.DOMAINS]
    assert report["bits-per-byte"] == pytest.approx(sum(by_domain) / 4)
    assert report["worst"] == max(by_domain)
    assert 0 < report[f"bits-per-byte/{corpus.PUBLIC_DOMAIN}"] < 9


def federation(config, folder, **changes):
    """The model that a federation of four clients leaves after two rounds."""
    config = config | {"num-server-rounds": 2, "run-folder": str(folder), **changes}
    run_app(LoadedApp(server_app.app, client_app.app, run_config=config), nodes=4, workers=0)
    return load(folder)


def test_two_rounds_with_all_weights_make_every_domain_better(config, tmp_path):
    before = server_app.evaluate(config, 0, server_app.initial(config))
    after = server_app.evaluate(config, 2, federation(config, tmp_path / "run", **{"local-steps": 8}))
    assert after["bits-per-byte"] < before["bits-per-byte"] - 0.5
    assert all(after[f"bits-per-byte/{domain}"] < before[f"bits-per-byte/{domain}"] for domain in corpus.DOMAINS)


def test_two_rounds_with_adapters_of_one_rank_lower_the_mean(config, tmp_path):
    config = config | {"adapter-rank": "4", "adapter-alpha": "32", "local-steps": 8}
    before = server_app.evaluate(config, 0, server_app.initial(config))
    adapter = federation(config, tmp_path / "run")
    assert lora.rank_of(adapter) == 4
    assert server_app.evaluate(config, 2, adapter)["bits-per-byte"] < before["bits-per-byte"]


# With fewer steps it depends on the installed packages, whose licences are a client's data, how much better it gets.
MIXED = {"adapter-rank": "2,4,8", "adapter-alpha": "4,16,8", "local-steps": 12, "seed": 1}


@pytest.mark.parametrize("method", ["lora_svd", "lora_stack"])
def test_adapters_of_different_ranks_are_merged_by_their_products(config, tmp_path, method):
    config = config | MIXED | {"merge-method": method}
    before = server_app.evaluate(config, 0, server_app.initial(config))
    adapter = federation(config, tmp_path / "run")
    after = server_app.evaluate(config | {"lora-plain": True}, 2, adapter)
    assert after["bits-per-byte"] < before["bits-per-byte"] - 0.05
    assert lora.rank_of(adapter) == (8 if method == "lora_svd" else 2 + 4 + 8 + 2)

    settings = Settings.read(config)
    folder = tmp_path / "run" / "adapter"
    model = peft.PeftModel.from_pretrained(base.load(settings), folder).eval()
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base.folder(settings)
    loaded = local.Local(model, base.tokenizer(settings), settings)
    for domain, documents in corpus.validation_documents(1).items():
        assert loaded.bits_per_byte(documents)[0] == pytest.approx(after[f"bits-per-byte/{domain}"], abs=1e-4)
    asked = torch.tensor([list(b"import ")])
    assert model.generate(input_ids=asked, max_new_tokens=5, do_sample=False).shape[1] > 7


def test_a_residual_is_added_to_the_base_of_clients_and_server(config, tmp_path):
    """FedEx: the mean of the factors and the residual of all rounds are the exact sum of what clients have learned."""
    config = config | {"adapter-rank": "2", "merge-method": "lora_residual", "local-steps": 8, "wire-dtype": "float32"}
    exact = config | {"merge-method": "lora_stack"}
    judged = []
    for run_config, rounds in ((config, 1), (exact, 1), (config, 2)):
        folder = tmp_path / str(len(judged))
        state = federation(run_config, folder, **{"num-server-rounds": rounds})
        judged.append(server_app.evaluate(run_config | {"lora-plain": True}, rounds, state)["bits-per-byte"])
    assert judged[0] == pytest.approx(judged[1], abs=1e-4)  # all start from one A, so both are the mean of products
    assert any(name.startswith("residual.") for name in load(tmp_path / "0"))
    assert judged[2] < judged[0]
    main, rest = (load_adapter(tmp_path / "2" / name) for name in ("adapter", "adapter/residual"))
    fold([main, rest], base.folder(Settings.read(config)), tmp_path / "folded")
    whole = local.with_weights(Settings.read(config | {"adapter-rank": "0"}), load(tmp_path / "folded"))
    bits = [whole.bits_per_byte(corpus.validation_documents()[domain])[0] for domain in corpus.DOMAINS]
    assert sum(bits) / 4 == pytest.approx(judged[2], abs=1e-4)


def test_factors_that_do_not_travel_stay_with_the_client(config):
    """FedSA: only A is sent, and a client goes on with its own B."""
    config = config | {"adapter-rank": "4"}
    state = server_app.initial(config)
    about = {"lora-share": "A", "lora-trains": "AB", "lora-fitted": False}

    def ask(grid, server_round):
        settings = ConfigRecord({"server-round": server_round, **about})
        content = RecordDict({"arrays": to_record(state), "config": settings})
        message = grid.create_message(content, "train", FIRST_NODE_ID + 1, str(server_round))
        (reply,) = grid.send_and_receive([message])
        assert not reply.has_error(), reply.error
        return receive(reply)

    def grid():
        return InProcessGrid(client_app.app, 4, workers=0, run_config=config)

    with grid() as one, grid() as another:
        assert all(name.endswith(lora.A) for name in ask(one, 1))
        assert not equal(ask(one, 2), ask(another, 2))


def test_only_the_factors_of_the_round_are_trained(config):
    model = local.with_adapter(Settings.read(config | {"adapter-rank": "4"}), 4, 8.0).model
    for factors in ("A", "B", "AB"):
        lora.train_only(model, factors)
        trained = {name.split(".lora_")[1][0] for name, weight in model.named_parameters() if weight.requires_grad}
        assert trained == set(factors)


def test_a_mixture_travels_under_the_names_of_its_checkpoint(config):
    """As transformers writes them, not as it keeps them; what comes back computes the same."""
    mixture = transformers.AutoConfig.for_model(
        "mixtral",
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    model = transformers.AutoModelForCausalLM.from_config(mixture).eval()
    tensors = weights.tensors_of(model)
    assert "model.layers.1.block_sparse_moe.experts.2.w1.weight" in tensors
    settings, asked = Settings.read(config), torch.arange(20)[None]
    again = local.with_weights(settings, tensors, mixture)
    with torch.no_grad():
        assert torch.equal(again.model(asked).logits, model(asked).logits)
    assert equal(again.tensors(), tensors)
    assert equal(weights.tensors_of(weights.model_of(mixture, model.state_dict())), tensors)
    short = {name: tensor for name, tensor in tensors.items() if "experts.2" not in name}
    with pytest.raises(ValueError, match="the model that was sent is not the one that the settings name"):
        weights.model_of(mixture, short)


def test_a_model_of_hugging_faces_is_used_by_its_path(config):
    path = base.folder(Settings.read(config))
    named = config | {"model": path}
    own, theirs = server_app.initial(config), server_app.initial(named)
    assert equal(own, theirs)
    _, metrics = answer("evaluate", theirs, named, partition=2)
    assert 0 < metrics["bits-per-byte"] < 9


def test_another_model_than_the_settings_name_is_refused(config):
    with pytest.raises(ValueError, match="the model that was sent is not the one that the settings name"):
        local.with_weights(Settings.read(config | {"hidden": 16}), server_app.initial(config))


@pytest.mark.parametrize(
    ("run_config", "problem"),
    [
        ({"wire-dtype": "int8"}, "wire-dtype: 'int8', wanted one of float32, bfloat16, float16"),
        ({"local-steps": "five"}, "local-steps: 'five', wanted a number >= 1"),
        ({"local-steps": 0}, "local-steps: 0, wanted a number >= 1"),
        ({"adapter-rank": "4,0"}, "adapter-rank: '4,0', wanted whole numbers >= 1, or 0 alone"),
        ({"adapter-rank": "4;8"}, "adapter-rank: '4;8', wanted a number >= 0, or several by partition"),
        ({"adapter-alpha": "0"}, "adapter-alpha: '0', wanted numbers > 0"),
        ({"learning-rate": float("nan")}, "learning-rate: nan, wanted a number"),
    ],
)
def test_bad_settings_are_refused_by_name(run_config, problem):
    with pytest.raises(ValueError, match=problem):
        Settings.read(run_config)


def test_ranks_and_alphas_are_dealt_by_partition():
    settings = Settings.read({"adapter-rank": "4, 8,16", "adapter-alpha": 32})
    assert [settings.rank(partition) for partition in range(5)] == [4, 8, 16, 4, 8]
    assert [settings.alpha(partition) for partition in range(2)] == [32.0, 32.0]
    assert settings.uses_adapters
    assert not Settings.read({"adapter-rank": 0}).uses_adapters
