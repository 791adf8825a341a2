"""TS1, script 4: which method, what it cost, and whether the difference is more than chance.

Reads the records that scripts 1 to 3 left and measures nothing again; what has not run is shown as - with the command
that runs it. Prints the answer and one table, and writes a PDF, a CSV and a JSON file.

    python test_scenarios/TS1_04_compare_methods.py
    python test_scenarios/TS1_04_compare_methods.py --dataset Digits    # after scripts 1 to 3 with Digits
"""
from cleanai import cli
from cleanai.checkpoints import write_record
from cleanai.comparison import compare_methods
from cleanai.comparison_report import pdf_comparison
from cleanai.comparison_tables import comparison_csv, comparison_text
from cleanai.files import write_bytes
from cleanai.scenario import Scenario

SCENARIO = "TS1"
MODEL = "ResNet18"
DATASET = "CIFAR10"
METHOD = "Comparison"
SCRIPTS = {"": "TS1_01_prepare_model.py", "Coverage": "TS1_02_coverage_pruning.py", "Wanda": "TS1_03_wanda_pruning.py"}


def main():
    args = cli.parse(__doc__, dataset=DATASET)
    scenario = Scenario(SCENARIO, MODEL, args.dataset, args.checkpoints_dir, METHOD)
    record = compare_methods(scenario, SCRIPTS)
    write_bytes(scenario.report, pdf_comparison(record))
    write_bytes(scenario.table, comparison_csv(record).encode("utf-8"))
    write_record(scenario.record, record)
    print(f"{comparison_text(record)}\n")
    print(f"Report: {scenario.report}\nTable: {scenario.table}\nRecord: {scenario.record}")


if __name__ == "__main__":
    cli.run(main)
