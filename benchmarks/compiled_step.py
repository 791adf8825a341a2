"""Does torch.compile pay? Seconds per training step without and with it, and with --cuda-graph recorded as such, too.

All train the same ResNet-18 on the same images, in turns; what is compared is the median over the turns. The first
step of the compiled network is timed by itself: it waits for the compiler, and the epochs until that is made up for
are told. torch.compile needs a C++ compiler, and Triton on a GPU.

    python benchmarks/compiled_step.py
    python benchmarks/compiled_step.py --dataset Digits    # images that are there without any download
"""
from __future__ import annotations

import statistics
from dataclasses import replace

from training_speed import SECONDS_PER_TURN, TURNS, our_loop, timed

from cleanai import UserError, cli
from cleanai.checkpoints import write_record
from cleanai.compute import choose_compute
from cleanai.progress import progress
from cleanai.records import describe_environment
from cleanai.scenario import PROJECT
from cleanai.sources import load_images


def main() -> None:
    args = cli.parse(__doc__, dataset="CIFAR10", batch_size=128, lr=0.001, precision="auto")
    compute = choose_compute(args.device, args.precision, args.cuda_graph, args.deterministic)
    eager = replace(compute, cuda_graph=False)
    print(compute.description)
    images = load_images(args.dataset, args.data_dir)
    there, classes = images.to(compute.device), len(images.classes)
    loops = {"eager": our_loop(there, classes, eager, args)}
    if compute.cuda_graph:
        loops["CUDA graph"] = our_loop(there, classes, compute, args)
    first_step_s = {name: timed(step, 1, compute) for name, step in loops.items()}
    loops["torch.compile"] = our_loop(there, classes, eager, args, compiled=True)
    try:
        first_step_s["torch.compile"] = timed(loops["torch.compile"], 1, compute)
    except Exception as error:  # whatever the compiler beneath may raise
        raise UserError(
            f"torch.compile does not work here ({type(error).__name__}): it needs a C++ compiler, and Triton on a GPU"
        ) from error

    seconds_per_step = {name: [] for name in loops}
    for step in loops.values():
        timed(step, 5, compute)
    steps = max(2, round(SECONDS_PER_TURN / timed(loops["eager"], 2, compute)))
    for _ in progress(range(TURNS), "Training", "turn"):
        for name, step in loops.items():
            seconds_per_step[name].append(timed(step, steps, compute))

    result = {
        "environment": describe_environment(compute),
        "dataset": {"name": args.dataset, "source": images.source},
        "batch_size": args.batch_size,
        "steps_per_epoch": len(images.train) // args.batch_size,
        "loops": {
            name: {"first_step_s": first_step_s[name], "seconds_per_step": seconds}
            for name, seconds in seconds_per_step.items()
        },
    }
    print(f"\n{table(result)}")
    path = PROJECT / "results" / "speed" / f"compiled_{args.dataset}_{compute.device.type}.json"
    write_record(path, result)
    print(path)


def table(result):
    """The first step and the others of each form, and after how many epochs it is faster than without."""
    lines = [f"{'Training step':<20}{'first, s':>12}{'others, ms':>14}{'speedup':>12}{'pays after':>16}"]
    eager, first = _median(result["loops"]["eager"]), result["loops"]["eager"]["first_step_s"]
    for name, loop in result["loops"].items():
        median, saved = _median(loop), (eager - _median(loop)) * result["steps_per_epoch"]
        epochs = (loop["first_step_s"] - first) / saved if saved > 0 else None
        pays = "-" if name == "eager" else "never" if epochs is None else f"{max(0, epochs):.1f} epochs"
        lines.append(f"{name:<20}{loop['first_step_s']:>12.1f}{1000 * median:>14.1f}{eager / median:>11.2f}x{pays:>16}")
    return "\n".join(lines)


def _median(loop):
    return statistics.median(loop["seconds_per_step"])


if __name__ == "__main__":
    cli.run(main)
