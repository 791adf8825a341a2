"""What the scripts share around their story: open a run, find finished work, save, and publish results.

Everything but the tables needs PyTorch, which takes seconds to import. It is imported only when there is work to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cleanai.report.run_text import comparison_table
from cleanai.report.wording import Record, exported_as, origin_lines, repair_stages, wrapped
from cleanai.runtime.checkpoints import find_checkpoint, find_record, load_checkpoint, write_record
from cleanai.runtime.files import file_digest, remove_file, write_bytes
from cleanai.runtime.lock import only_run
from cleanai.runtime.scenario import Scenario

if TYPE_CHECKING:
    from torch import nn

    from cleanai.cli import Options
    from cleanai.data.images import Images
    from cleanai.measure.results import Split
    from cleanai.network.evaluation import Evaluation
    from cleanai.pruning.pruner import PruneImages, PruneSettings
    from cleanai.runtime.compute import Compute


def finished_record(scenario: Scenario, args: Options) -> Record | None:
    """The record of a finished run with the same settings, or None.

    UserError when an earlier run had other settings, or when the preparing script has not run.
    """
    files = [scenario.record]
    if ":" in scenario.model:  # other networks are known by the names of their files
        args.config["model"] = scenario.model
    if scenario.method:
        scenario.require_fine_tuned(args.data_dir)
        args.config["fine_tuned_model"] = file_digest(scenario.fine_tuned)[:16]
    if "epochs" in args.config and "ratios" not in args.config:
        files.append(scenario.final)
    if "ratio" in args.config:
        files.append(scenario.pruned)
    record = None if args.fresh or not all(file.exists() for file in files) else find_record(files[0], args.config)
    if record:
        print(f"Already finished; its record is {scenario.record} (--fresh starts over)")
    return record


def save_record(scenario: Scenario, record: Record) -> None:
    """Write the record, which marks the run as finished, before the reports that are made from it."""
    remove_file(scenario.report)
    write_record(scenario.record, record)


def publish(scenario: Scenario, record: Record, args: Options) -> None:
    """Export a pruning script's network if asked, write its report where it is missing, and print its table."""
    if args.export == "onnx" and not ("export" in record and scenario.exported.exists()):
        from cleanai.measure.onnx_export import export_scenario

        with only_run(scenario):
            record["export"] = export_scenario(scenario, args.data_dir)
            save_record(scenario, record)
    if not scenario.report.exists():
        from cleanai.report.run_pdf import pdf_report

        with only_run(scenario):  # removes what a killed run left of it
            write_bytes(scenario.report, pdf_report(record))
    print(
        "",
        *map(wrapped, origin_lines(record)),
        "",
        comparison_table(record),
        "",
        f"Report: {scenario.report}",
        sep="\n",
    )
    if "export" in record:
        print(f"ONNX: {scenario.exported} ({exported_as(record['export'])})")


@dataclass
class Run:
    """A script at work: its device and images, and the facts that go into its checkpoints and its record."""

    scenario: Scenario
    args: Options
    compute: Compute
    images: Images
    facts: dict[str, Any]
    prepared: dict[str, Any] = field(default_factory=dict)  # the checkpoint of the preparing script
    split: Split = field(init=False)  # of the test images; set by `load_original`
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    def load_original(self) -> nn.Module:
        """The network of the preparing script. Splits the test images, and with --fresh deletes earlier results."""
        from cleanai.measure.results import Split
        from cleanai.network.models import network_from

        scenario, args = self.scenario, self.args
        self.prepared = load_checkpoint(scenario.fine_tuned, model=scenario.model, dataset=scenario.dataset)
        self.images.require_classes(self.prepared["classes"], scenario.fine_tuned)
        normalisation = {name: self.prepared[name] for name in ("mean", "std")}
        self.images = self.images.normalised_by(**normalisation)
        self.facts.update(normalisation)
        original = self.compute.place(network_from(self.prepared, scenario.fine_tuned))
        self.split = Split(*self.images.calibration_split(args.calibration_batches * args.batch_size, args.seed))
        print(
            f"Calibration uses {len(self.split.calibration):,} test images; "
            f"the other {len(self.split.heldout):,} are held out"
        )
        if args.fresh:
            scenario.remove_outputs()
        return original

    def evaluate(self, name: str, network: nn.Module) -> None:
        """Evaluate a network on all test images and print its accuracy."""
        from cleanai.network.evaluation import evaluate

        self.evaluations[name] = evaluate(network, self.images.test, self.compute, f"Evaluating, {name}")
        print(f"Test accuracy, {name}: {self.evaluations[name].accuracy_percent:.2f}%")

    @property
    def prune_images(self) -> PruneImages:
        """The images for pruning."""
        from cleanai.pruning.pruner import PruneImages

        count = self.args.repair_batches * self.args.batch_size
        return PruneImages(self.split.calibration, self.images.repair_sample(count, self.args.seed))

    @property
    def prune_settings(self) -> PruneSettings:
        """The settings of the pruning."""
        from cleanai.pruning.pruner import PruneSettings

        args = self.args
        return PruneSettings(args.ratio, args.macs_ratio, args.steps, args.round_to, args.repair, args.batch_size)

    def find_pruned(self) -> tuple[nn.Module | None, Record]:
        """The pruned network of an interrupted run with its report, or None and an empty report."""
        from cleanai.network.evaluation import Evaluation
        from cleanai.network.models import network_from

        path = self.scenario.pruned
        checkpoint = find_checkpoint(path, self.facts["config"], model=self.scenario.model)
        if not checkpoint:
            return None, {}
        print(f"Found the pruned network of an earlier run: {path}")
        self.evaluations["pruned"] = Evaluation.stored_in(checkpoint)
        return self.compute.place(network_from(checkpoint, path)), dict(checkpoint["pruning"])

    def save_pruned(self, network: nn.Module, unrepaired: nn.Module, pruning: Record) -> None:
        """Evaluate the pruned network before and after each part of the repair, and save it with `pruning`."""
        from cleanai.network.models import save_network

        pruning.update(self._repair_accuracies(network, unrepaired))
        evaluation = vars(self.evaluations["pruned"])
        save_network(self.scenario.pruned, network, {**self.facts, "pruning": pruning, "evaluation": evaluation})
        print(f"After pruning: {repair_stages(pruning)}")

    def _repair_accuracies(self, pruned: nn.Module, unrepaired: nn.Module) -> dict[str, float]:
        """Accuracy as cut and after each part of the repair. Batch norm of `unrepaired` is recalibrated for it."""
        from cleanai.network.evaluation import evaluate
        from cleanai.pruning.repair import recalibrate

        def accuracy(network: nn.Module, title: str) -> float:
            return evaluate(network, self.images.test, self.compute, title).accuracy_percent

        repair = self.args.repair
        self.evaluations["pruned"] = evaluate(pruned, self.images.test, self.compute, "Evaluating, pruned")
        repaired = self.evaluations["pruned"].accuracy_percent
        if repair == "none":
            return {"accuracy_raw_percent": repaired}
        accuracies = {"accuracy_raw_percent": accuracy(unrepaired, "Evaluating as cut")}
        if repair == "bn":
            return {**accuracies, "accuracy_recalibrated_percent": repaired}
        recalibrate(unrepaired, self.prune_images.repair, self.compute, self.args.batch_size, "Recalibrating")
        accuracies["accuracy_recalibrated_percent"] = accuracy(unrepaired, "Evaluating without reconstruction")
        return {**accuracies, "accuracy_reconstructed_percent": repaired}

    def record(self, networks: dict[str, nn.Module], pruning: Record, history: list[dict[str, float]]) -> Record:
        """Measure the networks original, pruned and fine_tuned; return the record of a pruning script."""
        from cleanai.measure.provenance import find_warnings
        from cleanai.measure.results import measure_results

        measured = measure_results(networks, self.evaluations, self.images, self.split, self.compute, self.args.seed)
        scenario = self.scenario
        return {
            **self.description(),
            **measured,
            "pruning": pruning,
            "history": history,
            "checkpoints": {file.name: file_digest(file) for file in scenario.networks.values()},
            "commands": [
                scenario.of("").command(self.prepared["config"]),
                scenario.command(self.args.config),
            ],
            "warnings": find_warnings(measured["models"], pruning["layers"], self.images),
        }

    def description(self) -> Record:
        """The entries of a record that are not measured."""
        from cleanai.measure.provenance import describe_run

        calibration = len(self.split.calibration) if self.prepared else None
        described = describe_run(self.scenario, self.images, self.compute, self.args.config, calibration)
        return {**described, **({"prepared_with": dict(self.prepared["config"])} if self.prepared else {})}


def open_run(scenario: Scenario, args: Options) -> Run:
    """Choose the device, print it, and load the images."""
    from cleanai.data.sources import load_images
    from cleanai.measure.provenance import checkpoint_facts
    from cleanai.runtime.compute import choose_compute

    compiled = "compile" in args and args.compile
    compute = choose_compute(args.device, args.precision, args.deterministic, compiled)
    if "timing_seconds" in args:
        compute = replace(compute, timing_s=args.timing_seconds)
    print(wrapped(compute.description))
    images = load_images(args.dataset, args.data_dir)
    if "mean" in args:
        images = images.normalised_by(args.mean, args.std)
    images = images.with_train_samples(args.train_samples, args.seed).to(compute.device)
    return Run(scenario, args, compute, images, checkpoint_facts(scenario, images, compute, args.config))
