from dataclasses import replace

import pytest
import torch
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet
from cleanai.network.activations import record_rows, record_statistics
from cleanai.pruning.least_squares import gram_matrix
from cleanai.runtime.compute import choose_compute


@pytest.fixture
def pictures():
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (37, 3, 8, 8), dtype=torch.uint8)
    return ImageSet(pixels, torch.zeros(37, dtype=torch.long), torch.full((3,), 0.5), torch.full((3,), 0.3))


def _layers(network):
    return [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]


@pytest.fixture
def small():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(4 * 5 * 5, 2),
    )  # fmt: skip


def test_statistics_are_the_means_of_what_each_layer_receives(small, pictures, compute):
    recorded = record_statistics(small, pictures, compute)
    small.double().eval()
    values = next(pictures.batches(len(pictures)))[0].double()
    seen = []
    for layer in small:
        if layer in recorded:
            seen.append(layer)
            rows = values if values.ndim == 2 else values.movedim(1, -1).flatten(0, 2)  # (everything else, C)
            torch.testing.assert_close(recorded[layer].mean_absolute, rows.abs().mean(0), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(recorded[layer].second_moment, rows.square().mean(0), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(recorded[layer].frequency, (rows > 0).double().mean(0), rtol=1e-3, atol=1e-3)
        values = layer(values)
    assert seen == _layers(small)


def test_how_images_are_split_into_batches_does_not_matter(small, pictures, compute):
    whole = record_statistics(small, pictures, compute)
    for size in (1, 8, 36):  # the last batch is ragged
        parts = record_statistics(small, pictures, replace(compute, inference_pixels=size * 64))
        for layer in _layers(small):
            for name in ("mean_absolute", "frequency", "second_moment"):
                expected = getattr(whole[layer], name)
                torch.testing.assert_close(getattr(parts[layer], name), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("training", [False, True])
def test_the_network_is_left_as_it_was(small, pictures, compute, training):
    small.train(training)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    record_statistics(small, pictures, compute)
    assert small.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in small.modules())


def test_no_hook_is_left_when_a_forward_pass_fails(small, pictures, compute):
    small[-1] = nn.Linear(7, 2)
    with pytest.raises(RuntimeError):
        record_statistics(small, pictures, compute)
    assert not any(m._forward_pre_hooks for m in small.modules())


def test_a_network_that_computes_no_finite_numbers_is_refused(small, pictures, compute):
    small[0].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite numbers: its weights are damaged"):
        record_statistics(small, pictures, compute)


def test_products_between_channels_are_not_taken_in_the_low_precision_of_the_network(small, pictures):
    layer, seen = small[3], []
    gram = gram_matrix(record_rows(small, {layer: 1}, pictures, choose_compute("cpu", "bfloat16"))[0][layer])
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        small.eval()(next(pictures.batches(37))[0])
    hook.remove()
    rows = seen[0].movedim(1, -1).flatten(0, 2).unflatten(1, (4, 2))
    torch.testing.assert_close(gram, torch.einsum("mgi,mgj->gij", rows, rows) / len(rows), rtol=1e-5, atol=1e-7)
