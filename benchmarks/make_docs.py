"""Make the generated pages: docs/results.md from `results/`, docs/options.md from the scripts, and the READMEs' table.

python benchmarks/make_docs.py            # or: make docs
python benchmarks/make_docs.py --check    # status 1 when a page is not up to date
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Callable

import controls
import criteria
import latency
import overfitting
import recipe
import repair
import runs as all_runs
import training_speed
from rows import read_rows

from cleanai import cli
from cleanai.report.comparison_text import comparison_text
from cleanai.report.notes import path_end
from cleanai.report.run_text import comparison_table, path_rows, preparation_table
from cleanai.report.sweep_text import sweep_text
from cleanai.report.wording import Record, method_title, origin_lines, prepared_with, table_text
from cleanai.runtime.files import write_bytes
from cleanai.runtime.methods import METHODS
from cleanai.runtime.scenario import PROJECT, SCRIPTS_DIR

RESULTS = PROJECT / "results"
SHOWN = "cpu/minus20"  # the folder of the run that README.md and the first section show
NAME = "ResNet18_CIFAR10"
BEGIN, END = "<!-- results: made by `make docs` -->", "<!-- end of results -->"
TURKISH = {
    "Original": "Orijinal",
    ", pruned": ", budanmış",
    ", fine-tuned": ", ince ayarlı",
    "Accuracy (%), all test images": "Doğruluk (%), tüm test görüntüleri",
    "Accuracy (%), held-out test images": "Doğruluk (%), ayrılmış test görüntüleri",
    "p (exact McNemar test, held-out)": "p (kesin McNemar testi, ayrılmış)",
    "Parameters (M)": "Parametre (M)",
    "Speed-up for one image (medians)": "Tek görüntüde hızlanma (medyan)",
}


def main() -> None:
    os.environ["COLUMNS"] = "100"
    pages = {
        PROJECT / "docs" / "results.md": results_page(),
        PROJECT / "docs" / "options.md": options_page(),
        PROJECT / "README.md": with_table("README.md", short_table()),
        PROJECT / "README.tr.md": with_table("README.tr.md", in_turkish(short_table())),
    }
    different = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        sys.exit(f"Not up to date, run make docs: {', '.join(map(str, different))}" if different else 0)
    for path in different:
        write_bytes(path, pages[path].encode("utf-8"))
        print(f"Written: {path}")


def load(name: str) -> Record:
    """A committed record of the shown run."""
    return json.loads((RESULTS / SHOWN / f"{name}.json").read_text(encoding="utf-8"))


def with_table(name: str, table: str) -> str:
    """A README with its table of results made again."""
    before, rest = (PROJECT / name).read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def in_turkish(table: str) -> str:
    """A table of results with Turkish words and decimal commas."""
    for english, turkish in TURKISH.items():
        table = table.replace(english, turkish)
    return re.sub(r"(?<=\d)\.(?=\d)", ",", table)


def short_table() -> str:
    """The result of the shown run as one small Markdown table."""
    comparison = load(f"TS1_Comparison_{NAME}")
    runs = comparison["runs"]
    first = next(iter(runs.values()))["models"]["original"]
    columns: list[tuple[str, Record, Record, Any]] = [("Original", first, first, None)]
    for stage in ("pruned", "fine_tuned"):
        for method, run in runs.items():
            (tested,) = (
                d
                for d in comparison["differences"]
                if (d["stage"], d["first"], d["second"]) == (stage, "original", method)
            )
            name = f"{method_title(method)}, {stage.replace('_', '-')}"
            columns.append((name, run["models"][stage], run["models"]["original"], tested))
    rows: list[tuple[str, Callable[[Record, Record, Any], str]]] = [
        ("Accuracy (%), all test images", lambda model, _, tested: f"{model['accuracy_percent']:.2f}"),
        ("Accuracy (%), held-out test images", lambda model, _, tested: f"{model['accuracy_heldout_percent']:.2f}"),
        ("p (exact McNemar test, held-out)", lambda _, original, tested: f"{tested['p_value']:.3f}" if tested else ""),
        ("Parameters (M)", lambda model, _, tested: f"{model['parameters'] / 1e6:.2f}"),
        ("FLOPs (G)", lambda model, _, tested: f"{model['macs'] / 1e9:.2f}"),
        (
            "Speed-up for one image (medians)",
            lambda model, original, _: f"{original['latency_ms']['p50'] / model['latency_ms']['p50']:.2f}x",
        ),
    ]
    lines = [f"| | {' | '.join(column[0] for column in columns)} |", f"|---|{'---:|' * len(columns)}"]
    lines += [f"| {label} | {' | '.join(value(*column[1:]) for column in columns)} |" for label, value in rows]
    return "\n".join(lines)


def results_page() -> str:
    """docs/results.md."""
    preparation = load(f"TS1_{NAME}")
    runs = {method: load(f"TS1_{method}_{NAME}") for method in ("Coverage", "Wanda")}
    sweep = load(f"TS1_Sweep_{NAME}")
    machine = preparation["environment"]
    committed = all_runs.load_runs((RESULTS / SHOWN).parent)
    paths = {
        "criteria": RESULTS / "criteria" / f"TS1_{NAME}.csv",
        "controls": RESULTS / SHOWN / f"TS1_Controls_{NAME}.csv",
        "repair": RESULTS / "repair" / "CIFAR10.csv",
    }
    rows = {name: read_rows(path) if path.exists() else [] for name, path in paths.items()}
    latency_record = json.loads((RESULTS / "speed" / "latency_CIFAR10_cpu.json").read_text(encoding="utf-8"))
    sections = [
        "# Results",
        "This page is made from the records in `results/` by `make docs`. [How to read it](reading-results.md).",
        "## What a sceptic asks",
        "\n".join(all_runs.answers(committed, sweep, rows, latency_record)),
        "## The scripts",
        f"{prepared_with(next(iter(runs.values()))).capitalize()}. {'. '.join(origin_lines(preparation))}.\n"
        f"Device: {machine['device']}, {machine['precision']}; PyTorch {machine['torch']}.",
        *(_block(comparison_table(run)) for run in runs.values()),
        *("```bash\n" + "\n".join(run["commands"]) + "\n```" for run in runs.values()),
        "Commands here name weights without their folder, which is `results/base/`.",
        f"Reports: {_links(f'TS1_Coverage_{NAME}.pdf', f'TS1_Wanda_{NAME}.pdf')}",
        "## The methods compared",
        _block(comparison_text(load(f"TS1_Comparison_{NAME}"))),
        f"Report: {_links(f'TS1_Comparison_{NAME}.pdf')}",
        "## All runs",
        "Each run is a folder of `results/"
        + str(Path(SHOWN).parent)
        + "`, with its PDFs. Accuracy is on held-out test images, in "
        "percent; pruned and fine-tuned: its change in points; p: exact McNemar test of the last network against the "
        "original one.",
        _block(all_runs.table(committed)),
        "## Sweep over ratios",
        _block(sweep_text(sweep)),
        f"![Accuracy over the removed share, by criterion](../results/{SHOWN}/TS1_Sweep_{NAME}.svg)",
        f"Report: {_links(f'TS1_Sweep_{NAME}.pdf')}",
    ]
    if rows["criteria"]:
        sections += [
            "## Criteria",
            "Each criterion prunes the same network, without fine-tuning, for three sets of images: mean accuracy and "
            "standard deviation (`python benchmarks/criteria.py`).",
            f"![Accuracy over the removed share, by criterion](../results/criteria/TS1_{NAME}.svg)",
            _block(criteria.table(rows["criteria"])),
        ]
    if rows["controls"]:
        sections += [
            "## Controls",
            "What further training alone brings, what random choice, and what the kept weights are worth "
            "(`python benchmarks/controls.py`).",
            _block(controls.table(rows["controls"])),
        ]
    sections += goals()
    sections += [
        "## The repair",
        "Two finished networks were pruned for up to three sets of images: mean points of accuracy lost on 5,000 "
        "held-out test images, without fine-tuning, and the standard deviation (`python benchmarks/repair.py`). "
        "Of ResNet-18 the shares are of parameters and FLOPs, of ResNet-56 of the FLOPs alone.",
        _block(repair.table(rows["repair"])),
        "## Weight decay",
        "Accuracy on training images that were kept aside, before and after pruning by WANDA, without fine-tuning "
        "(`python benchmarks/recipe.py`). The scripts use 0.0001: on average over the two machines its network is the "
        "best as trained, and after half of both costs is removed.",
    ]
    for of_recipe in sorted((RESULTS / "recipe").glob("*.csv")):
        machine = "NVIDIA H100" if of_recipe.stem.endswith("H100") else "CPU"
        chart = f"![Accuracy over the removed share, by weight decay](../results/recipe/{of_recipe.stem}.svg)"
        sections += [f"{machine}:", chart, _block(recipe.table(read_rows(of_recipe)))]
    sections += base_networks()
    benchmarks = {"latency": latency, "training": training_speed}
    for path in sorted((RESULTS / "speed").glob("*.json")):
        name = path.stem.split("_")[0]
        record = json.loads(path.read_text(encoding="utf-8"))
        sections += [
            f"## Speed: {name}",
            f"`python benchmarks/{benchmarks[name].__name__}.py` on {record['environment']['device']}.",
            _block(benchmarks[name].table(record)),
        ]
    return "\n\n".join(sections) + "\n"


def base_networks() -> list[str]:
    """The section on the networks that were trained in full, and on trials against their overfitting."""
    sections = ["## Trained in full: the base networks", "All training images, 20 epochs, weight decay 0.0001."]
    for folder, start in (("base", "weights trained on ImageNet"), ("base-random", "random weights")):
        (path,) = (RESULTS / folder).glob("*.json")
        record = json.loads(path.read_text(encoding="utf-8"))
        sections += [f"From {start}, on {record['environment']['device']}:", _block(preparation_table(record))]
    sections += [
        "The first is in [results/base](../results/base/README.md), for everyone. Its training images are classified "
        "correctly in 99.4% of the cases, augmented as they are, and test images in 92.3%: it overfits."
    ]
    for of_overfitting in sorted((RESULTS / "overfitting").glob("*.csv")):
        rows = read_rows(of_overfitting)
        trained_on, judged_on = (int(rows[0][key]) for key in ("train_images", "judging_images"))
        sections += [
            f"Trials against it, each from the same weights on the same {trained_on:,} training images for "
            f"{rows[0]['epochs']} epochs, one seed, judged on {judged_on:,} other training images "
            "(`python benchmarks/overfitting.py`):",
            _block(overfitting.table(rows)),
        ]
    return sections


def goals() -> list[str]:
    """The sections on the runs that pruned to a limit."""
    titles = {"accept-drop": "Until accuracy falls", "speedup": "Until it is fast enough"}
    sections = []
    for folder, title in titles.items():
        for path in (RESULTS / "cpu" / folder / f"TS1_{method}_{NAME}.json" for method in METHODS):
            record = json.loads(path.read_text(encoding="utf-8"))
            rows = path_rows(record)
            sections += [
                f"## {title}: {method_title(record['method'])}",
                f"{'. '.join(origin_lines(record))}. {path_end(record)} "
                "Accuracy is on the calibration images, after the repair of each step.",
                _block("\n".join(table_text(rows, [10, *[15] * (len(rows[0]) - 1)]))),
                _block(comparison_table(record)),
                "```bash\n" + "\n".join(record["commands"]) + "\n```",
                f"Report: [{path.stem}](../results/cpu/{folder}/{path.stem}.pdf)",
            ]
    return sections


def options_page() -> str:
    """docs/options.md."""
    sections = [
        "# Options of the scripts",
        "This page is made from the scripts by `make docs`. `--help` prints the same.",
    ]
    for path in sorted(SCRIPTS_DIR.glob("TS1_0*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        script: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        parser = cli.option_parser(script.__doc__, script.SETTINGS)
        rows = ["| option | default | |", "|---|---|---|"]
        for action in parser._actions[1:]:
            text, default = _without_default(action)
            choices = f" ({', '.join(action.choices)})" if action.choices else ""
            rows.append(f"| `{action.option_strings[0]}` | {default} | {text}{choices} |")
        title = script.__doc__.split(":", 1)[1].split(".")[0].strip()
        sections += [f"## `{path.name}`: {title}", "\n".join(rows)]
    return "\n\n".join(sections) + "\n"


def _without_default(action: argparse.Action) -> tuple[str, str]:
    """The help of an option, and its default, without the path of the project."""
    text = str(action.help).replace("%%", "%")
    match = re.match(r"(.*) \(default: (.*)\)$", text)
    if match is None:
        return text, "off"
    default = match[2].replace("%(default)s", str(action.default)).replace(f"{PROJECT}{os.sep}", "")
    return match[1], default


def _block(text: str) -> str:
    return f"```\n{text}\n```"


def _links(*names: str) -> str:
    return ", ".join(f"[{Path(name).stem}](../results/{SHOWN}/{name})" for name in names)


if __name__ == "__main__":
    main()
