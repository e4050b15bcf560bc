"""The network: deterministic given a seed, never changing what it was given, and worth finetuning."""

import pytest
import torch

from digits_clients import data, model


@pytest.fixture(scope="module")
def base():
    return model.initial(0)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def quick(state, client, seed, epochs=1):
    return model.train(state, client.train, epochs=epochs, learning_rate=0.02, seed=seed)


def test_the_base_is_a_float32_state_dict_of_301066_parameters(base):
    assert {name: tuple(tensor.shape) for name, tensor in base.items()} == {
        "hidden1.weight": (512, 64),
        "hidden1.bias": (512,),
        "hidden2.weight": (512, 512),
        "hidden2.bias": (512,),
        "output.weight": (10, 512),
        "output.bias": (10,),
    }
    assert sum(tensor.numel() for tensor in base.values()) == 301_066
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in base.values())


def test_the_base_is_the_callers_own(base):
    mine = model.initial(0)
    mine["output.bias"].zero_()
    assert equal(model.initial(0), base)


def test_pretraining_is_a_function_of_the_seed(base):
    model._pretrained.cache_clear()
    assert equal(model.initial(0), base)
    assert not equal(model.random_state(0), model.random_state(1))


def test_training_depends_on_the_seed_alone(base):
    client = data.client(1, 8)
    first = quick(base, client, seed=(0, 1, 1))
    torch.manual_seed(123)
    torch.rand(7)
    assert equal(first, quick(base, client, seed=(0, 1, 1)))
    assert not equal(first, quick(base, client, seed=(0, 2, 1)))
    assert not equal(first, quick(base, client, seed=(0, 1, 2)))


def test_training_leaves_the_global_generator_and_its_arguments_alone(base):
    before, state = {name: tensor.clone() for name, tensor in base.items()}, torch.get_rng_state()
    client = data.client(2, 8)
    images_BHW = client.train.images_BHW.clone()
    trained = quick(base, client, seed=0)
    assert equal(base, before)
    assert torch.equal(client.train.images_BHW, images_BHW)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(tensor.requires_grad for tensor in trained.values())


def test_the_number_of_threads_changes_no_bit(base):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(quick(base, data.client(1, 8), seed=0))
    finally:
        torch.set_num_threads(threads)
    assert equal(*results)


def test_a_step_is_the_momentum_step_by_hand(base):
    client = data.client(0, 8)
    stepped = model.train(base, client.train, epochs=1, learning_rate=0.5, seed=0, batch_size=144, max_steps=1)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in base.items()}
    network = model.Network()
    logits = torch.func.functional_call(network, leaves, (client.train.images_BHW,))
    torch.nn.functional.cross_entropy(logits, client.train.labels_B).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(stepped[name], base[name] - 0.5 * leaf.grad)


def test_half_precision_comes_in_and_float32_goes_out(base):
    half = {name: tensor.to(torch.bfloat16) for name, tensor in base.items()}
    trained = quick(half, data.client(0, 8), seed=0)
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    assert model.logits(half, data.client(0, 8).test.images_BHW).dtype == torch.float32


def test_finetuning_beats_the_base_by_far_on_the_clients_own_domain(base):
    for partition in (1, 3):
        client = data.client(partition, 8)
        finetuned = quick(base, client, seed=0, epochs=20)
        assert model.accuracy(base, client.test) < 0.5
        assert model.accuracy(finetuned, client.test) > 0.8


def test_pretraining_is_good_on_the_clean_domain(base):
    assert model.accuracy(base, data.client(0, 8).test) > 0.85


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_training_that_cannot_be_is_refused(base, bad):
    with pytest.raises(ValueError, match="wanted >= 1, >= 1 and > 0"):
        model.train(base, data.client(0, 8).train, **{"epochs": 1, "learning_rate": 0.1, "seed": 0, **bad})
