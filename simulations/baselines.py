"""What merging is measured against, on the same clients, splits and training: pure torch, seeded, no server.

    python simulations/baselines.py                                    # eight domains
    python simulations/baselines.py --setting dirichlet --alpha 0.1    # ten clients with label skew

pretrained    the base that everyone starts from
individual    each client finetunes alone; judged on its own distribution, and on everybody's
sequential    one model finetuned by one client after the other
joint         the private data pooled: what federated learning is there to avoid, and the usual upper bound
ensemble      all N finetuned models are kept and asked; by mean logits or by majority vote

Accuracies are shares in [0, 1] of held-out test examples; "mean" is the plain mean over the clients' test sets.

Shape suffixes: N clients, B examples, K = 10 classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from digits_clients import data, model
from digits_clients.data import Client
from digits_clients.model import State

HEADINGS = ("mean %", "worst %", "norm. %", "up MB", "merge s", "passes")

EPOCHS = 20
LEARNING_RATE = 0.02


@dataclass(frozen=True)
class Row:
    """One way of getting a model, and what it gives and costs.

    Args:
        name: what the table calls it.
        accuracies: client name -> accuracy in [0, 1] on that client's held-out test set.
        uplink_bytes: all that the clients send in all.
        merge_seconds: on the server, to make one model of what was sent; None where nothing is merged.
        forward_passes: of the network, to answer one query.
        note: one remark, or nothing.
    """

    name: str
    accuracies: dict[str, float]
    uplink_bytes: int = 0
    merge_seconds: float | None = None
    forward_passes: int = 1
    note: str = ""

    @property
    def mean(self) -> float:
        """Mean accuracy over all test sets."""
        return sum(self.accuracies.values()) / len(self.accuracies)

    @property
    def worst(self) -> float:
        """Accuracy on the test set where it is lowest."""
        return min(self.accuracies.values())

    def normalised(self, individual: dict[str, float]) -> float:
        """Mean over test sets of this accuracy / the accuracy there of the client finetuned on it alone."""
        return sum(self.accuracies[name] / individual[name] for name in individual) / len(individual)


@dataclass(frozen=True)
class Population:
    """The clients of a setting, the base they start from, and the model each makes of it alone.

    Args:
        base: the pretrained state dict.
        clients: in partition order.
        finetuned: one state dict a client, each trained from the base on its own data.
        seed: of everything.
        epochs: passes over its own data that each client made.
    """

    base: State
    clients: Sequence[Client]
    finetuned: Sequence[State]
    seed: int = 0
    epochs: int = EPOCHS

    @property
    def individual(self) -> dict[str, float]:
        """Each client's own model on its own test set: the 100 % of normalised accuracy."""
        return {
            client.name: model.accuracy(state, client.test)
            for client, state in zip(self.clients, self.finetuned, strict=True)
        }

    def judge(self, state: State) -> dict[str, float]:
        """One model's accuracy on every client's held-out test set."""
        return {client.name: model.accuracy(state, client.test) for client in self.clients}


def model_bytes(state: State) -> int:
    """Bytes of a state dict as it stands, without any container's overhead."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def finetune(state: State, client: Client, *, seed: object, epochs: int = EPOCHS) -> State:
    """The model after one client's training."""
    return model.train(state, client.train, epochs=epochs, learning_rate=LEARNING_RATE, seed=seed)


def population(setting: str = "domains", *, alpha: float = 0.5, seed: int = 0, epochs: int = EPOCHS) -> Population:
    """The clients of one setting, each finetuned once from the pretrained base, as in round 1 of the Flower app."""
    count = len(data.DOMAINS) if setting == "domains" else data.DIRICHLET_CLIENTS
    clients = [data.client(i, count, setting=setting, alpha=alpha, seed=seed) for i in range(count)]
    base = model.initial(seed)
    finetuned = [finetune(base, client, seed=(seed, 1, i), epochs=epochs) for i, client in enumerate(clients)]
    return Population(base, clients, finetuned, seed, epochs)


def pretrained(people: Population) -> Row:
    """The base, untouched."""
    return Row("pretrained", people.judge(people.base))


def individual(people: Population) -> tuple[Row, Row]:
    """Each client alone: its model on its own distribution; and on everybody's, averaged over the N models."""
    everywhere = [people.judge(state) for state in people.finetuned]
    mean_of_models = {c.name: sum(row[c.name] for row in everywhere) / len(everywhere) for c in people.clients}
    return (
        Row(
            "individual, on its own",
            people.individual,
            note="N models, each asked only about its own domain: the 100 of norm. %",
        ),
        Row(
            "individual, on all",
            mean_of_models,
            note="one such model asked about every domain, mean of the N",
        ),
    )


def sequential(people: Population) -> tuple[Row, float]:
    """One model handed from client to client in partition order, and how much it forgot on the way.

    Returns:
        The final model's row, and the forgetting: over all clients but the last, the mean of accuracy right after that
        client's training minus accuracy at the end (in [0, 1]; close to Chaudhry et al., 2018, arXiv:1801.10112, who
        take the best accuracy at any earlier time).
    """
    state, learned = people.base, {}
    for i, client in enumerate(people.clients):
        state = finetune(state, client, seed=(people.seed, "sequential", i), epochs=people.epochs)
        learned[client.name] = model.accuracy(state, client.test)
    final = people.judge(state)
    earlier = [client.name for client in people.clients[:-1]]
    forgetting = sum(learned[name] - final[name] for name in earlier) / len(earlier)
    name = f"sequential, forgets {100 * forgetting:.0f}"
    note = "points of accuracy lost, on average, since a client's own training by the time the last client is done"
    return Row(name, final, uplink_bytes=len(people.clients) * model_bytes(people.base), note=note), forgetting


def joint(people: Population) -> Row:
    """One model on the pooled private data, with as many gradient steps as all the clients took together."""
    sent = sum(
        client.train.images_BHW.numel() + len(client.train) for client in people.clients
    )  # a byte a pixel, a label
    note = f"{joint_steps(people)} gradient steps, as many as all clients together; sends the data itself"
    return Row("joint", people.judge(joint_state(people)), uplink_bytes=sent, note=note)


def joint_steps(people: Population) -> int:
    """The gradient steps of all clients together."""
    return people.epochs * sum(model.steps_an_epoch(len(client.train)) for client in people.clients)


def joint_state(people: Population) -> State:
    """The model trained from the base on the pooled private data."""
    pooled = data.Examples(
        torch.cat([client.train.images_BHW for client in people.clients]),
        torch.cat([client.train.labels_B for client in people.clients]),
        torch.cat([client.train.numbers_B for client in people.clients]),
    )
    steps = joint_steps(people)
    return model.train(
        people.base,
        pooled,
        epochs=-(-steps // model.steps_an_epoch(len(pooled))),
        learning_rate=LEARNING_RATE,
        seed=(people.seed, "joint"),
        max_steps=steps,
    )


def majority_vote(logits_NBK: Tensor) -> Tensor:
    """The class (B,) that most models put first; among classes with equally many votes, the larger mean logit wins."""
    classes = logits_NBK.shape[-1]
    votes_BK = torch.nn.functional.one_hot(logits_NBK.argmax(-1), classes).sum(0)
    most_B = votes_BK.max(-1, keepdim=True).values
    return logits_NBK.mean(0).masked_fill(votes_BK < most_B, -torch.inf).argmax(-1)


def ensembles(people: Population) -> tuple[Row, Row]:
    """All N models answer every query: by the mean of their logits, and by majority vote."""
    mean, vote = {}, {}
    for client in people.clients:
        logits_NBK = torch.stack([model.logits(state, client.test.images_BHW) for state in people.finetuned])
        mean[client.name] = model.accuracy_of(logits_NBK.mean(0), client.test.labels_B)
        vote[client.name] = float((majority_vote(logits_NBK) == client.test.labels_B).double().mean())
    count = len(people.clients)
    sent = count * model_bytes(people.base)
    return (
        Row("ensemble, mean logits", mean, uplink_bytes=sent, forward_passes=count),
        Row("ensemble, majority vote", vote, uplink_bytes=sent, forward_passes=count),
    )


def baselines(people: Population) -> list[Row]:
    """Every baseline's row, in the order of the table."""
    return [pretrained(people), *individual(people), sequential(people)[0], joint(people), *ensembles(people)]


def table(rows: Sequence[Row], individual: dict[str, float], title: str) -> Group:
    """The rows as they are printed, 80 columns wide, with their notes below."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    shown.add_column("model", no_wrap=True)
    for heading in HEADINGS:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(row.name, *cells(row, individual))
    notes = [Text(f"{row.name}: {row.note}", style="dim") for row in rows if row.note]
    return Group(shown, *notes)


def cells(row: Row, individual: dict[str, float]) -> list[str]:
    """A row's numbers as printed: mean, worst and normalised accuracy, uplink, merge seconds, forward passes."""
    return [
        f"{100 * row.mean:.1f}",
        f"{100 * row.worst:.1f}",
        f"{100 * row.normalised(individual):.1f}",
        f"{row.uplink_bytes / 1e6:.2f}",
        "" if row.merge_seconds is None else f"{row.merge_seconds:.3f}",
        str(row.forward_passes),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="The baselines of merging on the digits clients.")
    parser.add_argument("--setting", choices=["domains", "dirichlet"], default="domains")
    parser.add_argument("--alpha", type=float, default=0.5, help="label skew of dirichlet (default 0.5)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small gain nothing from more, and lose where cores are shared
    people = population(arguments.setting, alpha=arguments.alpha, seed=arguments.seed)
    Console().print(table(baselines(people), people.individual, f"{arguments.setting}, seed {arguments.seed}"))


if __name__ == "__main__":
    main()
