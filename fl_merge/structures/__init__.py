"""Models of another structure than their inputs: other layers (`layers`), experts (`experts`)."""

from fl_merge.structures.common import reconfigure

__all__ = ["reconfigure"]
