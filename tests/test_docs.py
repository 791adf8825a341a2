"""The documentation: generated pages are up to date, commands and links hold, and both READMEs have one skeleton."""

import re

import make_docs
import pytest
import rows

from cleanai.runtime.scenario import PROJECT

README, TURKISH = PROJECT / "README.md", PROJECT / "README.tr.md"
PAGES = sorted([README, TURKISH, PROJECT / "CONTRIBUTING.md", *(PROJECT / "docs").glob("*.md")])
PAGES += [PROJECT / "test_scenarios" / "README.md"]


def _text(path):
    return path.read_text(encoding="utf-8")


def _headings(text):
    without_code = re.sub(r"```.*?```", "", text, flags=re.S)
    return re.findall(r"^(#+) ", without_code, flags=re.M)


def _links(text):
    return re.findall(r"\]\(([^)]+)\)", text)


def test_the_generated_pages_are_those_of_the_records_and_scripts(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert _text(PROJECT / "docs" / "results.md") == make_docs.results_page()
    assert _text(PROJECT / "docs" / "options.md") == make_docs.options_page()
    table = make_docs.short_table()
    assert _text(README) == make_docs.with_table("README.md", table)
    assert _text(TURKISH) == make_docs.with_table("README.tr.md", make_docs.in_turkish(table))
    assert "%%" not in make_docs.options_page()


def test_both_readmes_have_the_same_headings_commands_and_links():
    english, turkish = _text(README), _text(TURKISH)
    assert _headings(turkish) == _headings(english)
    assert re.findall(r"```.*?```", turkish, flags=re.S) == re.findall(r"```.*?```", english, flags=re.S)
    swapped = [{"README.tr.md": "README.md"}.get(link, link) for link in _links(english)]
    assert _links(turkish) == swapped
    assert max(len(text.splitlines()) for text in (english, turkish)) <= 180


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_links_between_pages_lead_somewhere(path):
    for link in _links(_text(path)):
        if not link.startswith(("http", "#")):
            target = (path.parent / link.split("#")[0]).resolve()
            assert target.exists(), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_commands_name_scripts_and_targets_that_exist(path):
    makefile = _text(PROJECT / "Makefile")
    for block in re.findall(r"```(?:bash|bat)\n(.*?)```", _text(path), flags=re.S):
        for script in re.findall(r"python (\w+/TS1_\w+\.py|benchmarks/\w+\.py)", block):
            if not script.startswith("test_scenarios/TS1_06"):  # a script that the reader makes
                assert (PROJECT / script).exists(), script
        for target in re.findall(r"^make ([\w-]+)", block, flags=re.M):
            assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", makefile, flags=re.M), target


def test_the_criteria_were_measured_within_their_budgets():
    measured = [row for path in make_docs.criteria.FOLDER.glob("*.csv") for row in rows.read_rows(path)]
    if not measured:
        pytest.skip("the criteria have not been measured")
    for row in measured:
        requested = float(row["parameters_asked_percent"])
        assert abs(float(row["parameters_removed_percent"]) - requested) <= 0.1 + 1e-9
        assert 0 <= float(row["macs_removed_percent"]) - requested <= 0.5


def test_the_sweep_that_is_shown_met_every_ratio():
    record = make_docs.load(f"TS1_Sweep_{make_docs.NAME}")
    for point in record["points"]:
        parameters, macs = (1 - point[cost] / record["original"][cost] for cost in ("parameters", "macs"))
        assert parameters == pytest.approx(point["ratio"], abs=0.0015)
        assert macs == pytest.approx(point["ratio"] + 0.0025, abs=0.004)
