"""Copy the records, PDFs and CSVs of finished scripts to a folder of `results/`, without pictures and paths.

python benchmarks/collect.py checkpoints cpu-short
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from cleanai.exit import run_script
from cleanai.report.run_pdf import pdf_report
from cleanai.runtime.checkpoints import read_record, write_record
from cleanai.runtime.files import write_bytes
from cleanai.runtime.scenario import PROJECT

_PATHS = r' --(checkpoints|data|models)-dir ("[^"]*"|\S+)'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints_dir", type=Path, help="folder of the scripts' results")
    parser.add_argument("folder", help="folder in results/ to copy to")
    args = parser.parse_args()
    collect(args.checkpoints_dir, PROJECT / "results" / args.folder)


def collect(checkpoints_dir: Path, folder: Path) -> None:
    """Copy what the scripts in `checkpoints_dir` reported to `folder`.

    Pictures of the dataset and the machine's paths in commands are left out, of the reports as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted([*checkpoints_dir.glob("TS*/*.json"), *checkpoints_dir.glob("TS*/reports/TS*.*")]):
        target = folder / path.name
        if path.suffix in (".json", ".pdf", ".csv"):
            shutil.copyfile(path, target)
            print(target)
    for path in folder.glob("*.json"):
        record = read_record(path)
        if record and "newly_wrong" in record:
            record["newly_wrong"] = []
            record["commands"] = [re.sub(_PATHS, "", command) for command in record["commands"]]
            write_record(path, record)
            write_bytes(path.with_suffix(".pdf"), pdf_report(record))


if __name__ == "__main__":
    run_script(main)
