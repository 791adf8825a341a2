"""The scripts as a user runs them, on a few images: what they print, and what they leave."""

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from cleanai.measure.latency import LEAST_TURNS
from cleanai.measure.significance import compare_paired, heldout_flags, judge_drop, unpack
from cleanai.network.evaluation import evaluate
from cleanai.network.models import load_network
from cleanai.report.run_text import comparison_table, preparation_table
from cleanai.runtime.checkpoints import read_record
from cleanai.runtime.scenario import Scenario
from tests.helpers import (
    COMPARE,
    EXPORT,
    SCRIPTS,
    SMALL_MODEL,
    assert_same,
    command_options,
    copy_real_images,
    ended,
    fails,
    needs_real_images,
    outcome,
    own_scripts,
    pdf_text,
    preparation_record,
    prepare,
    prune,
    run,
    run_record,
    script_command,
    started,
    wait_for_line,
)


def _files(folder):
    """What is in a folder, less the lock files, which some systems keep."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".locks")
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _times_of_change(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


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


def _scenario(folder, method="", dataset="Digits", model="ResNet18"):
    return Scenario("TS1", model, dataset, folder, method)


def _record(folder, method="", dataset="Digits", model="ResNet18"):
    return read_record(_scenario(folder, method, dataset, model).record)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A folder in which copies of scripts 1 to 3 have run with a small network, and these copies."""
    folder = tmp_path_factory.mktemp("Küçük Ağ")
    scripts = own_scripts(tmp_path_factory.mktemp("scripts"), MODEL=SMALL_MODEL)
    results = [prepare(folder, "--dataset", "Digits", "--epochs", "6", script=scripts[SCRIPTS[0]])]
    results += [prune(scripts[name], folder, "--dataset", "Digits", "--epochs", "5") for name in SCRIPTS[1:]]
    for result in results:
        assert result.returncode == 0, result.stderr
    return folder, scripts


def test_what_is_printed_is_what_was_recorded(digits_run):
    folder, printed = digits_run
    assert preparation_table(_record(folder)) in printed[0]
    for method, output in (("Coverage", printed[1]), ("Wanda", printed[2])):
        record = _record(folder, method)
        assert comparison_table(record) in output
        assert f"TS1_{method}_ResNet18_Digits.pdf" in output
    for output in printed:
        assert ("--train-samples 64 leaves no more" in output) == (output is not printed[0])
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
    assert models["original"]["latency_ms"]["n"] >= LEAST_TURNS * 2 // 3
    assert record["dataset"]["calibration_images"] == 32
    assert record["prepared_with"]["weights"] == "none"
    assert len(record["history"]) == 5


def test_the_record_flags_the_images_that_each_network_classifies_correctly(digits_run, digits, compute):
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


def test_the_same_seed_gives_the_same_but_for_the_times(small_run, tmp_path):
    folder, scripts = small_run
    gpu = torch.cuda.is_available()  # the run to compare with was not --deterministic, which changes nothing on a CPU
    folders = [tmp_path / "a", tmp_path / "b"] if gpu else [tmp_path / "a"]
    for target in folders:
        shutil.copytree(folder / "TS1", target / "TS1")
        options = ["--dataset", "Digits", "--epochs", "5", "--deterministic"]
        result = prune(scripts[SCRIPTS[1]], target, *options, PYTHONWARNINGS="error")
        assert (result.returncode, result.stderr) == (0, "")
    assert _record(folders[0], "Coverage", model=SMALL_MODEL)["environment"]["deterministic"]
    reference = outcome(folders[1] if gpu else folder)
    assert_same(outcome(folders[0]), {name: content for name, content in reference.items() if "Wanda" not in name})


def test_the_record_holds_classes_layers_and_coverage(digits_run, digits):
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


def _keys(content):
    """The keys of nested dictionaries; of a list those of its first entry."""
    if isinstance(content, dict):
        return {key: _keys(value) for key, value in content.items()}
    return [_keys(content[0])] if isinstance(content, list) and content else type(content) is str


def test_the_records_in_the_other_tests_are_like_those_of_the_scripts(digits_run):
    folder, _ = digits_run
    assert _keys(preparation_record()) == _keys(_record(folder))
    for method in ("Coverage", "Wanda"):
        of_script, by_hand = _record(folder, method), run_record(method)
        for record in (of_script, by_hand):
            record["newly_wrong"] = record["newly_wrong"] or run_record(method)["newly_wrong"]  # there may be none
            record["warnings"] = []
            for model in record["coverage"]["models"].values():
                model["dead"] = []  # there may be none
            record["checkpoints"] = [*record["checkpoints"].values()]  # their names hold that of the dataset
        assert _keys(by_hand) == _keys(of_script)


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
    result = run(COMPARE, "--dataset", "Digits", "--checkpoints-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "on the 328 held-out test images" in " ".join(result.stdout.split())
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("After Pruning+FT: WANDA - Neuron Co")]
    records = [_record(folder, method) for method in ("Coverage", "Wanda")]
    heldout = unpack(records[0]["heldout_bits"], 360)
    flags = [unpack(record["models"]["fine_tuned"]["correct_bits"], 360)[heldout] for record in records]
    expected = compare_paired(*flags)
    models = [record["models"]["fine_tuned"] for record in records]
    gain = models[1]["accuracy_heldout_percent"] - models[0]["accuracy_heldout_percent"]
    assert gain == pytest.approx(expected["difference_points"])
    discordant = f"{expected['only_second']} / {expected['only_first']}"
    assert f" {gain:+.2f} " in line and f" {discordant} " in line
    assert line.split()[-1] == ("yes" if expected["p_value"] < 0.05 else "no")


def test_the_two_methods_choose_differently(digits_run):
    folder, _ = digits_run
    pruned = [
        load_network(folder / f"TS1_{method}_ResNet18_Digits" / f"ResNet18_Digits_pruned_{tag}.pth").state_dict()
        for method, tag in (("Coverage", "NC"), ("Wanda", "W"))
    ]
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(*(state.values() for state in pruned)))


def test_the_report_shows_the_table(digits_run):
    folder, _ = digits_run
    text = pdf_text(_scenario(folder, "Wanda").report.read_bytes())
    model = _record(folder, "Wanda")["models"]["fine_tuned"]
    assert "WANDA Pruning" in text
    assert f"{model['accuracy_percent']:.2f}" in text
    assert f"{model['latency_ms']['p90']:.2f}" in text
    for part in ("by McNemar's test", "Test coverage", "Accuracy per class", "Commands to repeat this"):
        assert part in text
    assert f'--checkpoints-dir "{folder}' in text


def test_a_finished_script_prints_its_table_and_changes_nothing(digits_run):
    folder, printed = digits_run
    before = _times_of_change(folder)
    again = prune(SCRIPTS[1], folder, "--dataset", "Digits", "--epochs", "5")
    assert again.returncode == 0
    assert "Already finished" in again.stdout
    table = printed[1][printed[1].index("NEURON COVERAGE") :]
    assert again.stdout.endswith(table)
    assert _times_of_change(folder) == before


def test_other_settings_are_refused(digits_run):
    folder, _ = digits_run
    other = prepare(folder, "--dataset", "Digits", "--epochs", "7")
    fails(other, str(_scenario(folder).record), "--epochs 6", "--epochs 7", "--fresh")
    other = prepare(folder, "--dataset", "Digits", "--epochs", "6", "--weight-decay", "0.01")
    fails(other, "--weight-decay 0.0001", "--weight-decay 0.01", "--fresh")
    other = prune(SCRIPTS[2], folder, "--dataset", "Digits", "--epochs", "5", "--ratio", "0.3")
    fails(other, str(_scenario(folder, "Wanda").record), "--ratio 0.2", "--ratio 0.3")


def test_a_lost_record_and_report_are_made_again_without_pruning_or_training(small_run, tmp_path):
    folder, scripts = small_run
    shutil.copytree(folder / "TS1", tmp_path / "TS1")
    shutil.copytree(folder / "TS1_Coverage_SmallNetwork_Digits", tmp_path / "TS1_Coverage_SmallNetwork_Digits")
    shutil.rmtree(tmp_path / "TS1_Coverage_SmallNetwork_Digits" / "reports")
    result = prune(scripts[SCRIPTS[1]], tmp_path, "--dataset", "Digits", "--epochs", "5")
    assert result.returncode == 0, result.stderr
    assert "Step 1/" not in result.stdout
    assert "Epoch 1/" not in result.stdout
    old, new = _record(folder, "Coverage", model=SMALL_MODEL), _record(tmp_path, "Coverage", model=SMALL_MODEL)
    for key in ("pruning", "config", "dataset"):
        assert new[key] == old[key]
    assert [epoch["test_loss"] for epoch in new["history"]] == [epoch["test_loss"] for epoch in old["history"]]
    assert new["models"]["pruned"]["accuracy_percent"] == old["models"]["pruned"]["accuracy_percent"]
    assert _scenario(tmp_path, "Coverage", model=SMALL_MODEL).report.exists()


def test_the_repair_may_end_with_a_distillation_and_no_training_may_follow(small_run, tmp_path):
    folder, scripts = small_run
    shutil.copytree(folder / "TS1", tmp_path / "TS1")
    result = prune(scripts[SCRIPTS[2]], tmp_path, "--dataset", "Digits", "--epochs", "0", "--repair", "distil")
    assert result.returncode == 0, result.stderr
    old, new = _record(folder, "Wanda", model=SMALL_MODEL), _record(tmp_path, "Wanda", model=SMALL_MODEL)
    before, after = old["pruning"], new["pruning"]
    assert after["accuracy_reconstructed_percent"] == before["accuracy_reconstructed_percent"]
    assert after["accuracy_distilled_percent"] == new["models"]["pruned"]["accuracy_percent"]
    assert new["models"]["pruned"]["loss"] != old["models"]["pruned"]["loss"]
    assert f"{after['accuracy_distilled_percent']:.2f}% distilled" in result.stdout
    scenario = _scenario(tmp_path, "Wanda", model=SMALL_MODEL)
    states = [load_network(path, SMALL_MODEL).state_dict() for path in (scenario.pruned, scenario.final)]
    assert all(map(torch.equal, *(state.values() for state in states))) and new["history"] == []
    assert "it was not fine-tuned" in pdf_text(scenario.report.read_bytes())


def test_a_lost_report_is_made_again_from_the_record_and_half_written_ones_are_removed(small_run, tmp_path):
    folder, scripts = small_run
    shutil.copytree(folder / "TS1", tmp_path / "TS1")
    scenario = _scenario(tmp_path, "Coverage", model=SMALL_MODEL)
    shutil.copytree(_scenario(folder, "Coverage", model=SMALL_MODEL).folder, scenario.folder)
    half_written = scenario.report.with_name(f"{scenario.report.name}.4711.tmp")
    scenario.report.rename(half_written)
    result = prune(scripts[SCRIPTS[1]], tmp_path, "--dataset", "Digits", "--epochs", "5")
    assert "Already finished" in result.stdout
    assert scenario.report.exists() and not half_written.exists()


def test_a_finished_run_is_exported_without_pruning_or_training(small_run, tmp_path):
    folder, scripts = small_run
    shutil.copytree(folder / "TS1", tmp_path / "TS1")
    shutil.copytree(folder / "TS1_Wanda_SmallNetwork_Digits", tmp_path / "TS1_Wanda_SmallNetwork_Digits")
    options = [scripts[SCRIPTS[2]], tmp_path, "--dataset", "Digits", "--epochs", "5", "--export", "onnx"]
    result = prune(*options)
    assert result.returncode == 0, result.stderr
    assert "Step 1/" not in result.stdout
    assert "Epoch 1/" not in result.stdout
    path = _scenario(tmp_path, "Wanda", model=SMALL_MODEL).exported
    assert path.stat().st_size < 1e6
    old, new = _record(folder, "Wanda", model=SMALL_MODEL), _record(tmp_path, "Wanda", model=SMALL_MODEL)
    assert {key: value for key, value in new.items() if key != "export"} == old
    assert new["export"].keys() == EXPORT.keys()
    assert comparison_table(new) in result.stdout
    assert f"ONNX: {path} (" in result.stdout
    assert f"largest difference from PyTorch's outputs {new['export']['largest_difference']:.1e}" in result.stdout
    text = pdf_text(_scenario(tmp_path, "Wanda", model=SMALL_MODEL).report.read_bytes())
    assert "ONNX Runtime, CPU" in text

    before = _times_of_change(tmp_path)
    assert comparison_table(new) in prune(*options).stdout
    assert _times_of_change(tmp_path) == before


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
@pytest.mark.long
def test_the_scripts_on_real_images(tmp_path):
    # Script 2 is script 3 but for the criterion (test_drift.py), and the timing of full-size images takes a minute.
    copy_real_images(tmp_path, per_class=20)
    source = ["--data-dir", tmp_path, "--epochs", "1"]
    results = [prepare(tmp_path / "out", *source)]
    results += [prune(SCRIPTS[2], tmp_path / "out", *source)]
    for result in results:
        assert result.returncode == 0, result.stderr
        assert "Dataset: CIFAR10, image folder; 64 training and 200 test images" in result.stdout
    models = _record(tmp_path / "out", "Wanda", "CIFAR10")["models"]
    assert f"{models['original']['macs'] / 1e9:.2f}" == "0.56"
    assert f"{models['fine_tuned']['macs'] / 1e9:.2f}" in ("0.44", "0.45")
    assert f"{models['fine_tuned']['parameters'] / 1e6:.1f}" == "8.9"


def test_a_killed_script_resumes_and_ends_bit_for_bit_like_an_uninterrupted_one(small_run, tmp_path):
    folder, scripts = small_run
    options = command_options(0, tmp_path, "--dataset", "Digits", "--epochs", "6")
    with started(script_command(scripts[SCRIPTS[0]], *options)) as process:
        wait_for_line("Epoch 2/6", process)  # its state may be saved, half-written or neither
        process.kill()
        assert ended(process).returncode != 0
    scenario = _scenario(tmp_path, model=SMALL_MODEL)
    assert scenario.resume.exists() and not scenario.record.exists()

    result = run(scripts[SCRIPTS[0]], *options)
    assert result.returncode == 0, result.stderr
    assert "Resuming after epoch " in result.stdout
    assert "Epoch 1/6" not in result.stdout and "Epoch 6/6" in result.stdout
    reference = {name: content for name, content in outcome(folder).items() if name.startswith("TS1/")}
    if torch.cuda.is_available():  # without --deterministic no two runs are the same
        assert sorted(outcome(tmp_path)) == sorted(reference)
    else:
        assert_same(outcome(tmp_path), reference)


def test_fresh_starts_over_with_other_settings(small_run, tmp_path):
    folder, scripts = small_run
    shutil.copytree(folder / "TS1", tmp_path / "TS1")
    options = ["--dataset", "Digits", "--epochs", "1", "--lr", "0.0000001", "--fresh"]
    result = prepare(tmp_path, *options, script=scripts[SCRIPTS[0]])
    assert result.returncode == 0, result.stderr
    assert "Epoch 1/1" in result.stdout and "hardly better than guessing" in " ".join(result.stdout.split())
    assert not (tmp_path / "TS1" / "SmallNetwork_Digits_FT_epoch5.pth").exists()
    # What was pruned before belongs to another network now.
    shutil.copytree(folder / "TS1_Wanda_SmallNetwork_Digits", tmp_path / "TS1_Wanda_SmallNetwork_Digits")
    other = prune(scripts[SCRIPTS[2]], tmp_path, "--dataset", "Digits", "--epochs", "5")
    fails(other, "was made from another fine-tuned model", "--fresh")


def test_fresh_deletes_nothing_for_a_run_that_is_refused(small_run, tmp_path):
    folder, scripts = small_run
    for name in ("TS1", "TS1_Wanda_SmallNetwork_Digits"):
        shutil.copytree(folder / name, tmp_path / name)
    before = outcome(tmp_path)
    refused = prune(scripts[SCRIPTS[2]], tmp_path, "--dataset", "Digits", "--ratio", "0.995", "--fresh")
    fails(refused, "cannot be met")
    assert outcome(tmp_path) == before


@pytest.mark.long
def test_a_run_up_to_an_accepted_drop_resumes_and_is_judged(small_run, tmp_path):
    folder, scripts = small_run
    shutil.copytree(folder / "TS1", tmp_path / "TS1")
    options = [scripts[SCRIPTS[2]], tmp_path, "--dataset", "Digits", "--epochs", "1", "--ratio", "auto"]
    options += ["--accept-drop", "7", "--keep-layers", "last*", "--strict"]
    result = prune(*options)
    scenario = _scenario(tmp_path, "Wanda", model=SMALL_MODEL)
    record = read_record(scenario.record)
    assert result.returncode == (0 if record["verdict"]["result"] == "PASS" else 3), result.stderr
    assert f"Verdict: {record['verdict']['result']}" in result.stdout
    flags = heldout_flags(record)
    assert record["verdict"] == judge_drop(flags["original"], flags["fine_tuned"], 7.0)
    original, *steps = [step["accuracy_calibration_percent"] for step in record["pruning"]["path"]]
    taken = steps[: len(record["pruning"]["steps"])]
    assert taken and original - min(taken) <= 7
    removed = record["summary"]["parameter_reduction_percent"]
    assert removed == pytest.approx(record["pruning"]["steps"][-1]["parameters_removed_percent"])
    widths = {layer["name"]: layer["channels_after"] for layer in record["pruning"]["layers"]}
    assert widths["last.0"] == 64 and min(widths["first.0"], widths["stem.0"] + 32) < 64

    shutil.rmtree(scenario.record.parent)
    resumed = prune(*options)
    assert "Found the pruned network of an earlier run" in resumed.stdout and "Step 1" not in resumed.stdout
    again = read_record(scenario.record)
    assert (again["pruning"], again["verdict"]) == (record["pruning"], record["verdict"])
    assert resumed.returncode == result.returncode
