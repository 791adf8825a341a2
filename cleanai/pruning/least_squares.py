"""Least squares: the loss of a layer's outputs when inputs are removed, and the weights that minimise it."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cleanai.network.activations import not_finite
from cleanai.pruning.rows import is_kept

RIDGE = 1e-4  # of the mean diagonal
WINDOW_RIDGE = 0.1  # of the mean diagonal, where each weight of a kernel changes by itself


def kernels(layer: nn.Module, spread: int) -> torch.Tensor:
    """A copy of a layer's weights: (groups, outputs per group, inputs per group, kernel positions) float64.

    A linear layer whose inputs are flattened channels has `spread` kernel positions, otherwise one.
    """
    weight = layer.weight.detach().to(torch.float64, copy=True)
    if isinstance(layer, nn.Linear):
        return weight.reshape(1, len(weight), -1, spread)
    if layer.transposed:  # (inputs, outputs per group, kernel)
        return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(3)
    return weight.unflatten(0, (layer.groups, -1)).flatten(3)


def set_kernels(layer: nn.Module, weight: torch.Tensor) -> None:
    """The inverse of `kernels`: set a layer's weights."""
    if getattr(layer, "transposed", False):
        weight = weight.transpose(1, 2)
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))


def gram_matrix(rows: torch.Tensor) -> torch.Tensor:
    """The mean of x x^T over rows x: (groups, rows, C) to (groups, C, C) float64."""
    return (rows.transpose(1, 2) @ rows).double() / rows.shape[1]


def reconstruct(
    layer: nn.Module, before: torch.Tensor, now: torch.Tensor, removed: torch.Tensor, spread: int = 1
) -> None:
    """Set the weights of a layer's kept inputs so that its outputs approximate those before, in the least squares.

    `before` and `now` are `channel_rows` of its inputs before pruning and now. `removed` (R,) are the removed input
    channels, the same in each group of a convolution; their weights become zero. With P the kept channels and d the
    inputs before, less those of P now, D = E[d now_P^T] (E[now_P now_P^T] + lambda I)^-1 predicts what is missing, and
    W D at each kernel position is added to W[:, P] (He et al. 2017, arXiv 1707.06168). lambda, `RIDGE` of the mean
    diagonal, penalises changes of the kept weights.
    """
    kept = is_kept(now.shape[-1], removed)
    now = now[:, :, kept]
    change = before.clone()
    change[:, :, kept] -= now
    prediction = _regression(now, change, RIDGE)  # (g, P, C)
    weight = kernels(layer, spread)
    weight[:, :, kept] += torch.einsum("gock,gpc->gopk", weight, prediction)
    weight[:, :, ~kept] = 0
    set_kernels(layer, weight)


def reconstruct_windows(layer: nn.Conv2d, outputs: torch.Tensor, windows: torch.Tensor, removed: torch.Tensor) -> None:
    """Adjust each weight of a convolution's kept inputs so that its outputs approximate `outputs`.

    Continues from the solution of `reconstruct`, which treats all kernel positions alike. `outputs` are rows as from
    `record_rows`, `windows` the `window_rows` without `removed`. The penalty on changes is `WINDOW_RIDGE` of the mean
    diagonal. Raises UserError when `windows` are not finite.
    """
    weight = kernels(layer, 1)
    kept = is_kept(weight.shape[2], removed)
    error = outputs - windows @ weight[:, :, kept].flatten(2).transpose(1, 2).to(windows)
    change = _regression(windows, error, WINDOW_RIDGE)
    weight[:, :, kept] += change.transpose(1, 2).unflatten(2, (-1, weight.shape[3]))
    set_kernels(layer, weight)


def fit(layer: nn.Module, norm: _BatchNorm | None, windows: torch.Tensor, targets: torch.Tensor) -> None:
    """Change the weights of a layer so that its outputs, behind `norm` if it has one, approximate `targets`.

    `windows` (groups, rows, weights of an output) are its inputs, `targets` (rows, outputs) what is to come out. The
    ridge regression starts from the present weights, those of the batch norm folded in, and penalises changes by
    `WINDOW_RIDGE` of the mean diagonal. The norm's scale and shift, or the layer's bias, are set as well.
    """
    groups = len(windows)
    weight = kernels(layer, 1).flatten(2)  # (groups, outputs per group, n)
    targets = targets.unflatten(1, (groups, -1)).movedim(1, 0)  # (groups, rows, outputs per group)
    shifts = norm is not None or layer.bias is not None
    centre = windows.mean(1, keepdim=True) if shifts else torch.zeros_like(windows[:, :1])
    goal = targets.mean(1, keepdim=True) if shifts else torch.zeros_like(targets[:, :1])
    rows = windows - centre
    if norm is not None:
        scale = norm.weight.detach().double().reshape(groups, -1) / _deviation(rows, weight, norm)
        weight = weight * scale[:, :, None]
    error = targets - goal - rows @ weight.transpose(1, 2).to(rows)
    weight = weight + _regression(rows, error, WINDOW_RIDGE).transpose(1, 2)
    set_kernels(layer, weight)
    with torch.no_grad():
        if norm is not None:
            norm.weight.copy_(_deviation(rows, weight, norm).flatten())
            norm.bias.copy_(goal.flatten())
        elif layer.bias is not None:
            layer.bias.copy_((goal.double() - centre.double() @ weight.transpose(1, 2)).flatten())


def _deviation(rows: torch.Tensor, weight: torch.Tensor, norm: _BatchNorm) -> torch.Tensor:
    """What `norm` divides the outputs of `weight` by: (groups, outputs per group)."""
    outputs = (rows @ weight.transpose(1, 2).to(rows)).double()
    return (outputs.var(1, unbiased=False) + norm.eps).sqrt()


def zero_inputs(layer: nn.Module, removed: torch.Tensor, spread: int = 1) -> None:
    """Set the weights of the input channels `removed` (R,) to zero, in each group of a convolution."""
    weight = kernels(layer, spread)
    weight[:, :, removed] = 0
    set_kernels(layer, weight)


def output_errors(layer: nn.Module, gram: torch.Tensor, inputs: torch.Tensor, spread: int = 1) -> torch.Tensor:
    """The error of a layer's outputs after reconstruction, as inputs are removed row by row: (R,) cumulative shares.

    `inputs` (R, n) are the input channels that are removed together, in their order. The error is the mean square
    error of least squares, as a share of the outputs' mean square. With the inputs in reverse order of removal, column
    k of the Gram matrix's Cholesky factor is the residual of input k after its prediction from all inputs that are
    removed later or never, so the error is a sum over the columns of the removed inputs.
    """
    weight = kernels(layer, spread)
    mixing = torch.einsum("goik,gojk->gij", weight, weight)  # (g, C, C)
    removed = inputs.flip(0).flatten()
    order = torch.cat([is_kept(gram.shape[-1], removed).nonzero().flatten(), removed]).to(gram.device)
    power = (mixing * gram).sum().cpu()
    residual = _factor(gram[:, order][:, :, order])[:, :, len(order) - len(removed) :]  # (g, C, R * n)
    errors = (residual * (mixing[:, order][:, :, order] @ residual)).sum((0, 1)).cpu()
    per_row = errors.reshape(inputs.shape).sum(1).flip(0).cumsum(0)
    return per_row / power if power > 0 else torch.zeros_like(per_row)


def greedy_order(
    layers: Sequence[nn.Module], grams: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], spreads: Sequence[int]
) -> torch.Tensor:
    """An order of removal (R,) in which each unit is the one without which the layers' outputs lose least then.

    Per layer: the Gram matrix of its inputs, the inputs (R, n) of each unit, and the spread, see `output_errors`, whose
    errors are summed. Removing input j costs A_jj / H_jj, with H the inverse Gram matrix and A the sum of w w^T over
    outputs and kernel positions. Both are updated after each (Hassibi et al. 1993; ZipLM, arXiv 2302.04089).
    """
    states = []
    for layer, gram, units, spread in zip(layers, grams, inputs, spreads):
        weight, gram = kernels(layer, spread).cpu(), gram.cpu()
        mixing = torch.einsum("goik,gojk->gij", weight, weight)  # A: (g, C, C)
        power = (mixing * gram).sum()
        if power > 0:
            states.append((mixing / power, torch.cholesky_inverse(_factor(gram)), units))
    removed = torch.zeros(len(inputs[0]), dtype=torch.bool)
    order = torch.empty(len(removed), dtype=torch.long)
    for number in range(len(order)):
        errors = torch.zeros(len(removed), dtype=torch.float64)
        for mixing, inverse, units in states:
            each = mixing.diagonal(dim1=-2, dim2=-1) / inverse.diagonal(dim1=-2, dim2=-1)
            errors += each.sum(0)[units].sum(1)
        order[number] = errors.masked_fill(removed, torch.inf).argmin()
        removed[order[number]] = True
        for mixing, inverse, units in states:
            for j in units[order[number]].tolist():
                own, column = inverse[:, j, j, None, None], inverse[:, :, j, None]  # (g, 1, 1), (g, C, 1)
                change = column / own
                lost = mixing[:, :, j, None] @ change.transpose(1, 2)
                square = change @ change.transpose(1, 2)
                mixing += mixing[:, j, j, None, None] * square - lost - lost.transpose(1, 2)
                inverse -= own * square
    return order


def _regression(rows: torch.Tensor, targets: torch.Tensor, share: float) -> torch.Tensor:
    """The ridge regression of `targets` (g, n, C) on `rows` (g, n, P): coefficients (g, P, C)."""
    count, width = rows.shape[1:]
    if count < width:  # the same solution from the smaller matrix: X^T (X X^T + lambda I)^-1 Y
        products = (rows @ rows.transpose(1, 2)).double() / count
        weights = torch.cholesky_solve(targets.double() / count, _factor(products, share * count / width))
        return rows.double().transpose(1, 2) @ weights
    products = (rows.transpose(1, 2) @ targets).double() / rows.shape[1]
    return torch.cholesky_solve(products, _factor(gram_matrix(rows), share))


def _factor(gram: torch.Tensor, share: float = RIDGE) -> torch.Tensor:
    """The Cholesky factor of G + lambda I, lambda a share of G's mean diagonal, larger where rounding requires it.

    Raises UserError when G is not finite.
    """
    if not gram.isfinite().all():
        raise not_finite()
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)  # (g,); the matrix of an all-zero input must not be singular
    ridge = torch.where(mean > 0, share * mean, torch.ones_like(mean))
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge[:, None, None] * torch.eye(gram.shape[-1]).to(gram))
        if not failed.any():
            return factor
        ridge = ridge * 10
