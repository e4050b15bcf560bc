"""The global model between the rounds of a run, and the records in which it travels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord

from fl_merge.errors import MergeError
from fl_merge.flower.records import to_record, views
from fl_merge.model import GlobalModel
from fl_merge.types import MergeMethod


class CarriedModel:
    """The model as it is kept, as it is given out, and as clients are sent it.

    Args:
        method: that will merge.
        wire: the floating dtype in which clients are sent it; None for the model's own.
        tied: names that are another name's tensor.

    Attributes:
        record: the model as it is given out; None before `adopt`.
        wire_record: as clients are sent it.
    """

    def __init__(self, method: MergeMethod, wire: torch.dtype | None, tied: Mapping[str, str]) -> None:
        self.record: ArrayRecord | None = None
        self.wire_record: ArrayRecord | None = None
        self._method, self._wire, self._tied = method, wire, tied
        self._model: GlobalModel | None = None

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
        self._model = GlobalModel.initial(views(arrays), self._method, wire=self._wire, tied=self._tied)
        self.record = arrays
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
        self._model, self.record = model, to_record(model.tensors(), encoded=model.encoded)
        self.wire_record = self.record if self._wire is None else to_record(model.sent, encoded=model.encoded)
