"""What a run leaves behind, and what it goes on from."""

from fl_merge.runs.checkpoint import Checkpoint
from fl_merge.runs.folder import RunFolder, read_config

__all__ = ["Checkpoint", "RunFolder", "read_config"]
