"""The names of flwr that are not in its public modules, all in this file.

Flower moves such names between minor releases. When one has moved, this is the file to mend; everything else imports
only `flwr.app`, `flwr.serverapp` and `flwr.clientapp`.
"""

from __future__ import annotations

from flwr.app.message.message import make_message
from flwr.common.config import flatten_dict, parse_config_args
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "NUM_PARTITIONS_KEY",
    "PARTITION_ID_KEY",
    "SUPERLINK_NODE_ID",
    "ErrorCode",
    "Run",
    "TaskIdentity",
    "flatten_dict",
    "make_message",
    "parse_config_args",
]
