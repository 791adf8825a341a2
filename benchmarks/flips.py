"""Does it matter how training images are mirrored? Accuracy after training with random and with alternating flips.

ResNet-18 is trained from random weights on the same images, in the same order and with the same shifts, once with
each kind of flip, for several seeds. Accuracy is measured on training images that were kept out, never on test images.
An interrupted run goes on with the same command.

    python benchmarks/flips.py                                       # 20 epochs on nine tenths of the training images
    python benchmarks/flips.py --epochs 8 --train-samples 2500       # about half an hour on two CPU cores
"""
from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from rows import known_rows, write_rows

from cleanai import UserError, cli
from cleanai.compute import choose_compute
from cleanai.data import balanced_order
from cleanai.evaluation import evaluate
from cleanai.models import resnet18_for_small_images
from cleanai.scenario import PROJECT
from cleanai.sources import load_images
from cleanai.training import TrainSettings, train

FOLDER = PROJECT / "results" / "flips"
FLIPS = ("random", "alternating")
SEEDS = 3


def main() -> None:
    args = cli.parse(
        __doc__, dataset="CIFAR10", epochs=20, batch_size=128, lr=0.001, train_samples=None, precision="auto"
    )
    compute = choose_compute(args.device, args.precision, args.cuda_graph, args.deterministic)
    print(compute.description)
    images = load_images(args.dataset, args.data_dir)
    if not images.mirror:
        raise UserError(f"--dataset {args.dataset}: its images are never mirrored, since that changes what they show")
    order = balanced_order(images.train.labels, seed=0)
    kept = len(order) * 9 // 10
    images = replace(images, train=images.train.select(order[:kept]), test=images.train.select(order[kept:]))
    images = images.with_train_samples(args.train_samples, seed=0).to(compute.device)
    print(f"Training on {len(images.train):,} training images, measuring on {len(images.test):,} others")

    path = FOLDER / f"TS1_ResNet18_{args.dataset}.csv"
    facts = {
        "epochs": str(args.epochs),
        "train_images": str(len(images.train)),
        "kept_out_images": str(len(images.test)),
        "batch_size": str(args.batch_size),
        "lr": str(args.lr),
        "precision": compute.precision,
    }
    rows = known_rows(path, facts, args.fresh)
    for seed in range(SEEDS):
        for flip in FLIPS:
            if any((row["flip"], row["seed"]) == (flip, str(seed)) for row in rows):
                continue
            print(f"{flip} flips, seed {seed}", flush=True)
            torch.manual_seed(seed)
            network = compute.place(resnet18_for_small_images(len(images.classes)))
            settings = TrainSettings(args.epochs, args.batch_size, args.lr, 0.0, seed, flip)
            train(network, images, compute, settings)
            accuracy = evaluate(network, images.test, compute).accuracy_percent
            rows.append({"flip": flip, "seed": str(seed), "accuracy_percent": f"{accuracy:.2f}", **facts})
            write_rows(path, rows)
    print(f"\n{table(rows)}\n\n{path}")


def table(rows: list[dict[str, str]]) -> str:
    """Accuracy for each seed, a line for each kind of flip."""
    facts = rows[0]
    heading = f"AFTER {facts['epochs']} EPOCHS OF {int(facts['train_images']):,} IMAGES - ACCURACY (%)"
    seeds = sorted({int(row["seed"]) for row in rows})
    lines = [f"{heading:<52}" + "".join(f"{f'Seed {seed}':>9}" for seed in seeds) + f"{'Mean':>9}"]
    for flip in FLIPS:
        accuracies = [float(row["accuracy_percent"]) for row in rows if row["flip"] == flip]
        figures = "".join(f"{accuracy:>9.2f}" for accuracy in accuracies)
        lines.append(f"{flip.capitalize() + ' flips':<52}{figures}{statistics.mean(accuracies):>9.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
