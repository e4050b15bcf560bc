"""Models of another structure out of a federation's clients, against controls with the same number of steps.

    python simulations/structure.py --seeds 3 --out runs/structure

Four clients with a domain of text each train a small byte-level model (clients/language). Bits per byte is on the
server's validation documents of the four domains, which nobody trains on; less is better.

    depth     layers stacked (all of them twice) and depth up-scaled (`depth_upscale`, as it is and with zero_init),
              before and after rounds of healing, against the original after the same rounds
    mixture   each client trains the base on its own domain (the branch), then the models become one:
              mixture, random or hidden router, then its router trained in rounds, then all weights;
              controls: averaging in rounds all the way, and a mixture of four copies of the base
              bounds: each client's own model on its domain and on all, their ensemble (mean of probabilities),
              all text in one place (as many steps as all clients together), the clients one after the other

Every client trains for as many steps in all in every row of the table that is marked "same steps". Seeds draw the text
of each step and the random routers; the pretrained base and the split of the documents are the same for all seeds.
Intervals are over seeds: three tell a large difference from none, and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import study
from fl_merge import merge
from fl_merge.method import Method
from fl_merge.methods import depth_upscale, layer_stack, moe_upcycle, weighted_average
from fl_merge.phases import trained_names
from fl_merge.statistics import collect
from fl_merge.structures import reconfigure
from language_clients import base, corpus, weights
from language_clients.corpus import DOMAINS, Document
from language_clients.settings import Settings
from language_clients.tokens import Bytes
from language_clients.training import bits_per_byte, finetune
from study import Row


@dataclass(frozen=True)
class Size:
    """How large the study is: the model, and each client's steps in the branch and in a round."""

    layers: int = 4
    hidden: int = 64
    pretraining: int = 200
    branch: int = 40
    router_rounds: int = 2
    rounds: int = 2
    steps: int = 20
    length: int = 64
    batch: int = 8
    rate: float = 2e-3
    evaluation_bytes: int = 4096
    train_bytes: int = 100_000


@dataclass(frozen=True)
class Model:
    """A model as it travels: its config, and its tensors under the names of the checkpoint."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def build(self) -> Any:
        """The transformers model."""
        return weights.model_of(weights.config_of(self.config), self.tensors)


class Federation:
    """Four clients and what they do, from one seed."""

    def __init__(self, seed: int, size: Size, cache: str) -> None:
        self.seed, self.size = seed, size
        settings = Settings(
            layers=size.layers, hidden=size.hidden, pretraining_steps=size.pretraining, cache_folder=cache
        )
        self.start = Model(weights.plain(base.config(settings)), weights.tensors_of(base.load(settings)))
        count = len(DOMAINS)
        self.texts = [corpus.client(at, count, train_bytes=size.train_bytes).train for at in range(count)]

    def trained(
        self, model: Model, text: Sequence[Document], steps: int, key: object, train: str = "all"
    ) -> Mapping[str, Tensor]:
        """The model's tensors after so many steps on a text."""
        built, size = model.build(), self.size
        weights.train_only(built, trained_names((train,), model.tensors))
        rate = size.rate if train == "all" else 5 * size.rate
        finetune(
            built,
            Bytes()(text),
            steps=steps,
            batch_size=size.batch,
            length=size.length,
            learning_rate=rate,
            key=(self.seed, key),
        )
        return weights.tensors_of(built)

    def clients(self, model: Model, steps: int, key: str, train: str = "all") -> dict[str, Mapping[str, Tensor]]:
        """What the clients make of a model, each on its own text."""
        return {str(at): self.trained(model, text, steps, (key, at), train) for at, text in enumerate(self.texts)}

    def averaged(self, model: Model, rounds: int, steps: int, key: str, train: str = "all") -> Model:
        """The model after rounds of training and averaging."""
        for number in range(rounds):
            sent = self.clients(model, steps, f"{key}/{number}", train)
            model = Model(model.config, merge(weighted_average(), model.tensors, sent, threads=1))
        return model

    def changed(self, method: Method, sent: Mapping[str, Mapping[str, Tensor]], hidden: bool = False) -> Model:
        """What a method that changes the structure makes of the clients' models."""
        statistics = {client: self.hidden(int(client), tensors) for client, tensors in sent.items()} if hidden else None
        tensors = merge(method, self.start.tensors, sent, seed=self.seed, statistics=statistics, threads=1)
        return Model(reconfigure(self.start.config, method, len(sent)), tensors)

    def hidden(self, client: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean hidden states of a client's text."""
        ids_T = Bytes()(self.texts[client]).ids_T[: 32 * self.size.length].view(32, -1)
        return collect(Model(self.start.config, tensors).build(), [ids_T], "hidden")

    def judged(self, model: Any) -> dict[str, float]:
        """Bits per byte by domain, of anything that is called as a transformers model is."""
        size, documents = self.size, corpus.validation_documents()
        return {
            domain: bits_per_byte(
                model, Bytes()(documents[domain]), length=size.length, limit=size.evaluation_bytes, num_bytes=256
            )[0]
            for domain in DOMAINS
        }


def parameters(model: Model) -> dict[str, int]:
    """How many parameters there are, and how many a token passes."""
    total = sum(tensor.numel() for tensor in model.tensors.values())
    experts = sum(tensor.numel() for name, tensor in model.tensors.items() if ".experts." in name)
    count, chosen = model.config.get("num_local_experts", 1), model.config.get("num_experts_per_tok", 1)
    return {"total": total, "active": total - experts + experts * chosen // count}


def work(part: str, seed: int, size: Size, cache: str) -> list[Row]:
    """The rows of one seed."""
    found = (depth if part == "depth" else mixture)(Federation(seed, size, cache))
    return [{"seed": seed, "part": part, **row} for row in found]


def row(federation: Federation, name: str, model: Model, same: bool) -> Row:
    """A model's row: bits per byte by domain and in the mean, its size, and whether it had the same steps."""
    bits = federation.judged(model.build())
    return {
        "model": name,
        "same steps": int(same),
        **bits,
        "mean": sum(bits.values()) / len(bits),
        **parameters(model),
    }


def depth(federation: Federation) -> list[Row]:
    """Deeper models, before and after healing."""
    size, start = federation.size, federation.start
    rounds, steps = size.router_rounds + size.rounds, size.steps
    itself = {str(at): start.tensors for at in range(len(DOMAINS))}
    rows = []
    for name, model in {
        "original": start,
        "stacked twice": federation.changed(layer_stack(layers="base[:], base[:]"), itself),
        "up-scaled": federation.changed(depth_upscale(source="base"), itself),
        "up-scaled, zero_init": federation.changed(depth_upscale(source="base", zero_init=True), itself),
    }.items():
        rows.append(row(federation, f"{name}, before", model, same=False))
        rows.append(row(federation, f"{name}, after", federation.averaged(model, rounds, steps, "heal"), same=True))
    return rows


def mixture(federation: Federation) -> list[Row]:
    """Mixtures of the clients' experts, and what they are measured against."""
    size, start = federation.size, federation.start
    routed, rounds, steps = size.router_rounds, size.rounds, size.steps
    total = size.branch + (routed + rounds) * steps
    branch = federation.clients(start, size.branch, "branch")
    rows = [row(federation, "base", start, same=False)]
    for name in ("random", "hidden"):
        model = federation.changed(moe_upcycle(router=name, top_k=2), branch, hidden=name == "hidden")
        rows.append(row(federation, f"mixture, {name} router, untrained", model, same=False))
        model = federation.averaged(model, routed, steps, "router", "router")
        rows.append(row(federation, f"mixture, {name} router, trained", model, same=False))
        model = federation.averaged(model, rounds, steps, "all")
        rows.append(row(federation, f"mixture, {name} router, all weights trained", model, same=True))
    plain = Model(start.config, merge(weighted_average(), start.tensors, branch, threads=1))
    rows.append(row(federation, "average", plain, same=False))
    plain = federation.averaged(federation.averaged(plain, routed, steps, "router"), rounds, steps, "all")
    rows.append(row(federation, "average + training", plain, same=True))
    itself = {str(at): start.tensors for at in range(len(DOMAINS))}
    copies = federation.changed(moe_upcycle(copies=4, source="base", top_k=2), itself)
    copies = federation.averaged(copies, 1, size.branch, "branch")
    copies = federation.averaged(federation.averaged(copies, routed, steps, "router"), rounds, steps, "all")
    rows.append(row(federation, "upcycled base + training", copies, same=True))
    return rows + bounds(federation, total)


def bounds(federation: Federation, total: int) -> list[Row]:
    """The clients' own models, their ensemble, all text in one place, one client after the other."""
    start = federation.start
    own = [Model(start.config, tensors) for tensors in federation.clients(start, total, "own").values()]
    judged = [federation.judged(model.build()) for model in own]
    sizes = parameters(start)
    alone = {domain: bits[domain] for domain, bits in zip(DOMAINS, judged, strict=True)}
    everywhere = {domain: sum(bits[domain] for bits in judged) / len(judged) for domain in DOMAINS}
    together = federation.judged(ensemble([model.build() for model in own]))
    everything = [document for text in federation.texts for document in text]
    joint = Model(start.config, federation.trained(start, everything, total * len(DOMAINS), "joint"))
    sequential = start
    for at, text in enumerate(federation.texts):
        sequential = Model(start.config, federation.trained(sequential, text, total, ("sequential", at)))
    rows = [
        {"model": name, "same steps": 1, **bits, "mean": sum(bits.values()) / len(bits), **sizes}
        for name, bits in (("individual, own domain", alone), ("individual, all domains", everywhere))
    ]
    four = {key: count * len(own) for key, count in sizes.items()}
    rows.append(
        {"model": "ensemble", "same steps": 1, **together, "mean": sum(together.values()) / len(together), **four}
    )
    return [*rows, row(federation, "joint", joint, same=True), row(federation, "sequential", sequential, same=True)]


def ensemble(models: Sequence[Any]) -> Any:
    """The mean of the models' probabilities, over bytes."""

    def call(**inputs: Any) -> Any:
        logs = torch.stack([model(**inputs).logits[..., :256].float().log_softmax(-1) for model in models])
        return SimpleNamespace(logits=logs.logsumexp(0))

    return call


CONTROLS = {"depth": "original, after", "mixture": "average + training"}


def tables(rows: Sequence[Row]) -> str:
    """Bits per byte by domain, parameters, and the difference to the control that had the same steps."""
    parts = []
    for part, control in CONTROLS.items():
        own = study.where(rows, part=part)
        theirs = study.by_seed(study.where(own, model=control), "mean", 1000)
        lines = []
        for name in dict.fromkeys(each["model"] for each in own):
            these = study.where(own, model=name)
            change = "" if name == control else study.paired(study.by_seed(these, "mean", 1000), theirs).signed()
            lines.append(
                [
                    name,
                    "yes" if these[0]["same steps"] else "no",
                    *(f"{sum(each[domain] for each in these) / len(these):.3f}" for domain in DOMAINS),
                    f"{sum(each['mean'] for each in these) / len(these):.3f}",
                    change,
                    f"{these[0]['active'] / 1e3:.0f} / {these[0]['total'] / 1e3:.0f}",
                ]
            )
        headings = [
            "model",
            "same steps",
            *DOMAINS,
            "mean",
            f"less '{control}', thousandths",
            "active / total, thousands",
        ]
        parts += [f"{part}, bits per byte:", study.markdown(headings, lines)]
    return "\n\n".join(parts)


def plot(rows: Sequence[Row], path: Path) -> None:
    """The mean over domains of each model, for both parts."""
    drawn, panels = study.figure(9, 4, 2)
    for axes, part in zip(panels, CONTROLS, strict=True):
        own = study.where(rows, part=part)
        names = list(dict.fromkeys(each["model"] for each in own))
        for at, name in enumerate(names):
            values = [each["mean"] for each in study.where(own, model=name)]
            axes.plot(values, [at] * len(values), "o", color="C0", markersize=3)
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.invert_yaxis()
        axes.set_xlabel("bits per byte, a dot a seed")
        axes.set_title(part, fontsize=8)
    study.save(drawn, path)


def main() -> None:
    parser = study.arguments("Models of another structure out of a federation's clients.", "structure")
    parser.add_argument("--cache", default="", help="where the pretrained base is kept (default ~/.cache/fl_merge)")
    parser.set_defaults(seeds=3)
    options = parser.parse_args()
    size, seeds = Size(), options.seeds
    if options.quick:
        size = replace(
            size,
            layers=2,
            hidden=32,
            pretraining=2,
            branch=2,
            steps=1,
            router_rounds=1,
            rounds=1,
            evaluation_bytes=256,
            length=32,
            batch=2,
            train_bytes=8_000,
        )
        seeds = 2
    base.folder(
        Settings(layers=size.layers, hidden=size.hidden, pretraining_steps=size.pretraining, cache_folder=options.cache)
    )  # once, before the processes want it
    tasks = {
        study.key(f"seed-{seed}", part): (part, seed, size, options.cache) for seed in range(seeds) for part in CONTROLS
    }
    console = Console()
    rows = study.perform(tasks, work, options.out, asdict(size), workers=options.workers, console=console)
    plot(rows, options.out / "plot.png")
    study.report(options.out, rows, tables(rows), console)


if __name__ == "__main__":
    study.command(main)
