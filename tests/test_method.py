"""The registry, settings by annotation, and what they say of themselves."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest

from fl_merge import METHODS, RecipeError, Span, build, in_range, merge_method
from fl_merge.hyperparameters import Range, describe
from fl_merge.method import Clients, find


@pytest.fixture
def register():
    """Registers methods for one test."""
    before = set(METHODS)
    yield merge_method(paper="Nobody, 2024, arXiv:2401.00001")
    for name in set(METHODS) - before:
        del METHODS._entries[name]


def average(spec, gram_NN):
    return spec.weights_N


def test_the_methods_of_the_foundation_are_there_in_order_of_name():
    wanted = {"weighted_average", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "fedgma"}
    assert wanted <= set(METHODS)
    assert list(METHODS) == sorted(METHODS)
    assert len(METHODS) == len(list(METHODS))


def test_what_is_importable_is_what_is_registered():
    from fl_merge import methods

    assert set(methods.__all__) == {*METHODS, "partition"}
    assert methods.ties is METHODS["ties"].factory


def test_every_kind_of_setting(register):
    @register
    def everything(
        *,
        needed: Annotated[int, Range(1, 5)],
        ratio: Annotated[float, Range(0.0, 1.0, open_low=True)] = 0.5,
        kind: Literal["a", "b"] = "a",
        table: Mapping[str, Annotated[float, Range(0.0)]] | None = None,
        note: str = "",
        thing: Any = None,
    ) -> Span:
        """Take everything."""
        return Span(average)

    method = build("everything", needed=3, ratio=1, table={"x": 2}, note="hello", thing=object)
    assert dict(method.parameters) | {"table": dict(method.parameters["table"])} == {
        "needed": 3,
        "ratio": 1.0,
        "kind": "a",
        "table": {"x": 2.0},
        "note": "hello",
        "thing": object,
    }
    assert type(method.parameters["ratio"]) is float
    with pytest.raises(TypeError):
        method.parameters["ratio"] = 0.3
    for settings, words in [
        ({}, "everything needs the parameter 'needed' (a whole number in [1, 5])"),
        ({"needed": 6}, "parameter 'needed' of everything: found 6, wanted a whole number in [1, 5]"),
        ({"needed": 2.0}, "parameter 'needed' of everything: found 2.0, wanted a whole number in [1, 5]"),
        ({"needed": 1, "ratio": 0}, "parameter 'ratio' of everything: found 0, wanted a number in (0, 1]"),
        ({"needed": 1, "kind": "c"}, "parameter 'kind' of everything: found 'c', wanted 'a' or 'b'"),
        ({"needed": 1, "note": 3}, "parameter 'note' of everything: found 3, wanted text"),
        (
            {"needed": 1, "table": {"x": -1}},
            "parameter 'table' of everything: found {'x': -1}, wanted a mapping from text to a number >= 0 or none",
        ),
    ]:
        with pytest.raises(RecipeError) as caught:
            build("everything", **settings)
        assert str(caught.value) == words


def test_a_method_may_be_loaded_again_but_not_replaced(register):
    def factory() -> Span:
        """Average."""
        return Span(average)

    factory.__name__ = factory.__qualname__ = "twice"
    register(factory)
    register(factory)

    def rival() -> Span:
        """Average, too."""
        return Span(average)

    rival.__name__, rival.__qualname__ = "twice", "rival"
    with pytest.raises(
        RecipeError, match=r"^merge method 'twice' is defined twice: in test_method.twice and in test_method.rival"
    ):
        register(rival)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "words"),
    [
        (Range(0, 1), [0, 0.5, 1], [-1e-9, 1.1, math.nan], "in [0, 1]"),
        (Range(0, 1, open_low=True), [1e-300, 1], [0, -0.0], "in (0, 1]"),
        (Range(2), [2, 1e300], [1.9], ">= 2"),
        (Range(0, open_low=True), [1e-300], [0], "> 0"),
        (Range(high=3), [-1e300, 3], [3.1], "<= 3"),
        (Range(), [-1e300, 0], [math.nan], "that is finite"),
    ],
)
def test_ranges(allowed, inside, outside, words):
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert str(allowed) == words


def test_in_range_for_what_an_annotation_cannot_say():
    in_range("x", 0.5, 0, 1)
    for value, words in [
        (2, "parameter 'x': found 2, wanted a number in [0, 1]"),
        (math.nan, "parameter 'x': found nan, wanted a number in [0, 1]"),
        ("a", "parameter 'x': found 'a', wanted a number in [0, 1]"),
        (True, "parameter 'x': found True, wanted a number in [0, 1]"),
        (None, "parameter 'x': found None, wanted a number in [0, 1]"),
    ]:
        with pytest.raises(RecipeError) as caught:
            in_range("x", value, 0, 1)
        assert str(caught.value) == words


def test_annotations_in_words():
    assert describe(Annotated[float, Range(0, 1)]) == "a number in [0, 1]"
    assert describe(int | None) == "a whole number or none"
    assert describe(Literal["a", "b"]) == "'a' or 'b'"
    assert describe(bool) == "true or false"
    assert describe(Mapping[str, float]) == "a mapping from text to a number"


def test_an_unknown_name_far_from_all_gets_the_list_only():
    with pytest.raises(RecipeError) as caught:
        find("xyzzy")
    assert str(caught.value) == f"unknown merge method 'xyzzy' (known: {', '.join(METHODS)})"


def test_how_many_clients_a_method_takes():
    assert 3 in Clients()
    assert 0 not in Clients()
    assert [count in Clients(2, 4) for count in (1, 2, 4, 5)] == [False, True, True, False]
    words = [str(clients) for clients in (Clients(5), Clients(1, 1), Clients(2, 4), Clients(5, why="N >= 2 f + 3"))]
    assert words == ["at least 5", "1", "2 to 4", "at least 5 (N >= 2 f + 3)"]


def test_bounds_may_depend_on_the_settings():
    assert build("krum", f=3).clients.fewest == 9
    assert build("passthrough").clients == Clients(1, 1)
    assert build("ties").clients == Clients()
    assert [Clients(2, 4).nearest(count) for count in (1, 3, 9)] == [2, 3, 4]
    assert [Clients(5).nearest(count) for count in (1, 9)] == [5, 9]
