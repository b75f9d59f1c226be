"""How inputs are made of well-formed ones."""

import io
import json
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

Mutate = Callable[[Random, list[bytes]], bytes]

_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_TOKENS = (
    *("", "null", "true", "NaN", "Infinity", "-Infinity", "1e999", "-1", "0", "1e-320", "0.5"),
    *("9" * 400, "9" * 5000, '"', "\\", "\\u0000", "\\ud800", "\x00", "[", "{", "]", "}", ",", ":"),
    *("=", "#", "\n", "\r", "'''", '"""', "[[a]]", "{a={}}", "2026-01-01", "0x10", "inf", "nan"),
    *(
        "[" * 2000,
        "{" * 2000,
        "<script>",
        "../../etc",
        "é",
        "٣",
        "𝟛",
        "１",
        "_",
        "1_000",
        "+1",
        " ",
    ),
)
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        2**64,
        -(2**70),
        10**400,
        0.5,
        -0.0,
        1e308,
        5e-324,
    ),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "a",
        "\x00",
        "\ud800",
        "9" * 400,
        "<b>&",
        "nan",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"": None},
        [1] * 300,
        ["x"] * 300,
        {"a": {"b": {"c": []}}},
        "x" * 5000,
    ),
)


def flip(random: Random, seeds: list[bytes]) -> bytes:
    """Bytes: flips, edges, cuts, repeats, insertions and splices of two inputs."""
    content = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        place = random.randrange(len(content) + 1)
        match random.randrange(8):
            case 0 if content:
                content[place % len(content)] ^= 1 << random.randrange(8)
            case 1 if content:
                content[place % len(content)] = random.choice(_EDGES) & 0xFF
            case 2:
                width = random.choice((2, 4, 8))
                edge = random.choice(_EDGES) & (2 ** (8 * width) - 1)
                order = random.choice(("little", "big"))
                content[place : place + width] = edge.to_bytes(width, order)  # type: ignore[arg-type]
            case 3:
                del content[place:]
            case 4:
                del content[place : place + random.randrange(1, 64)]
            case 5:
                content[place:place] = content[place : place + 64] * random.choice((1, 2, 50))
            case 6:
                content[place:place] = random.randbytes(random.choice((1, 4, 64)))
            case _:
                other = random.choice(seeds)
                content[place:] = other[random.randrange(len(other) + 1) :]
    return bytes(content)


def retext(random: Random, seeds: list[bytes]) -> bytes:
    """Text: the same, or tokens that formats give a meaning to, in place of a stretch."""
    if random.random() < 0.3:
        return flip(random, seeds)
    content = random.choice(seeds)
    for _ in range(random.choice((1, 1, 2, 4))):
        place = random.randrange(len(content) + 1)
        token = random.choice(_TOKENS).encode("utf-8", "surrogatepass")
        content = content[:place] + token + content[place + random.choice((0, 0, 1, 5, 20)) :]
    return content


def regrow(random: Random, seeds: list[bytes]) -> bytes:
    """JSON: parts of the tree replaced, removed, wrapped, doubled; or its text damaged."""
    if random.random() < 0.25:
        return retext(random, seeds)
    lines = random.choice(seeds).decode().splitlines()
    # rounds.jsonl is a document a line; all others are one document.
    whole = "\n".join(lines)
    parts = lines if len(lines) > 1 and whole[0] == "{" and lines[0][-1] == "}" else [whole]
    index = random.randrange(len(parts))
    tree = json.loads(parts[index])
    for _ in range(random.choice((1, 1, 2, 3))):
        tree = _changed(random, tree)
    parts[index] = json.dumps(tree, ensure_ascii=random.random() < 0.5)
    return "\n".join(parts).encode("utf-8", "surrogatepass")


def _changed(random: Random, node: Any) -> Any:
    if isinstance(node, dict) and node and random.random() < 0.9:
        key = random.choice(list(node))
        match random.randrange(8):
            case 0:
                return {k: v for k, v in node.items() if k != key}
            case 1:
                return {**node, random.choice(("x", "", "__class__", "\x00")): node[key]}
            case _:
                return {**node, key: _changed(random, node[key])}
    if isinstance(node, list) and node and random.random() < 0.8:
        place = random.randrange(len(node))
        match random.randrange(6):
            case 0:
                return node[:place] + node[place + 1 :]
            case 1:
                return node * random.choice((2, 20))
            case _:
                return [*node[:place], _changed(random, node[place]), *node[place + 1 :]]
    return random.choice((random.choice(_VALUES), [node], {"value": node}, str(node)))


def compose(*words: str) -> Mutate:
    """Specifications: words, signs and numbers of the grammar in any order, or damaged text."""

    def make(random: Random, seeds: list[bytes]) -> bytes:
        if random.random() < 0.4:
            return retext(random, seeds)
        pieces = [random.choice(words)] + [
            random.choice(_TOKENS if random.random() < 0.1 else (*words, ":", "=", ",", "/", "@"))
            for _ in range(random.randrange(8))
        ]
        return "".join(pieces).encode("utf-8", "surrogatepass")

    return make


def rezip(random: Random, seeds: list[bytes]) -> bytes:
    """Archives: bytes of the archive, or of a member that is then packed anew."""
    if random.random() < 0.5:
        return flip(random, seeds)
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(random.choice(seeds))) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        names = old.namelist()
        chosen = random.choice(names)
        for name in names:
            content = old.read(name)
            if name == chosen:
                # The first 200 bytes are numpy's header or a pickle, the part with a grammar.
                content = retext(random, [content[:200]]) + content[200:]
            new.writestr(name, content)
    return buffer.getvalue()


def in_turn(random: Random, seeds: list[bytes]) -> bytes:
    """Return an input as it is."""
    return random.choice(seeds)
