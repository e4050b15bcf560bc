"""Federations of many rounds in one process: `fl_merge.rounds.Round`, as on a server, without the messages.

The clients of a round are trained side by side, as one batch of networks; each gives what `digits_clients.model.train`
gives it alone, to rounding.

Shape suffixes: N clients, B examples, K = 10 classes, H hidden units, P = 64 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from digits_clients import data, model
from digits_clients.data import Client, Examples, seeded
from digits_clients.model import BATCH_SIZE, MOMENTUM, State
from fl_merge.errors import MergeError
from fl_merge.model import GlobalModel
from fl_merge.naming import STATISTICS
from fl_merge.rounds import Round
from fl_merge.statistics import collect
from fl_merge.store import MemorySource
from fl_merge.types import MergeMethod, TensorSource, Update

HIDDEN = 128
"""Hidden units in both layers: 26 122 parameters, a twelfth of the app's network, so that thousands of rounds pay."""


MAX_EXAMPLES = {"fisher": 16, "gram": 256}
"""Training images of which a client sends statistics. Fisher's take ten backward passes an image."""


@dataclass(frozen=True)
class Local:
    """How each client trains in each round.

    Args:
        epochs: passes over its own data.
        learning_rate: of gradient descent with momentum 0.9.
    """

    epochs: int = 5
    learning_rate: float = 0.02


Attack = Callable[[State, Sequence[State], Sequence[int], torch.Generator], list[State]]
"""From the model that was sent, what every client learned, who is bad, and draws, to what every client sends."""


def train_together(state: State, clients: Sequence[Examples], local: Local, seeds: Sequence[object]) -> list[State]:
    """Each client's model after training from the same start; as `model.train` with that client's seed.

    Raises:
        ValueError: if the clients do not make equally many steps an epoch.
    """
    steps = {model.steps_an_epoch(len(examples)) for examples in clients}
    if len(steps) > 1:
        raise ValueError(f"train_together: found {sorted(steps)} steps an epoch, wanted one number for all clients")
    stacked = {name: tensor.expand(len(clients), *tensor.shape).clone() for name, tensor in state.items()}
    parameters = [tensor.requires_grad_() for tensor in stacked.values()]
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    draws = [seeded("train", seed) for seed in seeds]
    for _ in range(local.epochs):
        orders = [torch.randperm(len(e), generator=draw) for e, draw in zip(clients, draws, strict=True)]
        for batch in zip(*(order.split(BATCH_SIZE) for order in orders), strict=True):
            gradients = torch.autograd.grad(_loss(stacked, clients, batch), parameters)
            with torch.no_grad():
                for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
                    velocity.mul_(MOMENTUM).add_(gradient)
                    parameter.sub_(velocity, alpha=local.learning_rate)
    return [{name: tensor[i].detach().clone() for name, tensor in stacked.items()} for i in range(len(clients))]


def _loss(stacked: State, clients: Sequence[Examples], batch: Sequence[Tensor]) -> Tensor:
    """The sum over clients of the mean cross entropy on each one's batch; shorter batches are padded with weight 0."""
    longest = max(len(numbers) for numbers in batch)
    images_NBP = torch.zeros(len(clients), longest, data.SIDE**2)
    labels_NB = torch.zeros(len(clients), longest, dtype=torch.int64)
    weights_NB = torch.zeros(len(clients), longest)
    for i, (examples, numbers) in enumerate(zip(clients, batch, strict=True)):
        images_NBP[i, : len(numbers)] = examples.images_BHW[numbers].flatten(1)
        labels_NB[i, : len(numbers)] = examples.labels_B[numbers]
        weights_NB[i, : len(numbers)] = 1 / len(numbers)

    def linear(inputs_NBX: Tensor, layer: str) -> Tensor:
        bias_N1Y = stacked[f"{layer}.bias"][:, None]
        return torch.baddbmm(bias_N1Y, inputs_NBX, stacked[f"{layer}.weight"].mT)

    hidden_NBH = torch.relu(linear(images_NBP * 2 - 1, "hidden1"))
    logits_NBK = linear(torch.relu(linear(hidden_NBH, "hidden2")), "output")
    losses = functional.cross_entropy(logits_NBK.flatten(0, 1), labels_NB.flatten(), reduction="none")
    return (losses * weights_NB.flatten()).sum()


def sampled(num_clients: int, per_round: int, seed: int, number: int) -> list[int]:
    """The clients that take part in a round, in order: the same for every method."""
    return sorted(torch.randperm(num_clients, generator=seeded("sampled", seed, number))[:per_round].tolist())


def federate(
    start: State,
    clients: Sequence[Client],
    method: MergeMethod,
    *,
    rounds: int,
    per_round: int,
    seed: int,
    local: Local = Local(),
    attack: Attack | None = None,
    bad: Sequence[int] = (),
    sends: Sequence[str] = (),
) -> Iterator[State]:
    """The global model after each round. A round that makes no model leaves the old one, as on a server.

    Args:
        start: the model before the first round.
        clients: all of them.
        method: any merge method, or one with a server optimizer.
        rounds: how many.
        per_round: clients that train in each.
        seed: of who takes part, of the order of batches, and of the method's draws.
        local: each client's training.
        attack: what bad clients make of what was learned.
        bad: their places in `clients`.
        sends: what clients send beside the model, as `MethodEntry.sends`.

    Raises:
        MergeError: if the first round makes no model although every update was usable.
    """
    current = GlobalModel.initial(start, method)
    for number in range(1, rounds + 1):
        chosen = sampled(len(clients), per_round, seed, number)
        train = [clients[i].train for i in chosen]
        sent = current.tensors()
        learned = train_together(sent, train, local, [(seed, number, i) for i in chosen])
        if attack is not None:
            places = [place for place, i in enumerate(chosen) if i in bad]
            learned = attack(sent, learned, places, seeded("attack", seed, number))
        this = Round(number, current, method, tuple(map(str, chosen)), seed=seed)
        for i, state, examples in zip(chosen, learned, train, strict=True):
            steps = local.epochs * model.steps_an_epoch(len(examples))
            extra = statistics(state, examples, [kind for kind in sends if kind in STATISTICS])
            update = Update(str(i), len(examples), MemorySource(state), {"local-steps": steps}, extra)
            this.offer(str(i), lambda update=update: update)
        merged, report = this.merge()
        if merged is None and number == 1 and not report.refused:
            raise MergeError(str(report.failure))  # the method's own reason, which every round will have
        current = merged or current
        yield current.tensors()


def statistics(state: State, examples: Examples, kinds: Sequence[str]) -> TensorSource | None:
    """What a client sends of its training images; nothing if nothing is asked for."""
    if not kinds:
        return None
    fewest = min(MAX_EXAMPLES[kind] for kind in kinds)
    return MemorySource(collect(model.network(state), [examples.images_BHW], kinds, fewest))


def accuracies(states: Iterator[State], sets: Mapping[str, Examples]) -> dict[str, list[float]]:
    """The accuracy after each round on each of several sets of examples."""
    found: dict[str, list[float]] = {name: [] for name in sets}
    for state in states:
        for name, examples in sets.items():
            found[name].append(model.accuracy(state, examples))
    return found
