"""Recipes: what they say, and every way in which one can be wrong, with the exact words."""

import pytest
import torch

from fl_merge import METHODS, Recipe, RecipeError, merge
from fl_merge.recipe import Rule
from fl_merge.types import TensorSpec

KNOWN = f"(known: {', '.join(METHODS)})"
TIES = "(known: density, election, normalize, scale, scope)"

FULL = """
merge_method: ties
parameters: {density: 0.3, scale: 1.5, scope: model}
rules:                                  # first match wins
  - {match: "*norm*", merge_method: weighted_average}
  - match: "*.head.*"
    merge_method: task_arithmetic
    parameters: {scale: 1e-1, coefficients: {"12": -1.0, "7": 1e5}}
"""


@pytest.fixture
def load(tmp_path):
    """Loads a recipe from text."""
    path = tmp_path / "recipe.yaml"

    def load_text(text):
        path.write_text(text)
        return Recipe.load(path)

    return load_text


# --- what a recipe says ----------------------------------------------------------------------------------------------


def test_a_full_recipe(load):
    recipe = load(FULL)
    assert recipe == Recipe(
        "ties",
        {"density": 0.3, "scale": 1.5, "scope": "model"},
        (
            Rule("*norm*", "weighted_average"),
            Rule("*.head.*", "task_arithmetic", {"scale": 0.1, "coefficients": {"12": -1.0, "7": 1e5}}),
        ),
    )
    assert str(recipe.build()) == (
        "partition(*norm*: weighted_average(), *.head.*: task_arithmetic(scale=0.1, "
        "coefficients={'12': -1.0, '7': 100000.0}, normalize=True), "
        "otherwise ties(density=0.3, scale=1.5, normalize=True, scope='model', election='total'))"
    )


def test_it_merges_by_its_rules(load):
    base = {"a.norm": torch.zeros(2), "a.w": torch.zeros(2)}
    client = {"a.norm": torch.tensor([1.0, 2.0]), "a.w": torch.tensor([1.0, 2.0])}
    recipe = load("merge_method: ties\nparameters: {density: 0.5}\nrules: [{match: '*norm', merge_method: slerp}]\n")
    result = merge(recipe.build(), base, [client])
    assert (result["a.norm"].tolist(), result["a.w"].tolist()) == ([1.0, 2.0], [0.0, 2.0])


@pytest.mark.parametrize(
    "text", ["merge_method: slerp", "merge_method: slerp\nparameters:\nrules:\n", "merge_method: slerp\nrules: []\n"]
)
def test_parameters_and_rules_may_be_left_out(load, text):
    assert load(text) == Recipe("slerp")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-1", 0.1),
        ("1E-1", 0.1),
        ("1.e-1", 0.1),
        ("1.0e-1", 0.1),
        ("10e-2", 0.1),
        ("+1e-1", 0.1),
        (".1", 0.1),
        ("1", 1.0),
    ],
)
def test_numbers_as_people_write_them(load, text, number):
    """YAML 1.1 reads 1e-1 as text."""
    density = load(f"merge_method: ties\nparameters: {{density: {text}}}").build().parameters["density"]
    assert density == number
    assert type(density) is float


@pytest.mark.parametrize("text", ["1e5x", "e5", "1e", "0x1e5g"])
def test_text_that_only_looks_like_a_number_stays_text(load, text):
    wanted = r"a number in \(0, 1\] or a mapping from text to a number in \(0, 1\]"
    with pytest.raises(RecipeError, match=rf"parameter 'density' of ties: found '{text}', wanted {wanted}$"):
        load(f"merge_method: ties\nparameters: {{density: {text}}}")


def test_on_is_the_parameter_of_slerp_and_no_truth_value(load):
    """In YAML 1.1 the key `on` is true."""
    assert load("merge_method: slerp\nparameters: {on: deltas}") == Recipe("slerp", {"on": "deltas"})
    assert load("merge_method: ties\nparameters: {normalize: off}") == Recipe("ties", {"normalize": False})


def test_to_yaml_is_read_back(load):
    for recipe in (
        Recipe("slerp", {"on": "deltas"}),
        Recipe("weighted_average"),
        Recipe("ties", {"density": 1e-05, "scope": "model", "normalize": False}),
        Recipe("task_arithmetic", {"coefficients": {"1e5": -1.0, "007": 2.0, "true": 0.5, "null": 1.0}}),
        load(FULL),
    ):
        assert load(recipe.to_yaml()) == recipe


def test_a_built_method_can_be_written_as_a_recipe(load):
    """Its parameters come back read-only; YAML has to take them all the same."""
    method = load("merge_method: task_arithmetic\nparameters: {coefficients: {a: -1}}").build()
    again = load(Recipe(method.name, method.parameters).to_yaml())
    assert str(again.build()) == str(method)


# --- what is wrong with it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the recipe: found None, wanted keys: merge_method, parameters, rules, clip_norm, server_optimizer"),
        (
            "- ties",
            "the recipe: found ['ties'], wanted keys: merge_method, parameters, rules, clip_norm, server_optimizer",
        ),
        ("parameters: {density: 0.2}", "merge_method: found None, wanted the name of a method"),
        ("merge_method: ties\nrules: false", "rules: found False, wanted a list of {match, merge_method, parameters}"),
        ("merge_method: ties\nrules: ''", "rules: found '', wanted a list of {match, merge_method, parameters}"),
        ("merge_method: [ties]", "merge_method: found ['ties'], wanted the name of a method"),
        (
            "merge_methd: ties",
            "unknown key 'merge_methd' in the recipe; did you mean 'merge_method'? "
            "(known: clip_norm, merge_method, parameters, rules, server_optimizer)",
        ),
        ("merge_method: tyes", f"unknown merge method 'tyes'; did you mean 'ties'? {KNOWN}"),
        ("merge_method: xyzzy", f"unknown merge method 'xyzzy' {KNOWN}"),
        ("merge_method: ''", f"unknown merge method '' {KNOWN}"),
        (
            "merge_method: no_such_module:ties",
            "merge method 'no_such_module:ties': cannot import 'no_such_module': No module named 'no_such_module'",
        ),
        ("merge_method: ':ties'", "merge method ':ties': cannot import '': Empty module name"),
        (
            "merge_method: ties\nparameters: {densty: 0.2}",
            f"ties has no parameter 'densty'; did you mean 'density'? {TIES}",
        ),
        ("merge_method: ties\nparameters: {name: 0.2}", f"ties has no parameter 'name' {TIES}"),
        (
            "merge_method: weighted_average\nparameters: {scale: 1}",
            "weighted_average has no parameter 'scale' (known: none)",
        ),
        (
            "merge_method: ties\nparameters: {density: 2}",
            "parameter 'density' of ties: found 2, wanted a number in (0, 1] "
            "or a mapping from text to a number in (0, 1]",
        ),
        (
            "merge_method: ties\nparameters: {density: 0}",
            "parameter 'density' of ties: found 0, wanted a number in (0, 1] "
            "or a mapping from text to a number in (0, 1]",
        ),
        (
            "merge_method: ties\nparameters: {density: true}",
            "parameter 'density' of ties: found True, wanted a number in (0, 1] "
            "or a mapping from text to a number in (0, 1]",
        ),
        (
            "merge_method: ties\nparameters: {density: [0.1, 0.2]}",
            "parameter 'density' of ties: found [0.1, 0.2], wanted a number in (0, 1] "
            "or a mapping from text to a number in (0, 1]",
        ),
        (
            "merge_method: ties\nparameters: {scale: .nan}",
            "parameter 'scale' of ties: found nan, wanted a number that is finite",
        ),
        (
            "merge_method: ties\nparameters: {scope: modell}",
            "parameter 'scope' of ties: found 'modell', wanted 'tensor' or 'model'",
        ),
        (
            "merge_method: ties\nparameters: {normalize: 1}",
            "parameter 'normalize' of ties: found 1, wanted true or false",
        ),
        (
            "merge_method: fedgma\nparameters: {threshold: -0.1}",
            "parameter 'threshold' of fedgma: found -0.1, wanted a number in [0, 1]",
        ),
        (
            "merge_method: task_arithmetic\nparameters: {coefficients: -1}",
            "parameter 'coefficients' of task_arithmetic: found -1, wanted a mapping from text to a number or none",
        ),
        (
            "merge_method: ties\nparameters: 0.2",
            "parameters: found 0.2, wanted a mapping from parameter names to values",
        ),
        (
            "merge_method: ties\nparameters: {1: 0.2}",
            "parameters: found {1: 0.2}, wanted a mapping from parameter names to values",
        ),
        (
            "merge_method: ties\nrules: {match: a}",
            "rules: found {'match': 'a'}, wanted a list of {match, merge_method, parameters}",
        ),
        (
            "merge_method: ties\nrules: [a]",
            "rule 1: found 'a', wanted keys: match, merge_method, parameters",
        ),
        (
            "merge_method: ties\nrules: [{match: a, merge_method: slerp}, {match: b, method: slerp}]",
            "unknown key 'method' in rule 2; did you mean 'merge_method'? (known: match, merge_method, parameters)",
        ),
        (
            "merge_method: ties\nrules: [{merge_method: slerp}]",
            "rule 1: match: found None, wanted a glob on tensor names",
        ),
        (
            "merge_method: ties\nrules: [{match: a}]",
            "rule 1 ('a'): merge_method: found None, wanted the name of a method",
        ),
        (
            "merge_method: ties\nrules: [{match: a, merge_method: slerp, parameters: 3}]",
            "rule 1 ('a'): parameters: found 3, wanted a mapping from parameter names to values",
        ),
        (
            "merge_method: ties\nrules: [{match: a, merge_method: slerp, parameters: {on: delta}}]",
            "rule 1 ('a'): parameter 'on' of slerp: found 'delta', wanted 'weights' or 'deltas'",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(load, tmp_path, text, problem):
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert str(caught.value) == f"recipe '{tmp_path / 'recipe.yaml'}': {problem}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "merge_method: ties\nparameters: {density: 0.2, density: 0.3}",
            "not valid YAML: key 'density' stands twice, line 2, column 28: ",
        ),
        (
            "merge_method: ties\nmerge_method: slerp",
            "not valid YAML: key 'merge_method' stands twice, line 2, column 1: ",
        ),
        ("merge_method: [ties", "not valid YAML: while parsing a flow sequence"),
        ("merge_method: !!python/object:os.system ties", "not valid YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_yaml_is_said_on_one_line_with_its_place(load, text, problem):
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert problem in str(caught.value)
    assert "line " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_in_lists_without_end_are_no_recipe(load):
    with pytest.raises(RecipeError, match=r"recipe\.yaml': not valid YAML: nested too deeply$"):
        load("merge_method: " + "[" * 20_000)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("9" * 5000, "4300 digits"),
        ("0x" + "f" * 4000, "a number of thousands of digits"),
        ("2024-99-99", "month must be in 1..12"),
    ],
    ids=["long", "hexadecimal", "date"],
)
def test_values_that_python_cannot_make_are_the_recipes_mistake(load, value, problem):
    with pytest.raises(RecipeError) as caught:
        load(f"merge_method: {value}")
    assert "recipe.yaml': not valid YAML: " in str(caught.value)
    assert problem in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(tmp_path / "missing.yaml")
    assert str(caught.value) == f"recipe '{tmp_path / 'missing.yaml'}': No such file or directory"
    with pytest.raises(RecipeError) as caught:
        Recipe.load(tmp_path)
    assert str(caught.value) == f"recipe '{tmp_path}': Is a directory"
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x00\xff")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(tmp_path / "model.safetensors")
    assert str(caught.value) == f"recipe '{tmp_path / 'model.safetensors'}': not a text file in UTF-8"


def test_a_module_that_does_not_work_is_the_recipes_mistake(load, tmp_path, monkeypatch):
    (tmp_path / "broken_merges.py").write_text("def nothing(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        RecipeError, match=r"cannot import 'broken_merges': invalid syntax \(broken_merges.py, line 1\)$"
    ):
        load("merge_method: broken_merges:nothing")


BASE = {name: TensorSpec((3,), torch.float32) for name in ("layers.0.norm.weight", "layers.0.mlp.weight")}


def test_a_rule_that_matches_nothing_is_refused_when_the_base_is_known():
    recipe = Recipe("ties", {}, (Rule("*nrom*", "weighted_average"),))
    recipe.build()
    with pytest.raises(RecipeError) as caught:
        recipe.build(BASE)
    assert str(caught.value) == (
        "rule '*nrom*' matches no tensor of the base, which has 2 tensors: layers.0.norm.weight, layers.0.mlp.weight"
    )


def test_a_rule_that_an_earlier_one_hides_is_refused():
    recipe = Recipe("ties", {}, (Rule("*.weight", "slerp"), Rule("*norm*", "weighted_average")))
    with pytest.raises(RecipeError) as caught:
        recipe.build(BASE)
    assert str(caught.value) == (
        "rule '*norm*' gets no tensor: every one that it matches is taken by an earlier rule ('*.weight')"
    )


def test_a_recipe_that_names_clients_fits_any_base():
    """Whether those clients take part only a round can tell."""
    recipe = Recipe("task_arithmetic", {"coefficients": {"1017": -1.0}})
    assert recipe.build(BASE).parameters["coefficients"] == {"1017": -1.0}


# --- in a Flower app's run config ------------------------------------------------------------------------------------


def test_the_run_config_says_the_same():
    config = {
        "merge-method": "ties",
        "parameters.density": 0.3,
        "parameters.scope": "model",
        "rules.*norm*": "weighted_average",
        "rules.*.head.*": "slerp",
        "num-server-rounds": 3,
        "learning-rate": 0.1,
        "client.seed": 1,
    }
    rules = (Rule("*norm*", "weighted_average"), Rule("*.head.*", "slerp"))
    assert Recipe.from_config(config) == Recipe("ties", {"density": 0.3, "scope": "model"}, rules)
    assert Recipe.from_config({}) == Recipe("weighted_average")


def test_parameters_are_in_kebab_case_or_not(tmp_path, monkeypatch):
    (tmp_path / "long_names.py").write_text(
        "from fl_merge import Span, merge_method\n\n\n"
        '@merge_method(paper="Nobody, 2024, arXiv:2401.00001")\n'
        "def a_long_name(*, max_iterations: int = 4) -> Span:\n"
        '    """Nothing."""\n'
        "    return Span(lambda spec, gram_NN: spec.weights_N)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        for key in ("parameters.max-iterations", "parameters.max_iterations"):
            recipe = Recipe.from_config({"merge-method": "long_names:a_long_name", key: 7})
            assert recipe.parameters == {"max_iterations": 7}
    finally:
        METHODS._entries.pop("a_long_name", None)


def test_tables_may_be_yaml_in_one_string():
    config = {"merge-method": "ties", "parameters": "{density: 1e-1}", "rules": "{'*norm*': slerp}"}
    assert Recipe.from_config(config) == Recipe("ties", {"density": 0.1}, (Rule("*norm*", "slerp"),))
    both = {"merge-method": "ties", "parameters.density": 0.5, "parameters.scale": 2.0, "parameters": "{density: 0.1}"}
    assert Recipe.from_config(both).parameters == {"density": 0.1, "scale": 2.0}


def test_a_recipe_file_takes_the_place_of_the_other_keys(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(FULL)
    assert Recipe.from_config({"recipe": str(path), "merge-method": "slerp"}) == Recipe.load(path)
    assert Recipe.from_config({"recipe": "", "merge-method": "slerp"}) == Recipe("slerp")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"merge_method": "ties"}, "unknown key 'merge_method'; did you mean 'merge-method'?"),
        ({"merge-method": "tyes"}, f"unknown merge method 'tyes'; did you mean 'ties'? {KNOWN}"),
        ({"merge-method": 3}, "merge_method: found 3, wanted the name of a method"),
        (
            {"merge-method": "ties", "parameters.density": 2},
            "parameter 'density' of ties: found 2, wanted a number in (0, 1] "
            "or a mapping from text to a number in (0, 1]",
        ),
        (
            {"merge-method": "ties", "parameters.densty": 0.2},
            f"ties has no parameter 'densty'; did you mean 'density'? {TIES}",
        ),
        (
            {"merge-method": "ties", "parameter.density": 0.2},
            "unknown key 'parameter.density'; did you mean 'parameters.density'?",
        ),
        ({"rule.*norm*": "slerp"}, "unknown key 'rule.*norm*'; did you mean 'rules.*norm*'?"),
        ({"parameters": "{density"}, "parameters: found '{density', wanted YAML such as '{key: value}'"),
        ({"parameters": "0.2"}, "parameters: found '0.2', wanted YAML such as '{key: value}'"),
        ({"merge-method": "ties", "parameters": "{1: 2}"}, f"ties has no parameter '1' {TIES}"),
        ({"rules": "[norm]"}, "rule 1: found 'norm', wanted keys: match, merge_method, parameters"),
        ({"rules.*norm*": 3}, "rule 1 ('*norm*'): merge_method: found 3, wanted the name of a method"),
        (
            {"rules.*norm*": "slurp"},
            f"rule 1 ('*norm*'): unknown merge method 'slurp'; did you mean 'slerp'? {KNOWN}",
        ),
    ],
)
def test_a_wrong_run_config_is_refused_by_name(config, problem):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_config(config)
    assert str(caught.value) == f"run config: {problem}"


# --- from a method, and the forms a run config can have -------------------------------------------------------------


def test_the_recipe_of_a_method_builds_it_again():
    method = Recipe("ties", {"density": 0.3}, (Rule("*.bias", "weighted_average"),)).build()
    recipe = Recipe.of(method)
    assert recipe is not None
    assert recipe.rules == (Rule("*.bias", "weighted_average", {}),)
    assert str(recipe.build()) == str(method)


def test_an_object_of_the_users_own_has_no_recipe():
    class Planner:
        def plan(self, spec):
            return iter(())

    assert Recipe.of(Planner()) is None


def test_a_run_config_can_nest_parameters_and_give_rules_theirs():
    """Flower flattens tables to dotted keys; rules with parameters stand in one string, as in a recipe file."""
    recipe = Recipe.from_config(
        {
            "merge-method": "task_arithmetic",
            "parameters.coefficients.1000": -1.0,
            "rules": "[{match: '*.weight', merge_method: ties, parameters: {density: 0.5}}]",
        }
    )
    assert recipe.parameters == {"coefficients": {"1000": -1.0}}
    assert recipe.rules == (Rule("*.weight", "ties", {"density": 0.5}),)


def test_a_clients_id_may_be_written_as_a_number(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("merge_method: task_arithmetic\nparameters: {coefficients: {1000: -1.0}}\n")
    assert dict(Recipe.load(path).build().parameters["coefficients"]) == {"1000": -1.0}
