"""A small network for the digits: its pretrained start, its training, its accuracy. Values in, values out.

A model is a state dict, `dict[str, Tensor]`; nothing here keeps or changes one that it was given.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from digits_clients import mixture
from digits_clients.data import NUM_CLASSES, SIDE, Examples, public_examples, seeded

HIDDEN = 512
MOMENTUM = 0.9
PRETRAINING_EPOCHS = 30
PRETRAINING_RATE = 0.02
BATCH_SIZE = 32

State = dict[str, Tensor]


class Network(nn.Module):
    """64 pixels -> 512 -> 512 -> 10 logits, with ReLU: 301 066 float32 parameters; fewer with narrower layers."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(SIDE * SIDE, hidden)
        self.hidden2 = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, NUM_CLASSES)

    def forward(self, images_BHW: Tensor) -> Tensor:
        """Images (B, 8, 8) in [0, 1] -> logits (B, 10); pixels are centred to [-1, 1] here."""
        features = torch.relu(self.hidden1(images_BHW.flatten(1) * 2 - 1))
        return self.output(torch.relu(self.hidden2(features)))


def network(state: Mapping[str, Tensor], top_k: int = mixture.TOP_K) -> Network | mixture.Mixture:
    """A network of its own with these weights in float32: a mixture of experts if they are one's.

    Args:
        state: its weights.
        top_k: experts of an image, in a mixture.
    """
    with torch.device("meta"):  # draws nothing from the global generator
        empty = mixture.empty(state, top_k) if mixture.is_mixture(state) else Network(len(state["hidden1.bias"]))
    empty.load_state_dict({k: v.detach().to(torch.float32).clone() for k, v in state.items()}, assign=True)
    return empty.requires_grad_()


def random_state(seed: int = 0, hidden: int = HIDDEN) -> State:
    """An untrained network: every element uniform in +-1/sqrt(fan_in), torch's own range for linear layers."""
    draws = seeded("start", seed)
    with torch.device("meta"):
        shapes = Network(hidden).state_dict()
    state: State = {}
    for name, meta in shapes.items():
        fan_in = shapes[f"{name.rpartition('.')[0]}.weight"].shape[1]
        state[name] = torch.empty(meta.shape).uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=draws)
    return state


def train(
    state: Mapping[str, Tensor],
    examples: Examples,
    *,
    epochs: int,
    learning_rate: float,
    seed: object,
    batch_size: int = BATCH_SIZE,
    max_steps: int | None = None,
    only: Collection[str] | None = None,
    balance: float = 0.0,
    top_k: int = mixture.TOP_K,
) -> State:
    """The network after finetuning by stochastic gradient descent with momentum 0.9 on the cross entropy.

    Args:
        state: where to start; read, never written.
        examples: what to train on.
        epochs: passes over the examples, at least 1.
        learning_rate: > 0.
        seed: names any value; it names the order of the batches (new each epoch), the only thing that is drawn.
        batch_size: examples a step, at least 1; the last batch of an epoch may be smaller.
        max_steps: stop after so many gradient steps; None for no limit.
        only: names of the tensors that are trained; None for all.
        balance: how much of the load-balancing loss (`mixture.balance`) is added, of a mixture of experts.
        top_k: experts of an image, in a mixture.

    Returns:
        A new float32 state dict.
    """
    if epochs < 1 or batch_size < 1 or not 0 < learning_rate < math.inf:
        raise ValueError(
            f"epochs {epochs}, batch size {batch_size}, learning rate {learning_rate}: wanted >= 1, >= 1 and > 0"
        )
    trained, draws, steps = network(state, top_k), seeded("train", seed), 0
    # Four lines instead of torch.optim.SGD, whose first use costs each worker process well over a second of imports.
    parameters = [weight for name, weight in trained.named_parameters() if only is None or name in only]
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    with _one_thread():
        for _ in range(epochs):
            for batch in torch.randperm(len(examples), generator=draws).split(batch_size):
                if steps == max_steps:
                    break
                images_BHW = examples.images_BHW[batch]
                loss = functional.cross_entropy(trained(images_BHW), examples.labels_B[batch])
                if balance and isinstance(trained, mixture.Mixture):
                    loss = loss + balance * mixture.balance(trained.scores(images_BHW), trained.top_k)
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
                        velocity.mul_(MOMENTUM).add_(gradient)
                        parameter.sub_(velocity, alpha=learning_rate)
                steps += 1
    return {name: tensor.detach() for name, tensor in trained.state_dict().items()}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """On some processors matrix products round by the number of threads; here the seed alone is to decide."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def steps_an_epoch(num_examples: int, batch_size: int = BATCH_SIZE) -> int:
    """Gradient steps in one epoch."""
    return math.ceil(num_examples / batch_size)


@lru_cache(maxsize=4)
def _pretrained(seed: int) -> tuple[tuple[str, Tensor], ...]:
    state = train(
        random_state(seed),
        public_examples(seed),
        epochs=PRETRAINING_EPOCHS,
        learning_rate=PRETRAINING_RATE,
        seed=("public", seed),
    )
    return tuple(state.items())


def initial(seed: int = 0) -> State:
    """The base that every client starts from: pretrained on the 200 public clean images. Kept per process and seed."""
    return {name: tensor.clone() for name, tensor in _pretrained(seed)}


@torch.no_grad()
def logits(state: Mapping[str, Tensor], images_BHW: Tensor, top_k: int = mixture.TOP_K) -> Tensor:
    """Logits (B, 10), float32, of images (B, 8, 8)."""
    return network(state, top_k)(images_BHW)


def accuracy_of(logits_BK: Tensor, labels_B: Tensor) -> float:
    """The share of examples in [0, 1] whose largest logit is their label's."""
    return float((logits_BK.argmax(1) == labels_B).double().mean())


def accuracy(state: Mapping[str, Tensor], examples: Examples, top_k: int = mixture.TOP_K) -> float:
    """Accuracy in [0, 1] of a model."""
    return accuracy_of(logits(state, examples.images_BHW, top_k), examples.labels_B)


def accuracy_and_loss(
    state: Mapping[str, Tensor], examples: Examples, top_k: int = mixture.TOP_K
) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross entropy in nats."""
    logits_BK = logits(state, examples.images_BHW, top_k)
    return accuracy_of(logits_BK, examples.labels_B), float(functional.cross_entropy(logits_BK, examples.labels_B))


def expert_load(state: Mapping[str, Tensor], examples: Examples, top_k: int = mixture.TOP_K) -> dict[str, list[float]]:
    """The metric `expert-load` of a mixture: each expert's share of the choices. None of a dense network."""
    found = network(state, top_k)
    return {"expert-load": found.load(examples.images_BHW)} if isinstance(found, mixture.Mixture) else {}
