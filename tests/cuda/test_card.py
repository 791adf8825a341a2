"""What trains, prunes and measures, on a stand-in for a card: no mixed devices, no waiting where none is meant."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from cleanai import image_set, prune, sweep
from cleanai.data.images import Images
from cleanai.measure.coverage import measure_coverage, record_profiles
from cleanai.measure.latency import time_networks
from cleanai.network.activations import record_statistics
from cleanai.network.evaluation import evaluate
from cleanai.network.models import resnet18_for_small_images
from cleanai.network.training import TrainSettings, fine_tune, train
from cleanai.network.training_step import TrainingStep
from cleanai.pruning import steps
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.repair import recalibrate
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.runtime.compute import Compute, choose_compute
from cleanai.runtime.scenario import Scenario
from cleanai.sweep import Sweep
from tests.cuda.stand_in import CPU, CUDA, StandIn, cuda_stand_in, device_of, needs_fused_adam
from tests.small_network import SmallNetwork

pytestmark = needs_fused_adam

CARDS = {"bfloat16": (8, 6), "float32": (6, 1), "float16": (7, 5)}  # the precision that auto takes on each
on_each_card = pytest.mark.parametrize("precision", CARDS)
EPOCH = TrainSettings(epochs=1, batch_size=16)


def on_card(precision: str, digits: Images) -> tuple[Compute, Images]:
    """The card that auto takes this precision on, and few images on it."""
    compute = replace(choose_compute("cuda", "auto"), timing_s=0.01)
    assert compute.precision == precision
    few = digits.with_train_samples(48, seed=0)
    return compute, replace(few, test=few.test.select(torch.arange(48)), mirror=True).to(compute.device)


def placed(compute: Compute, network: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    network = compute.place(network or SmallNetwork(10))
    assert {device_of(tensor) for tensor in network.state_dict().values()} == {CUDA}
    return network


def low_precisions(card: StandIn) -> set:
    """What autocast was asked for where it was enabled; nowhere else it may be asked for a precision."""
    assert all(dtype is None for _, dtype, enabled in card.autocasts if not enabled), "PyTorch 2.0 checks it anyhow"
    return {(device, dtype) for device, dtype, enabled in card.autocasts if enabled}


@on_each_card
def test_a_training_step_does_not_wait_for_the_card(precision, digits):
    with cuda_stand_in(CARDS[precision]) as card:
        compute, images = on_card(precision, digits)
        network = placed(compute).train()
        step = TrainingStep(network, images.train, compute)
        moves = images.train.draw_moves(48, True, torch.Generator().manual_seed(0))
        batch = torch.arange(16, device=compute.device)
        first, _ = step(batch, moves[batch], 0.001)
        card.forget()
        losses = [step(batch, moves[batch], 0.001) for _ in range(3)]
        assert card.waits == card.copies == Counter()
        assert {device_of(value) for value in (*losses[-1], *(each.grad for each in network.parameters()))} == {CUDA}
        assert losses[-1][0].item() < first.item()
        used = {("cuda", getattr(torch, precision))} if precision != "float32" else set()
        assert low_precisions(card) == used
        state = step.state_dict()["optimizer"]["state"]
        assert {device_of(value) for each in state.values() for value in each.values()} == {CUDA}


def test_an_epoch_of_resnet18_waits_once_for_its_results(digits):
    with cuda_stand_in() as card:
        compute, images = on_card("bfloat16", digits)
        network = placed(compute, resnet18_for_small_images(10))
        card.forget()
        train(network, images, compute, EPOCH)
        assert sum(card.waits.values()) == 1
        assert sum(card.copies.values()) == 2, "the order and the moves of the images"


@on_each_card
def test_a_network_is_trained_pruned_and_measured_on_the_card(precision, digits, tmp_path):
    with cuda_stand_in(CARDS[precision]) as card:
        compute, images = on_card(precision, digits)
        network = placed(compute)
        scenario = Scenario("T", "SmallNetwork", "Digits", tmp_path)
        _, tested = fine_tune(network, images, compute, EPOCH, scenario, {"config": {}})
        assert device_of(tested.correct) == CPU
        pruned = copy.deepcopy(network)
        used = PruneImages(images.test, images.repair_sample(32, 0))
        report, unrepaired = prune_to_budget(
            pruned, WandaImportance(), used, compute, PruneSettings(0.3, 0.3, steps=1, round_to=(1,), batch_size=16)
        )
        assert report["steps"][0]["parameters_removed_percent"] == pytest.approx(30, abs=0.2)
        recalibrate(unrepaired, used.repair, compute, 16, "")
        statistics = record_statistics(pruned, images.test, compute)
        assert {device_of(each.second_moment) for each in statistics.values()} == {CPU}
        profiles = record_profiles(pruned, images.train, compute)
        assert 0 < measure_coverage(pruned, images.test, profiles, compute)["nc_percent"] <= 100
        timed = time_networks({"before": network, "after": pruned}, images.test, compute)
        assert {device_of(tensor) for tensor in (*pruned.parameters(), *unrepaired.buffers())} == {CUDA}
        assert {device for device, _ in low_precisions(card)} <= {"cuda"}
        assert card.replays >= 2 * timed["after"]["latency_ms"]["n"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_sweep_runs_on_the_card(precision, digits, monkeypatch):
    monkeypatch.setattr(sweep, "METHODS", {})  # the baselines are left, whose importances are torch_pruning's
    with cuda_stand_in(CARDS[precision]):
        compute, images = on_card(precision, digits)
        used = PruneImages(images.test, images.train.sample(16, 0))
        points = Sweep(
            placed(compute), [0.3], used, images.test, compute, fine_tune=lambda x: train(x, images, compute, EPOCH)
        ).run()
        assert [point["criterion"] for point in points] == ["OBS", "L2 magnitude", "random choice"]


@on_each_card
def test_one_image_is_timed_as_a_graph(precision, digits):
    class Passes(nn.Module):
        def __init__(self, waits):
            super().__init__()
            self.waits, self.inside, self.outside, self.benchmark = waits, 0, 0, []

        def forward(self, inputs):
            self.inside += card.capturing
            self.outside += len(inputs) == 1 and not card.capturing
            self.benchmark.append(torch.backends.cudnn.benchmark)
            return inputs * int(inputs.sum()) if self.waits else inputs

    with cuda_stand_in(CARDS[precision]) as card:
        compute, images = on_card(precision, digits)
        passes, waiting = Passes(waits=False), Passes(waits=True)
        timed = time_networks({"a": passes}, images.test, compute)["a"]
        assert timed["latency_by"] == "as a CUDA graph"
        assert (passes.inside, passes.outside) == (1, 3)
        assert card.replays > timed["latency_ms"]["n"]
        assert all(passes.benchmark) and not torch.backends.cudnn.benchmark
        card.replays = 0
        timed = time_networks({"a": passes, "b": waiting}, images.test, compute)
        assert {each["latency_by"] for each in timed.values()} == {"without a CUDA graph, which cannot be made of it"}
        assert card.replays == 0
        assert waiting.outside > timed["b"]["latency_ms"]["n"]


def test_cudnn_searches_its_fastest_algorithms_for_training_alone(digits):
    seen: dict[str, set] = {"train": set(), "eval": set()}

    def note(network, args):
        seen["train" if network.training else "eval"].add(torch.backends.cudnn.benchmark)

    with cuda_stand_in():
        compute, images = on_card("bfloat16", digits)
        network = placed(compute)
        network.register_forward_pre_hook(note)
        train(network, images, compute, EPOCH)
        evaluate(network, images.test, compute)
        assert seen == {"train": {True}, "eval": {False}}
        seen["train"].clear()
        train(network, images, replace(compute, deterministic=True), EPOCH)
        assert seen["train"] == {False}


@pytest.mark.parametrize("stay", [False, True])
def test_images_that_are_large_for_the_card_stay_in_host_memory(stay, digits):
    size = 3 * 16 * 16 * (48 + 48)
    with cuda_stand_in((6, 1), free_bytes=3 * size - stay) as card:
        compute, images = on_card("float32", digits)
        assert device_of(images.train.pixels) == device_of(images.test.labels) == (CPU if stay else CUDA)
        network = placed(compute)
        card.forget()
        train(network, images, compute, EPOCH)
        assert sum(card.waits.values()) == 1, "batches are moved ahead"
        assert sum(card.copies.values()) == (1 if stay else 2)
        loss = evaluate(network, images.test, compute).loss
        pruned = PruneImages(images.calibration_split(32, 0)[0], images.repair_sample(32, 0))
        prune_to_budget(network, WandaImportance(), pruned, compute, PruneSettings(0.3, None, 1, (1,)))
        state = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    with cuda_stand_in((6, 1)):
        compute, images = on_card("float32", digits)
        other = placed(compute)
        train(other, images, compute, EPOCH)
        assert evaluate(other, images.test, compute).loss == loss
        pruned = PruneImages(images.calibration_split(32, 0)[0], images.repair_sample(32, 0))
        prune_to_budget(other, WandaImportance(), pruned, compute, PruneSettings(0.3, None, 1, (1,)))
        assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("stay", [False, True])
def test_a_notebook_prunes_in_float32_where_a_card_has_only_float16_and_leaves_large_sets_on_the_host(
    stay, monkeypatch
):
    pixels = torch.randint(0, 256, (32, 3, 16, 16), dtype=torch.uint8)
    with cuda_stand_in(CARDS["float16"], free_bytes=3 * pixels.numel() - stay) as card:
        seen = []

        def noted(network, images, *others):
            seen.append(device_of(images.pixels))
            return record_statistics(network, images, *others)

        monkeypatch.setattr(steps, "record_statistics", noted)
        pruned, _ = prune(SmallNetwork(10), image_set(pixels), ratio=0.2, round_to=(1,))
        assert low_precisions(card) == set()
    assert {device_of(tensor) for tensor in pruned.state_dict().values()} == {CPU}
    assert set(seen) == {CPU if stay else CUDA}
