import math

import pytest
import torch

from fl_merge.ops.fusion import divergence_importance, outlier_threshold


def test_importance_by_hand():
    """A row (0, 0) that becomes (log 3, 0): softmax 1/2, 1/2 before and 3/4, 1/4 after."""
    base_S, delta_S = torch.zeros(2, 2), torch.tensor([[math.log(3), 0.0], [0.5, 0.5]])
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found_S = divergence_importance(base_S, delta_S)
    assert found_S[0].tolist() == pytest.approx([math.log(3) * divergence, 0.0], rel=1e-6)
    assert found_S[1].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)  # a shift leaves the softmax as it is
    assert found_S.dtype == torch.float64


def test_importance_survives_small_changes():
    """In float32 the divergence of a row that hardly changed is rounding noise."""
    base_S = torch.randn(1, 4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    delta_S = 1e-5 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before_S = base_S.softmax(dim=-1)
    second_order = 0.5 * float((before_S * delta_S**2).sum() - (before_S * delta_S).sum() ** 2)
    found = float(divergence_importance(base_S, delta_S)[0, 0] / delta_S[0, 0].abs())
    assert found == pytest.approx(second_order, rel=1e-2)


def test_a_tensor_without_dimensions_has_no_row():
    assert float(divergence_importance(torch.tensor(1.0), torch.tensor(0.5))) == 0.0


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [6, 2, 4, 0, 5, 1, 3]])
def test_the_threshold_by_hand(order):
    """Seven values: quartiles are numbers int(1.5), int(3), int(4.5) of them in order, counted from 0."""
    values_S = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64)[order]
    assert outlier_threshold(values_S) == 4.0 + 1.5 * (8.0 - 1.0)
    assert outlier_threshold(torch.tensor([3.0])) == 3.0
