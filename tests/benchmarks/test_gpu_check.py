"""The check for the first GPU, as far as it runs without one: on the stand-in, with a small network."""

from dataclasses import replace

import gpu_check
import pytest
import torch

from cleanai import UserError
from cleanai.network.training_step import TrainingStep
from cleanai.runtime.compute import choose_compute
from tests.cuda.stand_in import cuda_stand_in, needs_fused_adam
from tests.small_network import SmallNetwork


@pytest.fixture
def setup(digits):
    with cuda_stand_in((6, 1)):
        compute = replace(choose_compute("cuda", "auto"), timing_s=0.01)
        images = digits.with_train_samples(320, seed=0)
        images = replace(images, test=images.test.select(torch.arange(20))).to(compute.device)
        yield gpu_check.Setup(compute, images, lambda: SmallNetwork(10))


def checks(*functions):
    named = {name: check for name, check in gpu_check.CHECKS.items() if check in functions}
    assert len(named) == len(functions)
    return named


@needs_fused_adam
def test_a_page_of_checks_goes_on_after_one_that_fails(setup):
    def fails(_):
        raise RuntimeError("CUDA error: of\nsome kind")

    some = checks(
        gpu_check.steps_do_not_wait, gpu_check.resumes_across_devices, gpu_check.several_gpus_train_like_one
    )  # fmt: skip
    page, failed = gpu_check.page(setup, {"First": fails, **some})
    assert failed == ["First"]
    assert "| First | FAILED | RuntimeError: CUDA error: of some kind |" in page
    assert page.count("| passed |") == 3
    assert "float32 from host: loss" in page
    assert "there is one GPU" in page


@needs_fused_adam
def test_a_step_that_waits_fails(setup, monkeypatch):
    step = TrainingStep.__call__

    def waiting(self, *args):
        loss, accuracy = step(self, *args)
        loss.item()
        return loss, accuracy

    monkeypatch.setattr(TrainingStep, "__call__", waiting)
    page, failed = gpu_check.page(setup, checks(gpu_check.steps_do_not_wait))
    assert len(failed) == 1
    assert "synchronizing CUDA operation" in page


def test_equal_networks_are_timed_as_graphs(setup, monkeypatch):
    monkeypatch.setattr(gpu_check, "EQUAL_SHARE", 1e9)  # here Python is timed
    assert gpu_check.equal_networks_take_equally_long(setup).startswith("as a CUDA graph: medians ")
    monkeypatch.setattr(gpu_check, "EQUAL_SHARE", -0.1)
    with pytest.raises(AssertionError, match="medians"):
        gpu_check.equal_networks_take_equally_long(setup)


def test_without_a_gpu_it_ends_with_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check.py"])
    with pytest.raises(UserError, match="no CUDA device"):
        gpu_check.main()
