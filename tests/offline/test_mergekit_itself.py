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

from fl_merge import merge
from fl_merge.methods import depth_upscale, layer_stack
from fl_merge.store import load
from fl_merge.structures import reconfigure
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


def _slices(*ranges):
    """A passthrough of (model, first layer, layer to stop before, scale)."""
    lines = [
        f"  - sources: [{{model: {model}, layer_range: [{start}, {stop}], parameters: {{scale: {scale}}}}}]\n"
        for model, start, stop, scale in ranges
    ]
    return f"slices:\n{''.join(lines)}merge_method: passthrough\ndtype: float32\n"


STACKS = {
    "solar": (_slices(("base", 0, 3, 1.0), ("base", 1, 4, 1.0)), depth_upscale(m=1, source="base")),
    "goliath": (
        _slices(("math", 0, 2, 1.0), ("code", 1, 3, 1.0), ("math", 1, 4, 1.0), ("code", 2, 4, 1.0)),
        layer_stack(layers="math[0:2], code[1:3], math[1:4], code[2:4]", embeddings="math", head="code"),
    ),
    "halved": (
        _slices(("math", 0, 2, 1.0), ("code", 1, 3, 0.5), ("math", 2, 4, 1.0)),
        layer_stack(layers="math[0:2], code[1:3] * 0.5, math[2:4]", embeddings="math"),
    ),
    "backwards": (
        _slices(("chat", 3, 4, 1.0), ("chat", 2, 3, 1.0), ("base", 0, 2, 1.0)),
        layer_stack(layers="chat[3:4], chat[2:3], base[0:2]", embeddings="chat", head="base"),
    ),
}
"""Recipes of slices, and the method that says the same."""


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
    for name, text in {**RECIPES, **{name: recipe for name, (recipe, _) in STACKS.items()}}.items():
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
    return {name: home / f"out-{name}" for name in (*RECIPES, *STACKS)}


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


@pytest.mark.parametrize("name", STACKS)
def test_stacked_layers_and_their_config_are_mergekits(name, theirs, zoo):
    """`layer_stack` and `depth_upscale` themselves, bit for bit."""
    _, method = STACKS[name]
    found = merge(method, load(zoo / "base"), {model: load(zoo / model) for model in ("math", "code", "chat")})
    wanted = load(theirs[name])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    config = reconfigure(json.loads((zoo / "base" / "config.json").read_text()), method, clients=3)
    other = json.loads((theirs[name] / "config.json").read_text())
    depths = {"solar": 6, "goliath": 9, "halved": 6, "backwards": 4}
    assert config["num_hidden_layers"] == other["num_hidden_layers"] == depths[name]
