"""The network as a mixture of experts: what `moe_upcycle` makes of the clients' networks.

Each expert has both hidden layers; the output layer is shared, and the router reads the pixels.
Shape suffixes: B images, E experts, K experts of an image, H hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from digits_clients.data import NUM_CLASSES, SIDE

TOP_K = 2
"""Experts of an image, where the server does not say."""


class Expert(nn.Module):
    """64 pixels -> H -> H, with ReLU."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(SIDE * SIDE, hidden)
        self.hidden2 = nn.Linear(hidden, hidden)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 64) in [-1, 1] -> (B, H)."""
        return torch.relu(self.hidden2(torch.relu(self.hidden1(pixels))))


class Mixture(nn.Module):
    """Experts of which each image is given to `top_k`, weighted by a softmax over their scores."""

    def __init__(self, experts: int, hidden: int, top_k: int = TOP_K) -> None:
        super().__init__()
        self.top_k = min(top_k, experts)
        self.experts = nn.ModuleList(Expert(hidden) for _ in range(experts))
        self.router = nn.Linear(SIDE * SIDE, experts, bias=False)
        self.output = nn.Linear(hidden, NUM_CLASSES)

    def scores(self, images_BHW: Tensor) -> Tensor:
        """What the router gives each expert for each image: (B, E)."""
        return self.router(images_BHW.flatten(1) * 2 - 1)

    def shares(self, images_BHW: Tensor) -> Tensor:
        """How much each expert has in each image: (B, E), summing to 1, at most top_k above 0."""
        scores_BE = self.scores(images_BHW)
        best_BK, at_BK = scores_BE.topk(self.top_k, dim=1)
        return torch.zeros_like(scores_BE).scatter(1, at_BK, best_BK.softmax(dim=1))

    @torch.no_grad()
    def load(self, images_BHW: Tensor) -> list[float]:
        """The share of the images' choices that each expert gets: E numbers that sum to 1."""
        return [float(share) for share in _chosen(self.scores(images_BHW), self.top_k).double()]

    def forward(self, images_BHW: Tensor) -> Tensor:
        """Images (B, 8, 8) in [0, 1] -> logits (B, 10)."""
        pixels = images_BHW.flatten(1) * 2 - 1
        each_BEH = torch.stack([expert(pixels) for expert in self.experts], dim=1)
        return self.output((self.shares(images_BHW)[..., None] * each_BEH).sum(dim=1))


def balance(scores_BE: Tensor, top_k: int) -> Tensor:
    """The load-balancing loss of Switch Transformers (Fedus et al., 2021, arXiv:2101.03961): E sum_e f_e P_e.

    f_e is the share of the choices that expert e gets, P_e its mean probability, through which alone gradients flow. It
    is 1 where the load is even, and E where one expert has everything.
    """
    return scores_BE.shape[1] * (_chosen(scores_BE, top_k) * scores_BE.softmax(dim=1).mean(dim=0)).sum()


def _chosen(scores_BE: Tensor, top_k: int) -> Tensor:
    """The share of the choices that each expert gets, (E,)."""
    chosen_BK = scores_BE.topk(top_k, dim=1).indices
    return torch.bincount(chosen_BK.flatten(), minlength=scores_BE.shape[1]).to(scores_BE.dtype) / chosen_BK.numel()


def top_k_of(architecture: Mapping[str, Any] | None) -> int:
    """Experts of an image, as the config says that the server sends with the model."""
    return int((architecture or {}).get("num_experts_per_tok", TOP_K))


def is_mixture(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is a mixture's."""
    return "router.weight" in state


def empty(state: Mapping[str, Tensor], top_k: int = TOP_K) -> Mixture:
    """A mixture of the sizes that a state dict has."""
    return Mixture(len(state["router.weight"]), len(state["experts.0.hidden1.bias"]), top_k)


def mean_pixels(images_BHW: Tensor) -> dict[str, Tensor]:
    """What a client sends for `moe_upcycle(router="hidden")`: the mean of what the router reads, (64,)."""
    return {"hidden/0": (images_BHW.flatten(1) * 2 - 1).mean(dim=0)}
