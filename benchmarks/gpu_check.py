"""What only a GPU can show: every path of this project that is for GPUs, on the first one at hand.

Takes about 5 minutes and needs no network. A check that fails does not stop the others. Prints one page and writes it
to results/gpu/. The status is 1 when a check fails.

    make test-gpu
    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py memory compiled    # only the checks whose names contain one of these
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import torch
from torch import nn

from cleanai import UserError
from cleanai.data.images import Images, ImageSet
from cleanai.data.sources import load_images
from cleanai.exit import run_script
from cleanai.measure.latency import time_networks
from cleanai.measure.provenance import describe_environment
from cleanai.network.evaluation import evaluate
from cleanai.network.models import build, resnet18_for_small_images
from cleanai.network.training_step import TrainingStep
from cleanai.report.wording import wrapped
from cleanai.runtime.checkpoints import load_checkpoint, read_record
from cleanai.runtime.compute import Compute, choose_compute
from cleanai.runtime.files import one_line, write_bytes
from cleanai.runtime.progress import say
from cleanai.runtime.scenario import PROJECT, SCRIPTS_DIR

GIB = 2**30
# Peak memory of a training step of 128 images (docs/robustness.md): network, side, precision, bound in GiB.
PEAKS = (
    ("ResNet18", 32, "float32", 0.75),
    ("ResNet18", 32, "bfloat16", 0.5),
    ("ResNet50", 224, "bfloat16", 6.0),
)
WORKSPACE_GIB = 1.0  # of cuDNN's algorithms, besides
EQUAL_SHARE = 0.05  # by which the medians of equal networks may differ
DEADLINE_S = 150  # of a command


@dataclass
class Setup:
    """What the checks run: a device, its images, and a network for them."""

    compute: Compute
    images: Images
    build: Callable[[], nn.Module] = lambda: resnet18_for_small_images(10)

    def network(self) -> nn.Module:
        """The network on the device, with the same weights each time."""
        torch.manual_seed(0)
        return self.compute.place(self.build())

    def precisions(self) -> list[str]:
        """Those that the device is made for."""
        suited = {"bfloat16": (8, 0), "float16": (7, 0)}
        capability = torch.cuda.get_device_capability(self.compute.device)
        return ["float32", *(name for name, least in suited.items() if capability >= least)]


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("names", nargs="*", help="parts of names of checks (default: all checks)")
    wanted = [name.lower() for name in parser.parse_args().names] or [""]
    checks = {name: check for name, check in CHECKS.items() if any(part in name.lower() for part in wanted)}
    if not checks:
        raise UserError(f"No check has such a name. There are: {'; '.join(CHECKS)}")
    if not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA device: this check needs an NVIDIA GPU and PyTorch's CUDA build")
    compute = choose_compute("cuda", "auto")
    say(wrapped(compute.description))
    images = load_images("Digits", PROJECT / "downloaded_datasets").to(compute.device)
    text, failed = page(Setup(compute, images), checks)
    name = re.sub(r"\W+", "_", compute.device_name).strip("_")
    path = PROJECT / "results" / "gpu" / f"{name}.md"
    write_bytes(path, text.encode("utf-8"))
    print(f"\n{text}\n{path}")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


def page(setup: Setup, checks: dict[str, Callable[[Setup], str]]) -> tuple[str, list[str]]:
    """The page of results, and the names of the checks that failed."""
    machine = {key: value for key, value in describe_environment(setup.compute).items() if value not in (None, False)}
    lines = [f"# Check on {setup.compute.device_name}", "", ", ".join(f"{k} {v}" for k, v in machine.items()), ""]
    lines += ["| check | | found | seconds |", "|---|---|---|---:|"]
    failed = []
    for name, check in checks.items():
        say(f"{name} ...")
        started = time.perf_counter()
        try:
            verdict, found = "passed", check(setup)
        except Exception as error:  # whatever it is: the others go on
            verdict, found = "FAILED", f"{type(error).__name__}: {one_line(error)[:300]}"
            failed.append(name)
        seconds = time.perf_counter() - started
        lines.append(f"| {name} | {verdict} | {found.replace('|', '/')} | {seconds:.0f} |")
        say(f"  {verdict}: {found}")
    return "\n".join([*lines, ""]), failed


def steps_do_not_wait(setup: Setup) -> str:
    """Training steps in each precision, from a dataset on the GPU and from one in host memory."""
    found = []
    for precision in setup.precisions():
        for place, images in (("GPU", setup.images.train), ("host", _in_host_memory(setup.images.train))):
            step = TrainingStep(setup.network().train(), images, replace(setup.compute, precision=precision))
            order = torch.arange(64, device=images.pixels.device)
            moves = images.draw_moves(64, False, torch.Generator().manual_seed(0))
            first = step(order, moves, 0.001)[0].item()
            last = _without_waiting(lambda step=step, order=order, moves=moves: step(order, moves, 0.001))[0].item()
            assert last < first, f"{precision}: the loss rises from {first} to {last}"
            found.append(f"{precision} from {place}: loss {first:.3f} to {last:.3f}")
    return "; ".join(found)


def _without_waiting(step: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last of ten steps, in which a wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return [step() for _ in range(10)][-1]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _in_host_memory(images: ImageSet) -> ImageSet:
    return images.to(torch.device("cpu")).to(images.mean.device, keep_pixels=True)


def compiled_like_eager(setup: Setup) -> str:
    """Compiled training steps: what they compute, and how long they take."""
    losses, milliseconds = {}, {}
    for name, compiled in (("eager", False), ("compiled", True)):
        compute = replace(setup.compute, precision="float32", compiled=compiled)
        step = TrainingStep(setup.network().train(), setup.images.train, compute)
        order = torch.arange(64, device=compute.device)
        moves = setup.images.train.draw_moves(64, False, torch.Generator().manual_seed(0))
        # Rounding, by TF32 above all, grows from step to step: the first ones are compared.
        losses[name] = [step(order, moves, 1e-4)[0].item() for _ in range(4)]
        for number in range(25):
            if number == 5:
                compute.synchronize()
                started = time.perf_counter()
            step(order, moves, 1e-9)
        compute.synchronize()
        milliseconds[name] = (time.perf_counter() - started) / 20 * 1000
    for eager, compiled in zip(losses["eager"], losses["compiled"]):
        assert abs(compiled / eager - 1) < 0.05, losses
    assert losses["eager"][-1] < losses["eager"][0], losses
    return "; ".join(
        f"{name}: losses {', '.join(f'{loss:.4f}' for loss in losses[name])}, {milliseconds[name]:.2f} ms per step"
        for name in losses
    )


def resumes_across_devices(setup: Setup) -> str:
    """The second half of a training from the state of the first, saved on this or another device."""
    losses: dict[str, float] = {}
    batches = torch.randperm(len(setup.images.train), generator=torch.Generator().manual_seed(0))[:320].split(32)
    moves = torch.zeros(32, 3, dtype=torch.long)
    cpu = replace(setup.compute, device=torch.device("cpu"), precision="float32")
    gpu = replace(setup.compute, precision="float32")
    for name, first, then in (("GPU", gpu, gpu), ("GPU to CPU", gpu, cpu), ("CPU to GPU", cpu, gpu)):
        network, state = setup.network(), None
        for compute, half in ((first, batches[:5]), (then, batches[5:])):
            network = compute.place(network)
            images = setup.images.to(compute.device).train
            step = TrainingStep(network.train(), images, compute)
            if state is not None:
                step.load_state_dict(state)
            trained = [step(batch.to(compute.device), moves.to(compute.device), 0.001)[0].item() for batch in half]
            state = _through_a_file(step.state_dict())
        losses[name] = sum(trained) / len(trained)
    assert all(abs(loss / losses["GPU"] - 1) < 0.05 for loss in losses.values()), losses
    return ", ".join(f"{name}: loss {loss:.4f}" for name, loss in losses.items())


def _through_a_file(state: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pth"
        torch.save(state, path)
        return torch.load(path, map_location="cpu", weights_only=True)


def equal_networks_take_equally_long(setup: Setup) -> str:
    """The A/A test of latency: three equal networks, timed in turns."""
    networks = {name: copy.deepcopy(setup.network()) for name in ("a", "b", "c")}
    timed = time_networks(networks, setup.images.test, setup.compute)
    medians = [each["latency_ms"]["p50"] for each in timed.values()]
    found = f"{timed['a']['latency_by']}: medians {', '.join(f'{median:.3f}' for median in medians)} ms"
    assert timed["a"]["latency_by"] == "as a CUDA graph", found
    assert max(medians) <= (1 + EQUAL_SHARE) * min(medians), found
    return f"{found}; {timed['a']['throughput_images_per_s']:,.0f} images/s in batches of 128"


def peak_memory_is_bounded(setup: Setup) -> str:
    """The peak of a training step of 128 images, against the bounds that tests/cuda checks."""
    found = []
    for model, side, precision, bound_gib in PEAKS:
        free_gib = torch.cuda.mem_get_info(setup.compute.device)[0] / GIB
        if precision not in setup.precisions() or bound_gib + WORKSPACE_GIB > free_gib:
            found.append(f"{model} at {side} in {precision}: not for this GPU")
            continue
        compute = replace(setup.compute, precision=precision)
        network = compute.place(build(model, 10))
        images = _noise(128, side).to(compute.device)
        before = torch.cuda.memory_allocated()
        step = TrainingStep(network.train(), images, compute)
        order, moves = torch.arange(128, device=compute.device), torch.zeros(128, 3, dtype=torch.long)
        peaks_gib = []
        for _ in range(2):  # in the first cuDNN tries algorithms with what memory there is
            torch.cuda.reset_peak_memory_stats()
            step(order, moves.to(compute.device), 0.001)
            peaks_gib.append((torch.cuda.max_memory_allocated() - before) / GIB)
        first, second = peaks_gib
        found.append(f"{model} at {side} in {precision}: {second:.2f} GiB, in cuDNN's search {first:.2f}")
        assert second < bound_gib + WORKSPACE_GIB, found[-1]
    return "; ".join(found)


def a_full_gpu_halves_the_batches(setup: Setup) -> str:
    """Evaluation with so little memory that its batches do not fit: the same result."""
    network, images = setup.network(), _noise(1000, 32).to(setup.compute.device)
    expected = evaluate(network, images, setup.compute)
    sizes: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(setup.compute.device)[1]
    allowed = torch.cuda.memory_reserved() + 0.15 * GIB
    torch.cuda.set_per_process_memory_fraction(allowed / total, setup.compute.device)
    try:
        found = evaluate(network, images, setup.compute)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setup.compute.device)
        hook.remove()
    assert len(sizes) > 2, f"the batches {sizes} did fit"
    assert abs(found.loss / expected.loss - 1) < 0.01, (found.loss, expected.loss)
    return f"batches of {sizes}, loss {found.loss:.4f} as {expected.loss:.4f}"


def _noise(count: int, side: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return ImageSet(pixels, labels, torch.full((3,), 0.5), torch.full((3,), 0.25))


def deterministic_twice_equal(setup: Setup) -> str:
    """Script 1 with --deterministic, twice: the same weights."""
    states = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            options = ("--deterministic", "--train-samples", "512", "--epochs", "1")
            _script(setup, "TS1_01_prepare_model.py", Path(folder) / name, *options, "--weights", "none")
            states.append(load_checkpoint(Path(folder) / name / "TS1" / "ResNet18_Digits_FT_final.pth")["state_dict"])
    different = [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])]
    assert not different, f"{len(different)} of {len(states[0])} tensors differ"
    return f"all {len(states[0])} tensors are equal"


def several_gpus_train_like_one(setup: Setup) -> str:
    """Script 1 on all GPUs by torchrun with NCCL, beside one of them."""
    count = 1 << (torch.cuda.device_count().bit_length() - 1)  # a batch of 64 must be shared evenly
    if count < 2:
        return "not tried: there is one GPU"
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        for name, prefix in (("one", ()), ("all", torchrun)):
            options = ("--epochs", "2", "--weights", "none", "--precision", "float32")
            _script(setup, "TS1_01_prepare_model.py", Path(folder) / name, *options, prefix=prefix)
            record = read_record(Path(folder) / name / "TS1" / "TS1_ResNet18_Digits.json")
            losses.append(record["history"][-1]["train_loss"])
    assert abs(losses[1] / losses[0] - 1) < 0.1, losses
    return f"{count} GPUs: training loss {losses[1]:.4f}, one: {losses[0]:.4f}"


def scripts_run(setup: Setup) -> str:
    """A short TS1: scripts 1 to 5 with few epochs."""
    with tempfile.TemporaryDirectory() as folder:
        _script(setup, "TS1_01_prepare_model.py", Path(folder), "--weights", "none", "--epochs", "4")
        for name in ("TS1_02_coverage_pruning.py", "TS1_03_wanda_pruning.py"):
            options = ("--epochs", "2", "--lr", "0.0003", "--timing-seconds", "3")
            _script(setup, name, Path(folder), *options)
        compare = ("TS1_04_compare_methods.py", "--dataset", "Digits", "--checkpoints-dir", folder)
        _run(str(SCRIPTS_DIR / compare[0]), *compare[1:])
        _script(setup, "TS1_05_sweep_ratios.py", Path(folder), "--ratios", "0.3")
        models = read_record(next(Path(folder).glob("TS1_Wanda_*/reports/*.json")))["models"]
    accuracies = {name: model["accuracy_percent"] for name, model in models.items()}
    assert min(accuracies.values()) > 50, accuracies
    return ", ".join(
        f"{name} {accuracies[name]:.2f}%, {model['latency_ms']['p50']:.3f} ms" for name, model in models.items()
    )


def _script(setup: Setup, name: str, folder: Path, *options: str, prefix: tuple[str, ...] = ()) -> None:
    common = ("--dataset", "Digits", "--batch-size", "64", "--device", setup.compute.device.type)
    _run(*prefix, str(SCRIPTS_DIR / name), *common, "--checkpoints-dir", str(folder), *options)


def _run(*command: str) -> None:
    """Run Python with these arguments. RuntimeError with the end of what it printed when it fails."""
    environment = {**os.environ, "NCCL_SOCKET_IFNAME": "lo", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=DEADLINE_S,
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[-1]).name} ended with {done.returncode}: {done.stderr[-300:]}")


CHECKS = {
    "Training steps do not wait": steps_do_not_wait,
    "Training resumes across devices": resumes_across_devices,
    "Equal networks take equally long": equal_networks_take_equally_long,
    "Peak memory is bounded": peak_memory_is_bounded,
    "A full GPU halves the batches": a_full_gpu_halves_the_batches,
    "--deterministic twice is equal": deterministic_twice_equal,
    "Several GPUs train like one": several_gpus_train_like_one,
    "A short TS1": scripts_run,
    "Compiled steps train like eager ones": compiled_like_eager,
}

if __name__ == "__main__":
    run_script(main)
