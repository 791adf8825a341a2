"""The names and paths of a test scenario, as the scenario's own page lays them down.

A scenario is called {TestScenarioNo}_{MethodName}_{ModelName}_{DatasetName}. This module imports nothing heavy, so
that a script that has nothing to do answers at once.
"""
from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cleanai import UserError
from cleanai.runtime import distributed

PROJECT = Path(__file__).resolve().parents[2]
CHECKPOINTS_DIR = PROJECT / "checkpoints"

DOWNLOADABLE = "CIFAR10"
EMBEDDED = "Digits"

METHOD_TAGS = {"Coverage": "NC", "Wanda": "W"}  # the short forms used in checkpoint names
# Of a config: what a command gives otherwise, or finds out by itself.
_NO_SETTINGS = ("dataset", "fine_tuned_model", "weights_sha256", "conditions")


def has_image_folder(dataset: str, data_dir: Path) -> bool:
    """Whether there is a folder of images of that name, with a part for training or for testing."""
    folder = data_dir / dataset
    return bool(re.fullmatch(r"[\w-]+", dataset)) and any((folder / part).is_dir() for part in ("train", "test"))


def require_known_dataset(dataset: str, data_dir: Path) -> None:
    """Raise UserError when images of that name can come from nowhere."""
    if dataset not in (EMBEDDED, DOWNLOADABLE) and not has_image_folder(dataset, data_dir):
        raise UserError(
            f"Unknown dataset: {dataset}. Use --dataset {DOWNLOADABLE} or {EMBEDDED}, "
            f"or put your images into {data_dir / dataset / '{train,test}' / '<class>' / '*.png'}"
        )


@dataclass(frozen=True)
class Scenario:
    """Where one script of a scenario reads and writes; `method` is empty for the preparing script."""

    number: str
    model: str
    dataset: str
    checkpoints_dir: Path
    method: str = ""

    @property
    def name(self) -> str:
        """For example TS1_Coverage_ResNet18_CIFAR10, or TS1_ResNet18_CIFAR10 for the preparing script."""
        return "_".join(part for part in (self.number, self.method, self.model, self.dataset) if part)

    @property
    def folder(self) -> Path:
        """The folder of this script's checkpoints."""
        return self.checkpoints_dir / (self.name if self.method else self.number)

    @property
    def pretrained(self) -> Path:
        """The adapted network before any training on the dataset."""
        return self._prepared("pretrained")

    @property
    def fine_tuned(self) -> Path:
        """The network that the preparing script ends with and the pruning scripts begin with."""
        return self._prepared("FT_final")

    def require_fine_tuned(self, script: str, data_dir: Path) -> None:
        """Raise UserError when the preparing script has not left its network yet, or could not for want of images."""
        if not self.fine_tuned.exists():
            require_known_dataset(self.dataset, data_dir)
            raise UserError(f"Fine-tuned model not found: {self.fine_tuned}. Run first: {self.command(script)}")

    def command(self, script: str, config: dict[str, Any] | None = None) -> str:
        """The command that runs a script of this scenario on the same dataset and folder, with these settings."""
        dataset = "" if self.dataset == DOWNLOADABLE else f" --dataset {self.dataset}"
        folder = "" if self.checkpoints_dir == CHECKPOINTS_DIR else f' --checkpoints-dir "{self.checkpoints_dir}"'
        settings = "".join(_option(name, value) for name, value in (config or {}).items() if name not in _NO_SETTINGS)
        return f"python test_scenarios/{script}{dataset}{folder}{settings}"

    @property
    def pruned(self) -> Path:
        """The pruned network before its fine-tuning."""
        return self.folder / f"{self.model}_{self.dataset}_pruned_{METHOD_TAGS[self.method]}.pth"

    def epoch(self, number: int) -> Path:
        """The network after `number` epochs of this script's fine-tuning."""
        return self._trained(f"epoch{number}")

    @property
    def final(self) -> Path:
        """The network this script ends with."""
        return self._trained("final")

    @property
    def networks(self) -> dict[str, Path]:
        """The three networks that a pruning script compares."""
        return {"original": self.fine_tuned, "pruned": self.pruned, "fine_tuned": self.final}

    @property
    def exported(self) -> Path:
        """The network this script ends with, as ONNX."""
        return self.final.with_suffix(".onnx")

    @property
    def resume(self) -> Path:
        """What an interrupted fine-tuning goes on from; removed when the fine-tuning is done."""
        return self._trained("resume")

    @property
    def record(self) -> Path:
        """Every number this script measured, as JSON."""
        return (self.folder / "reports" if self.method else self.folder) / f"{self.name}.json"

    @property
    def report(self) -> Path:
        """The PDF made from the record."""
        return self.folder / "reports" / f"{self.name}.pdf"

    @property
    def table(self) -> Path:
        """The table of a comparison, as CSV."""
        return self.report.with_suffix(".csv")

    @property
    def lock(self) -> Path:
        """What keeps a second run of this script away; there only while one is at work."""
        return self.folder / f"{self.name}.lock"

    def remove_outputs(self) -> None:
        """Delete what an earlier run of this script left, for starting over."""
        with distributed.first_before_others():
            for pattern in self._outputs():
                for path in pattern.parent.glob(pattern.name):
                    path.unlink()

    def refuse_own_file(self, path: Path) -> None:
        """Raise UserError when this script writes, and with --fresh deletes, the file at `path`."""
        for pattern in self._outputs():
            if path.resolve().parent == pattern.parent.resolve() and fnmatch.fnmatch(path.name, pattern.name):
                raise UserError(
                    f"{path} is a file that this script writes, and deletes with --fresh: copy it elsewhere, or use "
                    "another --checkpoints-dir"
                )

    def remove_unfinished(self) -> None:
        """Delete what this script was writing when it was killed; nothing, while no other run of it is at work."""
        for pattern in self._outputs():
            for path in pattern.parent.glob(f"{pattern.name}.*.tmp"):
                path.unlink()

    def _outputs(self) -> list[Path]:
        """Every file this script writes, as patterns of names."""
        own = [self.record, self.report, self.pruned] if self.method else [self.record, self.pretrained]
        return [*own, self.final, self.exported, self.resume, self._trained("epoch*")]

    def _prepared(self, stage: str) -> Path:
        return self.checkpoints_dir / self.number / f"{self.model}_{self.dataset}_{stage}.pth"

    def _trained(self, stage: str) -> Path:
        tag = f"FTAP_{METHOD_TAGS[self.method]}" if self.method else "FT"
        return self.folder / f"{self.model}_{self.dataset}_{tag}_{stage}.pth"


@dataclass(frozen=True)
class SweepScenario(Scenario):
    """Where the sweep of a comparison writes: into the comparison's folder, under names that end in _sweep."""

    @property
    def name(self) -> str:
        """For example TS1_Comparison_ResNet18_CIFAR10_sweep."""
        return f"{super().name}_sweep"

    @property
    def folder(self) -> Path:
        """The folder of the comparison."""
        return self.checkpoints_dir / super().name

    @property
    def resume(self) -> Path:
        """The points that an interrupted sweep has measured; removed when it is done."""
        return self.record.with_name(f"{self.name}_resume.json")

    def _outputs(self) -> list[Path]:
        return [self.record, self.report, self.table, self.resume]


def _option(name: str, value: Any) -> str:
    """A setting as it is given on the command line; nothing for one that was left out."""
    option = f" --{name.replace('_', '-')}"
    if value is None and "ratio" in name:
        return f"{option} none"
    if value is None or value is False:
        return ""
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return option if value is True else f"{option} {value}"
