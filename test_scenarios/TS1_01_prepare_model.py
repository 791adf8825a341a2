"""Script 1 of 5: prepare the network for the dataset.

Downloads pretrained weights and the dataset, adapts the network to the dataset, measures it, fine-tunes it, and
prints a table of before and after. Scripts 2 and 3 prune this network. With --weights FILE it starts from your own
weights; with --epochs 0 as well it takes a trained network as it is. The same command resumes an interrupted run.

    python test_scenarios/TS1_01_prepare_model.py
    python test_scenarios/TS1_01_prepare_model.py --dataset Digits --weights none --epochs 3    # a minute on a CPU
    python test_scenarios/TS1_01_prepare_model.py --weights my_resnet18.pth --epochs 0
"""

try:
    from cleanai import cli, stages
except ModuleNotFoundError as error:  # also after the folder was renamed
    raise SystemExit(f"Error: {error}. In the project's folder: python -m pip install -r requirements.txt") from None
from cleanai.exit import run_script
from cleanai.report.run_text import preparation_table
from cleanai.report.wording import origin_lines, wrapped
from cleanai.runtime.lock import only_run
from cleanai.runtime.scenario import Scenario

SCENARIO = "TS1"
MODEL = "ResNet18"
SETTINGS = {  # each is also an option: --batch-size, --weight-decay, ...
    "dataset": "CIFAR10",
    "image_size": None,  # as the files are; or a side in pixels, for example 224
    "flip": "auto",  # mirrored at random, except Digits; "none" for pictures such as text
    "shift": 0.125,  # at random by up to an eighth of the height
    "weights": "imagenet",  # or "none", or a file
    "mean": None,  # of the training images
    "std": None,
    "epochs": 20,
    "batch_size": 128,  # if GPU memory runs out: 64 or 32
    "lr": 0.001,  # the peak, between a linear rise and a linear fall
    "weight_decay": 0.0001,  # what benchmarks/recipe.py shows to be best
    "train_samples": None,  # all
    "seed": 0,
    "precision": "auto",
}


def main():
    args = cli.parse(f"{SCENARIO}, {MODEL}. {__doc__}", SETTINGS)
    scenario = Scenario(SCENARIO, MODEL, args.dataset, args.checkpoints_dir)
    record = stages.finished_record(scenario, args)
    if record is None:
        with only_run(scenario):
            record = prepare(scenario, args)
            stages.save_record(scenario, record)
    print("", *map(wrapped, origin_lines(record)), "", preparation_table(record), "", sep="\n")
    print(f"Fine-tuned model: {scenario.fine_tuned}")


def prepare(scenario, args):  # imports PyTorch, which takes seconds: only when there is work to do
    import torch

    from cleanai.measure.costs import count_parameters
    from cleanai.measure.provenance import at_chance_level
    from cleanai.network.models import build
    from cleanai.network.training import TrainSettings, fine_tune
    from cleanai.network.weights import start_from
    from cleanai.run import open_run
    from cleanai.runtime.distributed import end_all_but_first

    # Load: the device, the images, and the network with the weights that it starts from.
    run = open_run(scenario, args)
    torch.manual_seed(args.seed)  # for the layers without pretrained weights
    network = build(MODEL, len(run.images.classes))
    start_from(network, MODEL, args.weights, args.models_dir, trained=args.epochs == 0)
    run.save_pretrained(network)
    run.evaluate("before fine-tuning", network)

    # Fine-tune. The network of the last epoch is the result, whichever was best on the test images.
    history, after = fine_tune(network, run.images, run.compute, TrainSettings.of(args), scenario, run.facts)
    end_all_but_first()  # of several processes, as torchrun starts them

    # Report: before and after.
    evaluations = {"before": run.evaluations["before fine-tuning"], "after": after}
    parameters = count_parameters(network)
    models = {
        name: {"accuracy_percent": measured.accuracy_percent, "loss": measured.loss, **parameters}
        for name, measured in evaluations.items()
    }
    warnings = at_chance_level({"The network": after.accuracy_percent}, after.accuracy_percent, run.images)
    return {**run.description(), "models": models, "history": history, "warnings": warnings}


if __name__ == "__main__":
    run_script(main)
