"""``fedveil report`` from the command line."""

from pathlib import Path

import pytest

from tests.commands import forked
from tests.report.report_material import make_leakage, make_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"))
    make_leakage(Path("leakage"))
    Path("file.txt").write_text("mine")
    return tmp_path


def run(*options):
    return forked("report", *options, env={"PATH": ""})


def test_a_page_from_the_command_line(folder):
    done = run("run", "leakage", "--out", "page.html", "--title", "Acme & Sons")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "page.html"
    page = Path("page.html").read_text(encoding="utf-8")
    assert "<h1>Acme &amp; Sons</h1>" in page
    assert "Cap held" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["run", "--out", "run"], "--out run is a directory; name a file"),
        (["run", "--out", "none/page.html"], "none does not exist; make it first"),
        (["file.txt"], "file.txt is a file; name the --out directory of a run"),
        (["none"], "none does not exist; name the --out directory of a run"),
    ],
)
def test_a_page_that_cannot_be(folder, options, words):
    before = sorted(folder.rglob("*"))
    done = run(*options)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert sorted(folder.rglob("*")) == before
