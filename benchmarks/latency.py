"""Are pruned networks faster, and which multiple should their widths have?

Prunes the network of script 1 by WANDA, in one step, to widths that are multiples of 1, 8, 16 and 32, at the same share
of parameters and FLOPs, and times all of them in turns with the original: one image, and batches of 128, in float32 and
in bfloat16. Two more copies of the original show how much equal networks differ.

    python benchmarks/latency.py
"""

from __future__ import annotations

import copy

import torch

from cleanai import cli
from cleanai.exit import run_script
from cleanai.measure.latency import time_networks
from cleanai.measure.provenance import describe_environment
from cleanai.measure.standalone import scenario_images
from cleanai.network.models import load_network
from cleanai.pruning.criteria import WandaImportance
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.runtime.checkpoints import write_record
from cleanai.runtime.compute import choose_compute
from cleanai.runtime.scenario import PROJECT, Scenario

RATIO = 0.2
MULTIPLES = (1, 8, 16, 32)
COPIES = ("original", "original again", "and again")
SETTINGS = {"dataset": "CIFAR10", "calibration_batches": 4, "precision": "auto"}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    args = cli.parse(__doc__, SETTINGS)
    scenario = Scenario("TS1", "ResNet18", args.dataset, args.checkpoints_dir)
    scenario.require_fine_tuned(args.data_dir)
    compute = choose_compute(args.device, args.precision)
    print(compute.description)
    original = compute.place(load_network(scenario.fine_tuned))
    images = scenario_images(scenario, args.data_dir).to(compute.device)
    pictures, _ = images.calibration_split(args.calibration_batches * 128, seed=0)

    networks = {name: copy.deepcopy(original) for name in COPIES}
    removed = {}
    for multiple in MULTIPLES:
        name = f"multiples of {multiple}"
        networks[name] = copy.deepcopy(original)
        settings = PruneSettings(RATIO, RATIO, steps=1, round_to=[multiple], repair="none")
        used = PruneImages(pictures, pictures)
        pruning, _ = prune_to_budget(networks[name], WandaImportance(), used, compute, settings)
        removed[name] = {key: value for key, value in pruning["steps"][-1].items() if "removed" in key}

    result = {"environment": describe_environment(compute), "removed": removed, "precisions": {}}
    emulated = compute.device.type == "cuda" and torch.cuda.get_device_capability(compute.device) < (8, 0)
    for precision, dtype in PRECISIONS.items():
        if dtype == torch.bfloat16 and emulated:  # it takes no tensor cores, and some of its kernels are missing
            continue
        placed = {name: compute.place(copy.deepcopy(network).to(dtype)) for name, network in networks.items()}
        timed = time_networks(placed, images.test, compute, dtype)
        first = timed["original"]
        for one in timed.values():
            one["speedup_batch_128"] = one["throughput_images_per_s"] / first["throughput_images_per_s"]
        result["precisions"][precision] = timed
    print(f"\n{table(result)}")
    path = PROJECT / "results" / "speed" / f"latency_{args.dataset}_{compute.device.type}.json"
    write_record(path, result)
    print(f"\n{path}")


def table(result) -> str:
    """Times and speedups of every network, for each precision."""
    lines = []
    for precision, timed in result["precisions"].items():
        heads = f"{'median ms':>13}{'p90':>9}{'speedup':>10}{'images/s at 128':>18}{'speedup':>10}"
        lines.append(f"{precision:<20}{heads}")
        for name, one in timed.items():
            latency = one["latency_ms"]
            speedup = timed["original"]["latency_ms"]["p50"] / latency["p50"]
            lines.append(
                f"  {name:<18}{latency['p50']:>13.2f}{latency['p90']:>9.2f}{speedup:>9.2f}x"
                f"{one['throughput_images_per_s']:>18,.0f}{one['speedup_batch_128']:>9.2f}x"
            )
        if "latency_by" in timed["original"]:
            lines.append(f"  1 image: {timed['original']['latency_by']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
