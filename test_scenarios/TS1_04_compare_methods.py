"""Script 4 of 5: compare the methods.

Reads the records of scripts 1 to 3 and measures nothing. What has not run is shown as - with the command that runs
it. Prints the answer and one table, and writes a PDF, a CSV and a JSON file.

    python test_scenarios/TS1_04_compare_methods.py
    python test_scenarios/TS1_04_compare_methods.py --dataset Digits    # after scripts 1 to 3 with Digits
"""

try:
    from cleanai import cli, stages
except ModuleNotFoundError as error:  # also after the folder was renamed
    raise SystemExit(f"Error: {error}. In the project's folder: python -m pip install -r requirements.txt") from None
from cleanai.exit import run_script
from cleanai.report.comparison import compare_methods
from cleanai.report.comparison_pdf import pdf_comparison
from cleanai.report.comparison_text import comparison_csv, comparison_text
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
    print(f"{comparison_text(record)}\n", flush=True)

    # Report: a record, a CSV and a PDF.
    stages.save_reports(scenario, record, comparison_csv, pdf_comparison)
    print(f"Report: {scenario.report}\nTable: {scenario.table}\nRecord: {scenario.record}")


if __name__ == "__main__":
    run_script(main)
