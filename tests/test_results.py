"""The tables in the READMEs are those of the committed records."""
import json

import pytest

from cleanai.scenario import PROJECT
from cleanai.tables import comparison_table, preparation_table

RECORDS = sorted((PROJECT / "results").rglob("*.json"))


def test_there_are_measured_results():
    assert len(RECORDS) >= 3


@pytest.mark.parametrize("readme", ["README.md", "README.tr.md"])
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_readme_shows_what_was_measured(path, readme):
    record = json.loads(path.read_text(encoding="utf-8"))
    table = comparison_table(record) if record["method"] else preparation_table(record)
    assert table in (PROJECT / readme).read_text(encoding="utf-8")
