"""The global model between the rounds of a run, and the records in which it travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ArrayRecord

from fl_merge.errors import MergeError
from fl_merge.exchange import FITTED, SHARE, TRAINS, Downlinks, Form, exchange_of, form_in_state
from fl_merge.flower.records import to_record, views
from fl_merge.model import GlobalModel
from fl_merge.types import MergeMethod


class CarriedModel:
    """The model as it is kept, as it is given out, and as clients are sent it.

    Args:
        method: that will merge.
        wire: the floating dtype in which clients are sent it; None for the model's own.
        tied: names that are another name's tensor.
        architecture: the config of the model that a run starts from, where clients build the model from it.

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
    ) -> None:
        self.record: ArrayRecord | None = None
        self.wire_record: ArrayRecord | None = None
        self._method, self._wire, self._tied = method, wire, tied
        self._architecture = architecture
        self._model: GlobalModel | None = None
        self._exchange = exchange_of(method)
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
        self._model = GlobalModel.initial(
            views(arrays), self._method, wire=self._wire, tied=self._tied, architecture=self._architecture
        )
        self.record = arrays
        self._downlinks = None
        self.wire_record = arrays if self._wire is None else to_record(self._model.sent, encoded=self._model.encoded)

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
        if self._exchange is None:
            return self.wire_record, {}
        about: dict[str, bool | str] = {TRAINS: self._exchange.trains(server_round), SHARE: self._exchange.share}
        form = form_in_state(self.model.optimizer_state, client, self.model.specs())
        if form is None:
            return self.wire_record, {**about, FITTED: False}
        return self._in_form(form, seed, server_round), {**about, FITTED: True}

    def _in_form(self, form: Form, seed: int, server_round: int) -> ArrayRecord:
        assert self._exchange is not None
        if self._downlinks is None:
            self._downlinks = Downlinks(self.model.master(), self._exchange)
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
