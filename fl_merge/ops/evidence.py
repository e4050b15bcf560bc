"""Averages in which each client counts where its data say something. Suffixes: R rows, C columns, S elements.

Everything is the average plus a correction, both by sums of differences from the first client's delta: what clients
agree on comes out as it is, to the last digit, and each client is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_merge.naming import GramLayout
from fl_merge.ops.solve import solve_ridged


@dataclass(frozen=True)
class Evidence:
    """What one client sent of a layer. Tensors are in the dtypes in which they came.

    Args:
        share: the client's weight, all of them summing to 1.
        coefficient: of its statistic: the share by the number of examples that this is a sum over.
        statistic: a sum over examples.
        tensors, base: the layer's tensors, of the client and of the base.
    """

    share: float
    coefficient: float
    statistic: Tensor
    tensors: tuple[Tensor, ...]
    base: tuple[Tensor, ...]

    def delta(self) -> Tensor:
        """The client's first tensor less the base's, float64."""
        return self.tensors[0].double() - self.base[0].double()

    def rows(self, layout: GramLayout) -> Tensor:
        """(groups, R, C) float64: the delta of the weight, with that of the bias as a last column if there is one."""
        both = [
            (tensor.double() - base.double()).reshape(layout.groups, len(tensor) // layout.groups, -1)
            for tensor, base in zip(self.tensors, self.base, strict=True)
        ]
        return torch.cat(both, dim=2)

    def gram(self, layout: GramLayout) -> Tensor:
        """(groups, C, C) float64: the Gram matrix of the columns of `rows`, times the coefficient."""
        size = layout.columns + (len(self.tensors) > 1)
        gram_GCC = self.statistic.reshape(layout.groups, *self.statistic.shape[-2:])[:, :size, :size]
        return gram_GCC.double() * self.coefficient


def fisher_mean(clients: Sequence[Evidence], floor: float) -> Tensor:
    """The mean delta, each element weighted by the clients' information on it (Matena & Raffel, 2022).

    (sum c_i F_i tau_i + r sum w_i tau_i) / (sum c_i F_i + r),  r = floor * mean(sum c_i F_i)

    A statistic with fewer dimensions than the tensor counts for whole rows. Where it is zero for all: the average.

    Returns:
        The tensor's shape, float64.
    """
    first_S = clients[0].delta()
    beside_S, right_S = torch.zeros_like(first_S), torch.zeros_like(first_S)
    total_S = torch.zeros((), dtype=torch.float64)
    for client in clients:
        missing = first_S.dim() - client.statistic.dim()
        fisher_S = client.coefficient * client.statistic.double().reshape((*client.statistic.shape, *[1] * missing))
        from_first_S = client.delta() - first_S
        beside_S += client.share * from_first_S
        total_S = total_S + fisher_S
        right_S += fisher_S * from_first_S
    right_S -= total_S * beside_S
    total_S = total_S + floor * total_S.mean()
    return first_S + beside_S + torch.where(total_S > 0, right_S / total_S, 0.0)


def regression_mean(clients: Sequence[Evidence], layout: GramLayout, alpha: float, ridge: float) -> Tensor:
    """The delta whose outputs are nearest to all clients' own outputs on their own inputs (Jin et al., 2023).

    M = average + (sum (tau_i - average) G_i) (sum G_i + r)^-1,  r = ridge * mean(diag(sum G_i))

    Returns:
        (groups, R, C) float64, as `Evidence.rows`.
    """
    first_GRC = clients[0].rows(layout)
    beside_GRC, right_GRC = torch.zeros_like(first_GRC), torch.zeros_like(first_GRC)
    total_GCC = torch.zeros((), dtype=torch.float64)
    for client in clients:
        gram_GCC, from_first_GRC = client.gram(layout), client.rows(layout) - first_GRC
        beside_GRC += client.share * from_first_GRC
        total_GCC = total_GCC + gram_GCC
        right_GRC += _times(from_first_GRC, gram_GCC, alpha)
    right_GRC -= _times(beside_GRC, total_GCC, alpha)
    total_GCC = _damped(total_GCC, alpha)
    solved = [solve_ridged(*pair, ridge).T for pair in zip(total_GCC, right_GRC.mT, strict=True)]
    return first_GRC + beside_GRC + torch.stack(solved)


def regression_mean_bias(clients: Sequence[Evidence], layout: GramLayout, alpha: float, ridge: float) -> Tensor:
    """The last column of `regression_mean` alone: one right side to solve for in place of one a row.

    Returns:
        (groups * R,) float64.
    """
    first_GRC = clients[0].rows(layout)
    beside_GRC, total_GCC = torch.zeros_like(first_GRC), torch.zeros((), dtype=torch.float64)
    for client in clients:
        beside_GRC += client.share * (client.rows(layout) - first_GRC)
        total_GCC = total_GCC + client.gram(layout)
    last_C1 = torch.zeros(total_GCC.shape[1], 1, dtype=torch.float64)
    last_C1[-1] = 1.0
    solved_GC1 = torch.stack([solve_ridged(total_CC, last_C1, ridge) for total_CC in _damped(total_GCC, alpha)])
    bias_GR1 = (first_GRC + beside_GRC)[:, :, -1:]
    for client in clients:
        gram_GC1 = _damped(client.gram(layout), alpha) @ solved_GC1
        bias_GR1 = bias_GR1 + (client.rows(layout) - first_GRC - beside_GRC) @ gram_GC1
    return bias_GR1.reshape(-1)


def _damped(gram_GCC: Tensor, alpha: float) -> Tensor:
    """Off the diagonal times alpha."""
    return alpha * gram_GCC + (1.0 - alpha) * torch.diag_embed(gram_GCC.diagonal(dim1=1, dim2=2))


def _times(rows_GRC: Tensor, gram_GCC: Tensor, alpha: float) -> Tensor:
    """rows @ _damped(gram), without making that."""
    product_GRC = rows_GRC @ gram_GCC
    return alpha * product_GRC + (1.0 - alpha) * rows_GRC * gram_GCC.diagonal(dim1=1, dim2=2)[:, None, :]
