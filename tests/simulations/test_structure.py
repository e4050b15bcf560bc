"""The study of structures: a small federation of each kind, what is compared with what, its tables."""

import structure
import study
from fl_merge.methods import moe_upcycle


def tiny(folder):
    size = structure.Size(2, 32, 1, 1, 1, 1, 1, length=32, batch=2, evaluation_bytes=200, train_bytes=8_000)
    return structure.Federation(0, size, str(folder))


def test_a_mixture_has_the_parameters_that_its_config_says(tmp_path):
    federation = tiny(tmp_path)
    dense = structure.parameters(federation.start)
    assert dense["active"] == dense["total"]
    itself = {str(at): federation.start.tensors for at in range(4)}
    model = federation.changed(moe_upcycle(top_k=2), itself)
    sizes, mlp, router = structure.parameters(model), 2 * 3 * 32 * 96, 2 * 4 * 32
    assert sizes == {"total": dense["total"] + 3 * mlp + router, "active": dense["total"] + mlp + router}
    assert sum(weight.numel() for weight in model.build().parameters()) == sizes["total"]


def test_the_ensemble_of_one_model_is_that_model(tmp_path):
    federation = tiny(tmp_path)
    model = federation.start.build()
    ours, theirs = federation.judged(structure.ensemble([model, model])), federation.judged(model)
    assert all(abs(ours[domain] - theirs[domain]) < 1e-5 for domain in theirs)


def test_the_table_says_the_difference_to_the_control_in_pairs():
    def row(seed, name, mean):
        return {
            "part": "mixture",
            "seed": seed,
            "model": name,
            "same steps": 1,
            "mean": mean,
            "active": 1000,
            "total": 2000,
            **dict.fromkeys(structure.DOMAINS, mean),
        }

    rows = [
        row(seed, name, mean + seed) for seed in range(3) for name, mean in (("average + training", 2.0), ("x", 1.9))
    ]
    (line,) = [line for line in structure.tables(rows).splitlines() if line.startswith("| x ")]
    assert "-100.0 [-100.0, -100.0]" in line
    assert "1 / 2" in line
    assert study.where(rows, model="x")
