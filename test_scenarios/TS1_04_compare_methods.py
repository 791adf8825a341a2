"""Script 4 of 5: compare the methods.

Reads the records of scripts 1 to 3 and measures nothing. What has not run is shown as - with the command that runs
it. Prints the answer and one table, and writes a PDF, a CSV and a JSON file.

    python test_scenarios/TS1_04_compare_methods.py
    python test_scenarios/TS1_04_compare_methods.py --dataset Digits    # after scripts 1 to 3 with Digits
"""

from cleanai import cli
from cleanai.exit import run_script
from cleanai.report.comparison import compare_methods
from cleanai.report.comparison_pdf import pdf_comparison
from cleanai.report.comparison_text import comparison_csv, comparison_text
from cleanai.runtime.checkpoints import write_record
from cleanai.runtime.files import write_bytes
from cleanai.runtime.scenario import Scenario

SCENARIO = "TS1"
MODEL = "ResNet18"
METHOD = "Comparison"
SETTINGS = {"dataset": "CIFAR10"}


def main():
    args = cli.parse(f"{SCENARIO}, {MODEL}. {__doc__}", SETTINGS)
    scenario = Scenario(SCENARIO, MODEL, args.dataset, args.checkpoints_dir, METHOD)

    # Load and compare the records.
    record = compare_methods(scenario)
    print(f"{comparison_text(record)}\n")

    # Report: the record first, then what is made from it.
    write_record(scenario.record, record)
    write_bytes(scenario.table, comparison_csv(record).encode("utf-8"))
    write_bytes(scenario.report, pdf_comparison(record))
    print(f"Report: {scenario.report}\nTable: {scenario.table}\nRecord: {scenario.record}")


if __name__ == "__main__":
    run_script(main)
