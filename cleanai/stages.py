"""What the scripts share around their story: find finished work, save, and publish results.

PyTorch, which takes seconds to import, is imported only for an export.
"""

from __future__ import annotations

import contextlib
from typing import Callable

from cleanai import UserError
from cleanai.cli import Options
from cleanai.report.run_text import comparison_table
from cleanai.report.wording import Record, exported_as, origin_lines, wrapped
from cleanai.runtime.checkpoints import find_record, read_record, require_intact, write_record
from cleanai.runtime.files import file_digest, remove_file, write_bytes
from cleanai.runtime.lock import only_run
from cleanai.runtime.scenario import Scenario

NOT_PASSED = 3  # the exit status of --strict


def finished_record(scenario: Scenario, args: Options) -> Record | None:
    """The record of a finished run with the same settings, or None.

    UserError when an earlier run had other settings, or when the preparing script has not run.
    """
    files = []
    if ":" in scenario.model:  # other networks are known by the names of their files
        args.config["model"] = scenario.model
    if scenario.method:
        preparation = None if scenario.fine_tuned.exists() else read_record(scenario.of("").record)
        scenario.require_fine_tuned(args.data_dir, preparation and preparation["config"])
        require_intact(scenario.fine_tuned)
        args.config["fine_tuned_model"] = file_digest(scenario.fine_tuned)[:16]
    if "epochs" in args.config and "ratios" not in args.config:
        files.append(scenario.final)
    if "ratio" in args.config:
        files.append(scenario.pruned)
    record = None if args.fresh else find_record(scenario.record, args.config)
    if not record or not all(file.exists() for file in files):
        return None
    for file in files:
        require_intact(file)
    print(f"Already finished; its record is {scenario.record} (images are not read again; --fresh starts over)")
    return record


def save_record(scenario: Scenario, record: Record) -> None:
    """Write the record, which marks the run as finished, before the reports that are made from it."""
    write_record(scenario.record, record)
    with contextlib.suppress(PermissionError):  # on Windows it may be open; `publish` replaces an older one
        remove_file(scenario.report)


def save_reports(
    scenario: Scenario, record: Record, table: Callable[[Record], str], report: Callable[[Record], bytes]
) -> None:
    """Write the record of a comparison or a sweep, then its CSV and its PDF, which are made from it."""
    with only_run(scenario):
        write_record(scenario.record, record)
        remove_file(scenario.resume)
        write_bytes(scenario.table, table(record).encode("utf-8"))
        write_bytes(scenario.report, report(record))


def publish(scenario: Scenario, record: Record, args: Options) -> None:
    """Export a pruning script's network if asked, print its table, and write its report where it is missing.

    The table is printed even where nothing can be exported or written. With --strict a verdict other than PASS ends the
    program with status 3, after all of it.
    """
    not_exported = None
    try:
        _export(scenario, record, args)
    except (UserError, OSError) as error:  # the finished run is reported all the same
        not_exported = error
    print("", *map(wrapped, origin_lines(record)), "", comparison_table(record), "", sep="\n", flush=True)
    if not scenario.report.exists() or scenario.report.stat().st_mtime < scenario.record.stat().st_mtime:
        from cleanai.report.run_pdf import pdf_report

        with only_run(scenario):  # removes what a killed run left of it
            write_bytes(scenario.report, pdf_report(record))
    print(f"Report: {scenario.report}")
    if "export" in record and scenario.exported.exists():
        print(f"ONNX: {scenario.exported} ({exported_as(record['export'])})")
    if "int8" in record.get("export", {}) and scenario.quantized.exists():
        print(f"ONNX in 8 bits: {scenario.quantized}")
    if scenario.standalone.exists():
        print(f"PyTorch program: {scenario.standalone}")
    if not_exported:
        raise not_exported
    if args.strict and record["verdict"]["result"] != "PASS":
        raise SystemExit(NOT_PASSED)


def _export(scenario: Scenario, record: Record, args: Options) -> None:
    """Write the final network in the form that --export asks for, unless it is there."""
    int8 = args.export == "onnx-int8"
    files = [scenario.exported, *([scenario.quantized] if int8 else [])]
    measured = ("int8" if int8 else "disagreements") in record.get("export", {})  # older records lack some of it
    if args.export.startswith("onnx") and not (measured and all(file.exists() for file in files)):
        from cleanai.measure.deployment import export_scenario

        with only_run(scenario):
            record["export"] = export_scenario(scenario, record, args.data_dir, args.timing_seconds, int8)
            save_record(scenario, record)
    if args.export == "pt2" and not scenario.standalone.exists():
        from cleanai.measure.standalone import save_scenario

        with only_run(scenario):
            save_scenario(scenario, args.data_dir)
