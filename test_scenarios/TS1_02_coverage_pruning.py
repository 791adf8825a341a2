"""TS1, script 2 of 3: prune the fine-tuned ResNet-18 by Neuron Coverage.

Loads the network that script 1 left, measures how active its channels are on part of the test images, removes a fifth
of it in five steps over all layers, fine-tunes it, and compares the three networks in a table and a PDF.

    python test_scenarios/TS1_02_coverage_pruning.py
    python test_scenarios/TS1_02_coverage_pruning.py --dataset Digits --epochs 2    # after script 1 with Digits
"""
from cleanai import cli
from cleanai.report.run_pdf import write_report, write_results
from cleanai.report.run_text import comparison_table, exported_as, origin_lines, repair_stages
from cleanai.runtime.checkpoints import find_checkpoint, find_record, load_checkpoint
from cleanai.runtime.files import file_digest
from cleanai.runtime.lock import only_run
from cleanai.runtime.scenario import Scenario

SCENARIO = "TS1"
MODEL = "ResNet18"
DATASET = "CIFAR10"
METHOD = "Coverage"
PRUNING_RATIO = 0.2  # of the parameters
MACS_RATIO = "same"  # of the arithmetic: as of the parameters, a number, or None
COVERAGE_METRIC = "normalized_mean"
ITERATIVE_STEPS = 5
ROUND_TO = [32, 16, 8]  # widths stay multiples of the first of these that allows it
CALIBRATION_BATCHES = 50  # of test images; they never decide which network is kept
REPAIR = "full"  # what stays takes over from what went, and batch norm is recalibrated
REPAIR_BATCHES = 8  # of training images, without their labels
EPOCHS = 30
BATCH_SIZE = 128  # if GPU memory runs out: 64 or 32
LEARNING_RATE = 0.001  # the peak; it rises to it, then falls to zero
WEIGHT_DECAY = 0.0  # of Adam
SEED = 0


def main():
    args = cli.parse(
        __doc__,
        dataset=DATASET,
        ratio=PRUNING_RATIO,
        macs_ratio=MACS_RATIO,
        coverage_metric=COVERAGE_METRIC,
        steps=ITERATIVE_STEPS,
        round_to=ROUND_TO,
        calibration_batches=CALIBRATION_BATCHES,
        repair=REPAIR,
        repair_batches=REPAIR_BATCHES,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        train_samples=None,
        seed=SEED,
        precision="auto",
    )
    scenario = Scenario(SCENARIO, MODEL, args.dataset, args.checkpoints_dir, METHOD)
    scenario.require_fine_tuned("TS1_01_prepare_model.py", args.data_dir)
    args.config["fine_tuned_model"] = file_digest(scenario.fine_tuned)[:16]
    finished = scenario.pruned.exists() and scenario.final.exists() and not args.fresh
    record = find_record(scenario.record, args.config) if finished else None
    if record:
        print(f"Already finished; its record is {scenario.record} (--fresh starts over)")
        if not scenario.report.exists():
            write_report(scenario.report, record)
    else:
        with only_run(scenario):
            record = prune(args, scenario)
            write_results(scenario, record)
    if args.export == "onnx" and not ("export" in record and scenario.exported.exists()):
        from cleanai.measure.onnx_export import export_scenario

        with only_run(scenario):
            record["export"] = export_scenario(scenario, args.data_dir)
            write_results(scenario, record)
    print(f"\n{origin_lines(record)}\n\n{comparison_table(record)}\n\nReport: {scenario.report}")
    if "export" in record:
        print(f"ONNX: {scenario.exported} ({exported_as(record['export'])})")


def prune(args, scenario):
    # PyTorch takes seconds to import: only when there is work to do.
    import copy

    from cleanai.data.sources import load_images
    from cleanai.measure.costs import compare
    from cleanai.measure.provenance import checkpoint_facts, describe_run, find_warnings
    from cleanai.measure.results import measure_details
    from cleanai.network.evaluation import Evaluation, evaluate
    from cleanai.network.models import network_from, save_network
    from cleanai.network.training import TrainSettings, fine_tune
    from cleanai.pruning.criteria import NeuronCoverageImportance
    from cleanai.pruning.pruner import prune_to_budget
    from cleanai.pruning.repair import repair_accuracies
    from cleanai.runtime.compute import choose_compute
    from cleanai.runtime.distributed import end_all_but_first

    compute = choose_compute(args.device, args.precision, args.deterministic)
    print(compute.description)
    prepared = load_checkpoint(scenario.fine_tuned, model=MODEL, dataset=args.dataset)
    original = compute.place(network_from(prepared, scenario.fine_tuned))
    images = load_images(args.dataset, args.data_dir)
    images.require_classes(prepared["classes"], scenario.fine_tuned)
    images = images.with_train_samples(args.train_samples, args.seed).to(compute.device)
    calibration, heldout = images.calibration_split(args.calibration_batches * args.batch_size, args.seed)
    print(f"Channels are measured on {len(calibration):,} test images; the other {len(heldout):,} are held out")
    if args.fresh:
        scenario.remove_outputs()
    facts = checkpoint_facts(scenario, images, compute, args.config)
    earlier = find_checkpoint(scenario.pruned, facts["config"])
    evaluations = {"original": evaluate(original, images.test, compute, "Evaluating the original network")}
    print(f"Before pruning: test accuracy {evaluations['original'].accuracy_percent:.2f}%")

    if earlier:
        print(f"Found the pruned network of an earlier run: {scenario.pruned}")
        pruned, pruning = compute.place(network_from(earlier, scenario.pruned)), earlier["pruning"]
        evaluations["pruned"] = Evaluation.stored_in(earlier, scenario.pruned)
    else:
        pruned = copy.deepcopy(original)
        repair_on = images.repair_sample(args.repair_batches * args.batch_size, args.seed)
        pruning, unrepaired = prune_to_budget(
            pruned,
            NeuronCoverageImportance(args.coverage_metric),
            calibration,
            repair_on,
            compute,
            parameters_ratio=args.ratio,
            macs_ratio=args.macs_ratio,
            steps=args.steps,
            batch_size=args.batch_size,
            round_to=args.round_to,
            repair=args.repair,
        )
        accuracies, evaluations["pruned"] = repair_accuracies(
            args.repair, pruned, unrepaired, repair_on, images.test, compute, args.batch_size
        )
        pruning.update(accuracies)
        save_network(scenario.pruned, pruned, {**facts, "pruning": pruning, "evaluation": vars(evaluations["pruned"])})
    print(f"After pruning: test accuracy {repair_stages(pruning)}")

    tuned = copy.deepcopy(pruned)
    settings = TrainSettings(args.epochs, args.batch_size, args.lr, args.weight_decay, args.seed)
    history, evaluations["fine_tuned"] = fine_tune(tuned, images, compute, scenario, facts, settings)
    end_all_but_first()  # of several processes, as torchrun starts them

    networks = {"original": original, "pruned": pruned, "fine_tuned": tuned}
    compared = compare(networks, evaluations, heldout, images.test, compute)
    return {
        **describe_run(scenario, images, compute, args.config, len(calibration)),
        "prepared_with": prepared["config"],
        **compared,
        **measure_details(networks, evaluations, images, calibration, compute, args.seed),
        "pruning": pruning,
        "history": history,
        "checkpoints": {file.name: file_digest(file) for file in scenario.networks.values()},
        "commands": [
            scenario.command("TS1_01_prepare_model.py", prepared["config"]),
            scenario.command("TS1_02_coverage_pruning.py", args.config),
        ],
        "warnings": find_warnings(compared["models"], pruning["layers"], images),
    }


if __name__ == "__main__":
    cli.run(main)
