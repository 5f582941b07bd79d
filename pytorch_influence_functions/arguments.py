"""Arguments of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from .config import DEFAULTS

Command = Callable[[argparse.Namespace], int]
NAME = "python -m pytorch_influence_functions"
ABOUT = """Which training samples helped or harmed predictions, and which labels are wrong.

Results on disk are what a run wrote (influence_results_*.json) or InfluenceResult.save (.npz). Anything that needs the
model or the data takes them from your script: --entry my_script:make names a function without arguments that returns a
dict with the keys model, train_loader, test_loader and, if you like, config, classes."""
EXAMPLES = f"""examples:
  {NAME} top outdir/influence_results_0_10.json --test 3 -k 5
  {NAME} report result.npz --entry my_script:make --output page.html
  {NAME} mislabelled --entry my_script:make --csv labels.csv
  {NAME} doctor --entry my_script:make
  {NAME} estimate --entry my_script:make --option solver=ekfac

exit codes: 0 done, 1 the computation failed, 2 wrong use, 3 more labels are flagged than --most allows, or doctor
found something"""


def parser(
    commands: Mapping[str, Command],
    version: str,
) -> argparse.ArgumentParser:
    """Of the command line; `commands` are the functions of its commands."""
    whole = argparse.ArgumentParser(
        prog=NAME,
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=version)
    several = whole.add_subparsers(
        dest="command",
        metavar="command",
        required=True,
        help="what to do; each has its own --help",
    )
    for name, (about, fill) in ABOUT_EACH.items():
        fill(_command(several, name, about, commands[name]))
    return whole


def _command(
    commands: Any,
    name: str,
    about: str,
    function: Command,
) -> argparse.ArgumentParser:
    one: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"--option takes the keys of the config: {', '.join(DEFAULTS)}.",
    )
    one.set_defaults(run=function)
    one.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the computation, e.g. solver=ekfac; may be given several times",
    )
    return one


def _entry_argument(
    one: argparse.ArgumentParser,
    required: bool,
) -> None:
    one.add_argument(
        "--entry",
        required=required,
        metavar="MODULE:FUNCTION",
        help="function of yours that returns model and loaders, e.g. my_script:make or folder/script.py:make",
    )


def _result_argument(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "result",
        nargs="?",
        help="file of a result; without it the influences are computed from --entry",
    )
    _entry_argument(one, required=False)


def _report_arguments(one: argparse.ArgumentParser) -> None:
    _result_argument(one)
    one.add_argument(
        "--output",
        "-o",
        default="influence.html",
        help="file of the page (default: %(default)s)",
    )
    one.add_argument(
        "--title", default="Influence of training samples", help="of the page"
    )
    one.add_argument(
        "-k",
        type=int,
        default=10,
        help="training samples on each side of a test sample (default: %(default)s)",
    )
    one.add_argument(
        "--mislabelled",
        action="store_true",
        help="also look for wrong labels, with the model of --entry",
    )
    one.add_argument(
        "--invert", action="store_true", help="images dark on light"
    )


def _top_arguments(one: argparse.ArgumentParser) -> None:
    _result_argument(one)
    one.add_argument(
        "--test",
        help="key of the test sample, 0 for the first of the run (default: the mean over all)",
    )
    one.add_argument(
        "-k",
        type=int,
        default=10,
        help="training samples on each side (default: %(default)s)",
    )
    one.add_argument("--json", action="store_true", help="print JSON")


def _mislabelled_arguments(one: argparse.ArgumentParser) -> None:
    _entry_argument(one, required=True)
    one.add_argument(
        "-k",
        type=int,
        default=20,
        help="rows to print (default: %(default)s)",
    )
    one.add_argument(
        "--rank-by",
        default="self_influence",
        choices=["self_influence", "loss", "gradient_norm", "margin"],
        help="what the order goes by (default: %(default)s)",
    )
    one.add_argument(
        "--level",
        type=float,
        default=0.1,
        help="share of right labels that is accepted among the flagged ones (default: %(default)s)",
    )
    one.add_argument("--csv", help="write all rows to this file")
    one.add_argument("--json", action="store_true", help="print JSON")
    one.add_argument(
        "--most",
        type=int,
        help="end with exit code 3 where more labels than this are flagged",
    )


def _entry_alone(one: argparse.ArgumentParser) -> None:
    _entry_argument(one, required=True)
    one.add_argument("--json", action="store_true", help="print JSON")


ABOUT_EACH: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "report": ("write a page to look at", _report_arguments),
    "top": ("print the most helpful and harmful samples", _top_arguments),
    "mislabelled": ("print the most suspicious labels", _mislabelled_arguments),
    "doctor": ("print what is wrong with a model and its data", _entry_alone),
    "estimate": ("print what a run takes: time, memory, disk", _entry_alone),
}
"""What each command does, and what adds its arguments."""
