"""The names and paths of a test scenario.

A scenario is called {TestScenarioNo}_{MethodName}_{ModelName}_{DatasetName}. This module imports nothing heavy, so
that a finished script answers at once.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator

from cleanai import UserError
from cleanai.runtime import distributed
from cleanai.runtime.files import check_removable, remove_file
from cleanai.runtime.methods import METHODS

PROJECT = Path(__file__).resolve().parents[2]
CHECKPOINTS_DIR, DATA_DIR = PROJECT / "checkpoints", PROJECT / "downloaded_datasets"
SCRIPTS_DIR = PROJECT / "test_scenarios"

DOWNLOADABLE = "CIFAR10"
EMBEDDED = "Digits"

_PLAIN = r"[\w.:/\\-]+"  # what no shell changes
_OF_CONDITIONS = {"deterministic": "--deterministic", "compiled": "--compile"}
# Entries of a config that a command gives in another way, or that a run finds out by itself.
NO_OPTIONS = ("dataset", "model", "fine_tuned_model", "weights_sha256", "conditions", "train_sha256", "test_sha256")


def has_image_folder(dataset: str, data_dir: Path) -> bool:
    """Whether `data_dir/dataset` is an image folder: it has a part called train or test."""
    return is_dataset_name(dataset) and any((data_dir / dataset / part).is_dir() for part in ("train", "test"))


def is_dataset_name(dataset: str) -> bool:
    """Whether it may be part of file names: it has no characters that are special in paths."""
    return bool(re.fullmatch(r"[\w-]+", dataset))


def usual_flip(dataset: str) -> str:
    """Whether training images are mirrored, unless asked otherwise: a mirrored digit is not a digit."""
    return "none" if dataset == EMBEDDED else "horizontal"


def require_known_dataset(dataset: str, data_dir: Path) -> None:
    """Raise UserError when there is no source of images with that name, or a folder with that name would be ignored."""
    folder = data_dir / dataset
    if dataset == EMBEDDED and folder.is_dir():
        raise UserError(f"{EMBEDDED} is the embedded dataset: give the folder {folder} another name, and use that")
    too_deep = next(folder.glob("*/train"), None) if dataset and not has_image_folder(dataset, data_dir) else None
    if too_deep:
        raise UserError(f"{too_deep.parent} holds {{train,test}}, one folder too deep: move them up into {folder}")
    if dataset == EMBEDDED or has_image_folder(dataset, data_dir):
        return
    if is_dataset_name(dataset) and folder.is_dir():
        otherwise = ", or remove the folder" if dataset == DOWNLOADABLE else ""
        raise UserError(f"{folder} holds no images in {{train,test}}/<class>/: put them there{otherwise}")
    if dataset != DOWNLOADABLE:
        if data_dir != DATA_DIR and not data_dir.is_dir():
            raise UserError(f"There is no folder {data_dir}: give --data-dir the folder in which {dataset} lies")
        if data_dir.name == dataset and has_image_folder(dataset, data_dir.parent):
            raise UserError(f'{data_dir} is the dataset itself: use --data-dir "{data_dir.parent}"')
        there = sorted(path.name for path in data_dir.glob("*") if has_image_folder(path.name, data_dir))
        *names, last = dict.fromkeys((DOWNLOADABLE, EMBEDDED, *there))
        raise UserError(
            f"Unknown dataset: {dataset}. Use --dataset {', '.join(names)} or {last}, "
            f"or put your images into {data_dir / dataset / '{train,test}' / '<class>' / '*.png'}"
        )


def network_source(model: str) -> tuple[str, str]:
    """Where the network comes from that a scenario calls `model`, and its name there.

    "nets/my_net.py:MyNet" gives the Python file and MyNet; "torchvision:resnet18" gives torchvision and resnet18; of
    any other name the source is empty.
    """
    source, _, name = model.rpartition(":")
    return source, name


def is_from_file(model: str) -> bool:
    """Whether the network that a scenario calls `model` comes from a Python file of the user's."""
    return network_source(model)[0] not in ("", "torchvision")


@dataclass(frozen=True)
class Scenario:
    """Where one script of a scenario reads and writes. `method` is empty for the preparing script."""

    number: str
    model: str
    dataset: str
    checkpoints_dir: Path
    method: str = ""

    def of(self, method: str) -> Scenario:
        """The same scenario for the script of another method."""
        return replace(self, method=method)

    @property
    def model_name(self) -> str:
        """The model in names of files, MyNet for nets/my_net.py:MyNet."""
        source, name = network_source(self.model)
        return f"{source}-{name}" if source == "torchvision" else name

    @property
    def name(self) -> str:
        """For example TS1_Coverage_ResNet18_CIFAR10, or TS1_ResNet18_CIFAR10 for the preparing script."""
        return "_".join(part for part in (self.number, self.method, self.model_name, self.dataset) if part)

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
        """The network that the preparing script ends with and the pruning scripts start from."""
        return self._prepared("FT_final")

    @property
    def pruned(self) -> Path:
        """The pruned network before its fine-tuning."""
        return self.folder / f"{self.model_name}_{self.dataset}_pruned_{METHODS[self.method].tag}.pth"

    def epoch(self, number: int) -> Path:
        """The network after `number` epochs of this script's fine-tuning."""
        return self._trained(f"epoch{number}")

    @property
    def final(self) -> Path:
        """The network that this script ends with."""
        return self._trained("final")

    @property
    def networks(self) -> dict[str, Path]:
        """The three networks that a pruning script compares."""
        return {"original": self.fine_tuned, "pruned": self.pruned, "fine_tuned": self.final}

    @property
    def exported(self) -> Path:
        """The final network as ONNX."""
        return self.final.with_suffix(".onnx")

    @property
    def quantized(self) -> Path:
        """The final network as ONNX in 8 bits."""
        return self.final.with_name(f"{self.final.stem}_int8.onnx")

    @property
    def standalone(self) -> Path:
        """The final network as a program that PyTorch runs without this project."""
        return self.final.with_suffix(".pt2")

    @property
    def resume(self) -> Path:
        """The state of an interrupted run; removed when the run is complete."""
        return self._trained("resume") if self._trains else self.record.with_name(f"{self.name}_resume.json")

    @property
    def record(self) -> Path:
        """Every number that this script measured, as JSON."""
        return (self.folder / "reports" if self.method else self.folder) / f"{self.name}.json"

    @property
    def report(self) -> Path:
        """The PDF, made from the record."""
        return self.folder / "reports" / f"{self.name}.pdf"

    @property
    def table(self) -> Path:
        """The table of a comparison or a sweep, as CSV."""
        return self.report.with_suffix(".csv")

    @property
    def lock(self) -> Path:
        """Held while this script runs."""
        return self.checkpoints_dir / ".locks" / f"{self.name}.lock"

    def command(
        self, config: dict[str, Any] | None = None, data_dir: Path = DATA_DIR, without_defaults: bool = False
    ) -> str:
        """The command that runs this script on the same dataset and folders, with those settings in `config` it has."""
        word = self.method.lower() or "prepare"
        script = next(iter(sorted(SCRIPTS_DIR.glob(f"{self.number}_*_{word}_*.py"))), None)
        name = script.name if script else f"{self.number}_..._{word}_....py"
        text = script.read_text(encoding="utf-8") if script else ""
        dataset = "" if _is_default(text, "dataset", self.dataset) else f" --dataset {self.dataset}"
        folder = "" if self.checkpoints_dir == CHECKPOINTS_DIR else f' --checkpoints-dir "{self.checkpoints_dir}"'
        if data_dir != DATA_DIR and self.dataset != EMBEDDED:
            folder += f' --data-dir "{data_dir}"'
        settings = [
            option_text(key, value)
            for key, value in (config or {}).items()
            if key not in NO_OPTIONS
            and (not text or f'"{key}"' in text)
            and not (without_defaults and _is_default(text, key, value))
        ]
        conditions = (config or {}).get("conditions", "")
        settings += [option for word, option in _OF_CONDITIONS.items() if f", {word}" in conditions]
        return " ".join([f"python test_scenarios/{name}{dataset}{folder}", *filter(None, settings)])

    def require_fine_tuned(self, data_dir: Path, settings: dict[str, Any] | None = None) -> None:
        """Raise UserError when there is no network of the preparing script, which ran with these `settings`, if any."""
        if not self.fine_tuned.exists():
            require_known_dataset(self.dataset, data_dir)
            first = self.of("").command(settings, data_dir, without_defaults=True)
            raise UserError(
                f"Fine-tuned model not found: {self.fine_tuned}. Run first{weights_hint(settings)}: {first}"
            )

    def refuse_own_file(self, path: Path) -> None:
        """Raise UserError when `path` is a file that this script writes, and deletes with --fresh."""
        for pattern in self._outputs():
            if path.resolve().parent == pattern.parent.resolve() and fnmatch.fnmatch(path.name, pattern.name):
                raise UserError(
                    f"{path} is a file that this script writes, and deletes with --fresh: copy it elsewhere, or use "
                    "another --checkpoints-dir"
                )

    def remove_outputs(self) -> None:
        """Delete what an earlier run of this script left. UserError for a file that cannot be deleted.

        On Windows the report may be open elsewhere: it stays, and is replaced by the new one.
        """
        with distributed.first_before_others():
            for path in self._existing():
                with contextlib.suppress(PermissionError) if path == self.report else _explained(path):
                    remove_file(path)

    def require_removable(self) -> None:
        """UserError for a file of an earlier run that `remove_outputs` could not delete."""
        for path in self._existing():
            with _explained(path):
                check_removable(path)

    def _existing(self) -> list[Path]:
        return [path for pattern in self._outputs() for path in pattern.parent.glob(pattern.name)]

    def remove_unfinished(self) -> None:
        """Delete the half-written files of a killed run. Call it only while the lock is held."""
        for pattern in self._outputs():
            for path in pattern.parent.glob(f"{pattern.name}.*.tmp"):
                path.unlink()

    @property
    def _trains(self) -> bool:
        return not self.method or self.method in METHODS

    def _outputs(self) -> list[Path]:
        """Every file that this script writes, as patterns of names; first what others may hold open."""
        if not self._trains:
            return [self.report, self.table, self.record, self.resume]
        shown = [self.report] if self.method else []
        own = [*shown, self.exported, self.quantized, self.standalone, self.record]
        return [*own, self.pruned if self.method else self.pretrained, self.final, self.resume, self._trained("epoch*")]

    def _prepared(self, stage: str) -> Path:
        return self.checkpoints_dir / self.number / f"{self.model_name}_{self.dataset}_{stage}.pth"

    def _trained(self, stage: str) -> Path:
        tag = f"FTAP_{METHODS[self.method].tag}" if self.method else "FT"
        return self.folder / f"{self.model_name}_{self.dataset}_{tag}_{stage}.pth"


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"{path} cannot be deleted ({error.strerror}): close the programs that hold it open, or make its folder "
            "writable"
        ) from error


def weights_hint(settings: dict[str, Any] | None) -> str:
    """What to say before a command with these settings whose `--weights` has the name of a file, not its folder."""
    weights = (settings or {}).get("weights", "none")
    return "" if weights in ("imagenet", "none") else f", with the folder of {weights}"


def _is_default(text: str, name: str, value: Any) -> bool:
    """Whether a setting has this default in the text of a script."""
    literal = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    return bool(re.search(rf'"{name}": {re.escape(literal)}[,}}\s]', text))


def option_text(name: str, value: Any) -> str:
    """A setting as a command-line option; empty for one that was not given."""
    option = f"--{name.replace('_', '-')}"
    if value is None and "ratio" in name:
        return f"{option} none"
    if value is None:
        return ""
    values = map(str, value if isinstance(value, list) else [value])
    return f"{option} {' '.join(value if re.fullmatch(_PLAIN, value) else _quoted(value) for value in values)}"


def _quoted(text: str) -> str:
    return f'"{text}"'  # in cmd, too
