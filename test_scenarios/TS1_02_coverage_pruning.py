"""Script 2 of 5: prune the fine-tuned network by Neuron Coverage.

Needs the network of script 1. Scores its channels on part of the test images, removes channels in steps over all
layers, fine-tunes the pruned network, and compares the three networks in a table and a PDF. An interrupted run
resumes with the same command.

    python test_scenarios/TS1_02_coverage_pruning.py
    python test_scenarios/TS1_02_coverage_pruning.py --dataset Digits --epochs 2    # after script 1 with Digits
"""

try:
    from cleanai import cli, stages
except ModuleNotFoundError as error:  # also after the folder was renamed
    raise SystemExit(f"Error: {error}. In the project's folder: python -m pip install -r requirements.txt") from None
from cleanai.exit import run_script
from cleanai.runtime.lock import only_run
from cleanai.runtime.scenario import Scenario

SCENARIO = "TS1"
MODEL = "ResNet18"
METHOD = "Coverage"
SETTINGS = {  # each is also an option: --macs-ratio, --round-to, ...
    "dataset": "CIFAR10",
    "ratio": 0.2,  # share of the parameters to remove, or auto
    "macs_ratio": "same",  # share of the FLOPs to remove: the same, a number, or None
    "accept_drop": None,  # points of accuracy that may be lost: for a verdict, and the end of auto
    "speedup": None,  # auto ends, too, when the network is so many times as fast
    "speedup_of": None,  # a single image
    "keep_layers": None,  # names and patterns, as ["conv1", "layer4.*"]: these layers keep all channels
    "coverage_metric": "normalized_mean",
    "steps": 5,
    "round_to": [32, 16, 8, 4, 2, 1],  # layer widths stay multiples of the first of these that can meet the budget
    "calibration_batches": 50,
    "calibrate_on": "test",  # their accuracy only ends auto; or "train", which holds out all test images
    "repair": "full",  # least squares, after each step and at the end; batch norm is recalibrated
    "repair_batches": 24,  # of training images; labels are not used
    "epochs": 30,
    "batch_size": 128,  # if GPU memory runs out: 64 or 32
    "lr": 0.001,  # the peak, between a linear rise and a linear fall
    "weight_decay": 0.0001,
    "distil": 0.0,  # share of the loss that compares outputs with the original network's, the rest with labels
    "train_samples": None,  # all
    "seed": 0,
    "precision": "auto",
}


def main():
    args = cli.parse(f"{SCENARIO}, {MODEL}. {__doc__}", SETTINGS)
    scenario = Scenario(SCENARIO, MODEL, args.dataset, args.checkpoints_dir, METHOD)
    record = stages.finished_record(scenario, args)
    if record is None:
        with only_run(scenario):
            record = prune(scenario, args)
            stages.save_record(scenario, record)
    stages.publish(scenario, record, args)


def prune(scenario, args):
    # PyTorch takes seconds to import: only when there is work to do.
    import copy

    from cleanai.network.training import TrainSettings, fine_tune
    from cleanai.pruning.criteria import NeuronCoverageImportance
    from cleanai.run import open_run
    from cleanai.runtime.distributed import end_all_but_first

    # Load: the device, the images, and the network of script 1.
    run = open_run(scenario, args)
    original = run.load_original()
    run.evaluate("original", original)

    # Prune, unless an interrupted run has left the pruned network.
    pruned, pruning = run.find_pruned()
    if pruned is None:
        pruned, pruning = run.prune(original, NeuronCoverageImportance(args.coverage_metric))

    # Fine-tune, from the last epoch that an interrupted run has saved.
    tuned = copy.deepcopy(pruned)
    history, run.evaluations["fine_tuned"] = fine_tune(
        tuned, run.images, run.compute, TrainSettings.of(args, original), scenario, run.facts
    )
    end_all_but_first()  # of several processes, as torchrun starts them

    # Report: accuracy, size, FLOPs, time and test coverage of the three networks.
    return run.record({"original": original, "pruned": pruned, "fine_tuned": tuned}, pruning, history)


if __name__ == "__main__":
    run_script(main)
