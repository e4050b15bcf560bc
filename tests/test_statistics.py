"""What a client computes of its data: Gram matrices against explicit inputs, Fisher information by brute force."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from fl_merge.errors import RecipeError
from fl_merge.statistics import collect, patches


def close(found, wanted, tolerance=1e-5):
    assert found.shape == wanted.shape
    assert torch.allclose(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make()


def test_the_gram_matrix_of_linear_layers_with_and_without_bias(generator):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)))
    inputs = torch.randn(10, 3, generator=generator)
    found = collect(model, [inputs[:6], inputs[6:]])
    assert set(found) == {"count", "gram/0", "gram/2"}
    assert found["count"] == 10
    with_one = torch.cat([inputs, torch.ones(10, 1)], dim=1)
    close(found["gram/0"], with_one.T @ with_one)
    hidden = torch.relu(model[0](inputs)).detach()
    close(found["gram/2"], hidden.T @ hidden)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(3, 4, 3),
        lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2), groups=2),
        lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False),
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv1d(3, 5, 4, padding=2),
        lambda: nn.Conv3d(2, 2, 2, stride=(1, 2, 1)),
    ],
)
def test_a_convolution_is_its_kernels_times_the_patches(layer, generator):
    layer = seeded(layer)
    sides = (8, 7, 6)[: len(layer.kernel_size)]
    inputs = torch.randn(5, layer.in_channels, *sides, generator=generator)
    rows = patches(layer, inputs)
    weight = layer.weight.detach().reshape(layer.groups, layer.out_channels // layer.groups, -1)
    outputs = rows @ weight.mT
    outputs = outputs if layer.bias is None else outputs + layer.bias.detach().reshape(layer.groups, 1, -1)
    wanted = layer(inputs).detach()
    close(outputs.reshape(layer.groups, 5, -1, weight.shape[1]).permute(1, 0, 3, 2).reshape(wanted.shape), wanted)
    (gram,) = (tensor for name, tensor in collect(layer, [inputs]).items() if name != "count")
    rows = rows if layer.bias is None else functional.pad(rows, (0, 1), value=1.0)
    close(gram, (rows.mT @ rows).squeeze(0), 1e-4)


def test_an_embedding_counts_its_lookups():
    model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 2))
    found = collect(model, [torch.tensor([[0, 1, 1], [4, 1, 0]])])
    assert found["gram/0"].tolist() == [2, 3, 0, 0, 1]
    assert found["gram/1"].shape == (3, 3)
    assert found["gram/1"][-1, -1] == 6


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids))


def test_padding_counts_for_nothing():
    model = seeded(Padded)
    padded = {
        "input_ids": torch.tensor([[1, 2, 0], [3, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "labels": torch.zeros(2, 3),
    }
    apart = [{"input_ids": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[3]])}]
    for which in ("gram", "fisher"):
        found, wanted = collect(model, [padded], which), collect(model, apart, which)
        assert found.keys() == wanted.keys()
        for name in found:
            close(found[name], wanted[name])


def brute_force(model, inputs):
    """The definition: for each example and each class, the square of the gradient of the log probability."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in inputs:
        for label in range(model(inputs[:1]).shape[1]):
            model.zero_grad()
            log_p = model(example[None]).log_softmax(1)[0, label]
            log_p.backward()
            for name, parameter in model.named_parameters():
                total[name] += log_p.detach().exp() * parameter.grad**2
    model.zero_grad()
    return total


def test_fisher_is_per_example_and_per_class(generator):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    inputs = torch.randn(6, 3, generator=generator)
    found = collect(model, [inputs[:4], inputs[4:]], "fisher")
    assert set(found) == {"count", "fisher/0.weight", "fisher/0.bias", "fisher/2.weight", "fisher/2.bias"}
    wanted = brute_force(model, inputs)
    for name, tensor in wanted.items():
        close(found[f"fisher/{name}"], tensor)
    # the known fault: the square of a batch's mean gradient on the model's own labels is something else
    labels = model(inputs).argmax(1)
    gradients = torch.autograd.grad(functional.cross_entropy(model(inputs), labels), list(model.parameters()))
    for gradient, tensor in zip(gradients, wanted.values(), strict=True):
        assert not torch.allclose(6 * gradient**2, tensor, rtol=0.5)


def test_fisher_of_logistic_regression_by_hand():
    """Two classes with logits 0: p = 1/2, and the gradient of log p_c by the logit of class 0 is +-1/2: squares 1/4."""
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    found = collect(model, [torch.tensor([[2.0], [0.0]])], "fisher")
    close(found["fisher/bias"], torch.tensor([0.5, 0.5]))  # 1/4 an example
    close(found["fisher/weight"], torch.tensor([[1.0], [1.0]]))  # 1/4 of 2 * 2, and nothing of the second


def test_drawn_classes_estimate_it(generator):
    model = seeded(lambda: nn.Linear(3, 4))
    inputs = torch.randn(8, 3, generator=generator)
    exact = collect(model, [inputs], "fisher")
    drawn = collect(model, [inputs], "fisher", samples=2000, generator=generator)
    for name in exact:
        assert torch.allclose(drawn[name], exact[name], rtol=0.15), name
    rough = collect(model, [inputs], "fisher", samples=1, generator=generator)
    assert not torch.allclose(rough["fisher/weight"], exact["fisher/weight"], rtol=0.01)


def test_drawn_positions_add_up_to_the_sum_over_positions(generator):
    """The cross terms of two positions have expectation zero, so one backward pass serves all positions."""
    model = seeded(Padded)
    batch = {"input_ids": torch.tensor([[1, 2, 1]])}
    exact = collect(model, [batch], "fisher")
    drawn = collect(model, [batch], "fisher", samples=4000, generator=generator)
    assert torch.allclose(drawn["fisher/head.weight"], exact["fisher/head.weight"], rtol=0.2, atol=2e-3)


def test_the_model_is_left_as_it_was(generator):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)))
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    inputs = torch.randn(6, 3, generator=generator)
    first = collect(model, [inputs], "gram,fisher")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    again = collect(model, [inputs], ["gram", "fisher"])
    assert all(torch.equal(first[name], again[name]) for name in first), "dropout was on"


def test_no_more_examples_than_asked_for_are_used(generator):
    model, inputs = nn.Linear(3, 2), torch.randn(10, 3, generator=generator)
    found = collect(model, [(inputs[:4], None), (inputs[4:8], None), "not looked at"], max_examples=6)
    assert found["count"] == 6
    close(found["gram/"][:3, :3], inputs[:6].T @ inputs[:6])


def test_layers_inside_a_transformer_are_seen(generator):
    model = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    found = collect(model, [torch.randn(2, 5, 8, generator=generator)])
    assert {"gram/linear1", "gram/linear2"} <= set(found)
    assert found["gram/linear1"][-1, -1] == 10
    # attention multiplies with its weights itself: no call, no statistics
    assert not any("self_attn" in name for name in found)


@pytest.mark.parametrize(("which", "told"), [("fisher", [1, 2, 3, 4, 5, 6]), ("gram", [4, 6]), ("gram,fisher", None)])
def test_it_tells_how_many_examples_are_done(which, told, generator):
    model, inputs, calls = nn.Linear(3, 2), torch.randn(10, 3, generator=generator), []
    collect(model, [inputs[:4], inputs[4:]], which, max_examples=6, on_examples=calls.append)
    assert calls == (told or [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"which": "grm"}, "found 'grm', wanted 'fisher' or 'gram'"),
        ({"which": ""}, "found '', wanted 'fisher' or 'gram'"),
        ({"max_examples": 0}, "max_examples 0"),
        ({"batches": []}, "there are no examples"),
        ({"which": "fisher", "model": nn.Linear(2, 5000)}, "too many for the exact"),
        ({"which": "fisher", "model": nn.Linear(2, 2).requires_grad_(False)}, "no parameter that requires a gradient"),
    ],
)
def test_what_cannot_be_is_refused(arguments, words):
    with pytest.raises(RecipeError, match=words):
        collect(**{"model": nn.Linear(2, 2), "batches": [torch.zeros(3, 2)]} | arguments)


def test_a_gram_matrix_of_one_example_is_that_example(generator):
    """What docs/statistics.md warns of."""
    secret = torch.randn(1, 3, generator=generator)
    found = collect(nn.Linear(3, 2), [secret])["gram/"]
    close(found[:-1, -1], secret[0])
