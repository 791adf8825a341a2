"""A scenario of one's own, made as test_scenarios/README.md says: copies of the scripts with other settings."""

import re

import pytest

from cleanai.network.models import load_network
from cleanai.runtime.checkpoints import load_checkpoint, read_record
from cleanai.runtime.scenario import PROJECT
from tests.helpers import (
    COMPARE,
    SCRIPTS,
    SMALL_MODEL,
    SWEEP,
    fails,
    make_image_folder,
    own_scripts,
    parameter_count,
    pdf_text,
    run,
)
from tests.small_network import SmallNetwork

pytestmark = pytest.mark.long
NORMALISATION = ["--mean", "0.5", "0.25", "0", "--std", "0.25", "0.5", "1"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The copied scripts, by the names of those they were copied from."""
    copies = own_scripts(tmp_path_factory.mktemp("own"), SCENARIO="TS2", MODEL=SMALL_MODEL)
    for path in copies.values():
        text = path.read_text(encoding="utf-8")
        assert text.count('"dataset": "CIFAR10"') == 1
        path.write_text(text.replace('"dataset": "CIFAR10"', '"dataset": "Pets"'), encoding="utf-8")
    return copies


@pytest.fixture(scope="module")
def own(copies, tmp_path_factory):
    """A folder in which the first four of them have run, and what they printed."""
    folder = tmp_path_factory.mktemp("own-run")
    make_image_folder(folder / "images" / "Pets", size=(32, 32), per_class=8)
    printed = []
    for script in (*SCRIPTS, COMPARE):
        options = ["--checkpoints-dir", folder / "out"]
        if script != COMPARE:
            options += ["--data-dir", folder / "images", "--epochs", "1", "--batch-size", "4"]
            few = ["--steps", "1", "--calibration-batches", "2", "--timing-seconds", "1", "--robustness-images", "10"]
            options += ["--weights", "none", *NORMALISATION] if script == SCRIPTS[0] else few
        result = run(copies[script], *options)
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout)
    return folder / "out", printed


@pytest.mark.parametrize("script", [*SCRIPTS, COMPARE, SWEEP])
def test_its_help_names_its_own_scenario_model_dataset_and_file(copies, script):
    text = run(copies[script], "--help").stdout
    assert text.startswith(f"usage: {copies[script].name} ")
    assert f"\nTS2, {SMALL_MODEL}. Script " in text
    commands = re.findall(r"python test_scenarios/(\S+)", text)
    assert len(commands) >= 2
    assert set(commands) == {copies[script].name}
    assert re.search(r"--dataset DATASET .*?\(default:\s+Pets\)", text, flags=re.DOTALL)
    for word in ("TS1", "ResNet18", "(default: CIFAR10)"):
        assert word not in " ".join(text.split())


def test_its_files_are_named_as_the_rules_say(own):
    folder, _ = own
    expected = [f"TS2/SmallNetwork_Pets_{stage}.pth" for stage in ("pretrained", "FT_final")]
    expected += ["TS2/TS2_SmallNetwork_Pets.json"]
    for method, tag in (("Coverage", "NC"), ("Wanda", "W")):
        name = f"TS2_{method}_SmallNetwork_Pets"
        expected += [f"{name}/SmallNetwork_Pets_{stage}.pth" for stage in (f"pruned_{tag}", f"FTAP_{tag}_final")]
        expected += [f"{name}/reports/{name}.{suffix}" for suffix in ("json", "pdf")]
    name = "TS2_Comparison_SmallNetwork_Pets"
    expected += [f"{name}/reports/{name}.{suffix}" for suffix in ("csv", "json", "pdf")]
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert sorted(path.relative_to(folder).as_posix() for path in files) == sorted(expected)


@pytest.mark.parametrize(("method", "tag"), [("Coverage", "NC"), ("Wanda", "W")])
def test_a_fifth_of_its_network_was_removed_and_the_record_says_so(own, method, tag):
    folder, _ = own
    name = f"TS2_{method}_SmallNetwork_Pets"
    record = read_record(folder / name / "reports" / f"{name}.json")
    assert record["scenario"] == name
    assert record["models"]["original"]["parameters"] == parameter_count(SmallNetwork(2))
    assert abs(record["summary"]["parameter_reduction_percent"] - 20) <= 0.1
    network = load_network(folder / name / f"SmallNetwork_Pets_FTAP_{tag}_final.pth", SMALL_MODEL)
    assert parameter_count(network) == record["models"]["fine_tuned"]["parameters"]
    assert type(network).__name__ == "SmallNetwork"
    text = pdf_text((folder / name / "reports" / f"{name}.pdf").read_bytes())
    assert name in text and "second.0" in text


def test_its_own_normalisation_is_used_by_every_script(own):
    folder, _ = own
    for path in folder.rglob("*_final.pth"):
        checkpoint = load_checkpoint(path)
        assert (checkpoint["mean"], checkpoint["std"]) == ([0.5, 0.25, 0.0], [0.25, 0.5, 1.0])
        assert checkpoint["config"]["model"] == SMALL_MODEL
    # What script 1 measured last is what script 3 measures first: with the same inputs.
    records = [read_record(path) for path in sorted(folder.glob("TS2*/**/TS2*_Pets.json"))]
    after = records[0]["models"]["after"]
    for record in records[1:]:
        if "Comparison" not in record["scenario"]:
            assert record["models"]["original"]["loss"] == pytest.approx(after["loss"])
    command = "--mean 0.5 0.25 0.0 --std 0.25 0.5 1.0"
    assert command in records[-1]["commands"][0]


def test_another_network_under_the_same_names_is_refused(own, copies, tmp_path):
    folder, _ = own
    other = tmp_path / "small_network.py"
    other.write_text((PROJECT / "tests" / "small_network.py").read_text(encoding="utf-8"), encoding="utf-8")
    scripts = own_scripts(tmp_path, SCENARIO="TS2", MODEL=f"{other}:SmallNetwork")
    options = ["--dataset", "Pets", "--data-dir", folder.parent / "images", "--checkpoints-dir", folder]
    few = ["--weights", "none", "--epochs", "1", "--batch-size", "4", *NORMALISATION]
    fails(run(scripts[SCRIPTS[0]], *options, *few), str(other), "SCENARIO")


def test_its_methods_are_compared(own):
    _, printed = own
    assert "Dataset: Pets, image folder; 16 training and 16 test images" in printed[3]
    assert "After Pruning+FT: WANDA - Neuron Coverage" in printed[3]
