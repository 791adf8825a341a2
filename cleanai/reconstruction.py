"""Least squares between channels: what is lost when some go, and how the layers that read them take it over."""
from __future__ import annotations

import torch
from torch import nn

RIDGE = 1e-4  # of the mean diagonal: on CIFAR-10 anything from 1e-6 to 1e-2 gave the same accuracy


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


def reconstruct(layer: nn.Module, gram: torch.Tensor, removed: torch.Tensor, spread: int = 1) -> None:
    """Let the inputs that a layer keeps take over what they can say of the removed ones (He et al. 2017, 1707.06168).

    `gram` is the layer's from `record_grams`, `removed` (R,) the input channels about to go, the same in each group of
    a convolution. With P the kept ones, B = G[R, P] (G[P, P] + lambda I)^-1 predicts the removed inputs from them, and
    W[:, P] + W[:, R] B at each kernel position replaces W[:, P]: of all weights the ones whose outputs come nearest to
    what they were, a change costing lambda, `RIDGE` of the mean diagonal. The removed inputs' weights stay, to be cut.
    """
    if not len(removed):
        return
    kept = torch.ones(gram.shape[-1], dtype=torch.bool)
    kept[removed] = False
    kept, removed = kept.nonzero().flatten().to(gram.device), removed.to(gram.device)
    taken_over = torch.cholesky_solve(gram[:, kept][:, :, removed], _factor(gram[:, kept][:, :, kept]))  # (g, P, R)
    weight = kernels(layer, spread)
    weight[:, :, kept] += torch.einsum("gork,gpr->gopk", weight[:, :, removed], taken_over)
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
    staying = torch.ones(gram.shape[-1], dtype=torch.bool)
    staying[gone] = False
    order = torch.cat([staying.nonzero().flatten(), gone]).to(gram.device)
    power = (mixing * gram).sum().cpu()
    left = _factor(gram[:, order][:, :, order])[:, :, len(order) - len(gone) :]  # (g, C, R * n)
    lost = (left * (mixing[:, order][:, :, order] @ left)).sum((0, 1)).cpu()
    per_row = lost.reshape(inputs.shape).sum(1).flip(0).cumsum(0)
    return per_row / power if power > 0 else torch.zeros_like(per_row)


def _factor(gram: torch.Tensor) -> torch.Tensor:
    """The Cholesky factor of G + lambda I; where rounding asks for it lambda grows."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)  # (g,); a group that receives nothing must not be singular
    ridge = torch.where(mean > 0, RIDGE * mean, torch.ones_like(mean))
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge[:, None, None] * torch.eye(gram.shape[-1]).to(gram))
        if not failed.any():
            return factor
        ridge = ridge * 10
