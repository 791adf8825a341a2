"""The tables in the READMEs are those of the committed records."""
import json

import controls
import criteria
import latency
import pytest
import rows
import training_speed

from cleanai.report.comparison_text import comparison_text
from cleanai.report.run_text import comparison_table, preparation_table
from cleanai.report.sweep_pdf import sweep_text
from cleanai.runtime.scenario import PROJECT

SPEEDS = sorted((PROJECT / "results" / "speed").glob("*.json"))
RECORDS = sorted(set((PROJECT / "results").rglob("*.json")) - set(SPEEDS))


def test_there_are_measured_results():
    assert len(RECORDS) >= 3


@pytest.mark.parametrize("readme", ["README.md", "README.tr.md"])
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_readme_shows_what_was_measured(path, readme):
    record = json.loads(path.read_text(encoding="utf-8"))
    if "runs" in record:
        table = comparison_text(record)
    elif "points" in record:
        table = sweep_text(record)
    else:
        table = comparison_table(record) if record["method"] else preparation_table(record)
    assert (PROJECT / readme).read_text(encoding="utf-8").count(f"```\n{table}\n```") == 1


@pytest.mark.parametrize("readme", ["README.md", "README.tr.md"])
@pytest.mark.parametrize("path", SPEEDS, ids=lambda path: path.stem)
def test_a_readme_shows_how_fast_it_is(path, readme):
    benchmarks = {"training": training_speed, "latency": latency}
    benchmark = benchmarks[path.stem.split("_")[0]]
    table = benchmark.table(json.loads(path.read_text(encoding="utf-8")))
    assert (PROJECT / readme).read_text(encoding="utf-8").count(f"```\n{table}\n```") == 1


@pytest.mark.parametrize("readme", ["README.md", "README.tr.md"])
def test_a_readme_shows_how_the_criteria_compare(readme):
    (path,) = criteria.FOLDER.glob("*.csv")
    measured = rows.read_rows(path)
    text = (PROJECT / readme).read_text(encoding="utf-8")
    assert text.count(f"```\n{criteria.table(measured)}\n```") == 1
    assert path.with_suffix(".svg").relative_to(PROJECT).as_posix() in text
    for row in measured:  # the budgets were met at every step
        asked = float(row["parameters_asked_percent"])
        assert abs(float(row["parameters_removed_percent"]) - asked) <= 0.1 + 1e-9
        assert 0 <= float(row["macs_removed_percent"]) - asked <= 0.5


@pytest.mark.parametrize("readme", ["README.md", "README.tr.md"])
def test_a_readme_shows_what_the_controls_are(readme):
    (path,) = controls.FOLDER.glob("*.csv")
    measured = rows.read_rows(path)
    assert (PROJECT / readme).read_text(encoding="utf-8").count(f"```\n{controls.table(measured)}\n```") == 1
    for method in controls.SCRIPTS:  # they are controls of the networks that the other results are about
        (record,) = [record for record in RECORDS if record.stem == path.stem.replace("TS1", f"TS1_{method}")]
        final = json.loads(record.read_text(encoding="utf-8"))["checkpoints"]
        assert {row[f"{method}_sha256"] for row in measured} <= set(final.values())
