"""A script at work: its device, images and evaluations, and what scripts 1, 2, 3 and 5 do with them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.cli import Options
from cleanai.data.images import Images, ImageSettings
from cleanai.data.sources import load_images
from cleanai.measure.provenance import checkpoint_facts, describe_run, find_warnings
from cleanai.measure.results import Split, measure_results
from cleanai.measure.robustness import CASES, chosen_images, measure_robustness
from cleanai.measure.significance import judge_drop
from cleanai.network.evaluation import Evaluation, evaluate, require_finite
from cleanai.network.models import network_from, save_network
from cleanai.network.training import distil, require_even_shares
from cleanai.network.trial import copied, in_fitting_order
from cleanai.network.weights import require_weights
from cleanai.pruning.layers import find_layers
from cleanai.pruning.pruner import prune_to_budget, require_prunable
from cleanai.pruning.repair import REPAIR_BYTES, most_images, recalibrate
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.report.wording import Record, repair_stages, wrapped
from cleanai.runtime.checkpoints import find_checkpoint, find_record, load_checkpoint, write_record
from cleanai.runtime.compute import Compute, choose_compute
from cleanai.runtime.files import file_digest
from cleanai.runtime.progress import say
from cleanai.runtime.scenario import Scenario
from cleanai.search import FURTHEST, Limits, prune_to_limits


@dataclass
class Run:
    """A script at work: its device and images, and the facts that go into its checkpoints and its record."""

    scenario: Scenario
    args: Options
    compute: Compute
    images: Images
    facts: dict[str, Any]
    prepared: dict[str, Any] = field(default_factory=dict)  # the checkpoint of the preparing script
    prepared_sha256: str = ""  # of its file, when it was read
    split: Split = field(init=False)  # of the test images; set by `load_original`, as the next one
    repair_images: int = field(init=False)  # training images for the repair
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    def save_pretrained(self, network: nn.Module) -> None:
        """Place the preparing script's network on the device, try it and whether it can be pruned, and save it.

        With --fresh deletes earlier results.
        """
        self._try(network, self.args.batch_size if self.args.epochs else None, trained=True)
        require_prunable(network, self.images.test)
        self.replace_earlier()
        # Refuses an interrupted run with other settings.
        find_checkpoint(self.scenario.pretrained, self.facts["config"], model=self.scenario.model)
        save_network(self.scenario.pretrained, network, self.facts)

    def load_original(self) -> nn.Module:
        """The network of the preparing script. Splits the test images."""
        scenario, args = self.scenario, self.args
        self.images.require_classes(self.prepared["classes"], scenario.fine_tuned)
        if args.fresh:
            scenario.require_removable()
        original = network_from(self.prepared, scenario.fine_tuned)
        find_layers(original, args.config.get("keep_layers") or ())
        trained = bool(args.epochs or args.config.get("repair") == "distil")
        if trained:
            require_even_shares(self.images, args.batch_size)
        in_batches = trained or args.config.get("repair", "none") != "none"
        self._try(original, args.batch_size if in_batches else None, trained)
        for warning in self._other_pictures():
            print(wrapped(f"Note: {warning}."))
        self.split = Split.of(self.images, args.config)
        print(self._which_images())
        self.repair_images = self._count_repair_images(original)
        return original

    def replace_earlier(self) -> None:
        """With --fresh delete what an earlier run left, at the first call: what replaces it is there now."""
        if self.args.fresh:
            self.scenario.remove_outputs()
            self.args.fresh = False
            print("Earlier results are deleted, as --fresh asks")

    def _which_images(self) -> str:
        """What serves for calibration and what is held out; and where test images are few, how to hold out all."""
        calibration, heldout = f"{len(self.split.calibration):,}", f"{len(self.split.heldout):,} test images"
        if self.args.calibrate_on == "train":
            return f"Calibration uses {calibration} training images; all {heldout} are held out"
        few = len(self.split.calibration) < self.args.calibration_batches * self.args.batch_size
        hint = f" (all {len(self.images.test):,} with --calibrate-on train)" if few else ""
        return f"Calibration uses {calibration} test images; the other {heldout} are held out{hint}"

    def _other_pictures(self) -> list[str]:
        """A warning where the test images are not those that the preparing script had."""
        before, now = (config.get("test_sha256") for config in (self.prepared["config"], self.facts["config"]))
        if before in (None, now):  # older checkpoints lack it
            return []
        return [
            "The test images are not those of script 1 (or another version of Pillow reads them otherwise). If it "
            "trained on some of them, accuracies are too high"
        ]

    def _try(self, network: nn.Module, batch_size: int | None, trained: bool) -> None:
        """Try a network on the images, and place it in the order of memory in which it works."""
        self.compute, self.images = in_fitting_order(network, self.images, batch_size, self.compute, trained)
        self.compute.place(network)

    def _count_repair_images(self, network: nn.Module) -> int:
        requested, there = self.args.repair_batches * self.args.batch_size, len(self.images.train)
        count = min(requested, there, most_images(network, next(self.images.train.batches(1))[0]))
        if count < requested:
            given = self.args.train_samples
            why = f"--train-samples {given} leaves no more" if given else "there are no more"
            why = why if count == there else f"more would take over {REPAIR_BYTES >> 30} GiB of memory"
            print(f"The repair uses {count:,} training images, not {requested:,}: {why}")
        return count

    def evaluate(self, name: str, network: nn.Module) -> None:
        """Evaluate a network on all test images and print its accuracy."""
        self.evaluations[name] = evaluate(network, self.images.test, self.compute, f"Evaluating, {name}")
        require_finite(self.evaluations[name], name)
        print(f"Test accuracy, {name}: {self.evaluations[name].accuracy_percent:.2f}%")

    @property
    def prune_images(self) -> PruneImages:
        """The images for pruning."""
        return PruneImages(self.split.calibration, self.images.repair_sample(self.repair_images, self.args.seed))

    @property
    def prune_settings(self) -> PruneSettings:
        """The settings of the pruning. With --ratio auto the shares only say which cost is left free."""
        args = self.args
        ratio, macs_ratio = (
            FURTHEST if share in ("auto", "same") else share for share in (args.ratio, args.macs_ratio)
        )
        repair = "full" if args.repair == "distil" else args.repair  # `_distil` follows after all steps
        settings = PruneSettings(ratio, macs_ratio, args.steps, args.round_to, repair, args.batch_size, nearest=True)
        return replace(settings, keep_layers=args.keep_layers or ())

    def prune(self, original: nn.Module, importance: tp.importance.Importance) -> tuple[nn.Module, Record]:
        """Prune a copy of the network by the shares of the options, or up to their limits, and save it.

        Returns it with the report on the pruning.
        """
        args, work = self.args, (importance, self.prune_images, self.compute, self.prune_settings)
        if args.ratio == "auto":
            limits = Limits(args.accept_drop, args.speedup, args.speedup_of)
            pruned, pruning, unrepaired = prune_to_limits(original, *work, limits)
        else:
            pruned = copied(original)
            pruning, unrepaired = prune_to_budget(pruned, *work)
        self._save_pruned(pruned, unrepaired, original, pruning)
        return pruned, pruning

    def find_points(self) -> list[Record]:
        """The points of an interrupted sweep."""
        interrupted = None if self.args.fresh else find_record(self.scenario.resume, self.facts["config"])
        if not interrupted:
            return []
        print(f"Resuming after {len(interrupted['points'])} networks of an interrupted run")
        return list(interrupted["points"])

    def save_points(self, points: list[Record]) -> None:
        """Save the points of a sweep so far. With --fresh deletes earlier results."""
        self.replace_earlier()
        write_record(self.scenario.resume, {"config": self.facts["config"], "points": points})

    def find_pruned(self) -> tuple[nn.Module | None, Record]:
        """The pruned network of an interrupted run with its report, or None and an empty report."""
        path = self.scenario.pruned
        if self.args.fresh:
            return None, {}
        checkpoint = find_checkpoint(path, self.facts["config"], model=self.scenario.model)
        if not checkpoint:
            return None, {}
        print(f"Found the pruned network of an earlier run: {path}")
        self.evaluations["pruned"] = Evaluation.stored_in(checkpoint)
        return self.compute.place(network_from(checkpoint, path)), dict(checkpoint["pruning"])

    def _save_pruned(self, network: nn.Module, unrepaired: nn.Module, original: nn.Module, pruning: Record) -> None:
        """Evaluate the pruned network before and after each part of the repair, and save it with `pruning`.

        Distillation, where it belongs to the repair, runs here. With --fresh deletes earlier results.
        """
        pruning.update(self._repair_accuracies(network, unrepaired))
        if self.args.repair == "distil":
            pruning["accuracy_distilled_percent"] = self._distil(network, original)
        require_finite(self.evaluations["pruned"], "after pruning")
        evaluation = vars(self.evaluations["pruned"])
        self.replace_earlier()
        save_network(self.scenario.pruned, network, {**self.facts, "pruning": pruning, "evaluation": evaluation})
        print(f"Test accuracy after pruning: {repair_stages(pruning)}")

    def _distil(self, network: nn.Module, original: nn.Module) -> float:
        """Distil the pruned network, in place, from the original one, and evaluate it again: accuracy in percent."""
        distil(network, original, self.images, self.compute, self.args.batch_size, self.args.seed)
        self.evaluations["pruned"] = evaluate(network, self.images.test, self.compute, "Evaluating, distilled")
        return self.evaluations["pruned"].accuracy_percent

    def _repair_accuracies(self, pruned: nn.Module, unrepaired: nn.Module) -> dict[str, float]:
        """Accuracy as cut and after each part of the repair. Batch norm of `unrepaired` is recalibrated for it."""

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
        print(f"Measuring {len(networks)} networks: inference time, size, FLOPs, test coverage")
        measured = measure_results(networks, self.evaluations, self.images, self.split, self.compute, self.args.seed)
        scenario, accept_drop = self.scenario, self.args.accept_drop
        digests = {scenario.fine_tuned.name: self.prepared_sha256}
        digests.update({file.name: file_digest(file) for file in (scenario.pruned, scenario.final)})
        return {
            **self.description(),
            **measured,
            **self._robustness(networks, measured["models"]["original"]),
            **({} if accept_drop is None else {"verdict": self._verdict(accept_drop)}),
            "pruning": pruning,
            "history": history,
            "checkpoints": digests,
            "commands": [
                scenario.of("").command(self.prepared["config"], self.args.data_dir),
                scenario.command(self.facts["config"], self.args.data_dir),
            ],
            "warnings": [*self._other_pictures(), *find_warnings(measured["models"], pruning["layers"], self.images)],
        }

    def _robustness(self, networks: dict[str, nn.Module], original: Record) -> Record:
        """The entry on disturbed images; none with --robustness-images 0."""
        if self.args.robustness_images == 0:
            return {}
        heldout = self.images.test.select(self.split.heldout)
        chosen = chosen_images(heldout, self.args.robustness_images, original["macs"], self.args.seed)
        seconds = len(CASES) * len(networks) * len(chosen) / original["throughput_images_per_s"]
        say(f"Measuring accuracy on {len(chosen):,} disturbed images: about {seconds:.0f} s")
        return {"robustness": {"images": len(chosen), "rows": measure_robustness(networks, chosen, self.compute)}}

    def _verdict(self, accept_drop: float) -> Record:
        before, after = (
            self.evaluations[name].correct[self.split.heldout].numpy() for name in ("original", "fine_tuned")
        )
        return judge_drop(before, after, accept_drop)

    def description(self) -> Record:
        """The entries of a record that are not measured."""
        calibration = len(self.split.calibration) if self.prepared else None
        described = describe_run(self.scenario, self.images, self.compute, self.args.config, calibration)
        return {**described, **({"prepared_with": dict(self.prepared["config"])} if self.prepared else {})}


def open_run(scenario: Scenario, args: Options) -> Run:
    """Choose the device, print it, and load the images, read and augmented as in the preparing script."""
    if "weights" in args:
        require_weights(scenario.model, args.weights)
        if args.weights not in ("imagenet", "none"):
            scenario.refuse_own_file(args.weights)
    compiled = "compile" in args and args.compile
    compute = choose_compute(args.device, args.precision, args.deterministic, compiled)
    if "timing_seconds" in args:
        compute = replace(compute, timing_s=args.timing_seconds)
    print(wrapped(compute.description))
    prepared, sha256 = {}, ""
    if scenario.method:
        prepared = load_checkpoint(scenario.fine_tuned, model=scenario.model, dataset=scenario.dataset)
        sha256 = file_digest(scenario.fine_tuned)
        if not sha256.startswith(args.config["fine_tuned_model"]):
            raise UserError(f"{scenario.fine_tuned} was replaced a moment ago: run the same command again")
    settings = ImageSettings.of(prepared["config"] if prepared else args.config)
    images = load_images(args.dataset, args.data_dir, settings)
    images = images.normalised_by(*((prepared["mean"], prepared["std"]) if prepared else (args.mean, args.std)))
    images = images.with_train_samples(args.train_samples, args.seed).to(compute.device)
    print(f"Training images are {images.augmentation}")
    facts = checkpoint_facts(scenario, images, compute, args.config)
    return Run(scenario, args, compute, images, facts, prepared, sha256)
