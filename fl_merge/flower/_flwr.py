"""The names of flwr that are not in its public modules, all in this file.

Flower moves such names between minor releases. When one has moved, this is the file to mend; everything else imports
only `flwr.app`, `flwr.serverapp` and `flwr.clientapp`.
"""

from __future__ import annotations

import httpx
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.common.config import flatten_dict, parse_config_args
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "NUM_PARTITIONS_KEY",
    "PARTITION_ID_KEY",
    "SUPERLINK_NODE_ID",
    "TRANSPORT_ERRORS",
    "ErrorCode",
    "Run",
    "TaskIdentity",
    "error_reply_to",
    "flatten_dict",
    "make_message",
    "parse_config_args",
]

TRANSPORT_ERRORS = (httpx.HTTPError, OSError)
"""What Flower's Grid raises when the SuperLink cannot be reached; anything else is about the message at hand."""


def error_reply_to(about: Metadata, reason: str) -> Message:
    """An error in place of the reply to a message of which only the metadata is at hand."""
    return Message(Error(ErrorCode.UNKNOWN, reason), reply_to=make_message(metadata=about, content=RecordDict()))
