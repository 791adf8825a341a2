"""The scripts as a user runs them, on a few images: what they print, and what they leave."""
import hashlib
import json
import shlex
import shutil
import time
from pathlib import Path

import pytest
import torch
from pypdf import PdfReader

from cleanai.measure.significance import unpack
from cleanai.network.evaluation import evaluate
from cleanai.network.models import load_network
from cleanai.report.run_text import comparison_table, preparation_table
from tests.conftest import copy_real_images, needs_real_images
from tests.scripts import SCRIPTS, SMALL, assert_same, fails, outcome, prepare, prune, run, start


def _files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_file_of_the_scenario_is_there_and_no_other(digits_run):
    folder, _ = digits_run
    assert _files(folder) == sorted(
        [
            "TS1/ResNet18_Digits_FT_epoch5.pth",
            "TS1/ResNet18_Digits_FT_final.pth",
            "TS1/ResNet18_Digits_pretrained.pth",
            "TS1/TS1_ResNet18_Digits.json",
            "TS1_Coverage_ResNet18_Digits/ResNet18_Digits_FTAP_NC_epoch5.pth",
            "TS1_Coverage_ResNet18_Digits/ResNet18_Digits_FTAP_NC_final.pth",
            "TS1_Coverage_ResNet18_Digits/ResNet18_Digits_pruned_NC.pth",
            "TS1_Coverage_ResNet18_Digits/reports/TS1_Coverage_ResNet18_Digits.json",
            "TS1_Coverage_ResNet18_Digits/reports/TS1_Coverage_ResNet18_Digits.pdf",
            "TS1_Wanda_ResNet18_Digits/ResNet18_Digits_FTAP_W_epoch5.pth",
            "TS1_Wanda_ResNet18_Digits/ResNet18_Digits_FTAP_W_final.pth",
            "TS1_Wanda_ResNet18_Digits/ResNet18_Digits_pruned_W.pth",
            "TS1_Wanda_ResNet18_Digits/reports/TS1_Wanda_ResNet18_Digits.json",
            "TS1_Wanda_ResNet18_Digits/reports/TS1_Wanda_ResNet18_Digits.pdf",
        ]
    )


def _record(folder, method):
    path = folder / f"TS1_{method}_ResNet18_Digits" / "reports" / f"TS1_{method}_ResNet18_Digits.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_is_printed_is_what_was_recorded(digits_run):
    folder, printed = digits_run
    first = json.loads((folder / "TS1" / "TS1_ResNet18_Digits.json").read_text(encoding="utf-8"))
    assert preparation_table(first) in printed[0]
    for method, output in (("Coverage", printed[1]), ("Wanda", printed[2])):
        record = _record(folder, method)
        assert comparison_table(record) in output
        assert f"TS1_{method}_ResNet18_Digits.pdf" in output
    for output in printed:
        assert output.index("Device: ") < output.index("An epoch takes about ") < output.index("Epoch 1/")
        assert "scikit-learn's handwritten digits (embedded); 64 training and 360 test images" in output


@pytest.mark.parametrize(("method", "tag"), [("Coverage", "NC"), ("Wanda", "W")])
def test_the_record_agrees_with_the_networks(digits_run, method, tag):
    folder, _ = digits_run
    record = _record(folder, method)
    models = record["models"]
    assert abs(record["summary"]["parameter_reduction_percent"] - 20) <= 0.1
    last = record["pruning"]["steps"][-1]
    assert last["parameters_removed_percent"] == pytest.approx(record["summary"]["parameter_reduction_percent"])
    assert 20 <= last["macs_removed_percent"] <= 20.5
    for stage, name in (("pruned", f"pruned_{tag}"), ("fine_tuned", f"FTAP_{tag}_final")):
        network = load_network(folder / f"TS1_{method}_ResNet18_Digits" / f"ResNet18_Digits_{name}.pth")
        assert models[stage]["parameters"] == sum(p.numel() for p in network.parameters())
        widths = {layer["name"]: layer["channels_after"] for layer in record["pruning"]["layers"]}
        assert widths["layer3.1.conv1"] == network.layer3[1].conv1.out_channels
    assert models["original"]["parameters"] == 11_173_962
    assert models["fine_tuned"]["accuracy_percent"] == record["history"][-1]["test_accuracy_percent"]
    assert models["pruned"]["accuracy_percent"] == record["pruning"]["accuracy_reconstructed_percent"]
    assert {"accuracy_raw_percent", "accuracy_recalibrated_percent"} < record["pruning"].keys()
    assert models["original"]["latency_ms"]["n"] >= 200
    assert record["dataset"]["calibration_images"] == 32
    assert record["prepared_with"]["weights"] == "none"
    assert len(record["history"]) == 5


def test_the_record_says_which_images_each_network_gets_right(digits_run, digits, compute):
    folder, _ = digits_run
    record = _record(folder, "Wanda")
    heldout = unpack(record["heldout_bits"], 360)
    assert heldout.sum() == 360 - 32
    for stage, name in (("pruned", "pruned_W"), ("fine_tuned", "FTAP_W_final")):
        network = load_network(folder / "TS1_Wanda_ResNet18_Digits" / f"ResNet18_Digits_{name}.pth")
        correct = unpack(record["models"][stage]["correct_bits"], 360)
        assert 100 * correct.mean() == pytest.approx(record["models"][stage]["accuracy_percent"])
        assert 100 * correct[heldout].mean() == pytest.approx(record["models"][stage]["accuracy_heldout_percent"])
        agreeing = evaluate(network, digits.test, compute).correct.numpy() == correct
        assert agreeing.mean() > 0.98  # the script may have computed in bfloat16


def test_the_same_seed_gives_the_same_but_for_the_times(digits_run, tmp_path):
    gpu = torch.cuda.is_available()  # the run to compare with was not --deterministic, which changes nothing on a CPU
    folders = [tmp_path / "a", tmp_path / "b"] if gpu else [tmp_path / "a"]
    for folder in folders:
        shutil.copytree(digits_run[0] / "TS1", folder / "TS1")
        options = ["--dataset", "Digits", "--epochs", "5", "--deterministic"]
        result = prune(SCRIPTS[1], folder, *options, PYTHONWARNINGS="error")
        assert (result.returncode, result.stderr) == (0, "")
    assert _record(folders[0], "Coverage")["environment"]["deterministic"]
    reference = outcome(folders[1] if gpu else digits_run[0])
    assert_same(outcome(folders[0]), {name: left for name, left in reference.items() if "Wanda" not in name})


def test_the_record_tells_classes_layers_and_coverage(digits_run, digits):
    folder, _ = digits_run
    record = _record(folder, "Wanda")
    final = folder / "TS1_Wanda_ResNet18_Digits" / "ResNet18_Digits_FTAP_W_final.pth"
    correct = unpack(record["models"]["fine_tuned"]["correct_bits"], 360)
    for label, row in enumerate(record["classes"]):
        members = digits.test.labels.numpy() == label
        assert (row["name"], row["images"]) == (str(label), members.sum())
        assert row["fine_tuned_percent"] == pytest.approx(100 * correct[members].mean())
    network = load_network(final)
    for layer in record["layers"]:
        own = network.get_submodule(layer["name"]).parameters()
        assert layer["parameters_after"] == sum(p.numel() for p in own)
    coverage = record["coverage"]
    assert (coverage["profile_images"], coverage["images"]) == (64, 32)
    widths = {layer["name"]: layer["channels_after"] for layer in record["pruning"]["layers"]}
    for stage in ("pruned", "fine_tuned"):
        neurons = {layer["name"]: layer["neurons"] for layer in coverage["models"][stage]["layers"]}
        assert neurons["layer3.1.conv2"] == widths["layer3.1.conv1"], "an output is named after its reader"
    assert record["checkpoints"][final.name] == hashlib.sha256(final.read_bytes()).hexdigest()
    assert len(json.dumps(record)) < 100_000


def test_the_recorded_commands_are_those_of_the_run(digits_run):
    folder, _ = digits_run
    for command in _record(folder, "Wanda")["commands"]:
        python, script, *options = shlex.split(command)
        assert python == "python"
        again = run(Path(script).name, *options)
        assert again.returncode == 0, again.stderr
        assert "Already finished" in again.stdout, "no setting is another one"


def test_the_methods_are_compared_without_measuring_again(digits_run, tmp_path):
    folder, _ = digits_run
    for path in folder.rglob("*.json"):  # the records alone
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    result = run("TS1_04_compare_methods.py", "--dataset", "Digits", "--checkpoints-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "on the 328 held-out test images" in " ".join(result.stdout.split())
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("After Pruning+FT: WANDA - Neuron Co")]
    models = [_record(folder, method)["models"]["fine_tuned"] for method in ("Coverage", "Wanda")]
    gain = models[1]["accuracy_heldout_percent"] - models[0]["accuracy_heldout_percent"]
    assert f"{gain:+.2f}" in line
    assert line.split()[-1] in ("yes", "no")


def test_the_two_methods_choose_differently(digits_run):
    folder, _ = digits_run
    pruned = [
        load_network(folder / f"TS1_{method}_ResNet18_Digits" / f"ResNet18_Digits_pruned_{tag}.pth").state_dict()
        for method, tag in (("Coverage", "NC"), ("Wanda", "W"))
    ]
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(*(state.values() for state in pruned)))


def test_the_report_shows_the_table(digits_run):
    folder, _ = digits_run
    path = folder / "TS1_Wanda_ResNet18_Digits" / "reports" / "TS1_Wanda_ResNet18_Digits.pdf"
    text = "\n".join(page.extract_text() for page in PdfReader(path).pages)
    model = _record(folder, "Wanda")["models"]["fine_tuned"]
    assert "WANDA Pruning" in text
    assert f"{model['accuracy_percent']:.2f}" in text
    assert f"{model['latency_ms']['p90']:.2f}" in text
    for part in ("These images show", "Test coverage", "Accuracy per class", "Commands that repeat this"):
        assert part in text
    assert '--checkpoints-dir "' + str(folder) in " ".join(text.split())


def test_a_finished_script_prints_its_table_and_changes_nothing(digits_run):
    folder, printed = digits_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = prune(SCRIPTS[1], folder, "--dataset", "Digits", "--epochs", "5")
    assert again.returncode == 0
    assert "Already finished" in again.stdout
    table = printed[1][printed[1].index("NEURON COVERAGE") :]
    assert again.stdout.endswith(table)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_other_settings_are_refused(digits_run):
    folder, _ = digits_run
    other = prepare(folder, "--dataset", "Digits", "--epochs", "7")
    fails(other, "was made with --epochs 6", "is with --epochs 7", "--fresh")
    other = prune(SCRIPTS[2], folder, "--dataset", "Digits", "--epochs", "5", "--ratio", "0.3")
    fails(other, "was made with --ratio 0.2", "is with --ratio 0.3")


def test_a_lost_record_and_report_are_made_again_without_pruning_or_training(digits_run, tmp_path):
    folder, _ = digits_run
    shutil.copytree(folder / "TS1", tmp_path / "TS1")
    shutil.copytree(folder / "TS1_Coverage_ResNet18_Digits", tmp_path / "TS1_Coverage_ResNet18_Digits")
    shutil.rmtree(tmp_path / "TS1_Coverage_ResNet18_Digits" / "reports")
    result = prune(SCRIPTS[1], tmp_path, "--dataset", "Digits", "--epochs", "5")
    assert result.returncode == 0, result.stderr
    assert "Step 1/" not in result.stdout
    assert "Epoch 1/" not in result.stdout
    old, new = _record(folder, "Coverage"), _record(tmp_path, "Coverage")
    for key in ("history", "pruning", "config", "dataset"):
        assert new[key] == old[key]
    assert new["models"]["pruned"]["accuracy_percent"] == old["models"]["pruned"]["accuracy_percent"]
    assert (tmp_path / "TS1_Coverage_ResNet18_Digits" / "reports" / "TS1_Coverage_ResNet18_Digits.pdf").exists()


def test_a_finished_run_is_exported_without_pruning_or_training(digits_run, tmp_path):
    folder, _ = digits_run
    shutil.copytree(folder / "TS1", tmp_path / "TS1")
    shutil.copytree(folder / "TS1_Wanda_ResNet18_Digits", tmp_path / "TS1_Wanda_ResNet18_Digits")
    options = [SCRIPTS[2], tmp_path, "--dataset", "Digits", "--epochs", "5", "--export", "onnx"]
    result = prune(*options)
    assert result.returncode == 0, result.stderr
    assert "Step 1/" not in result.stdout
    assert "Epoch 1/" not in result.stdout
    path = tmp_path / "TS1_Wanda_ResNet18_Digits" / "ResNet18_Digits_FTAP_W_final.onnx"
    assert path.stat().st_size < 36e6
    old, new = _record(folder, "Wanda"), _record(tmp_path, "Wanda")
    assert {key: value for key, value in new.items() if key != "export"} == old
    assert comparison_table(new) in result.stdout
    assert f"ONNX: {path} (" in result.stdout
    assert f"largest difference from PyTorch's outputs {new['export']['largest_difference']:.1e}" in result.stdout
    report = PdfReader(tmp_path / "TS1_Wanda_ResNet18_Digits" / "reports" / "TS1_Wanda_ResNet18_Digits.pdf")
    text = "\n".join(page.extract_text() for page in report.pages)
    assert f"{new['export']['latency_ms']['onnx_runtime']['fine_tuned']['mean']:.2f}" in text

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert comparison_table(new) in prune(*options).stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_console_without_unicode_is_no_obstacle(digits_run):
    folder, printed = digits_run
    environment = {"PYTHONIOENCODING": "cp1254"}  # of a Turkish Windows
    results = [prepare(folder, "--dataset", "Digits", "--epochs", "6", **environment)]
    results += [prune(script, folder, "--dataset", "Digits", "--epochs", "5", **environment) for script in SCRIPTS[1:]]
    for result, whole in zip(results, printed):
        assert result.returncode == 0, result.stderr
        last = whole[whole.rindex("---") : whole.rindex("\n\n")]  # what stands under the table
        assert last.replace("✓", "?") in result.stdout


@needs_real_images
def test_the_three_scripts_on_real_images(tmp_path):
    copy_real_images(tmp_path, per_class=20)
    source = ["--data-dir", tmp_path, "--epochs", "1"]
    results = [prepare(tmp_path / "out", *source)]
    results += [prune(script, tmp_path / "out", *source) for script in SCRIPTS[1:]]
    for result in results:
        assert result.returncode == 0, result.stderr
        assert "Dataset: CIFAR10, image folder; 64 training and 200 test images" in result.stdout
    path = tmp_path / "out/TS1_Wanda_ResNet18_CIFAR10/reports/TS1_Wanda_ResNet18_CIFAR10.json"
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    assert f"{models['original']['macs'] / 1e9:.2f}" == "0.56"
    assert f"{models['fine_tuned']['macs'] / 1e9:.2f}" in ("0.44", "0.45")
    assert f"{models['fine_tuned']['parameters'] / 1e6:.1f}" == "8.9"


def test_a_killed_script_goes_on_where_it_stopped(tmp_path):
    options = ["--weights", "none", "--dataset", "Digits", *SMALL, "--epochs", "3", "--checkpoints-dir", tmp_path]
    resume = tmp_path / "TS1" / "ResNet18_Digits_FT_resume.pth"
    process = start(SCRIPTS[0], *options)
    while process.poll() is None and not resume.exists():
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert resume.exists(), "the script ended before it could be killed"

    result = run(SCRIPTS[0], *options)
    assert result.returncode == 0, result.stderr
    assert "Going on after epoch " in result.stdout
    assert "Epoch 1/3" not in result.stdout
    assert "Epoch 3/3" in result.stdout
    assert [path.name for path in (tmp_path / "TS1").glob("*resume*")] == []


def test_fresh_starts_over_with_other_settings(digits_run, tmp_path):
    folder, _ = digits_run
    shutil.copytree(folder / "TS1", tmp_path / "TS1")
    result = prepare(tmp_path, "--dataset", "Digits", "--epochs", "1", "--fresh")
    assert result.returncode == 0, result.stderr
    assert "Epoch 1/1" in result.stdout
    assert not (tmp_path / "TS1" / "ResNet18_Digits_FT_epoch5.pth").exists()
    # What was pruned before belongs to another network now.
    shutil.copytree(folder / "TS1_Wanda_ResNet18_Digits", tmp_path / "TS1_Wanda_ResNet18_Digits")
    other = prune(SCRIPTS[2], tmp_path, "--dataset", "Digits", "--epochs", "5")
    fails(other, "was made from another fine-tuned model: start over with --fresh")
