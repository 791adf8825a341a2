"""Names and paths, against the scenario's own page."""
from pathlib import Path

import pytest

from cleanai import UserError
from cleanai.runtime.scenario import Scenario


def scenario(method=""):
    return Scenario("TS1", "ResNet18", "CIFAR10", Path("checkpoints"), method)


def test_files_of_the_preparing_script():
    files = scenario()
    assert files.pretrained == Path("checkpoints/TS1/ResNet18_CIFAR10_pretrained.pth")
    assert files.epoch(5) == Path("checkpoints/TS1/ResNet18_CIFAR10_FT_epoch5.pth")
    assert files.final == files.fine_tuned == Path("checkpoints/TS1/ResNet18_CIFAR10_FT_final.pth")
    assert files.record == Path("checkpoints/TS1/TS1_ResNet18_CIFAR10.json")


@pytest.mark.parametrize(("method", "tag"), [("Coverage", "NC"), ("Wanda", "W")])
def test_files_of_the_pruning_scripts(method, tag):
    files = scenario(method)
    folder = Path(f"checkpoints/TS1_{method}_ResNet18_CIFAR10")
    assert files.name == folder.name
    assert files.fine_tuned == Path("checkpoints/TS1/ResNet18_CIFAR10_FT_final.pth")
    assert files.pruned == folder / f"ResNet18_CIFAR10_pruned_{tag}.pth"
    assert files.epoch(10) == folder / f"ResNet18_CIFAR10_FTAP_{tag}_epoch10.pth"
    assert files.final == folder / f"ResNet18_CIFAR10_FTAP_{tag}_final.pth"
    assert files.exported == folder / f"ResNet18_CIFAR10_FTAP_{tag}_final.onnx"
    assert files.report == folder / "reports" / f"TS1_{method}_ResNet18_CIFAR10.pdf"
    assert files.record == folder / "reports" / f"TS1_{method}_ResNet18_CIFAR10.json"


def test_starting_over_removes_only_what_the_script_made(tmp_path):
    first = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path)
    second = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path, "Coverage")
    own = [second.pruned, second.epoch(5), second.epoch(10), second.final, second.resume, second.record, second.report]
    own.append(second.exported)
    others = [first.pretrained, first.epoch(5), first.final, second.folder / "notes.txt"]
    for path in own + others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    second.remove_outputs()
    assert not any(path.exists() for path in own)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("method", ["", "Coverage", "Wanda"])
def test_names_hold_nothing_that_windows_forbids(method):
    files = Scenario("TS1", "ResNet18", "Çiçekler-2", Path("c"), method)
    paths = [files.final, files.resume, files.epoch(5), files.record, files.lock, files.fine_tuned, files.pretrained]
    paths += [files.pruned, files.report] if method else []
    for part in {part for path in paths for part in path.parts[1:]}:
        assert not set(part) & set('<>:"/\\|?*'), part
        assert part.split(".")[0].upper() not in {"CON", "PRN", "AUX", "NUL", "COM1", "LPT1"}
        assert part[-1] not in ". "


def test_a_missing_fine_tuned_model_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("cleanai.runtime.scenario.CHECKPOINTS_DIR", tmp_path)
    files = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path, "Wanda")
    with pytest.raises(UserError) as error:
        files.require_fine_tuned("TS1_01_prepare_model.py", tmp_path)
    assert str(error.value) == (
        f"Fine-tuned model not found: {files.fine_tuned}. "
        "Run first: python test_scenarios/TS1_01_prepare_model.py"
    )


def test_a_command_holds_all_settings():
    config = {
        "dataset": "Digits", "ratio": None, "macs_ratio": 0.3, "train_samples": None, "coverage_metric": "frequency",
        "some_flag": True, "other_flag": False, "fine_tuned_model": "0" * 16, "conditions": "float32, 3 images",
    }  # fmt: skip
    files = Scenario("TS1", "ResNet18", "Digits", Path("Çalışma dosyaları"), "Coverage")
    assert files.command("a.py", config) == (
        'python test_scenarios/a.py --dataset Digits --checkpoints-dir "Çalışma dosyaları" '
        "--ratio none --macs-ratio 0.3 --coverage-metric frequency --some-flag"
    )
