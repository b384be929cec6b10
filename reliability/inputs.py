"""The table of bad input: runs tests/inputs and writes down what each row met, as markdown.

    python reliability/inputs.py [-o FILE]

Rows are the tests' own, so the table says what was seen, not what was meant. Writes reliability/results/inputs.json
too; exit code 1 when a test failed.
"""

from __future__ import annotations

import collections
import datetime
import re
import sys
import textwrap
from pathlib import Path

import click
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import machine

ROOT = Path(__file__).parents[1]
WIDEST = 160  # characters of an error in the table
_FOLDER = re.compile(r"/[^ \"]*?/test_[^/ \"]*(?:/work)?")  # where pytest lets a test work


class Collector:
    """Gathers the property `row` of each test: input, fault, exit code and the error, where there was one."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []
        self.outcomes: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self.outcomes[report.outcome] += 1
            rows = (value for key, value in report.user_properties if key == "row")
            self.rows += [tuple(_FOLDER.sub("/somewhere", str(cell)) for cell in row) for row in rows]


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where the table goes. [default: stdout]")
def main(output: Path | None) -> None:
    """Run the tests, and write the table."""
    found = Collector()
    code = pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", str(ROOT / "tests" / "inputs")], plugins=[found])
    text = table(found.rows)
    if output:
        output.write_text(text, encoding="utf-8")
    else:
        click.echo(text)
    codes = collections.Counter(row[2] for row in found.rows)
    counted = ", ".join(f"exit {code} {count}x" for code, count in sorted(codes.items()))
    click.echo(f"{len(found.rows)} rows: {counted}")
    result = {
        "date": datetime.date.today().isoformat(),
        "tests": dict(found.outcomes),
        "rows": [{"input": row[0], "fault": row[1], "code": int(row[2]), "error": row[3:]} for row in found.rows],
    }
    machine.RESULTS = Path(__file__).parent / "results"
    machine.RESULTS.mkdir(exist_ok=True)
    click.echo(machine.save("inputs", result))
    sys.exit(bool(code))


def table(rows: list[tuple[str, ...]]) -> str:
    """A markdown table; an error that several faults of an input share has one line."""
    lines = ["| input | fault | exit | error |", "|---|---|---|---|"]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, fault, code, *errors in rows:
        groups.setdefault((name, code, _short(errors[0]) if errors else "none"), []).append(fault)
    for (name, code, error), faults in groups.items():
        lines.append(f"| {name} | {_cell(', '.join(faults))} | {code} | {_cell(error)} |")
    return "\n".join(lines) + "\n"


def _short(error: str) -> str:
    return textwrap.shorten(error.splitlines()[0], WIDEST, placeholder=" ...")


def _cell(text: str) -> str:
    """Fit for a cell: as code, where markdown would read something into it."""
    text = "".join(c if c.isprintable() else "?" for c in text).replace("|", "\\|")
    return f"`{text}`" if any(c in text for c in "<>*_[]`") and "`" not in text else text


if __name__ == "__main__":
    main()
