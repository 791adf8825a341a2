"""Script 5 of 5: how far can the network be pruned?

Prunes the network of script 1 at several ratios by each method, by OBS, by L2 magnitude and at random, measures the
accuracy on held-out test images, and draws it in a PDF beside the networks of scripts 2 and 3. It takes an hour on two
CPU cores. An interrupted run resumes with the same command.

    python test_scenarios/TS1_05_sweep_ratios.py
    python test_scenarios/TS1_05_sweep_ratios.py --dataset Digits --ratios 0.3 0.6    # after script 1 with Digits
"""

try:
    from cleanai import cli, stages
except ModuleNotFoundError as error:  # also after the folder was renamed
    raise SystemExit(f"Error: {error}. In the project's folder: python -m pip install -r requirements.txt") from None
from cleanai.exit import run_script
from cleanai.report.sweep_pdf import pdf_sweep
from cleanai.report.sweep_text import chosen_networks, sweep_answer, sweep_csv, sweep_text
from cleanai.runtime.lock import only_run
from cleanai.runtime.scenario import Scenario

SCENARIO = "TS1"
MODEL = "ResNet18"
METHOD = "Sweep"
SETTINGS = {  # each is also an option: --ratios, --test-samples, ...
    "dataset": "CIFAR10",
    "ratios": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],  # of the parameters, and of the FLOPs
    "epochs": 0,  # of fine-tuning, at each ratio
    "calibration_batches": 50,
    "calibrate_on": "test",  # accuracy is measured on others; or "train", which holds out all test images
    "repair_batches": 8,  # of training images; labels are not used
    "batch_size": 128,  # if GPU memory runs out: 64 or 32
    "lr": 0.001,  # the peak, between a linear rise and a linear fall
    "weight_decay": 0.0001,
    "train_samples": None,  # all
    "test_samples": None,  # all held-out ones
    "seed": 0,
    "precision": "auto",
}


def main():
    args = cli.parse(f"{SCENARIO}, {MODEL}. {__doc__}", SETTINGS)
    scenario = Scenario(SCENARIO, MODEL, args.dataset, args.checkpoints_dir, METHOD)
    record = stages.finished_record(scenario, args)
    if record is None:
        with only_run(scenario):
            record = measure(scenario, args)
            stages.save_record(scenario, record)
    record.update(chosen=chosen_networks(scenario, record), tolerance_points=args.tolerance)
    record["answer"] = sweep_answer(record)
    print(f"\n{sweep_text(record)}\n", flush=True)
    stages.save_reports(scenario, record, sweep_csv, pdf_sweep)
    print(f"Report: {scenario.report}\nTable: {scenario.table}\nRecord: {scenario.record}")


def measure(scenario, args):
    # PyTorch takes seconds to import: only when there is work to do.
    from cleanai.network.training import TrainSettings, train
    from cleanai.run import open_run
    from cleanai.runtime.distributed import end_all_but_first
    from cleanai.sweep import Sweep, measure_network

    # Load: the device, the images, and the network of script 1.
    run = open_run(scenario, args)
    original = run.load_original()
    test = run.images.test.select(run.split.heldout).sample(args.test_samples, args.seed)
    before = measure_network(original, test, run.compute)
    print(f"Accuracy on {len(test):,} held-out test images, before pruning: {before['accuracy_percent']:.2f}%")

    # Prune and measure, after the points that an interrupted run has saved.
    tune = (lambda network: train(network, run.images, run.compute, TrainSettings.of(args))) if args.epochs else None
    sweep = Sweep(original, args.ratios, run.prune_images, test, run.compute, args.seed, tune)
    sweep.points, sweep.save = run.find_points(), run.save_points
    points = sweep.run()
    end_all_but_first()  # of several processes, as torchrun starts them

    # Report: the points beside the original network.
    description = run.description()
    description["dataset"]["accuracy_images"] = len(test)
    return {**description, "original": before, "points": points}


if __name__ == "__main__":
    run_script(main)
