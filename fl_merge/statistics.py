"""What a client computes of its data for methods that ask for it: Gram matrices of layer inputs, diagonal Fisher
information, mean hidden states. Torch only; names and shapes are those of `fl_merge.naming`. docs/statistics.md says
what they reveal.

Suffixes: B examples, C columns (inputs of a layer), K classes, R rows (vectors that a layer is applied to), G groups.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_merge.errors import RecipeError
from fl_merge.naming import COUNT, FISHER, GRAM, HIDDEN, STATISTICS, fisher_of, gram_of, hidden_of
from fl_merge.structures.rows import mlp_modules

MAX_EXACT = 4096
"""Classes times positions of one example up to which the expectation over the classes is worked out in full."""

Forward = Callable[[nn.Module, Any], Any]
"""From the model and a batch to the logits."""


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    which: str | Sequence[str] = GRAM,
    max_examples: int = 256,
    *,
    forward: Forward | None = None,
    samples: int = 0,
    generator: torch.Generator | None = None,
    on_examples: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Sums over a client's examples, for `regmean` ("gram") and `fisher`; means for `moe_upcycle` ("hidden").

    The model runs in eval mode (no dropout, fixed batch statistics) and is left as it was found. The first examples are
    taken: shuffle them if they are sorted.

    Args:
        model: trained on the client's data, with the names of the state dict that the client sends.
        batches: a tensor of inputs, or (inputs, ...), or a mapping of keyword arguments (from which "labels" is left
            out); examples along the first dimension. With an "attention_mask" (B, T), positions where it is 0 count for
            nothing. The labels are not used: the Fisher information is an expectation over the model's own classes.
        which: of "gram", "fisher" and "hidden" (the mean of what each layer's MLP reads, of dense models that
            `moe_upcycle` knows).
        max_examples: no more are used.
        forward: from the model and a batch to logits (B, K) or (B, T, K), in place of calling the model.
        samples: 0 for the exact expectation over the classes. For models with many classes or positions: this many
            classes drawn from the model for each example (and position), which gives an unbiased estimate.
        generator: of these draws.
        on_examples: called with the number of examples that are done, after each (of "fisher") or each batch: the exact
            Fisher information takes a backward pass for each class of each example.

    Returns:
        "count", and float32 sums (of "hidden" means) by name. Layers that the model did not call as modules are not
        among them.

    Raises:
        RecipeError: for a kind that does not exist, no examples, or too many classes for the exact expectation.
    """
    kinds = tuple(kind for kind in (which.split(",") if isinstance(which, str) else which) if kind)
    if not kinds or any(kind not in STATISTICS for kind in kinds):
        raise RecipeError(f"statistics: found {which!r}, wanted {' or '.join(repr(kind) for kind in STATISTICS)}")
    if max_examples < 1 or samples < 0:
        raise RecipeError(f"statistics: max_examples {max_examples}, samples {samples}: wanted >= 1 and >= 0")
    run = forward or _logits
    sums: dict[str, Tensor] = {}
    reads: dict[str, tuple[Tensor, int]] = {}
    count = 0
    with _evaluating(model):
        for batch in batches:
            batch = _first(batch, max_examples - count)
            size = _size(batch)
            if GRAM in kinds:
                with torch.no_grad(), _inputs_added(model, sums, _mask(batch)):
                    run(model, batch)
            if HIDDEN in kinds:
                with torch.no_grad(), _reads_added(model, reads, _mask(batch)):
                    run(model, batch)
            if FISHER in kinds:
                for at in range(size):
                    _add_fisher(model, run, _slice(batch, at, at + 1), sums, samples, generator)
                    if on_examples is not None and at + 1 < size:
                        on_examples(count + at + 1)
            count += size
            if on_examples is not None:
                on_examples(count)
            if count >= max_examples:
                break
    if count == 0:
        raise RecipeError("statistics: there are no examples")
    sums |= {name: total / rows for name, (total, rows) in reads.items()}
    return {COUNT: torch.tensor(float(count))} | {name: total.float().cpu() for name, total in sums.items()}


# --- batches -------------------------------------------------------------------------------------------------


def _logits(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name != "labels"})
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _slice(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Mapping):
        return {name: _slice(value, start, stop) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_slice(value, start, stop) for value in batch)
    return batch[start:stop] if isinstance(batch, Tensor) and batch.dim() else batch


def _size(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    values = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    sizes = [len(value) for value in values if isinstance(value, Tensor) and value.dim()]
    if not sizes:
        raise RecipeError("statistics: a batch holds no tensor, wanted examples along its first dimension")
    return sizes[0]


def _first(batch: Any, count: int) -> Any:
    return batch if _size(batch) <= count else _slice(batch, 0, count)


def _mask(batch: Any) -> Tensor | None:
    """(B, T), true where there is an input; None where all are."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


# --- Gram matrices -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _inputs_added(model: nn.Module, sums: dict[str, Tensor], mask_BT: Tensor | None) -> Iterator[None]:
    """While it lasts, what each layer is given is added to its sum."""

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            value = given[0] if given else next(iter(named.values()))
            part = _gram(module, value.detach(), mask_BT)
            sums[name] = sums[name] + part if name in sums else part

        return add

    handles = [
        module.register_forward_pre_hook(hook(gram_of(name)), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gram(module: nn.Module, value: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The Gram matrix of one batch, float64 (each batch's product in float32): see `fl_merge.naming` for its shape."""
    if isinstance(module, nn.Embedding):
        return torch.bincount(_present(value, mask_BT, 0).flatten(), minlength=module.num_embeddings).double()
    if isinstance(module, nn.Linear):
        rows_GRC = _present(value, mask_BT, 1).reshape(1, -1, module.in_features)
    else:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        rows_GRC = patches(module, value)
    if rows_GRC.dtype != torch.float64:
        rows_GRC = rows_GRC.float()
    if module.bias is not None:
        rows_GRC = functional.pad(rows_GRC, (0, 1), value=1.0)
    gram_GCC = (rows_GRC.mT @ rows_GRC).double()
    return gram_GCC[0] if len(gram_GCC) == 1 else gram_GCC


@contextlib.contextmanager
def _reads_added(model: nn.Module, reads: dict[str, tuple[Tensor, int]], mask_BT: Tensor | None) -> Iterator[None]:
    """While it lasts, what each layer's MLP is given is added to its sum, and counted."""

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, given: tuple[Any, ...]) -> None:
            rows_RH = _present(given[0].detach(), mask_BT, 1).reshape(-1, given[0].shape[-1]).double()
            total, count = reads.get(name, (torch.zeros(rows_RH.shape[1], dtype=torch.float64), 0))
            reads[name] = total + rows_RH.sum(0).cpu(), count + len(rows_RH)

        return add

    modules = mlp_modules(model.state_dict())
    if not modules:
        raise RecipeError("statistics: 'hidden' is for dense models that moe_upcycle knows; this one is none of them")
    handles = [
        model.get_submodule(module).register_forward_pre_hook(hook(hidden_of(number)))
        for number, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _present(value: Tensor, mask_BT: Tensor | None, inner: int) -> Tensor:
    """The inputs that are no padding; all where the mask is not of this layer's (B, T)."""
    fits = mask_BT is not None and value.dim() == 2 + inner and value.shape[:2] == mask_BT.shape
    return value[mask_BT] if fits and mask_BT is not None else value


def patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, value: Tensor) -> Tensor:
    """The vectors that a convolution's kernels are multiplied with (im2col).

    Args:
        value: (B, channels, ...), the layer's input; without B for one example.

    Returns:
        (groups, R, C): R is B times the output's positions, C a kernel's elements, in the order of the weight's.
    """
    spatial = len(module.kernel_size)
    if value.dim() == spatial + 1:
        value = value[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    value = functional.pad(value, module._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, step, apart) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        value = value.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
    value = value.reshape(
        len(value), module.groups, -1, *value.shape[2:]
    )  # (B, groups, channels, positions ..., kernel ...)
    positions, kernel = range(3, 3 + spatial), range(3 + spatial, 3 + 2 * spatial)
    ordered = value.permute(1, 0, *positions, 2, *kernel)
    return ordered.reshape(module.groups, -1, math.prod(module.weight.shape[1:]))


# --- Fisher information --------------------------------------------------------------------------------------


def _add_fisher(
    model: nn.Module,
    run: Forward,
    example: Any,
    sums: dict[str, Tensor],
    samples: int,
    generator: torch.Generator | None,
) -> None:
    """Add one example's sum over classes of p(c | x) (grad log p(c | x))^2, exactly or by drawing classes."""
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if not parameters:
        raise RecipeError("statistics: the model has no parameter that requires a gradient")
    with torch.enable_grad():
        found = run(model, example)
        logits = found if isinstance(found, Tensor) else found.logits
        log_p_TK = logits.float().log_softmax(dim=-1).reshape(-1, logits.shape[-1])
    mask_BT = _mask(example)
    if mask_BT is not None and logits.dim() == 3 and mask_BT.shape == logits.shape[:2]:
        log_p_TK = log_p_TK[mask_BT.flatten()]
    p_TK = log_p_TK.detach().exp()
    if samples == 0:
        if log_p_TK.numel() > MAX_EXACT:
            raise RecipeError(
                f"statistics: {log_p_TK.numel()} classes times positions in one example are too many for the exact "
                f"Fisher information (up to {MAX_EXACT}); give samples=1 or more for an estimate"
            )
        terms = [(log_p_TK[at], float(p_TK[at])) for at in _places(p_TK)]
    else:
        drawn = torch.multinomial(p_TK, samples, replacement=True, generator=generator)
        # One draw at each position, and the square of the gradient of their sum: products of two positions have
        # expectation zero, since the expectation of each gradient is.
        terms = [(log_p_TK.gather(1, drawn[:, sample : sample + 1]).sum(), 1.0 / samples) for sample in range(samples)]
    squares: dict[str, Tensor] = {}
    for log_p, weight in terms:
        gradients = torch.autograd.grad(log_p, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if name not in squares:
                squares[name] = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
            squares[name].addcmul_(gradient, gradient, value=weight)
    for name, square in squares.items():
        key = fisher_of(name)
        sums[key] = sums[key] + square if key in sums else square.double()


def _places(p_TK: Tensor) -> list[tuple[int, int]]:
    return [(position, label) for position in range(p_TK.shape[0]) for label in range(p_TK.shape[1])]
