"""The scripts in simulations/ are not a package: let the tests import them as they import each other."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "simulations"))
