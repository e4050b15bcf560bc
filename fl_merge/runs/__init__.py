"""What a run leaves behind."""

from fl_merge.runs.folder import RunFolder

__all__ = ["RunFolder"]
