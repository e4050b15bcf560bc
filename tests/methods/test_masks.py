"""MagMax, EMR's unified delta, consensus masks and FedGMA, on paper."""

import pytest
import torch

from fl_merge import MergeError, merge
from fl_merge.methods import consensus, emr, magmax

DELTAS = [[3.0, -1.0, 2.0, 0.0], [-2.0, -4.0, -2.0, 0.0], [1.0, 2.0, 1.0, 0.0]]


def merged(method, deltas=DELTAS, **options):
    base = {"w": torch.zeros(len(deltas[0]))}
    return merge(method, base, [{"w": torch.tensor(delta)} for delta in deltas], **options)["w"].tolist()


def test_magmax_takes_the_largest_and_of_equal_ones_the_first_clients():
    assert merged(magmax(scale=1.0)) == [3.0, -4.0, 2.0, 0.0]
    assert merged(magmax()) == [1.5, -2.0, 1.0, 0.0]


def test_emr_takes_the_largest_with_the_sign_of_the_sum():
    # sums: 2 -3 1 0
    assert merged(emr()) == [3.0, -4.0, 2.0, 0.0]
    assert merged(emr(), [[5.0], [-3.0], [-3.0]]) == [-3.0]
    assert merged(emr(), [[1.0, 2.0], [-1.0, 1.0]]) == [0.0, 2.0]


def test_consensus_by_hand():
    # sums 2 -3 1: |tau| against 0.4 |sum - tau|:
    #   3 > .4*1, 2 > .4*4, 1 > .4*1 -> 3   |   1 > .4*2, 4 > .4*1, 2 = .4*5 -> 2   |   2 > .4, 2 > .4*3, 1 > 0 -> 3
    assert merged(consensus(scale=1.0)) == [2.0, -3.0, 1.0, 0.0]
    assert merged(consensus(scale=1.0, at_least=3)) == [2.0, 0.0, 1.0, 0.0]
    # the mean: 2/3 -1 1/3
    assert merged(consensus(scale=1.0, normalize=True)) == pytest.approx([2 / 3, -1.0, 1 / 3, 0.0])
    # one client's alone: in one mask
    alone = [[4.0, 1.0], [0.0, 1.0]]
    assert merged(consensus(scale=1.0), alone) == [0.0, 2.0]
    assert merged(consensus(scale=1.0, at_least=1), alone) == [4.0, 2.0]


def test_consensus_of_fewer_clients_than_masks_is_refused():
    with pytest.raises(MergeError, match=r"found 2 clients, wanted at least 3 \(an element is to be in 3 masks\)"):
        merged(consensus(at_least=3), DELTAS[:2])
