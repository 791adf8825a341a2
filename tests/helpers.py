"""What several tests use: the scripts as commands, a record of a run, a web server, images, PDFs, and FLOPs."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from pypdf import PdfReader

from cleanai.data.images import ImageSet
from cleanai.measure.significance import pack
from cleanai.runtime.methods import METHODS
from cleanai.runtime.scenario import PROJECT

REAL_IMAGES = PROJECT / "downloaded_datasets" / "CIFAR10"
needs_real_images = pytest.mark.skipif(
    not (REAL_IMAGES / "train").is_dir(), reason="the CIFAR-10 image folder is not there"
)

SCRIPTS = ["TS1_01_prepare_model.py", "TS1_02_coverage_pruning.py", "TS1_03_wanda_pruning.py"]
COMPARE, SWEEP = "TS1_04_compare_methods.py", "TS1_05_sweep_ratios.py"
SMALL_MODEL = f"{PROJECT / 'tests' / 'small_network.py'}:SmallNetwork"
SMALL = ["--train-samples", "64", "--batch-size", "16"]
DEADLINE_S = 240  # of every wait for a process: many times what it takes
# What differs from run to run: times, the checksums of files that hold some, and the folder.
TIMES = {"seconds", "latency_ms", "latency_quantiles_ms", "throughput_images_per_s", "speedup"}
TIMES |= {"throughput_batch", "throughput_spread_percent"}
TIMES |= {"fine_tuned_model", "checkpoints", "commands", "sha256"}


@contextlib.contextmanager
def started(command, preexec_fn=None, **environment) -> Iterator[subprocess.Popen]:
    """A command at work, killed at the end of the block, or when it has not ended by the deadline.

    So no wait for its output is without end.
    """
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        preexec_fn=preexec_fn,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1", "COLUMNS": "100", **environment},
    ) as process:
        deadline = threading.Timer(DEADLINE_S, process.kill)
        deadline.start()
        try:
            yield process
        finally:
            deadline.cancel()
            process.kill()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until `condition` holds, which is brought about by a process."""
    while process.poll() is None and not condition():
        time.sleep(0.02)
    assert condition(), process.communicate()


def wait_for_line(text: str, process: subprocess.Popen, stream: str = "stdout") -> None:
    """Read what a process prints, up to a line that holds `text`."""
    for line in iter(getattr(process, stream).readline, ""):
        if text in line:
            return
    raise AssertionError(f"{text!r} was not printed: {process.communicate()}")


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """The status of a process at its end, and what it printed that was not read yet."""
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def script_command(script, *options):
    """The arguments of Python that run a script."""
    return [PROJECT / "test_scenarios" / script, *options]


def run(script, *options, preexec_fn=None, **environment):
    """Run a script as a command to its end: its status, and what it printed."""
    with started(script_command(script, *options), preexec_fn, **environment) as process:
        return ended(process)


def fails(result, *expected):
    """The command ended with one line that holds all of `expected`, and no traceback."""
    assert result.returncode in (1, 2), result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for text in expected:
        assert text in result.stderr


def own_scripts(folder: Path, **settings: str) -> dict[str, Path]:
    """Copies of the scripts with other settings, by the names of the scripts: own_scripts(folder, MODEL="...")."""
    copies = {}
    for name in (*SCRIPTS, COMPARE, SWEEP):
        text = (PROJECT / "test_scenarios" / name).read_text(encoding="utf-8")
        for setting, value in settings.items():
            line = re.search(rf'^{setting} = ".*"$', text, flags=re.M)
            text = text.replace(line[0], f"{setting} = {value!r}")
        copies[name] = folder / name.replace("TS1", settings.get("SCENARIO", "TS1"))
        copies[name].write_text(text, encoding="utf-8")
    return copies


def command_options(number, folder, *options):
    """The options that run a script, by its index, on a few images."""
    few = (
        ["--weights", "none"]
        if number == 0
        else ["--calibration-batches", "2", "--steps", "2", "--timing-seconds", "1", "--robustness-images", "10"]
    )
    return [*few, *SMALL, "--checkpoints-dir", str(folder), *options]


def prepare(folder, *options, script=SCRIPTS[0], **environment):
    """Run script 1, or a copy of it, on a few images."""
    return run(script, *command_options(0, folder, *options), **environment)


def prune(script, folder, *options, **environment):
    """Run script 2 or 3, or a copy of one, on a few images."""
    return run(script, *command_options(1, folder, *options), **environment)


def outcome(folder):
    """All that the scripts left in a folder, less the times and the lock files, which hold nothing."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: _timeless(_read(path)) for name, path in files.items() if path.suffix != ".lock"}


def _read(path):
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)
    return json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else path.read_bytes()[:4]


def _timeless(content):
    if isinstance(content, dict):
        return {key: _timeless(value) for key, value in content.items() if key not in TIMES}
    if isinstance(content, list):
        return [_timeless(value) for value in content]
    return (content.dtype, content.shape, content.numpy().tobytes()) if isinstance(content, torch.Tensor) else content


def assert_same(result, reference):
    """What scripts left is the same as what others did, but for the times."""
    assert sorted(result) == sorted(reference)
    for name, content in reference.items():
        assert result[name] == content, f"{name} differs"


# Of 10,000 test images, of which 4,000 are held out: the images classified correctly, those of them held out,
# milliseconds for one image, and images per second.
_MEASURED = {
    "Coverage": {
        "original": (9200, 3676, 2.45, 500),
        "pruned": (9020, 3604, 2.15, 600),
        "fine_tuned": (9170, 3664, 2.15, 600),
    },
    "Wanda": {
        "original": (9200, 3676, 2.50, 490),
        "pruned": (9050, 3616, 2.20, 590),
        "fine_tuned": (9180, 3670, 2.25, 595),
    },
}
_COSTS = {  # parameters, multiply-accumulates, MB
    "original": (11_173_962, 557_000_000, 42.6),
    "Coverage": (8_939_170, 445_600_000, 34.08),
    "Wanda": (8_932_900, 445_000_000, 34.06),
}
_PREPARED_WITH = {
    "dataset": "CIFAR10", "image_size": None, "flip": "horizontal", "shift": 0.125, "weights": "imagenet",
    "mean": None, "std": None, "epochs": 20, "batch_size": 128, "lr": 0.001, "weight_decay": 0.0,
    "train_samples": None, "seed": 0, "precision": "auto",
}  # fmt: skip
_ENVIRONMENT = {
    "device": "Some <GPU> & CPU", "device_type": "cuda", "cpu_threads": 2, "precision": "bfloat16",
    "deterministic": False, "compiled": False, "processes": 1, "system": "Windows AMD64", "python": "3.8.10",
    "cleanai": "1.0.0", "torch": "2.0.1", "torchvision": "0.15.2", "torch-pruning": "1.6.1", "thop": "0.1.1",
    "numpy": "1.24",
}  # fmt: skip
_DATASET = {"name": "CIFAR10", "source": "image folder", "train_images": 50_000, "test_images": 10_000}
_DATASET.update(
    classes=["uçak", "kuş", "gemi"], train_per_class=[16_000, 17_000, 17_000], test_per_class=[3_334, 3_333, 3_333]
)
_DATASET.update(train_sha256="b" * 64, test_sha256="c" * 64)
EXPORT = {  # the entry of a record whose network was exported
    "file": "ResNet18_CIFAR10_FTAP_NC_final.onnx", "size_mib": 34.1, "opset": 20, "largest_difference": 8.1e-6,
    "free_image_size": True,
    "device": "Some CPU", "cpu_threads": 2, "onnxruntime": "1.31.1",
    "heldout_images": 4000, "pytorch_accuracy_percent": 91.6, "accuracy_heldout_percent": 91.6, "disagreements": 0,
    "latency_ms": {
        "onnx_runtime": {"original": {"mean": 1.5}, "pruned": {"mean": 1.25}, "fine_tuned": {"mean": 1.0}},
        "pytorch": {"original": {"mean": 3.0}, "pruned": {"mean": 2.5}, "fine_tuned": {"mean": 2.0}},
    },
}  # fmt: skip
INT8 = {  # what that entry holds as well when the network was quantised
    "file": "ResNet18_CIFAR10_FTAP_NC_final_int8.onnx", "size_mib": 8.61, "calibration_images": 1024,
    "accuracy_heldout_percent": 91.45, "disagreements": 31, "latency_ms": {"mean": 0.6},
}  # fmt: skip


def preparation_record() -> dict[str, Any]:
    """A record as script 1 writes it, made by hand."""
    size = {"parameters": 11_173_962, "trainable_parameters": 11_173_962}
    return {
        "scenario": "TS1_ResNet18_CIFAR10",
        "method": "",
        "config": dict(_PREPARED_WITH),
        "environment": dict(_ENVIRONMENT),
        "dataset": dict(_DATASET),
        "models": {
            "before": {"accuracy_percent": 15.0, "loss": 2.3, **size},
            "after": {"accuracy_percent": 92.0, "loss": 0.25, **size},
        },
        "history": _history(20),
        "warnings": [],
    }


def run_record(method: str = "Coverage") -> dict[str, Any]:
    """A record as script 2 or 3 writes it, made by hand: the accuracies are those of the flags of the images."""
    tag, measured = METHODS[method].tag, _MEASURED[method]
    models = {name: _model(_COSTS["original" if name == "original" else method], *measured[name]) for name in measured}
    for name, flags in _flags(method).items():
        models[name]["correct_bits"] = pack(flags)
    original, pruned, final = models.values()
    widths = [("conv1", 64, 64), ("layer1.0.conv1", 64, 40), ("layer4.1.conv1", 512, 384), ("fc", 10, 10)]
    names = [name for name, _, _ in widths]
    criteria = {f"{key}_percent": 41.5 for key in ("nc", "kmnc", "nbc", "snac", "tknc", "scc")}
    by_threshold = [{"threshold": threshold, "percent": 80 - 60 * threshold} for threshold in (0, 0.25, 0.5, 0.75)]
    hidden = {**criteria, "neurons": 1200, "active_percent": 50.0, "normalized_mean_percent": 60.0}
    layers = [*({"name": name, **hidden} for name in names[1:]), {"name": "output", "neurons": 1200, **criteria}]
    return {
        "scenario": f"TS1_{method}_ResNet18_CIFAR10",
        "method": method,
        "config": {
            "dataset": "CIFAR10", "ratio": 0.2, "macs_ratio": 0.2, "accept_drop": None,
            "speedup": None, "speedup_of": None, "keep_layers": None,
            **({"coverage_metric": "normalized_mean"} if method == "Coverage" else {}),
            "steps": 5, "round_to": [32, 16, 8, 4, 2, 1], "calibration_batches": 60, "calibrate_on": "test",
            "repair": "full", "repair_batches": 8,
            "epochs": 3, "batch_size": 100, "lr": 0.001, "weight_decay": 0.0, "distil": 0.0,
            "train_samples": None, "seed": 0, "precision": "auto", "fine_tuned_model": "0" * 16,
        },
        "environment": dict(_ENVIRONMENT),
        "dataset": {**_DATASET, "calibration_images": 6_000, "calibrated_on": "test"},
        "prepared_with": {
            **_PREPARED_WITH,
            "conditions": "bfloat16, 50,000 + 10,000 images from image folder",
            "train_sha256": "0" * 16,
            "test_sha256": "0" * 16,
        },
        "models": models,
        "heldout_bits": pack(_heldout()),
        "summary": {
            **{
                f"{key}_reduction_percent": 100 * (1 - final[entry] / original[entry])
                for key, entry in (("parameter", "parameters"), ("macs", "macs"), ("size", "size_mib"))
            },
            "speedup": original["latency_ms"]["mean"] / final["latency_ms"]["mean"],
            "accuracy_recovery_points": final["accuracy_percent"] - pruned["accuracy_percent"],
            "final_accuracy_drop_points": final["accuracy_percent"] - original["accuracy_percent"],
        },
        "layers": [
            {"name": name, "parameters_before": 2_000_000, "parameters_after": 2_000_000 - removed,
             "macs_before": 50_000_000, "macs_after": 50_000_000 - 10 * removed}
            for name, removed in zip(names, (0, 111_000, 1_670_000, 223_000))
        ],
        "classes": [
            {"name": name, "images": 1000, "original_percent": 90.0, "pruned_percent": 85.0,
             "fine_tuned_percent": 90.0 + change, "newly_wrong": 37, "newly_right": 37 + round(10 * change)}
            for name, change in (("uçak", 1.5), ("kuş", -3.25), ("gemi", 0.0))
        ],
        "churn": {
            "images": 4000, "changed": 143, "changed_percent": 3.575,
            "right_to_wrong": 60, "wrong_to_right": 48, "wrong_to_other_wrong": 35,
            "confusions": [{"class": "gemi", "predicted": "uçak", "before": 12, "after": 21}],
        },
        "robustness": {
            "images": 1000,
            "rows": [
                {"corruption": name, "level": level, "original_percent": accuracy, "pruned_percent": accuracy - 2,
                 "fine_tuned_percent": accuracy - 1}
                for name, level, accuracy in
                (("None", "", 92.0), ("Gaussian noise", "mild", 80.0), ("Gaussian noise", "strong", 50.5))
            ],
        },
        "newly_wrong": [
            {"index": 5, "class": "kuş", "predicted": "uçak", "png_base64": _png(shade)} for shade in (0, 9)
        ],
        "coverage": {
            "profile_images": 1024, "images": 1000, "threshold": 0.25,
            "models": {
                name: {"neurons": 4800, **criteria, "kmnc_percent": 40.0 + number, "nc_by_threshold": by_threshold,
                       "dead": [{"layer": "layer1.0.conv1", "count": 2, "channels": [3, 17]}],
                       "layers": [dict(layer) for layer in layers]}
                for number, name in enumerate(models)
            },
        },
        "pruning": {
            "steps": [
                {"parameters_asked_percent": 4.0 * step, "macs_asked_percent": 4.0 * step,
                 "parameters_removed_percent": 4.01 * step, "macs_removed_percent": 4.1 * step, "seconds": 9.0}
                for step in range(1, 6)
            ],
            "sensitivity": [
                {"layers": ["layer1.0.conv1"], "readers": ["fc"], "channels": 64,
                 "lost_percent": [float(2**tenth) / 6 for tenth in range(1, 10)]},
            ],
            "layers": [{"name": name, "channels_before": a, "channels_after": b} for name, a, b in widths],
            "accuracy_raw_percent": 74.12, "accuracy_recalibrated_percent": 88.31,
            "accuracy_reconstructed_percent": pruned["accuracy_percent"],
        },
        "history": _history(3),
        "checkpoints": {
            f"ResNet18_CIFAR10_{name}.pth": digit * 64
            for name, digit in (("FT_final", "0"), (f"pruned_{tag}", "1"), (f"FTAP_{tag}_final", "a"))
        },
        "commands": [
            f'python test_scenarios/{script} --checkpoints-dir "D:\\Çalışma" --seed 0'
            for script in (SCRIPTS[0], SCRIPTS[1 if method == "Coverage" else 2])
        ],
        "warnings": [],
    }  # fmt: skip


def auto_record(ended_by: str = "accuracy") -> dict[str, Any]:
    """A record of script 3 with --ratio auto, --accept-drop 1 and --speedup 1.5, made by hand."""
    record = run_record("Wanda")
    record["config"].update(ratio="auto", macs_ratio="same", accept_drop=1.0, speedup=1.5, speedup_of="single")
    path = [
        {"accuracy_calibration_percent": accuracy, "taken": accuracy > 96, "parameters_removed_percent": 5.0 * step,
         "macs_removed_percent": 5.1 * step,
         **({"speedup": 1 + step / 20, "latency_median_ms": 2.0 - step / 20, "latency_images": 1} if step else {})}
        for step, accuracy in enumerate((97.2, 97.0, 96.8, 96.9, 96.5, 96.4, 95.9))
    ]  # fmt: skip
    record["pruning"].update(path=path, ended_by=ended_by)
    return record


def _model(costs, correct, correct_heldout, latency_ms, images_per_s):
    parameters, macs, size_mib = costs
    return {
        "accuracy_percent": correct / 100,
        "accuracy_heldout_percent": correct_heldout / 40,
        "loss": 0.3,
        "size_mib": size_mib,
        "parameters": parameters,
        "macs": macs,
        "latency_ms": {**dict.fromkeys(("mean", "p50", "p90", "p99"), latency_ms), "n": 200, "spread_percent": 3.0},
        "latency_quantiles_ms": [latency_ms + number / 50 for number in range(49)],
        "throughput_images_per_s": images_per_s,
        "throughput_batch": 128,
        "throughput_spread_percent": 4.0,
    }


def _heldout() -> np.ndarray:
    return np.arange(10_000) % 5 < 2


def _flags(method: str) -> dict[str, np.ndarray]:
    """Which images each network classifies correctly: the same harder and easier ones for all."""
    random = np.random.default_rng(0)
    hardness, heldout = random.random(10_000), _heldout()
    random = np.random.default_rng(len(method))
    flags = {}
    for name, (correct, correct_heldout, *_) in _MEASURED[method].items():
        noisy = hardness + (0 if name == "original" else random.normal(0, 0.03, 10_000))
        flags[name] = np.zeros(10_000, dtype=bool)
        for part, count in ((heldout, correct_heldout), (~heldout, correct - correct_heldout)):
            images = np.flatnonzero(part)
            flags[name][images[noisy[images].argsort()][:count]] = True
    return flags


def _history(epochs: int) -> list[dict[str, float]]:
    return [
        {"epoch": epoch, "train_loss": 0.3, "train_accuracy_percent": 90.0 + epoch / 10, "learning_rate": 0.0,
         "test_loss": 0.3, "test_accuracy_percent": 91.0 + epoch / 10, "seconds": 9.0}
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip


def _png(shade: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 200, 100)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def make_image_folder(root: Path, size: tuple[int, int] = (8, 8), per_class: int = 2) -> Path:
    """An image folder of two classes whose pictures are plain colours: red cats and blue dogs."""
    for part in ("train", "test"):
        for name, color in (("cat", (250, 0, 0)), ("dog", (0, 0, 250))):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                Image.new("RGB", size, color).save(folder / f"{number}.png")
    return root


def copy_real_images(data_dir: Path, per_class: int) -> None:
    """Copy the first real CIFAR-10 images of each class into a dataset of that name in `data_dir`."""
    for part in ("train", "test"):
        for folder in sorted((REAL_IMAGES / part).iterdir()):
            target = data_dir / "CIFAR10" / part / folder.name
            target.mkdir(parents=True)
            for path in sorted(folder.iterdir())[:per_class]:
                shutil.copy(path, target)


@contextlib.contextmanager
def serving(files: dict[str, bytes], cut_off: bool = False, stall: bool = False) -> Iterator[str]:
    """Serve `files` by name and yield the server's address; in the middle of a file `cut_off` ends, `stall` rests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.connection.settimeout(None)  # not the default, which the code under test sets
            content = files.get(self.path.lstrip("/"))
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut_off or stall else content)
            if stall:
                self.rfile.read(1)  # until the other side closes the connection

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def pdf_pages(pdf: bytes) -> list[str]:
    """The text of each page of a PDF, with single spaces."""
    return [" ".join(page.extract_text().split()) for page in PdfReader(io.BytesIO(pdf)).pages]


def pdf_text(pdf: bytes) -> str:
    """The text of a PDF, with single spaces."""
    return " ".join(pdf_pages(pdf))


def torch_macs(network: torch.nn.Module, side: int) -> float:
    """Multiply-accumulates for one image of that size, as PyTorch counts them; skips the test before PyTorch 2.1."""
    return torch_macs_by_module(network, side)["Global"]


def torch_macs_by_module(network: torch.nn.Module, side: int) -> dict[str, float]:
    """`torch_macs` of each module, by names that begin with the network's class; "Global" is the whole network."""
    flop_counter = pytest.importorskip("torch.utils.flop_counter")
    with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, side, side))
    return {name: sum(counts.values()) / 2 for name, counts in counter.get_flop_counts().items()}


def parameter_count(network: torch.nn.Module) -> int:
    """The number of parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def random_images(count: int, side: int = 8, seed: int = 0, below: int = 256) -> ImageSet:
    """Images of random pixels below a value, all of class 0."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, below, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.zeros(count, dtype=torch.long), torch.full((3,), 0.5), torch.full((3,), 0.3))
