"""Layer stacking and depth up-scaling: which tensor comes from where, and what the deeper model computes."""

import json
import os

import pytest
import torch
from small_models import TOKENS, Model

from fl_merge import MergeError, RecipeError, build, kernels, merge
from fl_merge.execute import execute
from fl_merge.methods import depth_upscale, layer_stack, ties, weighted_average
from fl_merge.model import GlobalModel
from fl_merge.offline.commands import planned
from fl_merge.offline.run import merge_files
from fl_merge.store import load
from fl_merge.structures import reconfigure
from fl_merge.types import BASE, Cohort, CohortSpec, TensorSpec, Update

REST = [
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]
OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


def specs(depth, width=8, tied=False):
    names = [name for name in OUTSIDE if not (tied and name == "lm_head.weight")]
    names[1:1] = [f"model.layers.{layer}.{rest}" for layer in range(depth) for rest in REST]
    return {name: TensorSpec((width,) if "norm" in name else (width, width), torch.float32) for name in names}


def cohort_spec(depth, clients=("7", "9"), **options):
    return CohortSpec(specs(depth, **options), clients, (1 / len(clients),) * len(clients))


def plan(method, spec):
    return {output.name: output for output in method.plan(spec)}


def origins(method, spec):
    """For each new layer, the one (source, number) that all of its tensors are read from."""
    found: dict[int, set] = {}
    for name, output in plan(method, spec).items():
        if name.startswith("model.layers."):
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            for read in output.reads or (None,):
                if read is None:
                    continue
                source, layer = read.source, read.name.removeprefix("model.layers.").split(".", 1)
                assert layer[1] == rest
                found.setdefault(int(number), set()).add((source, int(layer[0])))
    assert sorted(found) == list(range(len(found)))
    assert all(len(each) == 1 for each in found.values())
    return [next(iter(found[number])) for number in range(len(found))]


def bits(tensors):
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


# Plans ----------------------------------------------------------------------------------------------------------------


def test_solar_makes_48_layers_of_32():
    method = depth_upscale(m=8, source="base")
    spec = cohort_spec(32)
    assert origins(method, spec) == [(BASE, layer) for layer in (*range(24), *range(8, 32))]
    assert plan(method, spec).keys() == specs(48).keys()
    config = reconfigure({"model_type": "llama", "num_hidden_layers": 32, "rms_norm_eps": 1e-5}, method)
    assert config == {"model_type": "llama", "num_hidden_layers": 48, "rms_norm_eps": 1e-5}


def test_goliath_interleaves_two_models():
    """Ranges of 16 to 20 layers of two models of 80 layers, in turns, that overlap by 8: 137 layers."""
    ranges = [(0, 16), (8, 24), (17, 32), (25, 40), (33, 48), (41, 56), (49, 64), (57, 72), (65, 80)]
    of = ["7", "9"]
    text = ", ".join(f"{of[at % 2]}[{start}:{stop}]" for at, (start, stop) in enumerate(ranges))
    method = layer_stack(layers=text, embeddings="7")
    wanted = [(at % 2, layer) for at, (start, stop) in enumerate(ranges) for layer in range(start, stop)]
    assert origins(method, cohort_spec(80)) == wanted
    assert reconfigure({"model_type": "llama", "num_hidden_layers": 80}, method)["num_hidden_layers"] == 137
    found = plan(method, cohort_spec(80))
    assert [found[name].reads[0].source for name in OUTSIDE] == [0, 0, 0]


def test_ends_head_and_scale():
    method = layer_stack(layers="9[2:], base[:1] * 0.5", embeddings="base", head="9")
    found = plan(method, cohort_spec(4))
    assert origins(method, cohort_spec(4)) == [(1, 2), (1, 3), (BASE, 0)]
    assert [found[name].reads[0].source for name in OUTSIDE] == [BASE, 1, 1]


def test_merged_layers_are_those_of_the_inner_method():
    base = {name: torch.randn(spec.shape) for name, spec in specs(3).items()}
    clients = {c: {n: t + 0.1 * torch.randn(t.shape) for n, t in base.items()} for c in ("7", "9")}
    for inner in (weighted_average(), ties(density=0.5), ties(density=0.5, scope="model"), build("dare_ties")):
        wanted = merge(inner, base, clients, seed=3)
        assert bits(merge(layer_stack(method=inner), base, clients, seed=3)) == bits(wanted)
        found = merge(layer_stack(layers="merged[:], merged[1:2]", method=inner), base, clients, seed=3)
        for rest in REST:
            again, first = found[f"model.layers.3.{rest}"], wanted[f"model.layers.1.{rest}"]
            assert torch.equal(again, first), f"{inner}: {rest}"


def test_lists_of_one_entry_a_layer_follow():
    config = {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    }
    new = reconfigure(config, layer_stack(layers="base[0:2], base[1:4]"))
    assert new["num_hidden_layers"] == 5
    assert new["layer_types"] == [config["layer_types"][layer] for layer in (0, 1, 1, 2, 3)]
    assert config["num_hidden_layers"] == 4
    assert reconfigure(config, ties()) == config


# What they compute ----------------------------------------------------------------------------------------------------


def restacked(method, model, *clients):
    tensors = merge(method, model.tensors, [client.tensors for client in clients or (model,)])
    return Model(reconfigure(model.config, method, len(clients or (model,))), tensors)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt2"])
def test_a_models_own_layers_in_order_give_the_model_back(make, family):
    names = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64} if family == "gpt2" else {}
    model = make(family, **names)
    other = make(family, seed=1, **names)
    method = layer_stack(layers="0[0:1], 0[1:3], 0[3:4]", embeddings="0")
    found = restacked(method, other, model)
    assert bits(found.tensors) == bits(model.tensors)
    assert found.config == other.config


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral"])
def test_a_deeper_model_with_silent_copies_computes_the_same(make, tmp_path, family):
    model = make(family, **({"num_local_experts": 3} if family == "mixtral" else {}))
    for m in (0, 1, 2):
        deeper = restacked(depth_upscale(m=m, zero_init=True), model)
        assert deeper.config["num_hidden_layers"] == 2 * (4 - m)
        torch.testing.assert_close(deeper.logits(tmp_path / "new"), model.logits(tmp_path / "old"), atol=1e-5, rtol=0)
    plain = restacked(depth_upscale(m=1), model)
    assert (plain.logits(tmp_path / "new") - model.logits(tmp_path / "old")).abs().max() > 1e-2


def test_a_stacked_model_loads_and_generates(make, tmp_path):
    first, second = make(seed=0), make(seed=1)
    method = layer_stack(layers="0[0:3], 1[1:4] * 0.5", embeddings="0", head="1")
    found = restacked(method, first, first, second)
    assert torch.equal(found.tensors["lm_head.weight"], second.tensors["lm_head.weight"])
    name = "self_attn.q_proj.weight"
    assert torch.equal(found.tensors[f"model.layers.4.{name}"], 0.5 * second.tensors[f"model.layers.2.{name}"])
    assert found.load(tmp_path / "stacked").config.num_hidden_layers == 6
    assert found.generated(tmp_path / "stacked").shape[1] > TOKENS.shape[1]


@pytest.mark.parametrize("zero_init", [False, True])
def test_an_up_scaled_model_generates(make, tmp_path, zero_init):
    model = make()
    found = restacked(depth_upscale(m=1, zero_init=zero_init), model).generated(tmp_path / "deeper")
    assert found.shape[1] > TOKENS.shape[1]
    if zero_init:
        assert torch.equal(found, model.generated(tmp_path / "original"))


SLICES = """\
merge_method: passthrough
slices:
  - sources: [{model: first, layer_range: [0, 3]}]
  - sources: [{model: second, layer_range: [1, 4]}]
  - sources: [{model: first, layer_range: [2, 4], parameters: {scale: 0.5}}]
"""


def test_mergekits_slices_write_the_same(make, tmp_path):
    """The last slice gives the final norm and the head there; the first one the embeddings."""
    first, second = make(seed=0), make(seed=1)
    first.save(tmp_path / "first"), second.save(tmp_path / "second")
    (tmp_path / "recipe.yaml").write_text(SLICES)
    merge_files(planned(tmp_path / "recipe.yaml"), tmp_path / "out", SLICES, version="0")
    ours = restacked(layer_stack(layers="0[0:3], 1[1:4], 0[2:4] * 0.5", embeddings="0"), first, first, second)
    theirs = load(tmp_path / "out")
    outside = {"model.norm.weight", "lm_head.weight"}  # which the last slice's scale there halves too
    assert theirs.keys() == ours.tensors.keys()
    assert {name for name, tensor in theirs.items() if not torch.equal(tensor, ours.tensors[name])} <= outside
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 8
    assert ours.config["num_hidden_layers"] == 8


def test_tied_embeddings_stay_tied(make, tmp_path):
    model = make(tie_word_embeddings=True)
    assert "lm_head.weight" not in model.tensors
    deeper = restacked(depth_upscale(m=1, zero_init=True), model)
    torch.testing.assert_close(deeper.logits(tmp_path / "new"), model.logits(tmp_path / "old"), atol=1e-5, rtol=0)


# Memory ---------------------------------------------------------------------------------------------------------------


class Shared:
    """A model of any size whose tensors are all in the same 1 MB, as if mapped from a file."""

    def __init__(self, described):
        self._specs, self._values = described, torch.zeros(1 << 18)

    def specs(self):
        return self._specs

    def read(self, name):
        return self._values[: self._specs[name].numel].view(self._specs[name].shape)

    def aliases(self):
        return {}


class Nowhere:
    """Counts what is written."""

    written = 0

    def begin(self, described):
        self.total = sum(spec.nbytes for spec in described.values())

    def place(self, name):
        return None

    def write(self, name, start, values):
        self.written += values.nbytes

    def finish(self):
        pass

    def abort(self):
        pass


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_up_scaling_takes_constant_memory():
    """48 layers of 1 MB tensors, 350 MB, pass through some megabytes."""
    model = Shared(specs(32, width=512))
    method = depth_upscale(m=8, zero_init=True, source="base")
    most = before = 0

    def watch(name):
        nonlocal most
        most = max(most, resident() - before)

    kernels.after(10**12)  # the compiled passes, which stay loaded, are no part of what a merge takes
    for _ in range(2):
        sink, most, before = Nowhere(), 0, resident()
        execute(method, Cohort(model, (Update("0", 1.0, model),)), sink, threads=2, on_tensor=watch)
        assert sink.written == sink.total > 350_000_000
    assert most < 40_000_000, most


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "base", "base[0-4]", "base[0:4] * x", "base[0:4] * nan", "[0:4]", "base[0:4],"])
def test_a_range_that_is_none_is_refused_at_construction(text):
    with pytest.raises(RecipeError, match=r"^parameter 'layers' of layer_stack: found .* wanted source\[start:stop\]"):
        layer_stack(layers=text)


@pytest.mark.parametrize("text", ["base[3:3]", "base[4:2]", "base[:0]"])
def test_an_empty_range_is_refused_at_construction(text):
    with pytest.raises(RecipeError, match="which has no layer"):
        layer_stack(layers=text)


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        (layer_stack(layers="base[0:5]"), r"'base\[0:5\]' is out of range, the model has layers 0 to 3"),
        (layer_stack(layers="base[4:]"), r"'base\[4:\]' is out of range"),
        (layer_stack(layers="base[0:3], base[2:4]", repeats=False), "overlaps: layer 2 of 'base' is taken twice"),
        (layer_stack(layers="merged[0:3] * 0.5"), "found a scale on 'merged' layers"),
        (depth_upscale(m=4), "m is 4 and the model has 4 layers, wanted m below that"),
        (depth_upscale(m=3, zero_init=True), "would lose layers 1 to 2, wanted m <= 2"),
    ],
    ids=str,
)
def test_layers_that_the_model_does_not_have_are_refused(method, problem):
    with pytest.raises(RecipeError, match=problem):
        plan(method, cohort_spec(4))


def test_a_source_that_does_not_exist_is_refused():
    with pytest.raises(MergeError, match=r"the source '8', wanted base, merged or a client \(7, 9\)"):
        plan(layer_stack(layers="8[0:2]"), cohort_spec(4))


def test_a_tied_head_of_another_source_is_refused():
    with pytest.raises(RecipeError, match=r"is tied to 'model\.embed_tokens\.weight': take both from one source"):
        plan(layer_stack(layers="base[:]", embeddings="base", head="7"), cohort_spec(4, tied=True))
    plan(layer_stack(layers="base[:]", embeddings="7"), cohort_spec(4, tied=True))


def test_models_of_different_sizes_are_refused(make, tmp_path):
    small, large = make(), make(hidden_size=64)
    with pytest.raises(Exception, match=r"shape \(.*64.*\), base has \(.*32.*\)"):
        merge(layer_stack(layers="0[0:2], 1[2:4]"), small.tensors, [small.tensors, large.tensors])
    spec = cohort_spec(4)
    both = CohortSpec(spec.tensors, spec.client_ids, spec.weights_N, clients_N=(spec.tensors, specs(4, width=16)))
    with pytest.raises(
        MergeError, match=r"client '9', .*shape \(16, 16\), base has \(8, 8\); models of different sizes"
    ):
        plan(layer_stack(layers="7[0:2], 9[2:4]", embeddings="7"), both)


def test_a_run_that_would_change_its_model_is_refused_before_it_begins():
    tensors = {name: torch.zeros(spec.shape) for name, spec in specs(4).items()}
    with pytest.raises(RecipeError, match="changes the model's tensors"):
        GlobalModel.initial(tensors, depth_upscale(m=1))
    GlobalModel.initial(tensors, layer_stack(layers="base[2:4], merged[0:2]"))


def test_a_model_without_layers_is_refused():
    with pytest.raises(RecipeError, match="found no numbered layers among the tensors"):
        merge(layer_stack(), {"weight": torch.zeros(2)}, [{"weight": torch.zeros(2)}])


def test_a_config_without_a_depth_is_refused():
    with pytest.raises(RecipeError, match="the config's 'num_hidden_layers' is None, wanted the number of layers"):
        reconfigure({"model_type": "llama"}, layer_stack())


def test_the_inner_method_is_one_for_models():
    with pytest.raises(RecipeError, match="found 'lora_svd', wanted a method for models"):
        layer_stack(method="lora_svd")
    with pytest.raises(RecipeError, match="wanted none beside the method"):
        depth_upscale(method=ties(), settings={"density": 0.5})
    with pytest.raises(RecipeError, match="unknown merge method 'tise'"):
        depth_upscale(method="tise")
