"""The global model between the rounds of a run, and the records in which it travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fl_merge.adapters import BaseModel
from fl_merge.errors import MergeError, RecipeError
from fl_merge.exchange import FITTED, SHARE, TRAINS, Downlinks, Form, exchange_of, form_in_state
from fl_merge.flower.records import to_record, views
from fl_merge.lowrank import Exchange
from fl_merge.model import GlobalModel
from fl_merge.pairs import RESIDUAL, pairs_of
from fl_merge.phases import as_schedule
from fl_merge.types import MergeMethod, TensorSpec


class CarriedModel:
    """The model as it is kept, as it is given out, and as clients are sent it.

    Args:
        method: that will merge, or a schedule of phases.
        wire: the floating dtype in which clients are sent it; None for the model's own.
        tied: names that are another name's tensor.
        architecture: the config of the model that a run starts from, where clients build the model from it.
        base: the model that adapters are folded into, of a schedule that begins with adapters.
        adapter_config: what is known of the adapters beside ranks and scalings.

    Attributes:
        record: the model as it is given out; None before `adopt`.
        wire_record: as clients are sent it.
    """

    def __init__(
        self,
        method: MergeMethod,
        wire: torch.dtype | None,
        tied: Mapping[str, str],
        architecture: Mapping[str, Any] | None = None,
        base: BaseModel | None = None,
        adapter_config: Mapping[str, Any] | None = None,
    ) -> None:
        schedule = as_schedule(method)
        first = schedule.phases[0]
        if schedule.folds and base is None:
            raise RecipeError(
                f"phase 1: {first.method} merges adapters, and the phases after it need the model that they are folded "
                "into: found none, wanted FedMerge(base=...) or 'base-model' in the run config, a safetensors file or "
                "folder"
            )
        if base is not None and not schedule.folds:
            raise RecipeError(f"base: found one for {first.method}, wanted it for phases that begin with adapters")
        self.record: ArrayRecord | None = None
        self.wire_record: ArrayRecord | None = None
        self._method, self._schedule, self._wire, self._tied = method, schedule, wire, tied
        self._architecture = architecture
        self._base = replace(base, architecture=architecture or base.architecture) if base is not None else None
        self._adapter_config = dict(adapter_config or {})
        self._base_specs: dict[str, TensorSpec] = {}
        self._model: GlobalModel | None = None
        self._downlinks: Downlinks | None = None
        self._fitted: dict[object, ArrayRecord] = {}

    @property
    def model(self) -> GlobalModel:
        """The global model, float32 master included.

        Raises:
            MergeError: before the first round.
        """
        if self._model is None:
            raise MergeError("there is no global model yet: configure_train has not been called")
        return self._model

    def adopt(self, arrays: ArrayRecord) -> None:
        """Make `arrays` the global model, unless it is the record that the model was given out as.

        Raises:
            RecipeError: if no run can start from it.
        """
        if arrays is self.record:
            return
        if self._base is not None:
            self._model = self._initial_adapter(views(arrays), self._base)
        else:
            self._model = GlobalModel.initial(
                views(arrays), self._method, wire=self._wire, tied=self._tied, architecture=self._architecture
            )
        self.record = arrays
        self._downlinks = None
        self.wire_record = arrays if self._wire is None else to_record(self._model.sent, encoded=self._model.encoded)

    def _initial_adapter(self, tensors: Mapping[str, Tensor], base: BaseModel) -> GlobalModel:
        """The adapter that a run begins with, once all that comes after it has been planned."""
        try:
            model = GlobalModel.initial(tensors, self._schedule.phases[0].method, wire=self._wire)
            source = base.check(_main(model.specs()), self._adapter_config)
        except RecipeError as error:
            raise RecipeError(f"phase 1: {error}") from None
        self._base_specs = dict(source.specs())
        once = {n: s for n, s in self._base_specs.items() if n not in {**source.aliases(), **self._tied}}
        self._schedule.check(once, base.architecture)
        return model

    @property
    def holds_adapter(self) -> bool:
        """Whether the global model is the adapter of a run that goes on with the model which it will be folded into."""
        return self._base is not None and bool(pairs_of(_main(self.model.specs()))[0])

    def wanted_specs(self, adapter: bool) -> Mapping[str, TensorSpec]:
        """What clients are sent in a run like this before its structure changes: names, shapes and dtypes.

        Args:
            adapter: while adapters are exchanged; else once they are folded in.
        """
        if self._base is None or adapter:
            return self.model.specs()
        return {
            name: TensorSpec(spec.shape, self._wire) if self._wire is not None and spec.is_floating else spec
            for name, spec in self._base_specs.items()
        }

    def fold(self) -> int:
        """Go on with the base that has the global adapter in it; gives the number of modules that have changed.

        The master is the sum in float32; it is the base's dtype that is sent and given out.

        Raises:
            MergeError: if a value is not finite, or does not fit the dtype in which it is sent.
        """
        assert self._base is not None
        modules = len(pairs_of(_main(self.model.specs()))[0])
        folded = self._base.folded(self.model.master(), self._adapter_config)
        model = GlobalModel.of(
            folded.tensors, wire=self._wire, dtypes=folded.dtypes, tied={**folded.tied, **self._tied}
        )
        self.follow(replace(model, architecture=dict(self._base.architecture)))
        return modules

    def given_out(self) -> ArrayRecord:
        """The model's record.

        Raises:
            MergeError: before the first round.
        """
        if self.record is None:
            raise MergeError("there is no global model yet")
        return self.record

    def follow(self, model: GlobalModel) -> None:
        """Go on with a model that a round has made."""
        self._downlinks = None
        self._model, self.record = model, to_record(model.tensors(), encoded=model.encoded)
        self.wire_record = self.record if self._wire is None else to_record(model.sent, encoded=model.encoded)

    def begin_phase(self) -> None:
        """Forget the state of the server optimizer: the next phase has its own."""
        if self.model.optimizer_state:
            self._model = replace(self.model, optimizer_state={})

    def sent_to(self, client: str, seed: int, server_round: int) -> tuple[ArrayRecord, dict[str, bool | str]]:
        """What a client is sent, and what is said of it in the message's config: nothing, but of adapters."""
        assert self.wire_record is not None
        exchange = exchange_of(self._schedule.at(server_round).method)
        if exchange is None:
            return self.wire_record, {}
        about: dict[str, bool | str] = {TRAINS: exchange.trains(server_round), SHARE: exchange.share}
        form = form_in_state(self.model.optimizer_state, client, self.model.specs())
        if form is None:
            return self.wire_record, {**about, FITTED: False}
        return self._in_form(form, exchange, seed, server_round), {**about, FITTED: True}

    def _in_form(self, form: Form, exchange: Exchange, seed: int, server_round: int) -> ArrayRecord:
        if self._downlinks is None:
            self._downlinks = Downlinks(self.model.master(), exchange)
            self._fitted = {}
        # With the round: what clients train from may not depend on whether they evaluated the model in the one before.
        key = (server_round, tuple(form.ranks.items()), tuple(form.scalings.items()))
        if key not in self._fitted:
            tensors = self._downlinks.fitted(form, (seed, server_round))
            dtypes = {
                n: self._wire if self._wire and t.is_floating_point() else self.model.dtypes[n]
                for n, t in tensors.items()
            }
            self._fitted[key] = to_record({name: tensor.to(dtypes[name]) for name, tensor in tensors.items()})
        return self._fitted[key]


def _main(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {name: spec for name, spec in specs.items() if not name.startswith(RESIDUAL)}
