"""Which device and precision are chosen: cards and builds of PyTorch of many years, on a stand-in."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
from torch.torch_version import TorchVersion

from cleanai import UserError
from cleanai.network.training_step import TrainingStep
from cleanai.runtime import distributed
from cleanai.runtime.compute import choose_compute
from tests.cuda.stand_in import CUDA, cuda_stand_in

OLD = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")  # up to PyTorch 2.6
NEW = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")  # from 2.9 on
CARDS = {  # capability, precision, runs with OLD, with NEW
    "GTX 1080": ((6, 1), "float32", True, False),
    "V100": ((7, 0), "float16", True, False),
    "T4": ((7, 5), "float16", True, True),
    "RTX 3060": ((8, 6), "bfloat16", True, True),
    "RTX 4090": ((8, 9), "bfloat16", True, True),
    "H100": ((9, 0), "bfloat16", True, True),
    "RTX 5090": ((12, 0), "bfloat16", False, True),
}


@pytest.mark.parametrize("architectures", [OLD, NEW], ids=["old", "new"])
@pytest.mark.parametrize("name", CARDS)
def test_each_card_gets_its_precision_or_is_left_with_a_reason(name, architectures):
    capability, precision, *runs = CARDS[name]
    with cuda_stand_in(capability, architectures):
        automatic = choose_compute("auto", "auto")
        if runs[architectures == NEW]:
            assert (automatic.device, automatic.precision) == (CUDA, precision)
            assert "cannot be used" not in automatic.description
            assert choose_compute("cuda", "auto") == automatic
            assert choose_compute("cuda", "float32").precision == "float32"
        else:
            assert automatic.device.type == "cpu"
            reason = f"compute capability {capability[0]}.{capability[1]}, cannot be used: .* {' '.join(architectures)}"
            with pytest.raises(UserError, match=f"{reason}.*--device cpu"):
                choose_compute("cuda", "auto")
            assert automatic.description.startswith("Device: cpu (")
            assert f"made for {' '.join(architectures)}" in automatic.description
            assert automatic.deterministic, "as a CPU is"
        assert choose_compute("cpu", "float32").unused_gpu == ""


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)])
def test_bfloat16_is_refused_where_it_is_only_emulated(capability):
    with cuda_stand_in(capability), pytest.raises(UserError, match="no bfloat16"):
        assert torch.cuda.is_bf16_supported(), "as PyTorch says since 2.4"
        choose_compute("cuda", "bfloat16")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be", "busy"),
        ("CUDA driver error: invalid argument", "invalid argument"),
    ],
)
def test_a_card_whose_first_kernel_fails_is_left_with_the_reason(message, expected):
    def fail(name, tensors):
        raise RuntimeError(message)

    with cuda_stand_in() as card:
        card.fail = fail
        description = choose_compute("auto", "float32").description
        assert expected in description
        assert "kernel errors" not in description
        with pytest.raises(UserError, match=expected):
            choose_compute("cuda", "float32")


def test_a_card_that_is_too_old_for_cudnn_is_left_with_the_reason(monkeypatch):
    def version():
        raise RuntimeError("cuDNN version 92400 is not compatible with devices with SM < 7.5")

    with cuda_stand_in((7, 0)):
        monkeypatch.setattr(torch.backends.cudnn, "version", version)
        assert "cuDNN version 92400" in choose_compute("auto", "float32").description


def test_a_full_card_is_no_reason_to_take_the_cpu():
    def fail(name, tensors):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with cuda_stand_in() as card, pytest.raises(torch.cuda.OutOfMemoryError):
        card.fail = fail
        choose_compute("auto", "float32")


@pytest.mark.parametrize(("version", "fused"), [("2.0.1", None), ("2.1.2+cu121", None), ("2.2.0", True)])
def test_adam_is_fused_where_it_takes_depthwise_convolutions(version, fused, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, **settings: settings)  # which has no other state
    with cuda_stand_in((6, 1)):
        compute = choose_compute("cuda", "auto")
        settings = TrainingStep(torch.nn.Conv2d(8, 8, 3, groups=8), None, compute)._optimizer
    assert settings["fused"] is fused
    assert TrainingStep(torch.nn.Linear(1, 1), None, choose_compute("cpu", "float32"))._optimizer["fused"] is None


def test_compiling_needs_a_newer_pytorch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.0.1"))
    with pytest.raises(UserError, match=r"--compile needs PyTorch 2\.1"):
        choose_compute("cpu", "float32", compiled=True)


@pytest.fixture
def torchrun(monkeypatch):
    """The second of two processes on one machine, whose PyTorch is asked to join; what it is asked for, in order."""
    asked = SimpleNamespace(order=[], nccl=True)

    def as_before_2_3(backend, timeout):
        asked.order.append(backend)

    def init_process_group(backend, timeout, device_id=None):
        asked.order.append((backend, device_id))

    asked.as_before_2_3 = lambda: monkeypatch.setattr(torch.distributed, "init_process_group", as_before_2_3)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: asked.nccl)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    return asked


def test_processes_join_by_nccl_after_their_card_is_set(torchrun, monkeypatch):
    with cuda_stand_in():
        monkeypatch.setattr(torch.cuda, "set_device", torchrun.order.append)
        choose_compute("cuda", "auto")
        torchrun.as_before_2_3()
        choose_compute("cuda", "auto")
    choose_compute("cpu", "float32")
    assert torchrun.order == [CUDA, ("nccl", CUDA), CUDA, "nccl", "gloo"]


def test_without_nccl_several_cards_are_refused(torchrun):
    torchrun.nccl = False
    with cuda_stand_in(), pytest.raises(UserError, match=r"NCCL.*without torchrun"):
        choose_compute("cuda", "auto")
    assert not torchrun.order
    torchrun.as_before_2_3()
    choose_compute("cpu", "float32")
    assert torchrun.order == ["gloo"]


def test_of_several_processes_none_falls_back_to_the_cpu_alone(torchrun):
    with cuda_stand_in((6, 1), NEW), pytest.raises(UserError, match="cannot be used"):
        choose_compute("auto", "auto")
    assert not torchrun.order


@pytest.mark.skipif(torch.__version__ < (2, 1), reason="there --compile is refused before")
def test_compiling_is_for_one_process(torchrun):
    with pytest.raises(UserError, match="--compile is for one process"):
        choose_compute("cpu", "float32", compiled=True)


def test_more_processes_than_cards_are_refused(torchrun, monkeypatch):
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "2")
    with cuda_stand_in(), pytest.raises(UserError, match="--nproc_per_node=1"):
        choose_compute("cuda", "auto")


@pytest.mark.parametrize("number", [0, 1])
def test_when_the_first_process_fails_the_others_end(number, monkeypatch):
    sent = []
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setattr(distributed, "_together", lambda: True)

    def broadcast(values):
        sent.append(values[0])
        if number:
            values[0] = False  # what the first one sent

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    entered = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(UserError if number == 0 else SystemExit))
        with distributed.first_before_others():
            entered.append(number)
            raise UserError("a download failed")
    assert entered == ([] if number else [0])
    assert sent == ([True] if number else [False])
