"""TS1, script 4: which method, what it cost, and whether the difference is more than chance.

Reads the records that scripts 1 to 3 left and measures nothing again; what has not run is shown as - with the command
that runs it. Prints the answer and one table, and writes a PDF, a CSV and a JSON file.

With --sweep it tells how far one can go: it prunes the network of script 1 at several ratios by both methods, by L2
magnitude and at random, and draws the accuracies in a PDF, with the networks of scripts 2 and 3 marked.

    python test_scenarios/TS1_04_compare_methods.py
    python test_scenarios/TS1_04_compare_methods.py --dataset Digits    # after scripts 1 to 3 with Digits
    python test_scenarios/TS1_04_compare_methods.py --sweep             # after script 1
"""
from cleanai import cli
from cleanai.report.comparison import compare_methods
from cleanai.report.comparison_pdf import pdf_comparison
from cleanai.report.comparison_text import comparison_csv, comparison_text
from cleanai.report.sweep_pdf import chosen_networks, pdf_sweep, sweep_answer, sweep_csv, sweep_text
from cleanai.runtime.checkpoints import find_record, load_checkpoint, write_record
from cleanai.runtime.files import file_digest, remove_file, write_bytes
from cleanai.runtime.lock import only_run
from cleanai.runtime.scenario import Scenario, SweepScenario

SCENARIO = "TS1"
MODEL = "ResNet18"
DATASET = "CIFAR10"
METHOD = "Comparison"
SCRIPTS = {"": "TS1_01_prepare_model.py", "Coverage": "TS1_02_coverage_pruning.py", "Wanda": "TS1_03_wanda_pruning.py"}
# With --sweep; but for the ratios and the epochs as in scripts 2 and 3.
RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]  # of the parameters, and of the arithmetic
EPOCHS = 0  # of fine-tuning, at each ratio
CALIBRATION_BATCHES = 50  # of test images; accuracy is measured on others
REPAIR_BATCHES = 8  # of training images, without their labels
BATCH_SIZE = 128  # if GPU memory runs out: 64 or 32
LEARNING_RATE = 0.001  # the peak; it rises to it, then falls to zero
WEIGHT_DECAY = 0.0  # of Adam
SEED = 0


def main():
    args = cli.parse(
        __doc__,
        dataset=DATASET,
        ratios=RATIOS,
        epochs=EPOCHS,
        calibration_batches=CALIBRATION_BATCHES,
        repair_batches=REPAIR_BATCHES,
        batch_size=BATCH_SIZE,
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        train_samples=None,
        test_samples=None,
        seed=SEED,
        precision="auto",
    )
    if args.sweep:
        show_sweep(args, SweepScenario(SCENARIO, MODEL, args.dataset, args.checkpoints_dir, METHOD))
    else:
        show_comparison(Scenario(SCENARIO, MODEL, args.dataset, args.checkpoints_dir, METHOD))


def show_comparison(scenario):
    record = compare_methods(scenario, SCRIPTS)
    write_bytes(scenario.report, pdf_comparison(record))
    write_bytes(scenario.table, comparison_csv(record).encode("utf-8"))
    write_record(scenario.record, record)
    print(f"{comparison_text(record)}\n")
    print(f"Report: {scenario.report}\nTable: {scenario.table}\nRecord: {scenario.record}")


def show_sweep(args, scenario):
    scenario.require_fine_tuned(SCRIPTS[""], args.data_dir)
    args.config["fine_tuned_model"] = file_digest(scenario.fine_tuned)[:16]
    with only_run(scenario):
        record = None if args.fresh else find_record(scenario.record, args.config)
        if record:
            print(f"Already finished; its record is {scenario.record} (--fresh starts over)")
        else:
            record = sweep(args, scenario)
        record["chosen"] = chosen_networks(scenario, args.config["fine_tuned_model"])
        record["answer"] = sweep_answer(record)
        write_bytes(scenario.report, pdf_sweep(record))
        write_bytes(scenario.table, sweep_csv(record).encode("utf-8"))
        write_record(scenario.record, record)  # last: it marks the sweep as finished
        remove_file(scenario.resume)
    print(f"\n{sweep_text(record)}\n\nReport: {scenario.report}")
    print(f"Table: {scenario.table}\nRecord: {scenario.record}")


def sweep(args, scenario):
    # PyTorch takes seconds to import: only when there is work to do.
    from cleanai.data.sources import load_images
    from cleanai.measure.provenance import checkpoint_facts, describe_run
    from cleanai.network.models import network_from
    from cleanai.network.training import TrainSettings, train
    from cleanai.runtime.compute import choose_compute
    from cleanai.runtime.distributed import end_all_but_first
    from cleanai.sweep import measure_network, measure_sweep

    compute = choose_compute(args.device, args.precision, args.deterministic)
    print(compute.description)
    prepared = load_checkpoint(scenario.fine_tuned, model=MODEL, dataset=args.dataset)
    original = compute.place(network_from(prepared, scenario.fine_tuned))
    images = load_images(args.dataset, args.data_dir)
    images.require_classes(prepared["classes"], scenario.fine_tuned)
    images = images.with_train_samples(args.train_samples, args.seed).to(compute.device)
    calibration, heldout = images.calibration_split(args.calibration_batches * args.batch_size, args.seed)
    test = images.test.select(heldout).sample(args.test_samples, args.seed)
    print(f"Channels are measured on {len(calibration):,} test images, accuracy on {len(test):,} of the others")
    if args.fresh:
        scenario.remove_outputs()

    def fine_tune(network):
        settings = TrainSettings(args.epochs, args.batch_size, args.lr, args.weight_decay, args.seed)
        train(network, images, compute, settings)

    config = checkpoint_facts(scenario, images, compute, args.config)["config"]
    earlier = find_record(scenario.resume, config)
    points = earlier["points"] if earlier else []
    if points:
        print(f"Going on after {len(points)} networks of an interrupted sweep")
    before = measure_network(original, test, compute)
    print(f"Before pruning: accuracy {before['accuracy_percent']:.2f}%")
    points = measure_sweep(
        original,
        args.ratios,
        calibration,
        repair_on=images.repair_sample(args.repair_batches * args.batch_size, args.seed),
        test=test,
        compute=compute,
        batch_size=args.batch_size,
        seed=args.seed,
        known=points,
        keep=lambda points: write_record(scenario.resume, {"config": config, "points": points}),
        fine_tune=fine_tune if args.epochs else None,
    )
    end_all_but_first()  # of several processes, as torchrun starts them
    described = describe_run(scenario, images, compute, args.config, len(calibration))
    described["dataset"]["accuracy_images"] = len(test)
    return {**described, "prepared_with": prepared["config"], "original": before, "points": points}


if __name__ == "__main__":
    cli.run(main)
