"""Who may import whom: the picture in docs/design.md, read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fl_merge

PACKAGE = Path(fl_merge.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT = {
    "errors": set(),
    "types": {"errors"},
    "kernels": set(),
    "naming": {"types"},
    "ops": {"kernels", "naming", "types", "errors"},
    "shapes": {"ops", "types", "errors"},
    "stages": {"ops", "shapes", "types", "errors"},
    "measured": {"naming", "ops", "shapes", "types", "errors"},
    "statistics": {"structures", "naming", "errors"},
    "cutoffs": {"kernels"},
    "reading": {"kernels", "ops.combine", "ops.gram", "types", "errors"},
    "measuring": {"kernels", "cutoffs", "reading", "shapes", "ops.gram", "ops.sparsify"},
    "fillers": {"stages", "shapes", "kernels", "types", "errors"},
    "fill": {
        "fillers",
        "measuring",
        "cutoffs",
        "reading",
        "stages",
        "shapes",
        "kernels",
        "ops.gram",
        "ops.sparsify",
        "types",
        "errors",
    },
    "hyperparameters": {"errors"},
    "method": {"hyperparameters", "types", "errors"},
    "pairs": {"ops.lowrank", "types", "errors"},
    "lowrank": {"pairs", "ops.lowrank", "shapes", "types", "errors"},
    "on_products": {"fill", "reading", "ops", "shapes", "types", "errors"},
    "structures": {"naming", "architectures", "method", "shapes", "ops.draws", "ops.routing", "types", "errors"},
    "methods": {
        "hyperparameters",
        "method",
        "structures",
        "lowrank",
        "on_products",
        "measured",
        "naming",
        "stages",
        "shapes",
        "ops",
        "types",
        "errors",
    },
    "rooms": {"types"},
    "releases": {"types"},
    "execute": {"rooms", "releases", "fill", "fillers", "reading", "shapes", "kernels", "ops.gram", "types", "errors"},
    "phases": {"structures", "exchange", "hyperparameters", "method", "types", "errors"},
    "yaml_text": {"errors"},
    "personal": {"hyperparameters", "check", "ops", "store", "types", "errors"},
    "store": {"types", "errors"},
    "spill": {"store", "types", "errors"},
    "check": {"structures", "kernels", "naming", "types", "errors"},
    "codecs": {"types", "errors"},
    "clipping": {"hyperparameters", "method", "shapes", "ops.gram", "types", "errors"},
    "optimizers": {"hyperparameters", "method", "types", "errors"},
    "merging": {"naming", "optimizers", "method", "execute", "check", "store", "types", "errors"},
    "tuning": {
        "merging",
        "optimizers",
        "execute",
        "hyperparameters",
        "method",
        "store",
        "types",
        "errors",
    },
    "exchange": {"pairs", "lowrank", "ops.lowrank", "ops.draws", "types", "errors"},
    "model": {
        "phases",
        "structures",
        "exchange",
        "pairs",
        "lowrank",
        "tuning",
        "optimizers",
        "execute",
        "codecs",
        "store",
        "types",
        "errors",
    },
    "adapters": {
        "architectures",
        "pairs",
        "lowrank",
        "ops.lowrank",
        "merging",
        "method",
        "execute",
        "check",
        "shapes",
        "store",
        "types",
        "errors",
    },
    "running": {"execute", "store", "types", "errors"},
    "running_products": {"execute", "pairs", "lowrank", "ops.lowrank", "types", "errors"},
    "rounds": {
        "phases",
        "exchange",
        "running_products",
        "tuning",
        "method",
        "naming",
        "optimizers",
        "model",
        "running",
        "execute",
        "check",
        "spill",
        "store",
        "types",
        "errors",
    },
    "run_config": {"yaml_text", "errors"},
    "recipe": {
        "run_config",
        "phases",
        "yaml_text",
        "clipping",
        "optimizers",
        "hyperparameters",
        "method",
        "execute",
        "types",
        "errors",
    },
    "runs": {"adapters", "model", "store", "types", "errors"},
    "architectures": set(),
    "offline": {
        "lowrank",
        "yaml_text",
        "__init__",
        "adapters",
        "architectures",
        "check",
        "errors",
        "execute",
        "hyperparameters",
        "method",
        "recipe",
        "shapes",
        "store",
        "types",
    },
    "flower": {
        "adapters",
        "phases",
        "exchange",
        "running_products",
        "pairs",
        "lowrank",
        "tuning",
        "naming",
        "statistics",
        "hyperparameters",
        "runs",
        "recipe",
        "model",
        "running",
        "rounds",
        "method",
        "execute",
        "check",
        "spill",
        "store",
        "codecs",
        "types",
        "errors",
    },
    "lora_cli": {"adapters", "store", "codecs", "pairs", "ops.lowrank", "method", "types", "errors"},
    "cli": {
        "yaml_text",
        "offline",
        "lora_cli",
        "hyperparameters",
        "__init__",
        "flower",
        "runs",
        "recipe",
        "rounds",
        "merging",
        "method",
        "store",
        "types",
        "errors",
    },
    "__init__": {
        "phases",
        "clipping",
        "tuning",
        "hyperparameters",
        "methods",
        "merging",
        "optimizers",
        "recipe",
        "method",
        "shapes",
        "errors",
    },
}
"""Each part of the package, and the parts that it may import besides itself. A new part needs a row."""

ELSEWHERE = {
    "flwr": {"flower"},
    "safetensors": {"store"},
    "yaml": {"recipe", "yaml_text", "flower"},
    "numba": {"kernels"},
    "typer": {"offline", "cli", "lora_cli"},
    "rich": {"offline", "cli", "lora_cli", "flower"},
    "pathlib": {
        "offline",
        "store",
        "personal",
        "adapters",
        "spill",
        "running",
        "recipe",
        "yaml_text",
        "runs",
        "flower",
        "cli",
        "lora_cli",
    },
}
"""Libraries that only some parts may import."""

FLWR_IS_PUBLIC = {"flwr.app", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.serverapp.exception", "flwr.clientapp"}
FLWR_ELSEWHERE = {"flower/_flwr.py", "flower/legacy.py"}
"""Files that may import more of flwr than that: the names that it moves, and its older API."""


def part_of(module):
    """`fl_merge.ops.gram` belongs to `ops`, `fl_merge` itself to `__init__`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def module_of(path):
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 2 else names)


def imports(path):
    """Every module that a file imports, also inside functions; of `from fl_merge import x`, the part x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module == "fl_merge":
                yield from (f"fl_merge.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_part_may(path):
    part = part_of(module_of(path))
    assert part in MAY_IMPORT, f"'{part}' is new: say in MAY_IMPORT where it stands"
    for module in imports(path):
        top = module.split(".")[0]
        if top == "fl_merge":
            allowed = MAY_IMPORT[part] | {part}
            assert part_of(module) in allowed or module.removeprefix("fl_merge.") in allowed, f"{part} imports {module}"
        if top in ELSEWHERE:
            assert part in ELSEWHERE[top], f"{part} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_of_flwr_only_public_modules_are_imported(path):
    if str(path.relative_to(PACKAGE)) in FLWR_ELSEWHERE:
        return
    private = {module for module in imports(path) if module.split(".")[0] == "flwr"} - FLWR_IS_PUBLIC
    assert not private


def test_the_picture_has_no_circle():
    """Each part stands above all that it imports."""
    above: dict[str, set[str]] = {part: {name.split(".")[0] for name in names} for part, names in MAY_IMPORT.items()}
    done: set[str] = set()
    while above:
        free = [part for part, names in above.items() if names <= done]
        assert free, f"a circle among {sorted(above)}"
        for part in free:
            done.add(part)
            del above[part]


def test_the_picture_has_no_part_that_is_gone():
    found = {part_of(module_of(path)) for path in FILES}
    assert set(MAY_IMPORT) == found


def test_importing_the_core_does_not_import_flower():
    """Nor what it drags in: whoever merges files in a notebook waits for torch alone."""
    script = (
        "import sys, fl_merge; heavy = {'flwr', 'ray', 'typer', 'rich', 'grpc', 'transformers'}; "
        "print('merge' in dir(fl_merge), sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert found.stdout == "True []\n", found.stderr
