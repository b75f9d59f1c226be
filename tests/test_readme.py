"""The READMEs say what docs/results says, in few words, and their commands are ones that exist."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from click import Command
from flwr.clientapp import ClientApp
from torch.utils.data import DataLoader, TensorDataset
from typer.main import get_command

from fedveil.cli.main import app
from fedveil.models import build_model
from tests.commands import forked

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import readme_tables  # noqa: E402

BLOCK = re.compile(r"<!-- table: .*?<!-- end -->", re.DOTALL)
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(params=readme_tables.READMES)
def readme(request):
    return request.param


@pytest.mark.parametrize(
    "name", [*readme_tables.READMES, *readme_tables.GUIDES, *readme_tables.PAGES]
)
def test_every_table_is_what_docs_results_gives(name):
    assert BLOCK.search(text(name))
    assert readme_tables.rendered(name, text(name)) == text(name)


@pytest.mark.parametrize("page", ["docs/noise.md", "docs/tracing.md"])
def test_every_row_of_figures_stands_in_docs_results(page):
    results = {
        line
        for file in (ROOT / "docs/results").glob("*.md")
        for line in file.read_text(encoding="utf-8").splitlines()
    }
    rows = [line for line in text(page).splitlines() if line.startswith("|") and "%" in line]
    assert len(rows) >= 10
    assert [line for line in rows if line not in results] == []


def test_a_changed_result_would_be_noticed(readme, monkeypatch):
    true = readme_tables._results

    def changed(name):
        results = true(name)
        for row in results["rows"]:
            if "final_mean" in row:
                row["final_mean"] -= 0.01
        return results

    monkeypatch.setattr(readme_tables, "_results", changed)
    assert readme_tables.rendered(readme, text(readme)) != text(readme)


def test_no_other_figure_was_measured(readme):
    """What stands outside the tables with a unit is the picture's own description, or a setting."""
    rest = FENCE.sub("", BLOCK.sub("", text(readme)))
    rest = re.sub(r"!\[.*?\]", "", rest, flags=re.DOTALL)
    assert not re.findall(r"\d[\d.,]*\s*(?:%|dB|points|seconds|minutes|포인트|초|분\b)", rest)


def test_it_is_short(readme):
    assert len(text(readme).split()) <= 900


def test_links_lead_somewhere(readme):
    for target in re.findall(r"\]\(([^)#:]+)\)", text(readme)):
        assert (ROOT / target).exists(), target


def _options(words):
    command: Command = get_command(app)
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    return {option for parameter in command.params for option in parameter.opts}


def shell_lines(readme):
    """Return the lines of the shell blocks, each whole and without its remark."""
    return [
        line.partition("#")[0].strip()
        for language, block in FENCE.findall(text(readme))
        if language == "sh"
        for line in block.replace("\\\n", " ").splitlines()
    ]


# What makes a printed command a matter of seconds; of an option given twice the last counts.
QUICK = {
    "train --dataset mnist --out": "--dataset digits --clients 10",
    "train": "--dataset digits --clients 10 --fraction 1 --rounds 1 --epochs 1",
    "audit theft": "--labels 0 --colluders 1 --thieves 1 --workers 1",
    "audit leakage": "--dataset digits --images 1 --workers 1",
}
# A recording is audited in tests/audit/test_recorded.py, which first makes one.
ELSEWHERE = ("make ", "pip ", "flwr ", "fedveil audit leakage --recorded")


def test_its_commands_run_in_the_order_they_are_printed(tmp_path):
    lines = [re.sub(r"^[A-Z_]+=\S+ ", "", line) for line in shell_lines("README.md")]
    ours = [line for line in lines if not line.startswith(ELSEWHERE)]
    assert len(ours) >= 6
    for line in ours:
        words = shlex.split(line)
        assert words.pop(0) == "fedveil", line
        added = next((QUICK[key] for key in QUICK if line.startswith(f"fedveil {key} ")), "")
        done = forked(*words, *added.split(), cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("page", ["README", "docs/tutorial"])
def test_both_languages_print_the_same_commands(page):
    english, korean = (
        list(filter(None, shell_lines(name))) for name in (f"{page}.md", f"{page}.ko.md")
    )
    assert english == korean
    assert len(english) >= 5


def test_its_python_runs(readme):
    images = TensorDataset(torch.rand(400, 1, 8, 8), torch.arange(400) % 10)
    given = {
        "ClientApp": ClientApp,
        "Net": lambda: build_model("lenet", (1, 8, 8), 10, seed=0),
        "calibration_loader": DataLoader(images, batch_size=50),
    }
    blocks = [block for language, block in FENCE.findall(text(readme)) if language == "python"]
    for block in blocks:
        exec(block, given)
    assert isinstance(given["app"], ClientApp)
    assert given["strategy"].cap.accuracy == 0.6


def test_its_commands_have_these_options(readme):
    lines = shell_lines(readme)
    ours = [shlex.split(line.partition("fedveil ")[2]) for line in lines if "fedveil " in line]
    assert len([words for words in ours if words]) >= 6
    for words in ours:
        known = _options(words)
        for word in words:
            if word.startswith("--"):
                assert word in known, words


DOCS = ROOT / "docs"
PAGES = sorted({*DOCS.glob("*.md"), *DOCS.glob("api/*.md")} - {DOCS / "index.md"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_begins_with_five_lines_of_what_to_do_and_is_listed(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert [line[:3] for line in lines[2:7]] == [f"{number}. " for number in range(1, 6)]
    assert f"({page.relative_to(DOCS)})" in text("docs/index.md")
    assert f" {page.relative_to(DOCS)}\n" in text("mkdocs.yml")


@pytest.mark.parametrize("page", ["README.md", "README.ko.md", "docs/index.md"])
def test_what_is_said_of_the_picture_is_what_the_demo_gave(page):
    told = re.search(r"!\[([^\]]*)\]\((?:docs/)?demo\.png\)", text(page))[1]
    content = (ROOT / "docs/results/demo.json").read_text(encoding="utf-8")
    given = {round(100 * float(number)) for number in re.findall(r"(?<=: )[01](?:\.\d+)?", content)}
    said = {int(number) for number in re.findall(r"(\d+) %", told)}
    assert len(said) >= 4
    assert said <= given
