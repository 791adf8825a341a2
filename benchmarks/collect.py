"""Copy the records, PDFs and CSVs of TS1 on CIFAR-10 to a folder of `results/`, and draw the sweep.

python benchmarks/collect.py checkpoints cpu/minus20
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from cleanai.exit import run_script
from cleanai.report.drawing import svg_bytes
from cleanai.report.run_pdf import pdf_report
from cleanai.report.sweep_pdf import sweep_chart
from cleanai.runtime.checkpoints import read_record, write_record
from cleanai.runtime.files import write_bytes
from cleanai.runtime.scenario import PROJECT

NAME = "ResNet18_CIFAR10"
_PATH = r' --(checkpoints|data)-dir ("[^"]*"|\S+)'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints_dir", type=Path, help="folder of the scripts' results")
    parser.add_argument("folder", help="folder in results/ to copy to")
    args = parser.parse_args()
    collect(args.checkpoints_dir, PROJECT / "results" / args.folder)


def collect(checkpoints_dir: Path, folder: Path) -> None:
    """Copy what the scripts in `checkpoints_dir` reported to `folder`.

    Pictures of the dataset and the machine's path in commands are left out, of the reports as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(checkpoints_dir.glob(f"TS1*/**/TS1*_{NAME}.*")):
        target = folder / path.name
        if path.suffix not in (".json", ".pdf", ".csv"):
            continue
        shutil.copyfile(path, target)
        print(target)
        record = read_record(target) if path.suffix == ".json" else None
        if record and "newly_wrong" in record:
            record["newly_wrong"] = []
            record["commands"] = [re.sub(_PATH, "", command) for command in record["commands"]]
            write_record(target, record)
    for path in folder.glob(f"TS1_*_{NAME}.json"):
        record = read_record(path)
        if record and "newly_wrong" in record:
            write_bytes(path.with_suffix(".pdf"), pdf_report(record))
        elif record and "points" in record:
            write_bytes(path.with_suffix(".svg"), svg_bytes(sweep_chart(record)))


if __name__ == "__main__":
    run_script(main)
