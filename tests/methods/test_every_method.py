"""One battery of properties over every registered method; a new method is in it by being registered."""

import battery
import pytest

from fl_merge import METHODS

CASES = [
    pytest.param(check, arguments, id=" ".join(filter(None, (entry.name, settings, check.__name__))))
    for entry in METHODS.values()
    for check, arguments, settings in battery.cases(entry)
]


@pytest.mark.parametrize(("check", "arguments"), CASES)
def test_property(check, arguments):
    check(*arguments)


def test_the_battery_covers_every_method_and_every_choice():
    calls = [case.values[1] for case in CASES]
    covered = {(entry.name, str(rest)) for entry, *rest in calls}
    assert {name for name, _ in covered} == set(METHODS)
    assert ("ties", "[{'scope': 'model'}]") in covered
    assert ("ties", "[{'scope': 'model', 'density': 1.0}]") in covered
    assert ("slerp", "[{'on': 'deltas'}]") in covered
    assert ("dare_linear", "[{'rescale': False}]") in covered
