import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_merge.ops.combine import disjoint_mean, disjoint_sum, weighted_sum
from fl_merge.ops.consensus import elect_sign, settle_draws

F64 = torch.float64
DELTAS_NS = torch.tensor([[4.0, -1.0, 2.0, 0.0], [-2.0, -3.0, 2.0, 0.0], [-4.0, 5.0, -8.0, 0.0]])
WEIGHTS_N = torch.tensor([0.5, 0.25, 0.25], dtype=F64)


def test_weighted_sum_by_hand():
    assert weighted_sum(DELTAS_NS, WEIGHTS_N).tolist() == [0.5, 0.0, -0.5, 0.0]


def test_disjoint_mean_and_sum_by_hand():
    sign_S = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    # (0.25 * -2 + 0.25 * -4) / 0.5;  5 alone;  (0.5 * 2 + 0.25 * 2) / 0.75;  nobody
    assert disjoint_mean(DELTAS_NS, WEIGHTS_N, sign_S).tolist() == [-3.0, 5.0, 2.0, 0.0]
    assert disjoint_sum(DELTAS_NS, WEIGHTS_N, sign_S).tolist() == [-1.5, 1.25, 1.5, 0.0]


def test_no_sign_elects_nobody():
    zero_S = torch.zeros(4)
    assert disjoint_mean(DELTAS_NS, WEIGHTS_N, zero_S).tolist() == [0.0] * 4
    assert disjoint_sum(DELTAS_NS, WEIGHTS_N, zero_S).tolist() == [0.0] * 4


def test_elections_by_hand():
    # totals: 0.5, 0, -0.5, 0; counts of signs: -1, -1, +1, 0
    assert elect_sign(DELTAS_NS, WEIGHTS_N).tolist() == [1.0, 0.0, -1.0, 0.0]
    assert elect_sign(DELTAS_NS, WEIGHTS_N, "frequency").tolist() == [-1.0, -1.0, 1.0, 0.0]


@pytest.mark.parametrize(("tally", "settled"), [(3, 1.0), (0, 1.0), (-1, -1.0)])
def test_draws_go_to_the_majority(tally, settled):
    assert settle_draws(torch.tensor([1.0, 0.0, -1.0]), tally).tolist() == [1.0, settled, -1.0]


matrices = st.integers(1, 6).flatmap(
    lambda clients: st.tuples(
        st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=5, max_size=5), min_size=clients, max_size=clients),
        st.lists(st.floats(0.01, 1.0), min_size=clients, max_size=clients),
    )
)


@given(matrices, st.sampled_from(["total", "frequency"]))
def test_disjoint_mean_lies_among_the_clients_that_agree(drawn, election):
    deltas_NS = torch.tensor(drawn[0])
    weights_N = torch.tensor(drawn[1], dtype=F64)
    weights_N = weights_N / weights_N.sum()
    sign_S = settle_draws(elect_sign(deltas_NS, weights_N, election), 1)
    mean_S = disjoint_mean(deltas_NS, weights_N, sign_S)
    for s in range(5):
        agreeing = [float(d) for d in deltas_NS[:, s] if d.sign() == sign_S[s]]
        if agreeing:
            slack = 1e-6 * max(map(abs, agreeing)) + 1e-44
            assert min(agreeing) - slack <= float(mean_S[s]) <= max(agreeing) + slack
        else:
            assert mean_S[s] == 0


@given(matrices, st.integers(0, 5))
def test_an_element_does_not_depend_on_where_a_slice_ends(drawn, at):
    deltas_NS, weights_N = torch.tensor(drawn[0]), torch.tensor(drawn[1], dtype=F64)
    deltas_NS = deltas_NS.repeat(1, 7)
    whole_S = weighted_sum(deltas_NS, weights_N)
    parts = [weighted_sum(deltas_NS[:, part], weights_N) for part in (slice(0, 7 * at), slice(7 * at, None))]
    assert torch.equal(torch.cat(parts), whole_S)


@given(matrices)
def test_weighted_sum_is_that_of_float64_to_rounding(drawn):
    deltas_NS, weights_N = torch.tensor(drawn[0]), torch.tensor(drawn[1], dtype=F64)
    exact_S = (deltas_NS.double() * weights_N[:, None]).sum(0)
    bound_S = 8 * 2.0**-24 * (deltas_NS.double() * weights_N[:, None]).abs().sum(0) + 1e-43
    assert ((weighted_sum(deltas_NS, weights_N).double() - exact_S).abs() <= bound_S).all()


def test_inputs_are_not_modified():
    deltas_NS, sign_S = DELTAS_NS.clone(), torch.tensor([-1.0, 1.0, 1.0, 0.0])
    weighted_sum(deltas_NS, WEIGHTS_N)
    disjoint_mean(deltas_NS, WEIGHTS_N, sign_S)
    settle_draws(sign_S, -1)
    assert torch.equal(deltas_NS, DELTAS_NS)
    assert sign_S.tolist() == [-1.0, 1.0, 1.0, 0.0]


def test_a_client_of_negative_weight_votes_against_its_delta():
    """As mergekit: what is elected and added is w_i tau_i, and it is divided by the sum of the signed weights."""
    deltas_NS = torch.tensor([[2.0, 1.0, 1.0], [-4.0, 1.0, -1.0]])
    weights_N = torch.tensor([1.0, -0.5], dtype=torch.float64)
    sign_S = elect_sign(deltas_NS, weights_N)
    assert sign_S.tolist() == [1.0, 1.0, 1.0]  # 2 + 2, 1 - 0.5, 1 + 0.5
    assert elect_sign(deltas_NS, weights_N, "frequency").tolist() == [1.0, 0.0, 1.0]
    # both agree: 4 / 0.5;  the first alone: 1 / 1;  both: 1.5 / 0.5
    assert disjoint_mean(deltas_NS, weights_N, sign_S).tolist() == [8.0, 1.0, 3.0]
    assert disjoint_sum(deltas_NS, weights_N, sign_S).tolist() == [4.0, 1.0, 1.5]


def test_signed_weights_that_cancel_are_not_divided_by():
    deltas_NS, sign_S = torch.tensor([[2.0], [-4.0]]), torch.tensor([1.0])
    for rest in (0.0, 1e-9):
        weights_N = torch.tensor([1.0, -1.0 + rest], dtype=torch.float64)
        assert disjoint_mean(deltas_NS, weights_N, sign_S).tolist() == [6.0]
