"""Least squares: what is lost when channels go, and the weights with which the layers that read them lose least."""
from __future__ import annotations

import torch
from torch import nn

from cleanai.network.activations import is_kept, not_finite

RIDGE = 1e-4  # of the mean diagonal: on CIFAR-10 anything from 1e-6 to 1e-2 gave the same accuracy
WINDOW_RIDGE = 0.1  # of the mean diagonal, too, where each weight of a kernel changes by itself: 0.03 was no better


def kernels(layer: nn.Module, spread: int) -> torch.Tensor:
    """A copy of a layer's weights: (groups, outputs per group, inputs per group, kernel positions) float64.

    A linear layer whose inputs are flattened channels has `spread` kernel positions, otherwise one.
    """
    weight = layer.weight.detach().to(torch.float64, copy=True)
    if isinstance(layer, nn.Linear):
        return weight.reshape(1, len(weight), -1, spread)
    if isinstance(layer, nn.ConvTranspose2d):  # (inputs, outputs per group, kernel)
        return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(3)
    return weight.unflatten(0, (layer.groups, -1)).flatten(3)


def set_kernels(layer: nn.Module, weight: torch.Tensor) -> None:
    """The opposite of `kernels`: give a layer these weights."""
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.transpose(1, 2)
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))


def gram_matrix(rows: torch.Tensor) -> torch.Tensor:
    """The mean of x x^T over rows x: (groups, rows, C) to (groups, C, C) float64."""
    return (rows.transpose(1, 2) @ rows).double() / rows.shape[1]


def reconstruct(
    layer: nn.Module, before: torch.Tensor, now: torch.Tensor, removed: torch.Tensor, spread: int = 1
) -> None:
    """Give the inputs that a layer keeps the weights with which its outputs come nearest to what they were.

    `before` and `now` are rows, as from `channel_rows`, of what it received and of what it receives; `removed` (R,) the
    input channels that go, the same in each group of a convolution, whose weights become zero. With P the kept ones, M
    = E[before now_P^T] (E[now_P now_P^T] + lambda I)^-1 predicts all inputs as they were, and W M at each kernel
    position replaces W[:, P] (He et al. 2017, 1707.06168). Changing what is kept costs lambda, `RIDGE` of the mean
    diagonal.
    """
    kept = is_kept(now.shape[-1], removed)
    now = now[:, :, kept]
    change = before.clone()
    change[:, :, kept] -= now
    taken_over = _regression(now, change, RIDGE)  # (g, P, C)
    weight = kernels(layer, spread)
    weight[:, :, kept] += torch.einsum("gock,gpc->gopk", weight, taken_over)
    weight[:, :, ~kept] = 0
    set_kernels(layer, weight)


def reconstruct_windows(layer: nn.Conv2d, made: torch.Tensor, seen: torch.Tensor, removed: torch.Tensor) -> None:
    """Change each weight of the inputs that a convolution keeps so that its outputs come nearest to `made`.

    `reconstruct` moves weights between channels, at each kernel position alike; from its solution this goes on with
    what the whole kernel sees, since neighbouring positions tell of what is lost, too. `made` are rows as from
    `record_rows`, `seen` those of `window_rows` without `removed`. A change costs `WINDOW_RIDGE` of the mean diagonal.
    Raises UserError when `seen` is not finite.
    """
    weight = kernels(layer, 1)
    kept = is_kept(weight.shape[2], removed)
    missing = made - seen @ weight[:, :, kept].flatten(2).transpose(1, 2).to(seen)
    change = _regression(seen, missing, WINDOW_RIDGE)
    weight[:, :, kept] += change.transpose(1, 2).unflatten(2, (-1, weight.shape[3]))
    set_kernels(layer, weight)


def silence(layer: nn.Module, removed: torch.Tensor, spread: int = 1) -> None:
    """Make the weights of the input channels `removed` (R,) zero, in each group of a convolution."""
    weight = kernels(layer, spread)
    weight[:, :, removed] = 0
    set_kernels(layer, weight)


def output_errors(layer: nn.Module, gram: torch.Tensor, inputs: torch.Tensor, spread: int = 1) -> torch.Tensor:
    """What a layer's outputs lose, after reconstruction, when inputs go one row after the other: (R,) summed shares.

    `inputs` (R, n) holds the input channels that go together, in the order in which they go. The error of the outputs
    is that of least squares, as a share of their power without it (mean square). With the last to go ordered first, the
    Cholesky factor L of the Gram matrix holds in column k what is left of input k once all that outlast it have been
    used to predict it, so that the loss is a sum over the columns that are gone.
    """
    weight = kernels(layer, spread)
    mixing = torch.einsum("goik,gojk->gij", weight, weight)  # (g, C, C)
    gone = inputs.flip(0).flatten()
    order = torch.cat([is_kept(gram.shape[-1], gone).nonzero().flatten(), gone]).to(gram.device)
    power = (mixing * gram).sum().cpu()
    left = _factor(gram[:, order][:, :, order])[:, :, len(order) - len(gone) :]  # (g, C, R * n)
    lost = (left * (mixing[:, order][:, :, order] @ left)).sum((0, 1)).cpu()
    per_row = lost.reshape(inputs.shape).sum(1).flip(0).cumsum(0)
    return per_row / power if power > 0 else torch.zeros_like(per_row)


def _regression(rows: torch.Tensor, wanted: torch.Tensor, share: float) -> torch.Tensor:
    """What turns `rows` (g, n, P) into what is nearest to `wanted` (g, n, C), by ridge least squares: (g, P, C)."""
    products = (rows.transpose(1, 2) @ wanted).double() / rows.shape[1]
    return torch.cholesky_solve(products, _factor(gram_matrix(rows), share))


def _factor(gram: torch.Tensor, share: float = RIDGE) -> torch.Tensor:
    """The Cholesky factor of G + lambda I, lambda a share of G's mean diagonal; where rounding asks for it it grows.

    Raises UserError when G is not finite.
    """
    if not gram.isfinite().all():
        raise not_finite()
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)  # (g,); a group that receives nothing must not be singular
    ridge = torch.where(mean > 0, share * mean, torch.ones_like(mean))
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge[:, None, None] * torch.eye(gram.shape[-1]).to(gram))
        if not failed.any():
            return factor
        ridge = ridge * 10
