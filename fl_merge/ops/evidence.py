"""Averages in which each client counts where its data say something. Suffixes: R rows, C columns, S elements.

Everything is written as the average plus a correction by sums over clients: what clients agree on comes out as it is.
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

    def gram(self, layout: GramLayout, alpha: float) -> Tensor:
        """(groups, C, C) float64: the Gram matrix of the columns of `rows`, off the diagonal times alpha."""
        size = layout.columns + (len(self.tensors) > 1)
        gram_GCC = self.statistic.double().reshape(layout.groups, *self.statistic.shape[-2:])[:, :size, :size]
        gram_GCC = self.coefficient * (0.5 * (gram_GCC + gram_GCC.mT))
        return alpha * gram_GCC + (1.0 - alpha) * torch.diag_embed(gram_GCC.diagonal(dim1=1, dim2=2))


def fisher_mean(clients: Sequence[Evidence], floor: float) -> Tensor:
    """The mean delta, each element weighted by the clients' information on it (Matena & Raffel, 2022).

    (sum c_i F_i tau_i + r sum w_i tau_i) / (sum c_i F_i + r),  r = floor * mean(sum c_i F_i)

    A statistic with fewer dimensions than the tensor counts for whole rows. Where it is zero for all: the average.

    Returns:
        The tensor's shape, float64.
    """
    average_S = clients[0].delta()
    first_S = average_S.clone()
    for client in clients[1:]:
        average_S += client.share * (client.delta() - first_S)  # of equal deltas it is that delta, with no rounding
    total_S, right_S = torch.zeros((), dtype=torch.float64), torch.zeros_like(average_S)
    for client in clients:
        missing = average_S.dim() - client.statistic.dim()
        fisher_S = client.coefficient * client.statistic.double().reshape((*client.statistic.shape, *[1] * missing))
        total_S = total_S + fisher_S
        right_S += fisher_S * (client.delta() - average_S)
    total_S = total_S + floor * total_S.mean()
    return average_S + torch.where(total_S > 0, right_S / total_S, 0.0)


def regression_mean(clients: Sequence[Evidence], layout: GramLayout, alpha: float, ridge: float) -> Tensor:
    """The delta whose outputs are nearest to all clients' own outputs on their own inputs (Jin et al., 2023).

    M = average + (sum (tau_i - average) G_i) (sum G_i + r)^-1,  r = ridge * mean(diag(sum G_i))

    Returns:
        (groups, R, C) float64, as `Evidence.rows`.
    """
    average_GRC, total_GCC = _sums(clients, layout, alpha)
    right_GRC = torch.zeros_like(average_GRC)
    for client in clients:
        right_GRC += (client.rows(layout) - average_GRC) @ client.gram(layout, alpha)
    solved = [solve_ridged(*pair, ridge).T for pair in zip(total_GCC, right_GRC.mT, strict=True)]
    return average_GRC + torch.stack(solved)


def regression_mean_bias(clients: Sequence[Evidence], layout: GramLayout, alpha: float, ridge: float) -> Tensor:
    """The last column of `regression_mean` alone: one right side to solve for in place of one a row.

    Returns:
        (groups * R,) float64.
    """
    average_GRC, total_GCC = _sums(clients, layout, alpha)
    last_C1 = torch.zeros(total_GCC.shape[1], 1, dtype=torch.float64)
    last_C1[-1] = 1.0
    solved_GC1 = torch.stack([solve_ridged(total_CC, last_C1, ridge) for total_CC in total_GCC])
    bias_GR1 = average_GRC[:, :, -1:].clone()
    for client in clients:
        bias_GR1 += (client.rows(layout) - average_GRC) @ (client.gram(layout, alpha) @ solved_GC1)
    return bias_GR1.reshape(-1)


def _sums(clients: Sequence[Evidence], layout: GramLayout, alpha: float) -> tuple[Tensor, Tensor]:
    average_GRC, total_GCC = clients[0].rows(layout), clients[0].gram(layout, alpha)
    first_GRC = average_GRC.clone()
    for client in clients[1:]:
        average_GRC += client.share * (client.rows(layout) - first_GRC)  # as in `fisher_mean`
        total_GCC = total_GCC + client.gram(layout, alpha)
    return average_GRC, total_GCC
