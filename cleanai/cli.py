"""The options of the scripts. Nothing heavy is imported, so that `--help` and a wrong option answer at once.

A script passes its settings, a dictionary of names and defaults: each is an option, described in `options.py`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, NoReturn

from cleanai import UserError
from cleanai.options import COME_WITH, COMMON, DEFAULT_WORDS, MAY_BE_NONE, SETTINGS, TOGETHER
from cleanai.runtime import distributed
from cleanai.runtime.files import file_digest
from cleanai.runtime.packages import ONNX, require_all, require_packages, require_torch_export
from cleanai.runtime.scenario import EMBEDDED, usual_flip

require_all()  # the scripts explain an error of this import


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if re.search("unrecognized arguments: .*--(image-size|flip|shift)", message):
            message += ": give it to script 1, and this script will do the same"
        elif "unrecognized arguments: --data-dir" in message:
            message += ": this script reads the records of the others, and needs no images"
        elif message.startswith("unrecognized arguments"):
            message += self._meant(message)
        listed = "--help lists the options" if self.add_help else "docs/options.md lists them"
        self.exit(2, f"{self.prog}: {message} ({listed})\n")

    def _meant(self, message: str) -> str:
        """The options that come closest to the ones that no script has."""
        given = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        given = [option for option in given if option[2:].replace("-", "_") not in {**SETTINGS, **COMMON}]
        known = [option for action in self._actions for option in action.option_strings]
        meant = dict.fromkeys(close for option in given for close in difflib.get_close_matches(option, known, n=1))
        return f"; did you mean {', '.join(meant)}?" if meant else ""


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps the paragraphs of a description to the terminal; indented ones, commands to copy, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(p if p.startswith(" ") else textwrap.fill(p, width) for p in paragraphs)


class Options(argparse.Namespace):
    """The parsed options. `config` holds the settings: the options that decide the results."""

    config: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        """UserError for a setting that the script does not have, as a copy of an older one."""
        if name in SETTINGS and "config" in vars(self):
            raise UserError(f'SETTINGS has no "{name}": copy its line from the script in test_scenarios')
        raise AttributeError(name)


def parse(description: str, settings: dict[str, Any]) -> Options:
    """Parse the command line: `settings`, names with their defaults, and the common options that come with them.

    Ends the program with one line when an option or a default is wrong. UserError when packages for an export are
    missing.
    """
    parser = option_parser(description, settings)
    args = parser.parse_args(namespace=Options())
    _check(args, settings, parser)
    args.config = {name: getattr(args, name) for name in settings}
    if isinstance(args.config.get("weights"), Path):
        args.config.update(weights=args.weights.name, weights_sha256=file_digest(args.weights))
    return args


def option_parser(description: str, settings: dict[str, Any]) -> argparse.ArgumentParser:
    """The parser of a script's options. Commands in the description get the script's own name."""
    own_name = re.sub(r"(?<=python test_scenarios/)\w+\.py", Path(sys.argv[0]).name, description)
    parser = _Parser(description=own_name, formatter_class=_HelpFormatter, allow_abbrev=False)
    _require_complete(settings)
    for name, default in settings.items():
        _add(parser, name, {**SETTINGS[name], "default": _checked(name, default)}, settings)
    for setting, names in COME_WITH.items():
        for name in names if setting in settings else ():
            _add(parser, name, COMMON[name], settings)
    return parser


def _require_complete(settings: dict[str, Any]) -> None:
    """End the program when a script's own settings have a wrong name, or lack one, as in a copy of an older script."""
    for name in settings:
        if name not in SETTINGS:
            close = difflib.get_close_matches(name, SETTINGS, n=1)
            _settings_parser().error(f'there is no "{name}"' + (f'; did you mean "{close[0]}"?' if close else ""))
    for one, names in TOGETHER.items():
        missing = [f'"{name}"' for name in names if one in settings and name not in settings]
        if missing:
            lines = "its line" if len(missing) == 1 else "their lines"
            _settings_parser().error(f"{', '.join(missing)} missing: copy {lines} from the script in test_scenarios")


def _checked(name: str, default: Any) -> Any:
    """A default from a script's own settings, as its option would give it. Ends the program when that refuses it."""
    parser, option = _settings_parser(f', "{name}"'), SETTINGS[name]
    if default is None or default == []:
        return None if name in MAY_BE_NONE else parser.error(f"it cannot be {default}")
    if isinstance(default, str) and "type" in option and "nargs" not in option:
        return default  # argparse parses it, unless the option is given
    values = default if isinstance(default, (list, tuple)) else [default]
    if len(values) > 1 and "nargs" not in option:
        parser.error(f"it is one value, not {len(values)}")
    parser.add_argument("--" + name.replace("_", "-"), **option)
    return getattr(parser.parse_args(["--" + name.replace("_", "-"), *map(str, values)]), name)


def _settings_parser(setting: str = "") -> argparse.ArgumentParser:
    return _Parser(prog=f"{Path(sys.argv[0]).name}, SETTINGS{setting}", add_help=False, allow_abbrev=False)


def _add(parser: argparse.ArgumentParser, name: str, option: dict[str, Any], settings: dict[str, Any]) -> None:
    if name == "epochs":
        what = "0 takes the network in --weights FILE as it is" if "weights" in settings else "0: no fine-tuning"
        option = {**option, "help": f"{option['help']}; {what}"}
    default = option.get("default")
    if "action" not in option:
        shown = DEFAULT_WORDS.get(name, "all") if default is None else "%(default)s"
        shown = " ".join(map(str, default)) if isinstance(default, list) else shown
        option = {**option, "help": f"{option['help']} (default: {shown})"}
    parser.add_argument("--" + name.replace("_", "-"), **option)


def _check(args: Options, settings: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """Refuse combinations of options that make no sense."""
    if "accept_drop" in settings:
        _check_limits(args, parser)
    if "ratio" in settings:
        if args.macs_ratio == "same" and args.ratio != "auto":
            args.macs_ratio = args.ratio
        if args.ratio is None and args.macs_ratio is None:
            parser.error("argument --ratio: none leaves nothing to remove without a --macs-ratio")
        if args.export.startswith("onnx"):
            require_packages(f"--export {args.export}", ONNX)
        if args.export == "pt2":
            require_torch_export("--export pt2")
    if "flip" in settings:
        if (args.flip, args.dataset) == ("horizontal", EMBEDDED):
            parser.error(f"argument --flip: {EMBEDDED} are never mirrored, a mirrored digit is not a digit")
        args.flip = usual_flip(args.dataset) if args.flip == "auto" else args.flip
    if {"mean", "std"} <= settings.keys() and (args.mean is None) != (args.std is None):
        given, missing = ("mean", "std") if args.mean else ("std", "mean")
        parser.error(f"argument --{given}: it belongs together with --{missing}")
    if "ratios" in settings and args.ratios != sorted(set(args.ratios)):
        parser.error(f"argument --ratios: {' '.join(map(str, args.ratios))} are not rising")
    if "distil" in settings and args.distil and args.epochs == 0:
        parser.error("argument --distil: it is for fine-tuning, and --epochs 0 leaves that out")
    if {"weights", "epochs"} <= settings.keys() and args.epochs == 0 and not isinstance(args.weights, Path):
        parser.error("argument --epochs: 0 takes a trained network as it is: name its file with --weights")
    processes = distributed.processes()
    if "batch_size" in settings and args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared evenly by {processes} processes")


def _check_limits(args: Options, parser: argparse.ArgumentParser) -> None:
    """Refuse combinations of the options that end the pruning."""
    if args.strict and args.accept_drop is None:
        parser.error("argument --strict: there is no verdict without --accept-drop")
    if args.speedup is None and args.speedup_of:
        parser.error("argument --speedup-of: it is for --speedup")
    if args.speedup is not None:
        given = any(each.split("=")[0] == "--ratio" for each in sys.argv[1:])
        if given and args.ratio != "auto":
            parser.error("argument --ratio: --speedup decides how much is removed, leave it out")
        args.ratio, args.speedup_of = "auto", args.speedup_of or "single"
    if args.ratio == "auto" and args.accept_drop is None and args.speedup is None:
        parser.error("argument --ratio: auto needs --accept-drop or --speedup, which end the pruning")
    if args.ratio == "auto" and args.macs_ratio not in ("same", None):
        parser.error("argument --macs-ratio: with --ratio auto it is same or none")
