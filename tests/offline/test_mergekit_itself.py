"""The same recipes through mergekit itself: the tensors are equal. Slow, and only if FL_MERGE_TEST_MERGEKIT is set:

    FL_MERGE_TEST_MERGEKIT=1 python -m pytest -m slow tests/offline/test_mergekit_itself.py

installs mergekit into an environment of its own on first use; a path in place of 1 is the interpreter of one.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from fl_merge.store import load
from recipes import MODELS, RECIPES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("FL_MERGE_TEST_MERGEKIT"), reason="FL_MERGE_TEST_MERGEKIT is not set"),
]

RUN = """
import json, sys
from mergekit.scripts.run_yaml import main
for recipe, out in json.load(open(sys.argv[1])):
    main([recipe, out, "--quiet", "--no-write-model-card"], standalone_mode=False)
"""

DRAWS = {"dare_ties", "dare_linear", "della"}
"""Recipes whose result is random: there the draws differ."""

CUTS = {"arcee_fusion"}
"""Recipes that cut at a score which mergekit computes in float32 from terms that cancel: an element in a hundred may
fall on the other side."""


@pytest.fixture(scope="module")
def theirs(zoo, tmp_path_factory):
    """Where mergekit has written each recipe's model."""
    from benchmarks.peers import mergekit_python

    given = os.environ["FL_MERGE_TEST_MERGEKIT"]
    python = given if os.path.exists(given) else mergekit_python(print)
    if python is None:
        pytest.skip("mergekit cannot be installed here")
    home = tmp_path_factory.mktemp("mergekit")
    jobs = []
    for name, text in RECIPES.items():
        (home / f"{name}.yaml").write_text(text)
        jobs.append([f"{name}.yaml", f"out-{name}"])
    for model in MODELS:
        (home / model).symlink_to(zoo / model)
    (home / "jobs.json").write_text(json.dumps(jobs))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", RUN, "jobs.json"], cwd=home, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: home / f"out-{name}" for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_is_mergekits(name, theirs, merged, tmp_path):
    found, wanted = merged(RECIPES[name]), load(theirs[name])
    assert {key: (t.shape, t.dtype) for key, t in found.items()} == {
        key: (t.shape, t.dtype) for key, t in wanted.items()
    }
    ours, other = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", theirs[name]))
    assert ours["num_hidden_layers"] == other["num_hidden_layers"]
    if name in DRAWS:
        return
    for key, tensor in found.items():
        if name in CUTS:
            assert float(((tensor - wanted[key]).abs() < 1e-6).double().mean()) > 0.99, key
            continue
        error = float((tensor.double() - wanted[key].double()).norm() / wanted[key].double().norm())
        coarse = {torch.float16: 6e-4, torch.bfloat16: 5e-3}.get(tensor.dtype, 0.0)
        assert error <= max(1e-6, coarse), (key, error)
