"""Handwritten digits, split once and for all into what may be seen by whom.

scikit-learn's bundled digits, 1797 grey images of 8 x 8 pixels, are shuffled by the seed and cut into four parts:

    public       200 images   pretraining; everyone may see them, untransformed
    validation    85 images   the server's: for choosing `scale`, and for the accuracy shown while a federation runs
    test         360 images   no client and no tuning ever sees them
    private     1152 images   the clients', divided among them without overlap

`split` names these parts by image number, so that a test can prove them disjoint. Eight *domains* are eight fixed
transforms of the pictures. A domain's client owns 144 private images that no other client owns, and its held-out test
set is all 360 test images, transformed: a test image is never trained on in any domain. The other setting keeps the
pictures as they are and skews the labels.

Shape suffixes: B images, H = W = 8 pixels, K = 10 classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 8
NUM_CLASSES = 10
NUM_IMAGES = 1797
PUBLIC, VALIDATION, TEST, PRIVATE = 200, 85, 360, 1152
DIRICHLET_CLIENTS = 10


@dataclass(frozen=True)
class Examples:
    """Labelled images.

    Args:
        images_BHW: (B, 8, 8) float32 in [0, 1].
        labels_B: (B,) int64 in 0..9.
        numbers_B: (B,) int64, each image's number in scikit-learn's set, whatever was done to its pixels since.
    """

    images_BHW: Tensor
    labels_B: Tensor
    numbers_B: Tensor

    def __len__(self) -> int:
        return len(self.labels_B)


@dataclass(frozen=True)
class Client:
    """One client's data: what it trains on and what it is judged by, and the name of its distribution."""

    name: str
    train: Examples
    test: Examples


@dataclass(frozen=True)
class Split:
    """Image numbers of the four parts: disjoint, 1797 together."""

    public: Tensor
    validation: Tensor
    test: Tensor
    private: Tensor


def seeded(*key: object) -> torch.Generator:
    """A generator whose draws depend on the key alone: the same on every machine and in every process."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=1)
def all_digits() -> Examples:
    """The 1797 images, in scikit-learn's order, pixels divided by 16. Shared: do not write into it."""
    from sklearn.datasets import load_digits  # a second's import: only processes that hold data pay for it

    digits = load_digits()
    images_BHW = torch.from_numpy(digits.images / 16).to(torch.float32)
    return Examples(images_BHW, torch.from_numpy(digits.target).to(torch.int64), torch.arange(NUM_IMAGES))


def split(seed: int = 0) -> Split:
    """Who may see which image: a shuffle of all 1797 by `seed`, cut into 200 + 85 + 360 + 1152."""
    order = torch.randperm(NUM_IMAGES, generator=seeded("split", seed))
    public, validation, test, private = order.split([PUBLIC, VALIDATION, TEST, PRIVATE])
    return Split(public=public, validation=validation, test=test, private=private)


# Domains: fixed transforms of the pictures ----------------------------------------------------------------------------

# Fixed on purpose, whatever the run's seed: domain "rows" is the same domain in every run.
ROW_ORDER = torch.randperm(SIDE, generator=seeded("rows"))
PIXEL_ORDER = torch.randperm(SIDE * SIDE, generator=seeded("permuted"))
STRIPE = 0.75


def _stripes(images_BHW: Tensor) -> Tensor:
    """Rows 0, 3 and 6 are painted over to at least 0.75 (this loses information, the other domains do not)."""
    striped_BHW = images_BHW.clone()
    striped_BHW[:, ::3] = striped_BHW[:, ::3].clamp(min=STRIPE)
    return striped_BHW


DOMAINS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "clean": lambda images_BHW: images_BHW,
        "rotated": lambda images_BHW: torch.rot90(images_BHW, 1, (1, 2)),
        "mirrored": lambda images_BHW: images_BHW.flip(2),
        "inverted": lambda images_BHW: 1 - images_BHW,
        "rows": lambda images_BHW: images_BHW[:, ROW_ORDER],
        "permuted": lambda images_BHW: images_BHW.flatten(1)[:, PIXEL_ORDER].view_as(images_BHW),
        "stripes": _stripes,
        "transposed": lambda images_BHW: images_BHW.transpose(1, 2),
    }
)
"""Name -> transform of (B, 8, 8) images in [0, 1]; a domain's place in this mapping is its partition-id."""


def examples(numbers_B: Tensor, domain: str = "clean") -> Examples:
    """The images with these numbers, as they look in a domain."""
    digits = all_digits()
    images_BHW = DOMAINS[domain](digits.images_BHW[numbers_B]).contiguous()
    return Examples(images_BHW, digits.labels_B[numbers_B], numbers_B)


# Label skew -----------------------------------------------------------------------------------------------------------


def label_mixes(num_clients: int, alpha: float, seed: int) -> NDArray[np.float64]:
    """Each client's class proportions, (num_clients, 10), rows drawn from Dir(alpha, ..., alpha) and summing to 1.

    Args:
        num_clients: at least 1.
        alpha: each class's concentration, > 0. 0.1 leaves a client a class or two, 100 is nearly uniform.
        seed: of the draw.

    Hsu, Qi and Brown, 2019, arXiv:1909.06335, write Dir(a * p) with p the uniform distribution over 10 classes: their a
    is ten times this alpha.
    """
    if num_clients < 1:
        raise ValueError(f"num-partitions: {num_clients}, wanted at least 1")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha: {alpha}, wanted a finite number > 0")
    return np.random.default_rng([seed, num_clients]).dirichlet([alpha] * NUM_CLASSES, size=num_clients)


def partition_by_label(numbers_B: Tensor, mixes: NDArray[np.float64], seed: int) -> list[Tensor]:
    """Deal the images out so that each client's labels follow its mix; every image goes to exactly one client.

    The clients take turns, one image a turn, so that their sizes differ by at most one and none is empty (as long as
    there are as many images as clients). A client draws a class from its mix among the classes that have images left,
    then takes that class's next image; when its classes have run out it takes from the rest in proportion to what is
    left. Hsu et al., 2019, arXiv:1909.06335, likewise draw without replacement and renormalise over what is left.

    Args:
        numbers_B: image numbers to deal out, distinct.
        mixes: (num_clients, 10), from `label_mixes`.
        seed: of the order within a class and of the draws.

    Returns:
        One tensor of image numbers a client.
    """
    draw = np.random.default_rng([seed, len(mixes), len(numbers_B)])
    shuffled = draw.permutation(numbers_B.numpy())
    labels = all_digits().labels_B.numpy()[shuffled]
    stock = [list(shuffled[labels == k]) for k in range(NUM_CLASSES)]
    hands: list[list[int]] = [[] for _ in mixes]
    for turn in range(len(shuffled)):
        left_K = np.array([len(images) for images in stock], dtype=np.float64)
        wanted_K = mixes[turn % len(mixes)] * (left_K > 0)
        chances_K = wanted_K if wanted_K.sum() > 1e-12 else left_K
        k = draw.choice(NUM_CLASSES, p=chances_K / chances_K.sum())
        hands[turn % len(mixes)].append(int(stock[k].pop()))
    return [torch.tensor(hand, dtype=torch.int64) for hand in hands]


# What each party sees -------------------------------------------------------------------------------------------------


def domain_client(partition: int, num_partitions: int = len(DOMAINS), *, seed: int = 0) -> Client:
    """Client `partition` of the eight domains: domain partition % 8, tested on all 360 test images in that domain.

    With more than eight clients, those of one domain share its 144 private images without overlap; with fewer, the
    first domains take part. A client that would own no image is refused.
    """
    names = list(DOMAINS)
    parts = split(seed)
    domain = partition % len(names)
    rivals = len(range(domain, num_partitions, len(names)))
    own = parts.private.chunk(len(names))[domain][partition // len(names) :: rivals]
    if len(own) == 0:
        raise ValueError(f"num-partitions: {num_partitions} leaves client {partition} without an image")
    name = names[domain] if rivals == 1 else f"{names[domain]}-{partition // len(names)}"
    return Client(name, examples(own, names[domain]), examples(parts.test, names[domain]))


@lru_cache(maxsize=4)
def _dirichlet_hands(num_clients: int, alpha: float, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    parts, mixes = split(seed), label_mixes(num_clients, alpha, seed)
    return partition_by_label(parts.private, mixes, seed), partition_by_label(parts.test, mixes, seed)


def dirichlet_client(
    partition: int, num_partitions: int = DIRICHLET_CLIENTS, *, alpha: float = 0.5, seed: int = 0
) -> Client:
    """Client `partition` under label skew: its share of the private images and, by the same mix, of the test images."""
    if num_partitions > TEST:
        raise ValueError(f"num-partitions: {num_partitions}, wanted at most {TEST}: there are {TEST} test images")
    private, test = _dirichlet_hands(num_partitions, alpha, seed)
    return Client(f"client-{partition}", examples(private[partition]), examples(test[partition]))


def client(
    partition: int, num_partitions: int, *, setting: str = "domains", alpha: float = 0.5, seed: int = 0
) -> Client:
    """One client's data in one of the two settings.

    Args:
        partition: in [0, num_partitions).
        num_partitions: how many clients there are.
        setting: "domains" or "dirichlet".
        alpha: the label skew of "dirichlet", see `label_mixes`.
        seed: of the split.

    Raises:
        ValueError: for any other setting, a partition out of range, or too many clients for the images.
    """
    if not 0 <= partition < num_partitions:
        raise ValueError(f"partition-id: {partition}, wanted 0 to {num_partitions - 1}")
    if setting == "domains":
        return domain_client(partition, num_partitions, seed=seed)
    if setting == "dirichlet":
        return dirichlet_client(partition, num_partitions, alpha=alpha, seed=seed)
    raise ValueError(f"setting: {setting!r}, wanted 'domains' or 'dirichlet'")


def public_examples(seed: int = 0) -> Examples:
    """The 200 public images, clean."""
    return examples(split(seed).public)


def validation_examples(setting: str = "domains", seed: int = 0) -> dict[str, Examples]:
    """The server's 85 labelled images: once a domain, or sorted by digit ("digit-0" ...) under label skew."""
    numbers_B = split(seed).validation
    if setting == "domains":
        return {name: examples(numbers_B, name) for name in DOMAINS}
    labels_B = all_digits().labels_B[numbers_B]
    return {f"digit-{k}": examples(numbers_B[labels_B == k]) for k in range(NUM_CLASSES) if bool((labels_B == k).any())}
