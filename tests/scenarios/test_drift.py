"""The scripts are written out one by one, and must not drift apart."""

import ast

import pytest

from cleanai.runtime.scenario import SCRIPTS_DIR
from tests.helpers import COMPARE, SCRIPTS, SWEEP

METHODS = {  # what scripts 2 and 3 may differ in: the lines that hold one of these
    SCRIPTS[1]: ('METHOD = "Coverage"', '"coverage_metric": "', "NeuronCoverageImportance"),
    SCRIPTS[2]: ('METHOD = "Wanda"', "WandaImportance"),
}


def lines_of(script):
    return (SCRIPTS_DIR / script).read_text(encoding="utf-8").splitlines()


def without_docstring(script):
    lines = lines_of(script)
    docstring = ast.parse("\n".join(lines)).body[0]
    return lines[docstring.end_lineno :]


def test_scripts_2_and_3_are_the_same_but_for_their_method():
    shared = {}
    for script, own in METHODS.items():
        lines = without_docstring(script)
        for text in own:
            expected = 2 if text.endswith("Importance") else 1  # its import and its use
            assert sum(text in line for line in lines) == expected, text
        shared[script] = [line for line in lines if not any(text in line for text in own)]
    assert shared[SCRIPTS[1]] == shared[SCRIPTS[2]]


@pytest.mark.parametrize("script", [*SCRIPTS, COMPARE, SWEEP])
def test_a_script_fits_on_a_page(script):
    lines = lines_of(script)
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 120


def test_every_script_is_known_to_the_tests():
    assert sorted(path.name for path in SCRIPTS_DIR.glob("*.py")) == sorted([*SCRIPTS, COMPARE, SWEEP])
