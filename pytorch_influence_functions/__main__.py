"""The command line: `python -m pytorch_influence_functions report | top | mislabelled | doctor | estimate`.

Exit codes: 0 done; 1 the computation failed; 2 wrong use (an argument, a file or an entry that is not there); 3 more
labels are flagged than `--most` allows, or `doctor` found something.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .arguments import NAME, parser
from .calc_influence_function import calc_influences, version
from .config import Config, known_key
from .evaluation import Mislabelled, find_mislabelled
from .run.doctor import doctor as findings
from .run.estimate import estimate as estimated
from .script import Entry, UsageError, entry_of
from .show.results import InfluenceResult
from .utils import as_json

DONE, FAILED, WRONG_USE, FOUND = 0, 1, 2, 3

# ---- the commands


def _needed(
    entry: Entry,
    *names: str,
) -> None:
    for name in names:
        if getattr(entry, name) is None:
            raise UsageError(
                f"--entry: what it returned has no {name}, which this needs"
            )


def report(arguments: argparse.Namespace) -> int:
    """Write a page."""
    entry = entry_of(arguments.entry) if arguments.entry else Entry()
    result = _result(arguments, entry)
    sets = [
        _dataset(loader) for loader in (entry.train_loader, entry.test_loader)
    ]
    suspects = None
    if arguments.mislabelled:
        _needed(entry, "model", "train_loader")
        suspects = find_mislabelled(
            entry.model, entry.train_loader, _config(arguments, entry)
        )
    page = result.to_html(
        arguments.output,
        *sets,
        title=arguments.title,
        suspects=suspects,
        k=arguments.k,
        classes=entry.classes,
        invert=arguments.invert,
    )
    _say(f"{page.resolve()}")
    return DONE


def top(arguments: argparse.Namespace) -> int:
    """Print the ends of the list of a test sample."""
    entry = entry_of(arguments.entry) if arguments.entry else Entry()
    result = _result(arguments, entry)
    try:
        helpful = result.top(arguments.test, arguments.k)
        harmful = result.bottom(arguments.test, arguments.k)
    except (KeyError, ValueError) as error:
        raise UsageError(str(error.args[0])) from error
    if arguments.json:
        named = {"helpful": helpful, "harmful": harmful}
        rows = {
            name: [one._asdict() for one in ends]
            for name, ends in named.items()
        }
        _say(as_json(rows))
        return DONE
    _say(_heading(result, arguments.test))
    _say(f"{'most helpful':>28}{'most harmful':>28}")
    for good, bad in zip(helpful, harmful, strict=True):
        _say(_cell(good) + _cell(bad))
    return DONE


def _cell(one: Any) -> str:
    return f"{one.train_index:14d}{one.influence:+14.3e}"


def _heading(
    result: InfluenceResult,
    test: str | None,
) -> str:
    if test is None:
        return f"mean over {len(result.tests)} test samples: training sample, influence"
    one = result.influences[test]
    return (
        f"test sample {one['num_in_dataset']} (label {one['label']}, relative residual {one['relative_residual']}): "
        "training sample, influence"
    )


def mislabelled(arguments: argparse.Namespace) -> int:
    """Print the most suspicious labels."""
    entry = entry_of(arguments.entry)
    _needed(entry, "model", "train_loader")
    table = find_mislabelled(
        entry.model,
        entry.train_loader,
        _config(arguments, entry),
        rank_by=arguments.rank_by,
        level=arguments.level,
    )
    if arguments.csv:
        _write_csv(table, Path(arguments.csv))
    if arguments.json:
        rows = table.rows(arguments.k)
        numbers = {"expected": table.expected, "flagged": table.flagged}
        _say(as_json({**numbers, "rows": rows}))
    else:
        _print_table(table, arguments.k)
    too_many = arguments.most is not None and (
        len(table.flagged) > arguments.most
    )
    return FOUND if too_many else DONE


def _print_table(
    table: Mislabelled,
    count: int,
) -> None:
    _say(repr(table).partition("(")[2].removesuffix(")"))
    _say(
        f"{'index':>8}{'label':>8}{'suggested':>11}{'probability':>13}{'self-influence':>16}{'loss':>10}{'margin':>10}"
    )
    for row in table.rows(count):
        _say(
            f"{row['index']:8d}{row['label']!s:>8}{row['suggested']!s:>11}{row['probability']:13.2f}"
            f"{row['self_influence']:16.3e}{row['loss']:10.3g}{row['margin']:10.3g}"
        )


def _write_csv(
    table: Mislabelled,
    path: Path,
) -> None:
    import csv

    rows = table.rows()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _asked(
    way: Callable[..., Any], arguments: argparse.Namespace, *needed: str
) -> Any:
    """What is found out of the script's model and loaders, of which these are needed."""
    entry = entry_of(arguments.entry)
    _needed(entry, *needed)
    config = _config(arguments, entry)
    return way(config, entry.model, entry.train_loader, entry.test_loader)


def doctor(arguments: argparse.Namespace) -> int:
    """Print what is wrong, or not what it seems, with a model and its data."""
    found = _asked(findings, arguments, "model", "train_loader")
    if arguments.json:
        _say(as_json([one._asdict() for one in found]))
    elif not found:
        _say("nothing was found")
    else:
        for name, what, advice in found:
            _say(f"{name}: {what}\n    {advice}")
    return FOUND if found else DONE


def estimate(arguments: argparse.Namespace) -> int:
    """Print what a run takes."""
    found = _asked(estimated, arguments, "model", "train_loader", "test_loader")
    if arguments.json:
        numbers = dataclasses.asdict(found)
        _say(as_json({**numbers, "seconds": found.seconds}))
    else:
        _say(str(found))
    return DONE


def _result(
    arguments: argparse.Namespace,
    entry: Entry,
) -> InfluenceResult:
    """Of the file, or of a run of what the entry gives."""
    if arguments.result:
        try:
            return InfluenceResult.load(arguments.result)
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from error
    _needed(entry, "model", "train_loader", "test_loader")
    return calc_influences(
        _config(arguments, entry),
        entry.model,
        entry.train_loader,
        entry.test_loader,
    )


def _dataset(loader: Any) -> Any:
    return None if loader is None else loader.dataset


def _config(
    arguments: argparse.Namespace,
    entry: Entry,
) -> Config:
    """The entry's options with those of the command line on top."""
    options = dict(map(_option, arguments.option))
    try:
        return Config.of(entry.config, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _option(text: str) -> tuple[str, Any]:
    """`key=value`; the value is JSON where it can be, else a text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--option: expected key=value, got {text!r}")
    try:
        known_key(key)
    except ValueError as error:
        raise UsageError(f"--option: {error}") from error
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


COMMANDS = {
    "report": report,
    "top": top,
    "mislabelled": mislabelled,
    "doctor": doctor,
    "estimate": estimate,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command -> its exit code."""
    whole = parser(COMMANDS, version())
    given = whole.parse_args(arguments)
    if given.command in ("report", "top") and not (given.result or given.entry):
        whole.error(f"{given.command}: give the file of a result, or --entry")
    try:
        code: int = given.run(given)
        return code
    except UsageError as error:
        sys.stderr.write(f"{NAME}: {error}\n")
        return WRONG_USE
    except Exception as error:
        sys.stderr.write(f"{NAME}: {type(error).__name__}: {error}\n")
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
