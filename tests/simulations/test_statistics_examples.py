"""The table of how many examples suffice, on a small scale."""

import re

import statistics_examples


def test_the_table_has_a_row_for_each_number_of_examples():
    found = statistics_examples.table(1, [1, 40])
    rows = {int(count): float(value) for count, value in re.findall(r"^\| (\d+) \| ([\d.]+) \+-", found, re.MULTILINE)}
    average = float(re.search(r"needs none: ([\d.]+)", found)[1])
    assert set(rows) == {1, 40}
    assert 10 < average < rows[40] < 100
    assert rows[1] < rows[40]
