"""``fedveil report``: one page from any set of runs and audits."""

from pathlib import Path
from typing import Annotated

import typer

from fedveil.errors import FedveilError


def report(
    directories: Annotated[
        list[Path], typer.Argument(help="Directories of runs and audits.", metavar="DIR...")
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "fedveil report",
) -> None:
    """Write one self-contained HTML page about runs and audits.

    Verdict, curves, reconstructions, theft, frontier, settings and limits. The page loads nothing
    from anywhere, and no key, checkpoint or archive is opened for it.
    """
    if out.is_dir():
        raise FedveilError(f"--out {out} is a directory; name a file, like {out / 'report.html'}")
    if not out.absolute().parent.is_dir():
        raise FedveilError(f"--out {out}: {out.parent} does not exist; make it first")
    from fedveil.report import write_report

    write_report(directories, out, title=title)
    typer.echo(str(out))
