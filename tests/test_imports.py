"""Who may import whom: the *never* rules of the house, read off the source."""

import ast
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fedveil

ROOT = Path(fedveil.__file__).parent
FILES = {
    ".".join(("fedveil", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in ROOT.rglob("*.py")
}
NEVER = {
    "defenses": {"attacks", "runs", "federation", "audit", "studies", "report"},
    "copies": {"attacks", "runs", "federation", "audit", "studies", "report"},
    "attacks": {"runs", "federation", "audit", "studies", "report"},
    "runs": {"federation", "audit", "studies", "report"},
    "federation": {"audit", "studies", "report"},
    "audit": {"studies", "report"},
}
ONLY = {"report": {"report", "results", "files", "errors", "wording", "fedveil"}}
OWNERS = {"typer": {"cli"}, "click": {"cli"}, "rich": {"cli", "progress"}}


def imports(path):
    """Yield every module that a file imports, at any depth and under any condition."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


def room(module):
    """Return the part of the package that a module is in."""
    return module.split(".")[1] if "." in module else module


@cache
def edges():
    """Return who imports what, as pairs."""
    return [(own, other) for own, path in FILES.items() for other in imports(path)]


@cache
def inner():
    """Return who imports what of fedveil."""
    return [(own, other) for own, other in edges() if other.split(".")[0] == "fedveil"]


def test_no_room_imports_what_it_never_may():
    wrong = [
        (own, other)
        for own, other in inner()
        if room(other) in NEVER.get(room(own), ())
        or room(other) not in ONLY.get(room(own), {room(other)})
        or (room(other) == "cli" and room(own) not in ("cli", "__main__"))
    ]
    assert wrong == []


def test_typer_and_rich_stay_where_they_are_shown():
    wrong = [
        (own, other)
        for own, other in edges()
        if room(own) not in OWNERS.get(other.split(".")[0], {room(own)})
    ]
    assert wrong == []


@pytest.mark.parametrize("name", [str, room], ids=["modules", "rooms"])
def test_there_is_no_circle(name):
    graph = defaultdict(set)
    for own, other in inner():
        if name(own) != name(other) and other != "fedveil":
            graph[name(own)].add(name(other))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_name_means_two_things():
    places = defaultdict(list)
    for module, path in FILES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
