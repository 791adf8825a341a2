"""Names and paths, against the user's specification."""

import runpy
from pathlib import Path

import pytest

from cleanai import UserError
from cleanai.runtime import files as runtime_files
from cleanai.runtime.scenario import CHECKPOINTS_DIR, SCRIPTS_DIR, Scenario
from tests.helpers import SCRIPTS, SWEEP


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
    assert files.quantized == folder / f"ResNet18_CIFAR10_FTAP_{tag}_final_int8.onnx"
    assert files.report == folder / "reports" / f"TS1_{method}_ResNet18_CIFAR10.pdf"
    assert files.record == folder / "reports" / f"TS1_{method}_ResNet18_CIFAR10.json"


def test_other_networks_in_names():
    own = Scenario("TS2", "nets/my_net.py:MyNet", "Pets", Path("c"), "Wanda")
    assert own.name == "TS2_Wanda_MyNet_Pets" and own.final.name == "MyNet_Pets_FTAP_W_final.pth"
    own = Scenario("TS2", r"C:\nets\my_net.py:MyNet", "Pets", Path("c"))
    assert own.final == Path("c/TS2/MyNet_Pets_FT_final.pth")
    # On some systems resnet18 and ResNet18 are the same file.
    assert Scenario("TS2", "torchvision:resnet18", "Pets", Path("c")).name == "TS2_torchvision-resnet18_Pets"


@pytest.mark.parametrize("method", ["Comparison", "Sweep"])
def test_files_of_the_comparison_and_the_sweep(method):
    files = scenario(method)
    folder = Path(f"checkpoints/TS1_{method}_ResNet18_CIFAR10/reports")
    for path, end in ((files.record, ".json"), (files.table, ".csv"), (files.report, ".pdf")):
        assert path == folder / f"TS1_{method}_ResNet18_CIFAR10{end}"
    assert files.resume == folder / f"TS1_{method}_ResNet18_CIFAR10_resume.json"


@pytest.mark.parametrize("method", ["", "Coverage", "Wanda", "Comparison", "Sweep"])
def test_every_script_has_a_lock_of_its_own(method):
    assert scenario(method).lock == Path(f"checkpoints/.locks/{scenario(method).name}.lock")


def test_starting_over_removes_only_what_the_script_made(tmp_path):
    first = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path)
    second, sweep = first.of("Coverage"), first.of("Sweep")
    own = [second.pruned, second.epoch(5), second.epoch(10), second.final, second.resume, second.record, second.report]
    own += [second.exported, second.quantized]
    of_sweep = [sweep.record, sweep.report, sweep.table, sweep.resume]
    others = [first.pretrained, first.epoch(5), first.final, second.folder / "notes.txt", sweep.folder / "notes.txt"]
    for path in own + of_sweep + others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    second.remove_outputs()
    assert not any(path.exists() for path in own)
    assert all(path.exists() for path in others + of_sweep)
    sweep.remove_outputs()
    assert not any(path.exists() for path in of_sweep)
    assert all(path.exists() for path in others)


def test_a_report_that_another_program_holds_open_is_named_at_the_start_and_not_after_the_pruning(
    tmp_path, monkeypatch
):
    scenario, unlink = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path, "Wanda"), Path.unlink
    outputs = [scenario.report, scenario.record, scenario.pruned, scenario.final]
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def held(self, *args):
        if self == scenario.report:
            raise PermissionError(13, "The process cannot access the file")
        unlink(self, *args)

    def not_moved(self, target):
        if self == scenario.report:
            raise PermissionError(13, "The process cannot access the file")

    monkeypatch.setattr(runtime_files, "_WINDOWS", True)
    monkeypatch.setattr(runtime_files, "_TRIES", 1)
    monkeypatch.setattr(Path, "rename", not_moved)
    with pytest.raises(UserError, match=r"\.pdf cannot be deleted \(The process .*\): close"):
        scenario.require_removable()
    assert all(path.exists() for path in outputs)
    monkeypatch.setattr(Path, "unlink", held)
    scenario.remove_outputs()
    assert [path.exists() for path in outputs] == [True, False, False, False]


@pytest.mark.parametrize("method", ["", "Coverage", "Wanda", "Comparison", "Sweep"])
def test_names_hold_nothing_that_windows_forbids(method):
    files = Scenario("TS1", "ResNet18", "Çiçekler-2", Path("c"), method)
    paths = [files.resume, files.record, files.lock, files.fine_tuned, files.pretrained, files.report, files.table]
    paths += [files.final, files.epoch(5)] if method not in ("Comparison", "Sweep") else []
    paths += [files.pruned] if method in ("Coverage", "Wanda") else []
    for part in {part for path in paths for part in path.parts[1:]}:
        assert not set(part) & set('<>:"/\\|?*'), part
        assert part.split(".")[0].upper() not in {"CON", "PRN", "AUX", "NUL", "COM1", "LPT1"}
        assert part[-1] not in ". "


def test_a_missing_fine_tuned_model_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("cleanai.runtime.scenario.CHECKPOINTS_DIR", tmp_path)
    files = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path, "Wanda")
    with pytest.raises(UserError) as error:
        files.require_fine_tuned(tmp_path)
    assert str(error.value) == (
        f"Fine-tuned model not found: {files.fine_tuned}. Run first: python test_scenarios/TS1_01_prepare_model.py "
        f'--data-dir "{tmp_path}"'
    )


def test_a_command_holds_all_settings():
    config = {
        "dataset": "Digits", "ratio": None, "macs_ratio": 0.3, "train_samples": None, "coverage_metric": "frequency",
        "round_to": [16, 8], "keep_layers": ["conv1", "layer4.*"],
        "fine_tuned_model": "0" * 16, "conditions": "float32, 3 images",
    }  # fmt: skip
    files = Scenario("TS1", "ResNet18", "Digits", Path("Çalışma dosyaları"), "Coverage")
    assert files.command(config) == (
        'python test_scenarios/TS1_02_coverage_pruning.py --dataset Digits --checkpoints-dir "Çalışma dosyaları" '
        "--ratio none --macs-ratio 0.3 --coverage-metric frequency --round-to 16 8 "
        '--keep-layers conv1 "layer4.*"'
    )
    compiled = {**config, "conditions": "float32, deterministic, compiled, 3 images"}
    assert files.command(compiled) == f"{files.command(config)} --deterministic --compile"
    assert "coverage-metric" not in files.of("Wanda").command(config), "the script has no such setting"


def test_a_command_names_the_folder_of_the_images_where_it_is_another():
    first = Scenario("TS1", "ResNet18", "CIFAR10", Path("c"))
    assert first.command(data_dir=Path("my pictures")).endswith(' --checkpoints-dir "c" --data-dir "my pictures"')
    embedded = Scenario("TS1", "ResNet18", "Digits", Path("c"))
    for command in (first.command(), embedded.command(data_dir=Path("my pictures"))):
        assert command.endswith('--checkpoints-dir "c"')


@pytest.mark.parametrize("script", [*SCRIPTS, SWEEP])
def test_a_command_names_the_script_of_its_method(script):
    method = runpy.run_path(str(SCRIPTS_DIR / script)).get("METHOD", "")
    files = Scenario("TS1", "ResNet18", "CIFAR10", CHECKPOINTS_DIR, method)
    assert files.command() == f"python test_scenarios/{script}"


def test_a_command_finds_a_copied_script_by_its_scenario_and_method(tmp_path, monkeypatch):
    monkeypatch.setattr("cleanai.runtime.scenario.SCRIPTS_DIR", tmp_path)
    for name in ("TS1_02_coverage_pruning.py", "TS2_07_coverage_of_pets.py", "TS2_08_wanda_of_pets.py"):
        (tmp_path / name).write_text('SETTINGS = {"dataset": "Pets"}', encoding="utf-8")
    for dataset, option in (("Pets", ""), ("CIFAR10", " --dataset CIFAR10")):
        files = Scenario("TS2", "ResNet18", dataset, CHECKPOINTS_DIR, "Coverage")
        assert files.command() == f"python test_scenarios/TS2_07_coverage_of_pets.py{option}"


@pytest.mark.parametrize("method", ["", "Coverage", "Wanda", "Comparison", "Sweep"])
def test_a_file_that_a_script_deletes_is_refused_as_its_own_weights(tmp_path, method):
    files = Scenario("TS1", "ResNet18", "CIFAR10", tmp_path, method)
    own = [files.record, files.resume] + (
        [files.final, files.epoch(5)] if method not in ("Comparison", "Sweep") else []
    )
    for path in own:
        with pytest.raises(UserError, match=f"{path.name} is a file that this script writes"):
            files.refuse_own_file(path)
    files.refuse_own_file(tmp_path / files.record.name)
