"""TS1, script 1 of 3: prepare ResNet-18 for CIFAR-10.

Downloads the ImageNet-pretrained network and the dataset, adapts the network to 32x32 images and 10 classes,
measures it, fine-tunes it, and prints what that changed. Scripts 2 and 3 prune the network it leaves. With --weights
FILE it starts from your own weights; with --epochs 0 as well it takes a trained network as it is.

    python test_scenarios/TS1_01_prepare_model.py
    python test_scenarios/TS1_01_prepare_model.py --dataset Digits --weights none --epochs 3    # a minute on a CPU
    python test_scenarios/TS1_01_prepare_model.py --weights my_resnet18.pth --epochs 0
"""
from cleanai import cli
from cleanai.report.run_text import origin_lines, preparation_table
from cleanai.runtime.checkpoints import find_checkpoint, find_record, write_record
from cleanai.runtime.lock import only_run
from cleanai.runtime.scenario import Scenario

SCENARIO = "TS1"
MODEL = "ResNet18"
DATASET = "CIFAR10"
WEIGHTS = "imagenet"  # or "none", or a file
EPOCHS = 20
BATCH_SIZE = 128  # if GPU memory runs out: 64 or 32
LEARNING_RATE = 0.001  # the peak; it rises to it, then falls to zero
WEIGHT_DECAY = 0.0  # of Adam
SEED = 0


def main():
    args = cli.parse(
        __doc__,
        dataset=DATASET,
        weights=WEIGHTS,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        train_samples=None,
        seed=SEED,
        precision="auto",
    )
    scenario = Scenario(SCENARIO, MODEL, args.dataset, args.checkpoints_dir)
    finished = scenario.final.exists() and not args.fresh
    record = find_record(scenario.record, args.config) if finished else None
    if record:
        print(f"Already finished; its record is {scenario.record} (--fresh starts over)")
    else:
        with only_run(scenario):
            record = prepare(args, scenario)
            write_record(scenario.record, record)
    print(f"\n{origin_lines(record)}\n\n{preparation_table(record)}\n\nFine-tuned model: {scenario.fine_tuned}")


def prepare(args, scenario):
    # PyTorch takes seconds to import: only when there is work to do.
    import torch

    from cleanai.data.sources import load_images
    from cleanai.measure.costs import count_parameters
    from cleanai.measure.provenance import checkpoint_facts, describe_run
    from cleanai.network.evaluation import evaluate
    from cleanai.network.models import build, save_network
    from cleanai.network.training import TrainSettings, fine_tune
    from cleanai.network.weights import begin_with
    from cleanai.runtime.compute import choose_compute
    from cleanai.runtime.distributed import end_all_but_first

    compute = choose_compute(args.device, args.precision, args.deterministic)
    print(compute.description)
    if args.weights not in ("imagenet", "none"):
        scenario.refuse_own_file(args.weights)
    images = load_images(args.dataset, args.data_dir)
    images = images.with_train_samples(args.train_samples, args.seed).to(compute.device)

    torch.manual_seed(args.seed)  # the layers that no pretrained weights fill begin at random
    network = build(MODEL, len(images.classes))
    network = compute.place(begin_with(network, MODEL, args.weights, args.models_dir, trained=args.epochs == 0))
    if args.fresh:
        scenario.remove_outputs()
    facts = checkpoint_facts(scenario, images, compute, args.config)
    find_checkpoint(scenario.pretrained, facts["config"])  # an interrupted run with other settings is refused here
    save_network(scenario.pretrained, network, facts)

    before = evaluate(network, images.test, compute)
    print(f"Before fine-tuning: test loss {before.loss:.4f}, test accuracy {before.accuracy_percent:.2f}%")

    settings = TrainSettings(args.epochs, args.batch_size, args.lr, args.weight_decay, args.seed)
    # The last epoch's network is the result, whichever was best on the test images.
    history, after = fine_tune(network, images, compute, scenario, facts, settings)
    end_all_but_first()  # of several processes, as torchrun starts them

    parameters = count_parameters(network)
    return {
        **describe_run(scenario, images, compute, args.config),
        "models": {
            "before": {"accuracy_percent": before.accuracy_percent, "loss": before.loss, **parameters},
            "after": {"accuracy_percent": after.accuracy_percent, "loss": after.loss, **parameters},
        },
        "history": history,
    }


if __name__ == "__main__":
    cli.run(main)
