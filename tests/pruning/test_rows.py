"""Rows of layer inputs, against the inputs themselves and against PyTorch's unfold."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from cleanai import UserError
from cleanai.network.activations import not_finite
from cleanai.pruning.least_squares import gram_matrix
from cleanai.pruning.rows import record_rows, window_rows
from cleanai.runtime.compute import choose_compute


@pytest.fixture
def grouped():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)).eval()


def _recorded_inputs(network, images, compute):
    """The recorded input rows of the last layer."""
    return record_rows(network, {network[2]: 1}, images, compute)[0][network[2]]


def _all_rows(values, groups):
    """Values (images, C, H, W) as rows: (groups, images * positions, C of a group)."""
    return torch.stack(values.movedim(1, -1).flatten(0, 2).chunk(groups, dim=1))


def _positions(few, whole, images, count):
    """The positions in the first image of its `count` rows in `few`, of all rows in `whole`."""
    return few[0, :count][:, None].eq(whole[0, : whole.shape[1] // images]).all(2).int().argmax(1)


def test_rows_are_the_inputs_of_a_layer_whatever_the_split_into_batches(grouped, images, compute):
    with torch.inference_mode():
        expected = _all_rows(grouped[:2](next(images.batches(50))[0]), groups=2)
    for size in (1, 16, 50):
        rows = _recorded_inputs(grouped, images, replace(compute, inference_pixels=size * 64))
        torch.testing.assert_close(rows, expected)
    products = torch.einsum("gni,gnj->gij", expected.double(), expected.double()) / expected.shape[1]
    torch.testing.assert_close(gram_matrix(rows), products, rtol=1e-5, atol=1e-6)


def test_the_number_of_rows_does_not_grow_with_the_size_of_the_images(grouped, images, compute, monkeypatch):
    whole = _recorded_inputs(grouped, images, compute)
    monkeypatch.setattr("cleanai.pruning.rows.ROWS", 50 * 5)
    few = _recorded_inputs(grouped, images, compute)
    assert few.shape == (2, 50 * 5, 4)
    positions = _positions(few, whole, 50, 5)
    assert len(set(positions.tolist())) == 5
    torch.testing.assert_close(few, whole.unflatten(1, (50, 36))[:, :, positions].flatten(1, 2))


def test_products_of_channels_are_exact_when_the_network_runs_in_bfloat16(grouped, images):
    gram = gram_matrix(_recorded_inputs(grouped, images, choose_compute("cpu", "bfloat16")))
    inputs = []
    hook = grouped[2].register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        grouped(next(images.batches(50))[0])
    hook.remove()
    rows = _all_rows(inputs[0], groups=2)
    torch.testing.assert_close(gram, torch.einsum("gmi,gmj->gij", rows, rows) / rows.shape[1], rtol=1e-5, atol=1e-7)


def test_windows_and_outputs_are_those_of_unfold_and_of_the_layer(two_convolutions, images, compute, monkeypatch):
    layer, small_batches = two_convolutions[2], replace(compute, inference_pixels=16 * 64)
    with torch.inference_mode():
        values = two_convolutions[:2](next(images.batches(50))[0])
        outputs = layer(values) - layer.bias[:, None, None]
    sizes = {name: getattr(layer, name) for name in ("kernel_size", "dilation", "padding", "stride")}
    whole = nn.functional.unfold(values, **sizes).movedim(1, 2).flatten(0, 1)  # (images * positions, C * kernel)
    whole = torch.stack(whole.chunk(layer.groups, 1))
    torch.testing.assert_close(window_rows(layer, values, 50), whole)
    expected = _all_rows(outputs, layer.groups)
    _, recorded = record_rows(two_convolutions, {layer: 1}, images, small_batches)
    torch.testing.assert_close(recorded[layer], expected, rtol=1e-4, atol=1e-5)

    # Of each image three positions.
    monkeypatch.setattr("cleanai.pruning.rows.WINDOWS", 50 * 3)
    monkeypatch.setattr("cleanai.pruning.rows.ROWS_PER_WEIGHT", 1)
    few = window_rows(layer, values, 50)
    assert few.shape == (layer.groups, 50 * 3, whole.shape[2])
    positions = _positions(few, whole, 50, 3)
    assert len(set(positions.tolist())) == 3
    torch.testing.assert_close(few, whole.unflatten(1, (50, -1))[:, :, positions].flatten(1, 2))
    _, recorded = record_rows(two_convolutions, {layer: 1}, images, small_batches)
    expected = expected.unflatten(1, (50, -1))[:, :, positions].flatten(1, 2)
    torch.testing.assert_close(recorded[layer], expected, rtol=1e-4, atol=1e-5)


def test_windows_leave_out_the_removed_inputs(two_convolutions, images):
    layer = two_convolutions[2]
    with torch.inference_mode():
        values = two_convolutions[:2](next(images.batches(50))[0])
    positions = layer.weight[0, 0].numel()
    kept = [column for column in range(layer.weight.shape[1] * positions) if column // positions != 1]
    windows = window_rows(layer, values, 50, removed=torch.tensor([1]))
    torch.testing.assert_close(windows, window_rows(layer, values, 50)[:, :, kept])


def test_too_few_rows_per_weight_give_no_windows(two_convolutions, images, compute, monkeypatch):
    layer = two_convolutions[2]
    _, outputs = record_rows(two_convolutions, {layer: 1}, images, compute)
    enough = outputs[layer].shape[1] // layer.weight[0].numel()
    for rows_per_weight, expected in ((enough, [layer]), (enough + 1, [])):
        monkeypatch.setattr("cleanai.pruning.rows.ROWS_PER_WEIGHT", rows_per_weight)
        assert list(record_rows(two_convolutions, {layer: 1}, images, compute)[1]) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_other_convolutions_have_no_windows(options, images, compute):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, **options))
    assert not record_rows(network, {network[2]: 1}, images, compute)[1]


def test_outputs_that_are_not_finite_are_refused(two_convolutions, images, compute):
    two_convolutions[2].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=re.escape(str(not_finite()))):
        record_rows(two_convolutions, {two_convolutions[2]: 1}, images, compute)
