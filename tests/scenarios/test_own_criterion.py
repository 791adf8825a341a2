"""A criterion of one's own, added exactly as docs/own-scenario.md says: it is pruned, compared and swept."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from cleanai.runtime.checkpoints import read_record
from cleanai.runtime.scenario import PROJECT
from tests.helpers import SMALL_MODEL, own_scripts, pdf_text

pytestmark = pytest.mark.long
FEW = ["--dataset", "Digits", "--batch-size", "16"]
CALIBRATION = ["--calibration-batches", "1", "--repair-batches", "2"]
PRUNE = [
    "--epochs",
    "1",
    "--steps",
    "1",
    "--train-samples",
    "64",
    "--timing-seconds",
    "1",
    "--robustness-images",
    "10",
    *FEW,
    *CALIBRATION,
]


def _example(name):
    text = (PROJECT / "docs" / "own-scenario.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- example: {name} -->\n+```python\n(.*?)```", text, flags=re.S)[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the method L1: two files of the package touched, and a script."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("cleanai", "test_scenarios"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    own_scripts(folder / "test_scenarios", MODEL=SMALL_MODEL)
    registry = folder / "cleanai" / "runtime" / "methods.py"
    text = registry.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    registry.write_text(text[:-2] + _example("methods") + "}\n", encoding="utf-8")
    with (folder / "cleanai" / "pruning" / "criteria.py").open("a", encoding="utf-8") as file:
        file.write(_example("criteria"))
    subprocess.run([sys.executable, "-c", _example("script")], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def printed(project):
    """What the scripts printed, by their numbers."""
    texts = {}
    for pattern, options in (
        ("01", ["--weights", "none", "--epochs", "1", "--train-samples", "64", *FEW]),
        ("03", PRUNE),
        ("06", PRUNE),
        ("04", FEW[:2]),
        ("05", ["--ratios", "0.3", "--test-samples", "50", *FEW, *CALIBRATION]),
    ):
        (script,) = (project / "test_scenarios").glob(f"TS1_{pattern}_*.py")
        result = subprocess.run(
            [sys.executable, str(script), *options],
            env={**os.environ, "PYTHONPATH": str(project), "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            encoding="utf-8",
        )
        assert result.returncode == 0, result.stderr
        texts[pattern] = result.stdout
    return texts


def test_it_prunes(project, printed):
    assert printed["06"].count("L1 NORM PRUNING - COMPREHENSIVE COMPARISON TABLE") == 1
    folder = project / "checkpoints" / "TS1_L1_SmallNetwork_Digits"
    assert (folder / "SmallNetwork_Digits_pruned_L1.pth").exists()
    record = read_record(folder / "reports" / "TS1_L1_SmallNetwork_Digits.json")
    assert abs(record["summary"]["parameter_reduction_percent"] - 20) < 0.2
    assert "TS1_06_l1_pruning.py" in record["commands"][1]


def test_it_is_compared_with_the_original_and_with_every_method_that_has_run(project, printed):
    path = (
        project
        / "checkpoints"
        / "TS1_Comparison_SmallNetwork_Digits"
        / "reports"
        / "TS1_Comparison_SmallNetwork_Digits.json"
    )
    record = read_record(path)
    pairs = {(d["first"], d["second"]) for d in record["differences"]}
    assert pairs == {("original", "Wanda"), ("original", "L1"), ("Wanda", "L1")}
    lines = printed["04"].splitlines()
    (line,) = (line for line in lines if line.startswith("After Pruning+FT: L1 norm - WANDA"))
    assert line.split()[-1] in ("yes", "no")
    assert any("TS1_02_coverage_pruning.py" in line for line in lines), "the method that has not run"
    tables = [line for line in lines if not line.startswith(("- ", "Report", "Table", "Record"))]
    assert max(map(len, tables)) <= 100
    assert "L1 norm" in pdf_text(path.with_suffix(".pdf").read_bytes())


def test_it_is_swept(project, printed):
    path = project / "checkpoints" / "TS1_Sweep_SmallNetwork_Digits" / "reports" / "TS1_Sweep_SmallNetwork_Digits.json"
    record = read_record(path)
    names = [point["criterion"] for point in record["points"]]
    assert names == ["Neuron Coverage", "WANDA", "L1 norm", "OBS", "L2 magnitude", "random choice"]
    assert {network["criterion"] for network in record["chosen"]} == {"WANDA", "L1 norm"}
    assert "L1 norm" in pdf_text(path.with_suffix(".pdf").read_bytes())
