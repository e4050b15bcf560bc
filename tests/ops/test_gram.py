import numpy as np
import pytest
import torch

from fl_merge.ops.gram import BLOCK, GramSum, gram_partials


def vectors(numel, dtype=torch.float32, count=3):
    generator = torch.Generator().manual_seed(numel)
    common_S = torch.randn(numel, generator=generator) * 100  # nearly parallel, as models that share a base are
    return (common_S + torch.randn(count, numel, generator=generator)).to(dtype)


def gram(vectors_NS, step):
    pieces = [vectors_NS[:, start : start + step] for start in range(0, vectors_NS.shape[1], step)]
    total = GramSum(len(vectors_NS))
    for piece_NS in pieces:
        total.add(gram_partials(piece_NS))
    return total.total()


def test_by_hand():
    gram_NN = gram(torch.tensor([[1.0, 2.0, 2.0], [0.0, -3.0, 1.0]]), BLOCK)
    assert gram_NN.tolist() == [[9.0, -4.0], [-4.0, 10.0]]
    assert gram_NN.dtype == torch.float64


@pytest.mark.parametrize("numel", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 77, 130 * BLOCK + 5])
def test_any_slicing_gives_the_same_bits(numel):
    vectors_NS = vectors(numel)
    wanted_NN = gram(vectors_NS, numel + BLOCK)
    for step in (BLOCK, 2 * BLOCK, 3 * BLOCK):
        assert torch.equal(gram(vectors_NS, step), wanted_NN)
    assert torch.equal(wanted_NN, wanted_NN.T)


def test_few_partial_sums_are_kept():
    total = GramSum(2)
    for _ in range(1000):
        total.add(torch.ones(3, 2, 2, dtype=torch.float64))
    assert len(total._sums) < 7
    assert len(total._pending) < 64
    assert torch.equal(total.total(), torch.full((2, 2), 3000.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_numpys_in_float64(dtype):
    vectors_NS = vectors(5 * BLOCK + 77, dtype)
    wide = vectors_NS.double().numpy()
    np.testing.assert_allclose(gram(vectors_NS, BLOCK).numpy(), wide @ wide.T, rtol=1e-13)


def test_a_small_distance_between_large_vectors_survives():
    """||x - y||^2 from the Gram matrix: in float32 sums it would be lost."""
    x_S = torch.full((4 * BLOCK,), 1000.0)
    gram_NN = gram(torch.stack([x_S, x_S + 0.0078125]), BLOCK)
    assert float(gram_NN[0, 0] + gram_NN[1, 1] - 2 * gram_NN[0, 1]) == pytest.approx(4 * BLOCK * 0.0078125**2, rel=1e-4)
