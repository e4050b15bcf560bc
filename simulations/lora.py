"""LoRA adapters of four clients with text of their own: ways of merging them, once and over ten rounds.

    python simulations/lora.py --seeds 10 --out runs/lora

Each client holds another domain (Python sources, licences, tables, C headers) and finetunes an adapter on a small
byte-level model that is pretrained here, anew for each seed: 2 layers of width 64, 140 thousand parameters. What is
judged is the global model on the domains' test documents, in bits per byte.

    equal ranks   rank 8 and alpha 16 at all clients
    mixed ranks   4, 8, 16, 4, alpha twice the rank: all products count 2 times
    mixed alpha   rank 8, alpha 8, 16, 32, 8: products count 1, 2, 4 and 1 times

All start from one A (clients of a lower rank have its first rows) and B = 0. "One shot" is one round of as many steps
as the ten rounds have together; its adapters are trained once, and every method merges the same. A method that does
not take a setting is shown as refused, with the server's own words. A round is what it is on a server
(`fl_merge.rounds.Round`, bfloat16 both ways), without the messages. Nothing is tuned: methods are at their defaults.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import study
from fl_merge.errors import FlMergeError, MergeError
from fl_merge.exchange import FITTED, SHARE, TRAINS, fit
from fl_merge.flower.carried import CarriedModel
from fl_merge.flower.records import to_record, to_tensors
from fl_merge.methods import (
    lora_factor_mean,
    lora_merge,
    lora_residual,
    lora_stack,
    lora_svd,
    lora_zero_pad,
)
from fl_merge.pairs import RESIDUAL, pairs_of
from fl_merge.rounds import Round
from fl_merge.store import MemorySource
from fl_merge.types import MergeMethod, TensorSpec, Update
from language_clients import base, corpus, lora
from language_clients.settings import Settings
from language_clients.tokens import Bytes, Tokens
from language_clients.training import bits_per_byte, finetune
from study import Interval, Row

State = dict[str, Tensor]

CLIENTS = len(corpus.DOMAINS)
WIRE = torch.bfloat16
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Size:
    """How much of everything; `--quick` has less.

    Args:
        layers, hidden, pretraining: of the model, and the steps it is pretrained for.
        rounds, steps: of the long federation, and each client's steps in each round of it.
        judged_after: rounds of it after which the global model is judged, the last among them.
        batch, length: sequences a step, bytes a sequence.
        rate: AdamW's.
        judged: bytes of each domain.
    """

    layers: int = 2
    hidden: int = 64
    pretraining: int = 400
    rounds: int = 10
    steps: int = 8
    judged_after: tuple[int, ...] = (1, 2, 5, 10)
    batch: int = 4
    length: int = 128
    rate: float = 3e-3
    judged: int = 8192


QUICK = Size(1, 32, pretraining=3, rounds=2, steps=2, judged_after=(1, 2), batch=2, length=32, judged=512)


@dataclass(frozen=True)
class Setting:
    """The clients' ranks and alphas."""

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    @property
    def largest(self) -> tuple[int, float]:
        """The largest rank, and the alpha that goes with it."""
        return max(zip(self.ranks, self.alphas, strict=True))

    @property
    def equal(self) -> bool:
        """Whether all clients have one rank and one alpha."""
        return len({*zip(self.ranks, self.alphas, strict=True)}) == 1


SETTINGS = {
    "equal ranks": Setting((8, 8, 8, 8), (16, 16, 16, 16)),
    "mixed ranks": Setting((4, 8, 16, 4), (8, 16, 32, 8)),
    "mixed alpha": Setting((8, 8, 8, 8), (8, 16, 32, 8)),
}

FEDIT, PADDED, FOLDED = "FedIT: mean of factors", "HetLoRA: zero-padding", "FLoRA: stack, folded in"
BASE, ALONE = "the base, untrained", "each client's own, on its own domain"


def methods(setting: Setting) -> dict[str, MergeMethod]:
    """What is compared. At equal ranks zero-padding is the mean of factors, and is not done twice."""
    rank, _ = setting.largest
    padded: dict[str, MergeMethod] = {PADDED: lora_zero_pad()} if not setting.equal else {}
    return {
        FEDIT: lora_factor_mean(),
        **padded,
        "FFA: A frozen, mean of B": lora_factor_mean(share="B"),
        "FedEx: mean and residual": lora_residual(),
        FOLDED: lora_stack(),
        f"svd, rank {rank}": lora_svd(rank=rank),
        f"KnOTS-TIES, rank {rank}": lora_merge(method="ties", space="knots", rank=rank),
    }


# Clients --------------------------------------------------------------------------------------------------------------


def products(adapter: Mapping[str, Tensor], scaling: float = 1.0) -> State:
    """Module -> scaling times B A, the residual's among them."""
    found: State = {}
    for pair in pairs_of({name: TensorSpec.of(tensor) for name, tensor in adapter.items()})[0].values():
        module = pair.module.removeprefix(RESIDUAL)
        product = scaling * (adapter[pair.b].float() @ adapter[pair.a].float())
        found[module] = found[module] + product if module in found else product
    return found


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Clients:
    """The clients of one seed, the base, and the text by which models are judged.

    Args:
        seed: of the split, the pretraining, the untrained adapter and the clients' batches.
        size: of everything.
    """

    def __init__(self, seed: int, size: Size) -> None:
        self.seed, self.size = seed, size
        settings = Settings(layers=size.layers, hidden=size.hidden, pretraining_steps=size.pretraining, seed=seed)
        self._base = base.load(settings)
        self._weights = _copied(self._base.state_dict())
        clients = [corpus.client(i, CLIENTS, seed=seed, train_bytes=settings.train_bytes) for i in range(CLIENTS)]
        public = corpus.split(corpus.PUBLIC_DOMAIN, seed).test
        read = Bytes()
        self._train = [read(client.train) for client in clients]
        self._test = {client.name: read(client.test) for client in clients} | {corpus.PUBLIC_DOMAIN: read(public)}
        self._adapted: dict[tuple[int, float], tuple[Any, State]] = {}
        self._first: dict[tuple[object, ...], State] = {}

    def examples(self, client: int) -> int:
        """A client's number of sequences."""
        return len(self._train[client]) // self.size.length

    def untrained(self, rank: int, alpha: float) -> State:
        """The adapter that everybody would draw: A random, B zero."""
        return _copied(self._model(rank, alpha)[1])

    def first(self, client: int, adapter: State, alpha: float, trains: str, steps: int) -> State:
        """`learned` in the first round, which is the same for all methods that start alike: done once."""
        key = (client, lora.rank_of(adapter), alpha, trains, steps)
        starts = torch.cat([adapter[name].flatten() for name in sorted(adapter)])
        if key not in self._first or not torch.equal(self._first[key]["starts"], starts):
            self._first[key] = {"starts": starts, **self.learned(client, adapter, {}, alpha, trains, 1, steps)}
        return {name: tensor for name, tensor in self._first[key].items() if name != "starts"}

    def learned(
        self, client: int, adapter: State, folded: State, alpha: float, trains: str, number: int, steps: int
    ) -> State:
        """A client's adapter after training.

        Args:
            client: who.
            adapter: what it starts from, in its rank and scaling.
            folded: what is added to the weights of its base.
            alpha: of the adapter.
            trains: "A", "B" or "AB".
            number: of the round; with the seed and the client it says which text comes in which step.
            steps: how many.
        """
        model, _ = self._model(lora.rank_of(adapter), alpha)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                module, ending, _ = name.partition(".base_layer.weight")
                if ending:
                    weight.copy_(self._weights[f"{module.removeprefix(PREFIX)}.weight"] + folded.get(module, 0))
        lora.put(model, adapter)
        lora.train_only(model, trains)
        size, key = self.size, (self.seed, number, client)
        text, rate = self._train[client], size.rate
        finetune(model, text, steps=steps, batch_size=size.batch, length=size.length, learning_rate=rate, key=key)
        return _copied(lora.take(model))

    def judged(self, added: State, domains: Sequence[str] = ()) -> dict[str, float]:
        """Bits per byte by domain of the base with `added` in its weights."""
        with torch.no_grad():
            for name, weight in self._base.named_parameters():
                weight.copy_(self._weights[name] + added.get(PREFIX + name.removesuffix(".weight"), 0))
        return {domain: self._bits(self._test[domain]) for domain in domains or self._test}

    def _bits(self, tokens: Tokens) -> float:
        size = self.size
        return bits_per_byte(self._base, tokens, length=size.length, limit=size.judged, num_bytes=Bytes.num_bytes)[0]

    def _model(self, rank: int, alpha: float) -> tuple[Any, State]:
        """The base with an adapter of a rank and alpha, and that adapter as it was drawn."""
        if (rank, alpha) not in self._adapted:
            model = lora.wrap(
                copy.deepcopy(self._base), rank=rank, alpha=alpha, targets=("all-linear",), seed=self.seed
            )
            self._adapted[rank, alpha] = model, _copied(lora.take(model))
        return self._adapted[rank, alpha]


def _copied(tensors: Mapping[str, Tensor]) -> State:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# Federations ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a round leaves.

    Args:
        added: what the global model adds to the base's weights, by module.
        down: bytes that a client is sent of it, on average.
        up: bytes that a client has sent, on average.
        seconds: of processor time for the merge.
        cut: what the merge cut off, of the norm of the whole.
    """

    added: State
    down: float
    up: float
    seconds: float
    cut: float


def federate(
    clients: Clients, setting: Setting, method: MergeMethod, rounds: int, steps: int, *, fold: bool = False
) -> Iterator[Outcome]:
    """A round after the other, as on a server.

    Args:
        clients: all take part in every round.
        setting: their ranks and alphas.
        method: that merges.
        rounds, steps: how many, and of each client in each.
        fold: clients are sent the merged adapter whole, add it to their base's weights, and start a new one.

    Raises:
        MergeError: if a client's adapter is refused, or the method does not merge them.
    """
    start = to_record({name: tensor.to(WIRE) for name, tensor in clients.untrained(*setting.largest).items()})
    carried, folded = _begun(method, start), State()
    for number in range(1, rounds + 1):
        this = Round(number, carried.model, method, tuple(map(str, range(CLIENTS))), seed=clients.seed, wire=WIRE)
        up = 0
        for i, (rank, alpha) in enumerate(zip(setting.ranks, setting.alphas, strict=True)):
            record, about = carried.sent_to(str(i), clients.seed, number)
            sent, own = to_tensors(record), clients.untrained(rank, alpha)
            adapter = {name: sent[name].float() for name in own} if about[FITTED] else fit(sent, own, alpha / rank)
            trains = str(about[TRAINS])
            if number == 1:
                learned = clients.first(i, adapter, alpha, trains, steps)
            else:
                rest = folded if fold else products({n: t for n, t in sent.items() if n.startswith(RESIDUAL)})
                learned = clients.learned(i, adapter, rest, alpha, trains, number, steps)
            travels = {name: tensor.to(WIRE) for name, tensor in lora.shared(learned, str(about[SHARE])).items()}
            up += size_of(travels)
            update = Update(str(i), clients.examples(i), MemorySource(travels), {"lora-scalings": alpha / rank})
            refusal = this.offer(str(i), lambda update=update: update)
            if refusal is not None:
                raise MergeError(str(refusal))
        started = time.process_time()
        model, report = this.merge()
        seconds = time.process_time() - started
        if model is None:
            raise MergeError(str(report.failure))
        carried.follow(model)
        assert report.merge is not None
        cut = float(report.merge.found["lora-relative-error"])
        if fold:
            assert carried.wire_record is not None
            stack = to_tensors(carried.wire_record)
            folded = {module: folded.get(module, 0) + delta for module, delta in products(stack).items()}
            yield Outcome(folded, size_of(stack), up / CLIENTS, seconds, cut)
            carried = _begun(method, start)
            continue
        down = [size_of(to_tensors(carried.sent_to(str(i), clients.seed, number + 1)[0])) for i in range(CLIENTS)]
        yield Outcome(products(carried.model.master()), sum(down) / CLIENTS, up / CLIENTS, seconds, cut)


def _begun(method: MergeMethod, start: Any) -> CarriedModel:
    carried = CarriedModel(method, WIRE, {})
    carried.adopt(start)
    return carried


# The study ------------------------------------------------------------------------------------------------------------


def one_setting(seed: int, name: str, size: Size) -> list[Row]:
    """Every method in one setting: once, and over rounds. A row for each time that the global model is judged."""
    setting, clients = SETTINGS[name], Clients(seed, size)
    about: Row = {"seed": seed, "setting": name}
    rows = [about | {"rounds": 1, "method": ALONE, "round": 1} | alone(clients, setting, size)]
    rows += [about | {"rounds": n, "method": BASE, "round": 0} | judged(clients, {}) for n in (1, size.rounds)]
    for rounds, steps, after in (
        (1, size.rounds * size.steps, (1,)),
        (size.rounds, size.steps, size.judged_after),
    ):
        for told, method in methods(setting).items():
            row = about | {"rounds": rounds, "method": told}
            try:
                outcomes = federate(clients, setting, method, rounds, steps, fold=told == FOLDED)
                total = 0.0
                for number, outcome in enumerate(outcomes, start=1):
                    total += outcome.seconds
                    if number in after:
                        cost = {"down": outcome.down, "up": outcome.up, "seconds": total / number, "cut": outcome.cut}
                        rows.append(row | {"round": number} | judged(clients, outcome.added) | cost)
            except FlMergeError as problem:
                rows.append(row | {"round": rounds, "refused": str(problem)})
    return rows


def judged(clients: Clients, added: State) -> Row:
    """Bits per byte of each domain, and the mean over those of the clients."""
    bits = clients.judged(added)
    return {"mean": sum(bits[domain] for domain in corpus.DOMAINS) / CLIENTS, **bits}


def alone(clients: Clients, setting: Setting, size: Size) -> Row:
    """Each client's own adapter after all its steps, on its own domain: what a global model is to be held against."""
    bits: Row = {}
    start = clients.untrained(*setting.largest)
    for i, (rank, alpha) in enumerate(zip(setting.ranks, setting.alphas, strict=True)):
        sent = {name: tensor.to(WIRE) for name, tensor in start.items()}
        adapter = fit(sent, clients.untrained(rank, alpha), alpha / rank)
        learned = clients.first(i, adapter, alpha, "AB", size.rounds * size.steps)
        bits |= clients.judged(products(learned, alpha / rank), [corpus.DOMAINS[i]])
    return {"mean": sum(bits.values()) / CLIENTS, **bits}


# What comes out -------------------------------------------------------------------------------------------------------


def told(interval: Interval, sign: str = "") -> str:
    """Three decimals: differences between methods are hundredths of a bit."""
    if interval.low != interval.low:
        return f"{interval.mean:{sign}.3f} [one seed]"
    return f"{interval.mean:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def tables(rows: Sequence[Row]) -> str:
    """A table for each setting, once and over rounds; below each what was refused, and why."""
    domains = (*corpus.DOMAINS, corpus.PUBLIC_DOMAIN)
    text = [
        f"Bits per byte on test documents, {len({row['seed'] for row in rows})} seeds, mean and 95 % bootstrap "
        "interval; differences are paired by seed, negative is better. down, up: kB that a client is sent of a round's "
        "result, and sends; merge: processor milliseconds on the server."
    ]
    for rounds in dict.fromkeys(row["rounds"] for row in rows):
        for setting in dict.fromkeys(row["setting"] for row in rows):
            last = [r for r in study.where(rows, rounds=rounds, setting=setting) if r["round"] in (0, rounds)]
            refused = {row["method"]: row["refused"] for row in last if row.get("refused")}
            reference = FEDIT if FEDIT not in refused else PADDED
            theirs = study.by_seed(study.where(last, method=reference), "mean")
            lines = []
            for method in dict.fromkeys(row["method"] for row in last):
                own = study.where(last, method=method)
                if method in refused:
                    lines.append([method, "refused", *[""] * (len(domains) + 4)])
                    continue
                ours = study.by_seed(own, "mean")
                difference = "" if method == reference else told(study.paired(ours, theirs), "+")
                costs = [average(own, column, factor) for column, factor in (("down", 1e-3), ("up", 1e-3))]
                bits = [average(own, domain, 1.0, 3) for domain in domains]
                cost = [*costs, average(own, "seconds", 1e3)]
                lines.append([method, told(study.bootstrap(list(ours.values()))), difference, *bits, *cost])
            heading = "One shot" if rounds == 1 else f"{rounds} rounds"
            columns = ["method", "mean of clients' domains", f"to {reference.partition(':')[0]}", *domains]
            table = study.markdown([*columns, "down", "up", "merge"], lines)
            reasons = [f"- {method}: {reason}" for method, reason in refused.items()]
            text.append(
                "\n".join([f"### {heading}, {setting}\n", table, *(["", "Refused:", "", *reasons] if reasons else [])])
            )
    return "\n\n".join(text)


def average(rows: Sequence[Row], column: str, factor: float, digits: int = 1) -> str:
    """The mean of a column that some rows have; empty if none has it."""
    values = [factor * row[column] for row in rows if row.get(column) is not None]
    return f"{sum(values) / len(values):.{digits}f}" if values else ""


def plot(rows: Sequence[Row], rounds: int, path: Path) -> None:
    """The mean over the clients' domains after each judged round; to the right, one shot with as many steps."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    drawn, panels = study.figure(8.5, 3.2, len(settings))
    for axes, setting in zip(panels, settings, strict=True):
        here = [row for row in study.where(rows, setting=setting) if not row.get("refused")]
        base_line = average(study.where(here, rounds=rounds, method=BASE), "mean", 1.0, 6)
        for method in methods(SETTINGS[setting]):
            own = study.where(here, rounds=rounds, method=method)
            if not own:
                continue
            numbers = sorted({row["round"] for row in own})
            means = [float(average(study.where(own, round=number), "mean", 1.0, 6)) for number in numbers]
            (line,) = axes.plot([0, *numbers], [float(base_line), *means], linewidth=1.2, marker=".", label=method)
            once = average(study.where(here, rounds=1, method=method), "mean", 1.0, 6)
            axes.plot([rounds + 1], [float(once)], marker="D", markersize=4, color=line.get_color())
        axes.set_title(setting, fontsize=8)
        axes.set_xlabel("round (diamonds: one shot)")
        axes.legend(frameon=False, fontsize=6)
    panels[0].set_ylabel("bits per byte, mean of the clients' domains")
    study.save(drawn, path)


def main() -> None:
    parser = study.arguments("Ways of merging LoRA adapters of a language model.", "lora")
    options = parser.parse_args()
    seeds, size = (2, QUICK) if options.quick else (options.seeds, Size())
    tasks = {study.key(f"seed-{seed}", setting): (seed, setting, size) for seed in range(seeds) for setting in SETTINGS}
    console = Console()
    settings = dataclasses.asdict(size)
    rows = study.perform(tasks, one_setting, options.out, settings, workers=options.workers, console=console)
    plot(rows, size.rounds, options.out / "plot.png")
    study.report(options.out, rows, tables(rows), console)


if __name__ == "__main__":
    study.command(main)
