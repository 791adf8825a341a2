"""A scenario of one's own, made as test_scenarios/README.md says: copies of the scripts with other constants."""
import json
import os
import subprocess
import sys

import pytest
from pypdf import PdfReader

from cleanai.network.models import load_network
from cleanai.runtime.scenario import PROJECT
from tests.conftest import make_image_folder

CHANGES = {"TS1": "TS2", 'MODEL = "ResNet18"': 'MODEL = "MobileNetV2"', 'DATASET = "CIFAR10"': 'DATASET = "Pets"'}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder in which the four copied scripts have run, and what they printed."""
    folder = tmp_path_factory.mktemp("own")
    make_image_folder(folder / "images" / "Pets", size=(32, 32), per_class=8)
    printed = []
    for script in sorted((PROJECT / "test_scenarios").glob("TS1_0[1-4]_*.py")):
        text = script.read_text(encoding="utf-8")
        for before, after in CHANGES.items():
            assert before in text
            text = text.replace(before, after)
        copy = folder / "test_scenarios" / script.name.replace("TS1", "TS2")
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text, encoding="utf-8")
        options = ["--checkpoints-dir", folder / "out"]
        if "_04_" not in copy.name:
            options += ["--data-dir", folder / "images", "--epochs", "1", "--batch-size", "4"]
            options += ["--weights", "none"] if "_01_" in copy.name else ["--steps", "1", "--calibration-batches", "2"]
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, str(copy), *map(str, options)]
        result = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout)
    return folder / "out", printed


def test_its_files_are_named_as_the_rules_say(own):
    folder, _ = own
    expected = [f"TS2/MobileNetV2_Pets_{stage}.pth" for stage in ("pretrained", "FT_final")]
    expected += ["TS2/TS2_MobileNetV2_Pets.json"]
    for method, tag in (("Coverage", "NC"), ("Wanda", "W")):
        name = f"TS2_{method}_MobileNetV2_Pets"
        expected += [f"{name}/MobileNetV2_Pets_{stage}.pth" for stage in (f"pruned_{tag}", f"FTAP_{tag}_final")]
        expected += [f"{name}/reports/{name}.{suffix}" for suffix in ("json", "pdf")]
    name = "TS2_Comparison_MobileNetV2_Pets"
    expected += [f"{name}/reports/{name}.{suffix}" for suffix in ("csv", "json", "pdf")]
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == sorted(expected)


@pytest.mark.parametrize(("method", "tag"), [("Coverage", "NC"), ("Wanda", "W")])
def test_a_fifth_of_its_network_went_and_the_record_says_so(own, method, tag):
    folder, _ = own
    name = f"TS2_{method}_MobileNetV2_Pets"
    record = json.loads((folder / name / "reports" / f"{name}.json").read_text(encoding="utf-8"))
    assert record["scenario"] == name
    assert record["models"]["original"]["parameters"] == 2_223_872 + 1281 * 2
    assert abs(record["summary"]["parameter_reduction_percent"] - 20) <= 0.1
    network = load_network(folder / name / f"MobileNetV2_Pets_FTAP_{tag}_final.pth")
    assert sum(p.numel() for p in network.parameters()) == record["models"]["fine_tuned"]["parameters"]
    assert type(network).__name__ == "MobileNetV2"
    text = "".join(page.extract_text() for page in PdfReader(folder / name / "reports" / f"{name}.pdf").pages)
    assert name in text and "features.18.0" in text


def test_its_methods_are_compared(own):
    _, printed = own
    assert "Dataset: Pets, image folder; 16 training and 16 test images" in printed[3]
    assert "After Pruning+FT: WANDA - Neuron Coverage" in printed[3]
