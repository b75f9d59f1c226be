"""The READMEs' tables, from docs/results: ``python benchmarks/readme_tables.py`` writes them."""

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedveil.results import (
    AUC,
    EXACT,
    FOUND,
    FOUND_SURELY,
    IDENTIFIED,
    PICKED_OUT,
    SCORES,
    TO_ORIGINAL,
    TO_TRAINED,
    renamed,
)

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.ko.md")
GUIDES = ("docs/guide.md", "docs/guide.ko.md")
PAGES = (
    *("docs/models.md", "docs/both-ways.md", "docs/inversion-suite.md", "docs/flower.md"),
    *("docs/model-theft.md", "docs/defenses.md", "docs/gradient-leakage.md"),
)
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


_VIEW = "best by the owner's view"


def _results(name: str) -> Any:
    text = (ROOT / "docs/results" / f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text, object_hook=renamed)


_ALIKE = ("theft-trained-alike", "theft-trained-alike-shards")
_ANSWERS = ("theft-answers", "theft-answers-shards")
_STRATEGIES = (
    ("`fedavg`", ("theft-study",), "fedavg"),
    ("`fedavg`, {longer}", ("theft-fedavg-50",), "fedavg"),
    ("`fedavg`, {alike}", _ALIKE, "fedavg, trained alike"),
    ("`noise-delta`", ("theft-study",), "noise-delta"),
    ("`protected`", ("theft-study",), "protected"),
    ("`analytic`", ("theft-analytic",), "analytic"),
    ("{alone}", ("theft-study",), "server alone"),
)
_ANY_PARTITION = ("analytic", "server alone")  # w is the same to the bit


def theft(words: Mapping[str, str]) -> list[str]:
    """Accuracy of w, and the most that one thief with 10 labels gains on training alone."""
    heads = ("strategy", "owner", "shards", "gain")
    lines = [f"| {' | '.join(words[head] for head in heads)} |", "|---|---|---|---|"]
    for label, names, arm in _STRATEGIES:
        rows = {
            row["partition"]: row
            for name in names
            for row in _results(name)["rows"]
            if row["arm"] == arm and row["dataset"].startswith("mnist")
        }
        if arm in _ANY_PARTITION:
            rows["shards:2"] = rows["iid"]
        best = [
            one
            for one in rows["iid"]["theft"]
            if (one["attack"], one["labels"], one["colluders"]) == (_VIEW, 10, 1)
        ]
        gain = _range(best[0]) if best else words["nobody" if arm == "server alone" else "itself"]
        gain = _by_every_thief() if arm == "noise-delta" else gain
        lines.append(
            f"| {label.format_map(words)} | {_final(rows['iid'], words)} "
            f"| {_final(rows['shards:2'], words)} | {gain} |"
        )
    return lines


def _by_every_thief() -> str:
    """Return what a thief of ten labels gains on ``noise-delta`` where it can cluster, too."""
    (row,) = (row for row in _results("theft-ten-labels")["rows"] if row["attack"] == _VIEW)
    return f"{round(100 * row['advantage']):+d}"


def _final(row: Mapping[str, Any], words: Mapping[str, str]) -> str:
    return f"{row['final_mean']:.1%}{words['single'] if len(row['final']) == 1 else ''}"


def _range(row: Mapping[str, Any]) -> str:
    middle, low, high = (
        round(100 * row[name]) for name in ("advantage", "advantage_low", "advantage_high")
    )
    single = 1 in (row.get("thieves"), len(row["chosen"]))
    return f"{middle:+d}, one" if single else f"{middle:+d} [{low:+d}, {high:+d}]"


def leakage(words: Mapping[str, str]) -> list[str]:
    """What the attack that knows the transformation gives back of 100 images."""
    lines = [
        f"| {words['transformation']} | {words['exact']} | {words['decibels']} |",
        "|---|---|---|",
    ]
    rows = {row["defense"]: row for row in _results("dct")["rows"]}
    for defense in ("none", "dct:keep=21", "dct:keep=6", "dct:keep=1"):
        found = rows[defense]["adaptive"]
        name = words["none"] if defense == "none" else f"`{defense}`"
        exact = f"{found['exact'] * found['images']:.0f} / {found['images']}"
        lines.append(f"| {name} | {exact} | {found['psnr_original']:.1f} dB |")
    return lines


def noise(words: Mapping[str, str]) -> list[str]:
    """Accuracy of w, the best copy and the rounds over the cap, on images that chose no setting."""
    lines = (ROOT / "docs/results/noise-blind.md").read_text(encoding="utf-8").splitlines()
    heads = (words[key] for key in ("partition", "strategy", "accuracy", "copy", "over"))
    table = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|"]
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        partition, strategy, _, accuracy, copy, over = cells[:6]
        told = re.sub(r"(\d+) of (\d+)", words["of"], over)
        table.append(f"| {partition} | `{strategy}` | {accuracy} | {copy} | {told} |")
    return table


def architectures(_words: Mapping[str, str]) -> list[str]:
    """What became of other people's architectures, by strategy, DP-SGD and audit."""
    found = _results("architectures")["architectures"]
    columns = list(next(iter(found.values())))
    heads = (f"`{column}`" for column in columns)
    lines = [f"| architecture | {' | '.join(heads)} |", f"|---|{'---|' * len(columns)}"]
    for name, row in found.items():
        cells = [_OUTCOMES[row[column].partition(":")[0]] for column in columns]
        cells = [
            f"{cell} (without a client)" if ", without node" in row[column] else cell
            for cell, column in zip(cells, columns, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def analytic(_words: Mapping[str, str]) -> list[str]:
    """What one round of sums gives, over seeds."""
    lines = ["| | images a client | D | w | seeds | bytes a client |", "|---|---|---|---|---|---|"]
    rows = _results("analytic-runs")["rows"]
    for name in dict.fromkeys(row["dataset"] for row in rows):
        seeds = [row for row in rows if row["dataset"] == name]
        first = seeds[0]
        found = sorted(row["accuracy"] for row in seeds)
        asked = f", `--filters {first['filters']}`" if "filters" in first else ""
        lines.append(
            f"| {name}{asked} | {first['images'] // first['clients']} | {first['features']:,} "
            f"| {sum(found) / len(found):.1%} [{found[0]:.1%}, {found[-1]:.1%}] "
            f"of {first['report_images']:,} | {len(found)} "
            f"| {first['answer_bytes'] / 1e6:,.1f} MB |"
        )
    return lines


def attackers(_words: Mapping[str, str]) -> list[str]:
    """What an attacker of the suite reaches where an earlier one did not."""
    return [
        "| attack | setting | before | now | published |",
        "|---|---|---|---|---|",
        *map(_batch_line, ((16, True), (64, False), (256, False))),
        _whole_client_line(),
        _pattern_line(),
        *_active_lines(),
        *_membership_lines(),
        *_copies_lines(),
    ]


def batches(_words: Mapping[str, str]) -> list[str]:
    """What is read off a first linear layer, attack by attack: images exact."""
    attacks = ("fc", "peel", "ica")
    lines = [
        f"| images | units × layers | inputs | updates | {' | '.join(map(_code, attacks))} "
        "| `peel` cannot tell |",
        f"|---|---|---|---|{'---|' * len(attacks)}---|",
    ]
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in _alone():
        setting = (row["images"], row["hidden"], row["layers"], row["centred"])
        groups.setdefault(setting, {})[row["attack"]] = row
    for (images, hidden, layers, centred), found in groups.items():
        cells = [_share(found[attack], "exact") if attack in found else "" for attack in attacks]
        lines.append(
            f"| {images} | {hidden:,} × {layers} | {'centred' if centred else 'in [0, 1]'} "
            f"| {found['ica']['updates']} | {' | '.join(cells)} "
            f"| {found['peel']['untold'] if 'peel' in found else ''} |"
        )
    return lines


def sums(_words: Mapping[str, str]) -> list[str]:
    """What is rebuilt of the mean update of several clients, exactly and not."""
    lines = [
        "| network | clients × images | each returns | attack | sums | exact | identified (floor) "
        "| dB to original | processor seconds |",
        f"|{'---|' * 9}",
    ]
    for row in _results("batches")["rows"]:
        if row["summed"] > 1:
            returned = (
                "a gradient"
                if row["local_batch"] is None
                else f"an epoch in batches of {row['local_batch']}"
            )
            if row.get("defense", "none") != "none":
                returned += f" under `{row['defense']}`"
            lines.append(
                f"| CIFAR-100, {row['hidden']:,} ReLU units | {row['summed']} × "
                f"{row['images'] // row['summed']} | {returned} | `{row['attack']}` "
                f"| {row['updates']} | {_share(row, 'exact')} | {row['identified']:.0%} "
                f"({row['identified_floor']:.0%}) | {row['psnr']:.1f} "
                f"| {row['cpu_seconds_an_update']:.0f} |"
            )
    found = _results("sums-cnn")
    settings, row = found["settings"], found["rows"][0]
    lines.append(
        f"| CIFAR-10, `{settings['model']}` | {settings['aggregate']} × {settings['batch']} "
        f"| a gradient | `{row['attack']}` "
        f"| {settings['images'] // settings['batch'] // settings['aggregate']} "
        f"| {_share(row, EXACT.key)} | {row[IDENTIFIED.key]:.0%} ({row['identified_floor']:.0%}) "
        f"| {row['psnr_original']:.1f} (floor {row['psnr_original_floor']:.1f}) |  |"
    )
    return lines


def separation(_words: Mapping[str, str]) -> list[str]:
    """How many mixed images are parted, before anything sharpens them."""
    rows = {(row["images"], row["method"]): row for row in _results("separation")["rows"]}
    lines = [
        "| mixed images | answers of a place together: cosine, median | above 0.9 "
        "| differences one by one: cosine, median | above 0.9 |",
        "|---|---|---|---|---|",
    ]
    for images in sorted({images for images, _ in rows}):
        cells = [
            f"{row['cosine']:.2f} | {row['above_09']:.0%}" if row else " | "
            for row in (rows.get((images, method)) for method in ("together", "one by one"))
        ]
        lines.append(f"| {images} | {' | '.join(cells)} |")
    return lines


def cocktail(_words: Mapping[str, str]) -> list[str]:
    """The Cocktail Party's authors' code beside ours, on the same gradients."""
    lines = [
        "| images, units | what was run | dB to original, fitted | above 20 dB "
        "| processor seconds |",
        "|---|---|---|---|---|",
    ]
    for row in _results("cocktail-party")["rows"]:
        ours = f"`{row['attack']}`" if row["attack"].startswith("ica") else row["attack"]
        lines.append(
            f"| {row['images']}, {row['hidden']:,} | {ours} | {row['psnr']:.1f} "
            f"| {row['above_20']:.0%} | {row['cpu_seconds']:.1f} |"
        )
    return lines


def _alone() -> list[dict[str, Any]]:
    """Return the rows of updates of one client."""
    return [row for row in _results("batches")["rows"] if row["summed"] == 1]


def _code(name: str) -> str:
    return f"`{name}`"


def _share(row: Mapping[str, Any], name: str) -> str:
    low, high = (100 * row[f"{name}_{end}"] for end in ("low", "high"))
    return f"{row[name]:.1%} [{low:.1f}, {high:.1f}]"


def active_servers(_words: Mapping[str, str]) -> list[str]:
    """What servers that plant something read, and which inspection refuses what they send."""
    lines = [
        "| attack | images, network | clients × images | disturbance | updates | exact | dB "
        "| identified (floor) | refused by weights | by trial | processor seconds |",
        f"|{'---|' * 11}",
    ]
    found = _results("active-servers")
    for row in (*found["fished"], *found["sorted"]):
        low, high = (100 * row[name] for name in ("exact_low", "exact_high"))
        refused = ("yes" if row[name] else "no" for name in ("weights_refuse", "responses_refuse"))
        lines.append(
            f"| `{row['attack']}` | {row.get('dataset', 'cifar100')}, `{row['model']}` "
            f"| {row['clients']} × {row['images_each']} | {row['noise']:g} | {row['updates']} "
            f"| {row['exact']:.0%} [{low:.0f}, {high:.0f}] | {row['psnr']:.1f} "
            f"| {row['identified']:.0%} ({row['identified_floor']:.0%}) | {' | '.join(refused)} "
            f"| {row['cpu_seconds']:.1f} |"
        )
    return lines


def many_rounds(_words: Mapping[str, str]) -> list[str]:
    """What membership attacks tell by the number of rounds, against the other clients' scores."""
    rows = {
        (row["attack"], row["rounds"]): row
        for row in _results("membership-many-rounds")["rows"]
        if row["scores"] == "against others"
    }
    attacks, counts = ({key[place]: None for key in rows} for place in (0, 1))
    heads = [f"{what}, {n} round{'s' if n > 1 else ''}" for what in _TOLD for n in counts]
    lines = [f"| attack | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for attack in attacks:
        areas = [f"{rows[attack, n]['auc']:.3f}" for n in counts]
        shares = [_share(rows[attack, n], "tpr_at_1") for n in counts]
        lines.append(f"| `{attack}` | {' | '.join([*areas, *shares])} |")
    return lines


_TOLD = (AUC.heading, FOUND.heading)


def batch_statistics(_words: Mapping[str, str]) -> list[str]:
    """What running statistics tell of candidates, and what other attacks tell beside them."""
    kinds = {"": "fresh", "-noise": "fresh", "-steps": "fresh", "-trained": "trained"}
    lines = [
        "| observed | weights | steps | defence | attack | updates "
        f"| {PICKED_OUT.heading} | {AUC.heading} | {FOUND.heading} |",
        f"|{'---|' * 9}",
    ]
    for end, weights in kinds.items():
        found = _results(f"membership-statistics{end}")
        for row in found["rows"]:
            images, clients = row["images"], row["clients"]
            step = found["training"]["batch_size"]
            observed = f"{images} image{'s' if images > 1 else ''}"
            if clients > 1:
                observed = f"sum of {clients} clients × {images}"
            found_ = "" if row["tpr_at_1"] is None else _share(row, "tpr_at_1")
            line = (
                f"| {observed} | {weights} | {-(-images // step)} | `{row['defense']}` "
                f"| `{row['attack']}` | {len(row['updates'])} "
                f"| {_share(row, PICKED_OUT.key)} | {row['auc']:.3f} | {found_} |"
            )
            if line not in lines:  # the same updates, in two files
                lines.append(line)
    return lines


def batch_statistics_prior(_words: Mapping[str, str]) -> list[str]:
    """What a prior on a batch's statistics does for inverting gradients."""
    told = {"none": "none (`ig`)", "running": "those that were sent", "own": "the batch's own"}
    lines = [
        f"| images a batch | prior on statistics | updates | {TO_ORIGINAL.heading} (floor) "
        f"| {IDENTIFIED.heading} (floor) |",
        f"|{'---|' * 5}",
    ]
    for row in _results("batch-statistics")["rows"]:
        low, high = min(row["psnr_updates"]), max(row["psnr_updates"])
        lines.append(
            f"| {row['batch']} | {told[row['prior']]} | {row['updates']} "
            f"| {row['psnr_original']:.1f}, {low:.1f} to {high:.1f} "
            f"({row['psnr_original_floor']:.1f}) "
            f"| {_share(row, IDENTIFIED.key)} ({row['identified_floor']:.1%}) |"
        )
    return lines


def recovery(_words: Mapping[str, str]) -> list[str]:
    """Which networks an exact search solves at batch 1, beside inverting gradients."""
    exact, searched = (
        {row["network"]: row for row in _results(name)["rows"] if row["batch"] == 1}
        for name in ("gauss-newton", "gauss-newton-ig")
    )
    lines = [
        "| network | unknowns / weights | exact | dB of both images | `ig`: dB of both images |",
        "|---|---|---|---|---|",
    ]
    for name, row in exact.items():
        both = (
            ", ".join(f"{db:.1f}" for db in sorted(one["psnr_all"]))
            for one in (row, searched[name])
        )
        lines.append(
            f"| {name} | {row['unknowns']:,} / {row['weights']:,} | {row['exact']:.0%} "
            f"| {' | '.join(both)} |"
        )
    return lines


def patterns(_words: Mapping[str, str]) -> list[str]:
    """What is rebuilt of single images behind ReLU and max pooling, where layers were found."""
    lines = [
        "| | images | `ig`: dB, median | `layers`: dB, median | nearer by `layers` | exact |",
        "|---|---|---|---|---|---|",
    ]
    for name, untold in (("every layer found", False), ("cannot tell", True)):
        searched, solved = _rebuilt_by_pattern(untold)
        nearer = sum(now > before for before, now in zip(searched, solved, strict=True))
        exact = sum(now > _EXACT_DECIBELS for now in solved)
        lines.append(
            f"| {name} | {len(solved)} | {statistics.median(searched):.1f} "
            f"| {statistics.median(solved):.1f} | {nearer} | {exact} |"
        )
    return lines


def _rebuilt_by_pattern(untold: bool) -> tuple[list[float], list[float]]:
    """Return decibels of ``ig`` and ``layers``, of those images of which the latter cannot tell."""
    searched, solved = _results("patterns")["rows"]
    inside = [place for place, one in enumerate(solved["untold"]) if one == untold]
    before, now = ([row["psnr"][place] for place in inside] for row in (searched, solved))
    return before, now


_EXACT_DECIBELS = 40


def examples(_words: Mapping[str, str]) -> list[str]:
    """What each example app does by ``flwr run``."""
    lines = [
        "| `examples/` | lines | clients are sent | cap | best copy | w | client evaluation |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in _results("example-apps")["rows"]:
        copy = "" if row["best_copy"] is None else f"{row['best_copy']:.1%} of {row['copies']}"
        cap = "" if row["cap"] is None else f"{row['cap']:.0%}, {_held(row)}"
        said = "said once" if row["log"]["no client evaluates"] == 1 else "Flower's own"
        lines.append(
            f"| `{row['app']}` | {row['lines']} | {_SENT[row['app']]} | {cap} | {copy} "
            f"| {row['accuracy']:.1%} | {said} |"
        )
    return lines


def _held(row: Mapping[str, Any]) -> str:
    return "held" if row["best_copy"] <= row["cap"] else "passed"


_SENT = {
    "quickstart-pytorch": "copies below the cap",
    "advanced-pytorch": "the untrained model and the server's images",
    "custom-mods": "the model, by Flower's `FedAvg`",
    "secure-aggregation": "copies below the cap",
    "quickstart-sklearn": "copies below the cap",
    "closed-form": "a feature map",
}


def prices(_words: Mapping[str, str]) -> list[str]:
    """What each protection costs, and what thieves gain all the same, by the owner's view."""
    thieves = ((1, 10), (1, 100), (2, 10), (5, 600))
    heads = [f"{_many(count)}, {labels}" for count, labels in thieves]
    lines = [
        f"| | `--strategy` | w | {' | '.join(heads)} |",
        f"|---|---|---|{'---|' * len(thieves)}",
    ]
    added = ("theft-analytic", *_ALIKE, *_ANSWERS)  # their baseline is the study's
    for name in ("theft-study", "theft-fedavg-50", *added, "theft-cifar10"):
        rows = [
            row for row in _results(name)["rows"] if row["arm"] != "fedavg" or name not in added
        ]
        how = ", by answers" if name in _ANSWERS else ""
        how = ", 50 rounds" if name == "theft-fedavg-50" else how
        for row in sorted(rows, key=lambda row: str(row["partition"])):
            found = {
                (one["colluders"], one["labels"]): _range(one)
                for one in row["theft"]
                if one["attack"] == _VIEW
            }
            cells = [found.get(who, "") for who in thieves]
            if not found:
                cells[0] = _NO_THEFT[row["arm"].partition(",")[0]]
            data = row["dataset"].partition("@")[0]
            spread = f" ± {100 * row['final_sd']:.1f}" if len(row["final"]) > 1 else ", one run"
            lines.append(
                f"| {data}, {row['partition']} | {row['arm']}{how} "
                f"| {row['final_mean']:.1%}{spread} | {' | '.join(cells)} |"
            )
    return lines


def theft_of_sums(_words: Mapping[str, str]) -> list[str]:
    """What thieves gain by the map that an analytic run sends, by the owner's view."""
    (row,) = (row for row in _results("theft-analytic")["rows"] if row["arm"] == "analytic")
    return _by_labels(row["theft"])


def theft_of_sums_of_photographs(_words: Mapping[str, str]) -> list[str]:
    """The same on CIFAR-10."""
    return _by_labels(_results("theft-analytic-cifar10")["rows"])


def _by_labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {(one["labels"], one["colluders"]): one for one in rows if one["attack"] == _VIEW}
    labels, colluders = (sorted({key[place] for key in found}) for place in (0, 1))
    heads = " | ".join(f"{_many(count)}: thief, alone | gains" for count in colluders)
    lines = [f"| labels | {heads} |", f"|---|{'---|---|' * len(colluders)}"]
    for count in labels:
        cells = [
            f"{found[count, many]['accuracy']:.0%}, {found[count, many]['alone']:.0%} "
            f"| {_range(found[count, many])}"
            for many in colluders
        ]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return lines


def answer_shadows(_words: Mapping[str, str]) -> list[str]:
    """What shadow clients teach a server that sees answers of who is in them."""
    lines = [
        "| asked about | answers | seen | AUC | found at FPR 1 % | at FPR 0.1 % |",
        "|---|---|---|---|---|---|",
    ]
    asked = {"asked": "the candidate itself", "others": "the server's images"}
    for row in _results("answer-shadows")["rows"]:
        shares = [_share(row, name) for name in ("tpr_at_1", "tpr_at_01")]
        area = f"{row['auc']:.2f} [{row['auc_low']:.2f}, {row['auc_high']:.2f}]"
        lines.append(
            f"| {asked[row['question']]} | {row['answers']} | {row['seen']} "
            f"| {area} | {' | '.join(shares)} |"
        )
    return lines


def paired_logits(_words: Mapping[str, str]) -> list[str]:
    """What pictures a server makes of what clients answer, beside pictures of strangers."""
    lines = [
        "| seen | the server's images | surer by | picture | floor | over it | mean of the class |",
        "|---|---|---|---|---|---|---|",
    ]
    for seen, name in _SEEN_ANSWERS.items():
        for row in _results(name)["rows"]:
            lack, mean = row["server_lacks_the_class"], row["mean_of_the_class"]
            middle, low, high = row["over"]
            lines.append(
                f"| {seen} | {'none of the class' if lack else 'of all classes'} | {row['gap']:g} "
                f"| {row['correlation']:.2f} | {row['floor']:.2f} "
                f"| {middle:+.2f} [{low:+.2f}, {high:+.2f}] "
                f"| {'' if mean is None else f'{mean:.2f}'} |"
            )
    return lines


_SEEN_ANSWERS = {"one client": "paired-logits", "sum of ten": "paired-logits-sums-of-10"}


def _many(count: int) -> str:
    return {1: "one thief", 2: "two", 5: "five"}[count]


_NO_THEFT = {"fedavg": "sent w itself", "server alone": "no client"}


def defended_round(_words: Mapping[str, str]) -> list[str]:
    """What each membership attack picks out of the same small rounds, under each defence."""
    rows = _defended()
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    lines = [
        f"| defence | {' | '.join(map(_code, attacks))} | the best, {FOUND.heading} |",
        f"|---|{'---|' * len(attacks)}---|",
    ]
    for defense in dict.fromkeys(row["defense"] for row in rows):
        told = {row["attack"]: row for row in rows if row["defense"] == defense}
        best = max(told.values(), key=lambda row: float(row[PICKED_OUT.key]))
        cells = [_whole(told[one], PICKED_OUT.key) if one in told else "" for one in attacks]
        found = "cannot tell" if best["tpr_at_1"] is None else _whole(best, "tpr_at_1")
        lines.append(f"| `{defense}` | {' | '.join(cells)} | {found} |")
    return lines


def deploy(_words: Mapping[str, str]) -> list[str]:
    """For whom which settings, and what the best attacks of the suite leave of them."""
    summed = _summed(("membership-sizes-20", "membership-sizes-20-1024"), "none")
    noised, plain = (_summed(("membership-sizes",), one) for one in ("noise:ratio=2", "none"))
    shown = {one: _most_picked(one) for one in ("noise:ratio=2", "dp-sgd:noise=1")}
    accuracy = {row["defense"]: row for row in _results("frontier")["rows"]}
    rounds = {
        row["rounds"]: row["tpr_at_1"]
        for row in _results("membership-many-rounds")["rows"]
        if (row["attack"], row["scores"]) == ("gradient", "against others")
    }
    alone, several = (
        next(
            row
            for row in _results(name)["rows"]
            if (row["defense"], row["scenario"], row["best"]) == ("noise:ratio=2", scenario, True)
        )
        for name, scenario in (("frontier", "worst"), ("frontier-suite", "round"))
    )
    lost = 100 * (accuracy["none"]["accuracy"] - accuracy["noise:ratio=2"]["accuracy"])
    private = accuracy["dp-sgd:noise=1"]
    return [
        "| who you are | setting | what it gives |",
        "|---|---|---|",
        "| the server follows the protocol; nobody may tell which images were used "
        "| `--secure-aggregation`, and rounds of ten clients or more that train on a thousand "
        f"images or more each | {summed[1024]} of images picked out among 100 at 10 × 1,024 "
        "images, where chance is 1 %; no accuracy. Rounds of the same images add up: of a client "
        f"watched by itself the gradient told {rounds[10]:.0%} in ten and {rounds[1]:.0%} in one |",
        "| the same, and clients have hundreds of images | `--secure-aggregation` and `--defense "
        f"noise:ratio=2` | {noised[256]} at 10 × 256 images, where it is {plain[256]} without "
        f"noise; {lost:.1f} points of accuracy |",
        "| the same, and clients have tens of images | more clients a round, until there are "
        "thousands of images in it; else the guarantee below | of ten clients with 16 images each "
        f"{summed[16]} are picked out, {noised[16]} under that noise |",
        "| the server sees every update (`--no-secure-aggregation`, `--average median`) | large "
        "rounds, and `--defense noise:ratio=2` against rebuilt pictures | by what `ig` rebuilds "
        f"{_whole(alone, IDENTIFIED.key)} are identified of one image a round, and of 16 "
        f"{_whole(several, IDENTIFIED.key)}, where images without content reach "
        f"{several['identified_floor']:.0%}; {lost:.1f} points of accuracy; "
        f"*{shown['noise:ratio=2']} of a batch of 16 are still picked out by who has candidates* |",
        "| a guarantee in writing, whatever the attack | `--defense dp-sgd:noise=1 --batch-size "
        f"250 --learning-rate 2`, ε in `summary.json` | ε = {private['privacy']['epsilon']:.1f} "
        f"for 20 rounds of training; of a batch of 16 under the same noise "
        f"{shown['dp-sgd:noise=1']} are picked out; accuracy falls from "
        f"{accuracy['none']['accuracy']:.1%} to {private['accuracy']:.1%} |",
        "| the content must not be legible even to a server that breaks the protocol "
        "| `fedveil transform SRC DST --keep 1` to `3` at the site, before any app; the settings "
        "above besides | fine detail is gone for good; which image it was is not hidden |",
        "| the network's first layer is linear, before a ReLU | another network, [sums of "
        "features](both-ways.md), or `--defense noise:ratio=2`, under which nothing was rebuilt; "
        "neither secure aggregation nor local steps hide anything of so few images "
        f"| {_read_whole(None)} of the *images themselves* are exact in sums of ten "
        f"clients of 16, {_read_whole(8)} after an epoch in batches of 8, and {_largest()} in one "
        "batch |",
        "| a single image a round | train on larger batches first | undefended or transformed, "
        "recovery is exact, [above](#what-it-protects-and-what-it-does-not) |",
    ]


def _read_whole(local_batch: int | None) -> str:
    (row,) = (
        row
        for row in _results("batches")["rows"]
        if (row["summed"], row["local_batch"], row["attack"]) == (10, local_batch, "ica")
        and row.get("defense", "none") == "none"
    )
    return _whole(row, "exact")


def _largest() -> str:
    """Return how many images of one batch came back exactly, of the largest that was read."""
    read = [row for row in _alone() if row["attack"] == "ica" and row["exact"] > 0.9]
    most = max(read, key=lambda row: (row["images"], row["updates"]))
    return f"{_rounded(most['exact'])} of {most['images']}"


def _rounded(share: float) -> str:
    """Return a share that says 100% only where it was all."""
    return "100%" if share == 1 else f"{share:.1%}"


def _summed(names: tuple[str, ...], defense: str) -> dict[int, str]:
    """Return what the best attack picks out of sums of ten clients, by images a client."""
    best: dict[int, dict[str, Any]] = {}
    for row in (row for name in names for row in _results(name)["rows"]):
        if (row["clients"], row["defense"]) == (10, defense):
            before = best.setdefault(row["images"], row)
            if row[PICKED_OUT.key] > before[PICKED_OUT.key]:
                best[row["images"]] = row
    return {images: _whole(row, PICKED_OUT.key) for images, row in best.items()}


def _most_picked(defense: str) -> str:
    rows = (row for row in _defended() if row["defense"] == defense)
    return _whole(max(rows, key=lambda row: float(row[PICKED_OUT.key])), PICKED_OUT.key)


def _defended() -> list[dict[str, Any]]:
    return [
        row
        for name in ("membership-round", "membership-defences")
        for row in _results(name)["rows"]
    ]


def frontier_worst(_words: Mapping[str, str]) -> list[str]:
    """What defences cost, and what they leave of one image a round."""
    rows = _results("frontier")["rows"]
    tried = [
        *(row for row in rows if row["scenario"] == "worst"),
        *(row for name in ("frontier-lm", "frontier-lm-soteria") for row in _results(name)["rows"]),
    ]
    lines = [
        f"| defence | accuracy | {IDENTIFIED.heading} | {TO_ORIGINAL.heading} | by | updates |",
        "|---|---|---|---|---|---|",
    ]
    for defense in _ON_THE_FRONTIER:
        accuracy = next(row for row in rows if row["defense"] == defense)
        worst = max(
            (row for row in tried if row["defense"] == defense),
            key=lambda row: (row["identified"], row["psnr_original"]),
        )
        lines.append(
            f"| `{defense}` | {accuracy['accuracy']:.1%} ± {100 * accuracy['accuracy_sd']:.1f} "
            f"| {_whole(worst, 'identified')} | {worst['psnr_original']:.1f} "
            f"| `{worst['attack'].partition(':')[0]}` | {worst['images']} |"
        )
    return lines


def _whole(row: Mapping[str, Any], name: str) -> str:
    low, high = (round(100 * row[f"{name}_{end}"]) for end in ("low", "high"))
    return f"{row[name]:.0%} [{low}, {high}]"


_ON_THE_FRONTIER = (
    *("none", "dct:keep=3", "dct:keep=10", "dct:keep=21", "dct-random:drop=0.8"),
    *("jpeg:quality=20", "blur:sigma=1.5", "down:factor=4", "prune:share=0.9", "prune:share=0.99"),
    *("clip:norm=1", "noise:ratio=2", "noise:ratio=10", "soteria:share=0.8", "dp-sgd:noise=1"),
)


def sizes(_words: Mapping[str, str]) -> list[str]:
    """What the best membership attack picks out, by how many images are behind an update."""
    rows = [
        {"after": found["training"]["rounds"], **row}
        for found in map(_results, _OF_SIZES)
        for row in found["rows"]
    ]
    told: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["clients"], row["after"])):
        cells = told.setdefault((row["clients"], row["after"], row["defense"]), {})
        before = cells.setdefault(row["images"], row)
        if row[PICKED_OUT.key] > before[PICKED_OUT.key]:
            cells[row["images"]] = row
    columns = sorted({n for cells in told.values() for n in cells})
    lines = [
        f"| observed | model after | defence | {' | '.join(f'{n:,} a client' for n in columns)} |",
        f"|{'---|' * (3 + len(columns))}",
    ]
    for (clients, after, defense), cells in told.items():
        texts = [
            f"{_whole(cells[n], PICKED_OUT.key)} `{cells[n]['attack']}`" if n in cells else ""
            for n in columns
        ]
        observed = "one client's update" if clients == 1 else f"sum of {clients} clients"
        lines.append(f"| {observed} | {after} rounds | `{defense}` | {' | '.join(texts)} |")
    return lines


_OF_SIZES = (
    *("membership-sizes", "membership-sizes-1024"),
    *("membership-sizes-20", "membership-sizes-20-1024"),
)


def transformed(_words: Mapping[str, str]) -> list[str]:
    """What the block-DCT leaves to an attacker who knows it, and what it costs in accuracy."""
    lines = [
        f"| kept of 64 | {TO_ORIGINAL.heading} | {TO_TRAINED.heading} | {EXACT.heading}, of T(x) "
        f"| {IDENTIFIED.heading} among 100 | accuracy on T(x) | on x |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(_results("dct")["rows"], key=lambda row: int(row["keep"])):
        found = row["adaptive"]
        kept = "all: no defence" if row["defense"] == "none" else str(row["keep"])
        if row["defense"] != "none" and row["keep"] == _BLOCK_ENTRIES:
            continue
        exact = f"{found['exact'] * found['images']:.0f} of {found['images']}"
        costs = [f"{row[n]['mean']:.1%} ± {100 * row[n]['sd']:.1f}" for n in _ON]
        lines.append(
            f"| {kept} | {found['psnr_original']:.1f} | {found['psnr_trained']:.1f} | {exact} "
            f"| {found['identified']:.0%} | {' | '.join(costs)} |"
        )
    return lines


_BLOCK_ENTRIES = 64
_ON = ("accuracy_transformed", "accuracy_plain")


def suite(_words: Mapping[str, str]) -> list[str]:
    """What attacks that search nothing cost, beside plain work on the same numbers."""
    lines = ["| attack | of | processor seconds | times |", "|---|---|---|---|"]
    for row in _results("attacks-suite")["rows"]:
        ratios = ", ".join(f"{value:.1f} × {what}" for what, value in row["times"].items())
        lines.append(
            f"| `{row['attack']}` | {row['setting']} | {row['cpu_seconds']:.2f} | {ratios} |"
        )
    return lines


def _batch_line(setting: tuple[int, bool]) -> str:
    images, centred = setting
    rows = {
        row["attack"]: row
        for row in sorted(_alone(), key=lambda row: int(row["hidden"]))
        if (row["images"], row["centred"], row["layers"]) == (images, centred, 1)
    }
    hidden = rows["ica"]["hidden"]
    what = f"CIFAR-100, {hidden:,} ReLU units{', centred inputs' if centred else ''}"
    before = f"`fc` {rows['fc']['exact']:.0%}"
    if "peel" in rows:
        before += f", `peel` {rows['peel']['exact']:.0%}"
    return (
        f"| `ica`, images exact | {what}, a batch of {images} | {before} "
        f"| {_rounded(rows['ica']['exact'])} of {rows['ica']['updates']} updates "
        f"| {_PUBLISHED[images]} |"
    )


_PUBLISHED = {
    16: "up to some 25 images exact (SPEAR, on a GPU)",
    64: "up to 1,024 images, not exactly (Cocktail Party)",
    256: "the same",
}


def _whole_client_line() -> str:
    found = _results("fedavg-leakage")
    rows = {row["attack"].partition(":")[0]: row for row in reversed(found["rows"])}
    now, most = rows["features"], found["recovered_above"]
    return (
        f"| `features`, images above {most:.0f} dB | MNIST, a client of {found['images']} images, "
        f"{found['epochs']} epochs in batches of {found['batch_size']} "
        f"| `ig` {rows['ig']['recovered']:.0%} "
        f"| {now['recovered']:.0%} of {now['updates']} updates "
        f"| over {found['published']:.0%}, on FEMNIST (Dimitrov et al.) |"
    )


def _active_lines() -> list[str]:
    found = _results("active-servers")
    fished, binned = found["fished"][0], found["sorted"][0]
    return [
        f"| `{row['attack']}`, {asked} exact | {what}, a sum of {row['clients']} clients of "
        f"{row['images_each']}, a server that alters weights | `fc`, if it adds a block "
        f"| {row['exact']:.0%} of {row['updates']} updates | {published} |"
        for row, asked, what, published in (
            (
                fished,
                "the image fished for",
                "CIFAR-100, `lenet`",
                "the idea: Wen et al., in other settings",
            ),
            (binned, "all images", "MNIST, `mnist-cnn`", "the idea: Scale-MIA, in other settings"),
        )
    ]


def fedavg(_words: Mapping[str, str]) -> list[str]:
    """What is rebuilt of a client that returns weights after many local steps."""
    found = _results("fedavg-leakage")
    heads = (
        *("attack", "setting", "updates", f"above {found['recovered_above']:.0f} dB", "floor"),
        *("mean dB", f"{IDENTIFIED.heading} among 100", "cannot tell", "processor seconds"),
    )
    return [
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(
            f"| `{row['attack']}` | {_CHANGED[row['setting']]} | {row['updates']} "
            f"| {_share(row, 'recovered')} | {row['floor']:.1%} | {row['decibels']:.1f} "
            f"| {_share(row, 'identified')} | {row['untold']} | {row['cpu_seconds']:.0f} |"
            for row in found["rows"]
        ),
    ]


_CHANGED = {
    "published": "as published",
    "longer": "steps of 0.04, not 0.004",
    "momentum": "momentum 0.9",
    "trained": "weights after 1,000 steps on others' images",
    "photographs": "CIFAR-10, not MNIST",
}


def noise_patterns(_words: Mapping[str, str]) -> list[str]:
    """Where noise-delta's noise is, what it costs w, and what thieves make of copies."""
    rows = _results("noise-patterns")["rows"]
    thieves = [(one["labels"], one["colluders"]) for one in rows[0]["thieves"]]
    heads = [
        f"{_many(colluders)}, {f'{labels} labels' if labels else 'no label'}"
        for labels, colluders in thieves
    ]
    alone = [f"alone, {labels} labels" for labels, colluders in thieves if labels]
    lines = [
        f"| noise in | w | best copy | {' | '.join([*heads, *alone])} |",
        f"|---|---|---|{'---|' * (len(heads) + len(alone))}",
    ]
    for row in rows:
        told = [*row["thieves"], *({"accuracy": o["alone"]} for o in row["thieves"] if o["labels"])]
        cells = [row["w"], row["as_received"], *(one["accuracy"] for one in told)]
        lines.append(
            f"| {row['where']}: `{row['pattern']}` | {' | '.join(map(_over_seeds, cells))} |"
        )
    return lines


def _over_seeds(found: Mapping[str, float]) -> str:
    least, most = (round(100 * found[end]) for end in ("least", "most"))
    return f"{found['mean']:.0%} [{least}, {most}]"


def _pattern_line() -> str:
    searched, solved = _rebuilt_by_pattern(untold=False)
    before, now = statistics.median(searched), statistics.median(solved)
    tried = _results("patterns")["rows"][0]["images"]
    return (
        f"| `layers`, median distance where it can tell, {len(solved)} of {tried} images "
        f"| CIFAR-100, `cnn`, single images, fresh weights | `ig` {before:.1f} dB | {now:.1f} dB "
        "| exact, on other networks (R-CONV) |"
    )


def _membership_lines() -> list[str]:
    def share(attack: str) -> float:
        return next(
            float(row[PICKED_OUT.key])
            for row in _results("membership-sizes-20")["rows"]
            if (row["images"], row["clients"], row["attack"]) == (16, 10, attack)
        )

    rounds = {
        row["rounds"]: row["auc"]
        for row in _results("membership-many-rounds")["rows"]
        if (row["attack"], row["scores"]) == ("gradient", "against others")
    }
    returned = {row["attack"]: row for row in _results("membership-returned")["rows"]}
    before, now = share("gradient"), share("span")
    noisy = {
        row["attack"]: row[PICKED_OUT.key]
        for row in _results("membership-statistics-noise")["rows"]
        if row["defense"] != "none"
    }
    return [
        f"| `batch-statistics`, {PICKED_OUT.heading} of 100 "
        "| CIFAR-10, `resnet-bn`, one step on 16 images, noise of ten times the update's size "
        f"| `gradient` {noisy['gradient']:.0%} | {noisy['batch-statistics']:.0%} "
        "| none known to us |",
        f"| `span`, {PICKED_OUT.heading} of 100 "
        "| CIFAR-10, trained `cnn`, a sum of ten clients of 16 images "
        f"| `gradient` {before:.0%} | {now:.0%} | none known to us |",
        f"| `gradient` over ten rounds, {AUC.heading} | CIFAR-10, `cnn`, one of ten clients, "
        f"256 images, 3 local epochs | one round {rounds[1]:.2f} | {rounds[10]:.2f} "
        "| the idea: FedMIA, in other settings |",
        "| `loss`, area under the curve | CIFAR-10, `cnn`, 500 images, 30 local epochs "
        f"| `gradient` {returned['gradient']['auc']:.3f} | {returned['loss']['auc']:.3f} "
        "| none known to us |",
    ]


def _copies_lines() -> list[str]:
    theft = {
        (row["colluders"], row["attack"]): row["accuracy"]
        for row in _results("theft-zero-labels")["rows"]
    }
    disguised = _results("trace-disguised")["rows"]
    rows = [r for r in disguised if r["treatment"] == "permuted" and r["colluders"]]
    alone = [row for row in rows if row["colluders"] == 1]
    innocent = [row for row in disguised if not row["colluders"]]
    innocents, wrong = (sum(row[key] for row in innocent) for key in ("innocents", "naming"))
    return [
        "| `cluster`, accuracy | MNIST, copies of `noise-delta`, two clients, no label "
        f"| `direct` {theft[2, 'direct']:.0%} | {theft[2, 'colluding + cluster']:.1%} "
        "| none known to us |",
        "| tracing, clients named | MNIST, permuted units, single copies and averages of 3 and 8 "
        f"| {_named(alone, 'named_before', 'guilty_before')}, alone | {_named(rows)}; "
        f"{wrong} of {innocents:,} innocents | none known to us |",
        *(
            f"| tracing, clients named | MNIST, averages of 6 to 10 copies, {treatment} "
            f"| {_named(_coalitions('trace-own-round', treatment))} "
            f"| {_named(_coalitions('trace', treatment))} | none known to us |"
            for treatment in ("pruned, 90 %", "4 bits")
        ),
    ]


def _coalitions(result: str, treatment: str) -> list[Mapping[str, Any]]:
    return [
        row
        for row in _results(result)["rows"]
        if row["source"] == "last copies" and row["treatment"] == treatment
        if 6 <= row["colluders"] <= 10
    ]


def _named(rows: Sequence[Mapping[str, Any]], named: str = "named", of: str = "guilty") -> str:
    return f"{sum(row[named] for row in rows)} of {sum(row[of] for row in rows)}"


_ARMS = ("analytic", "fedavg_of_the_head", "server_alone", "one_client_alone")
_ARM_NAMES = "sums | FedAvg of the head | server alone | one client alone |"


def analytic_partitions(_words: Mapping[str, str]) -> list[str]:
    """A public backbone's features in closed form beside FedAvg of the same head, by partition."""
    rows = _by_partition(_results("analytic-partitions")["partitions"])
    return [f"| | {_ARM_NAMES}", "|---|---|---|---|---|", *(f"| {row}" for row in rows)]


def analytic_other_partitions(_words: Mapping[str, str]) -> list[str]:
    """The same of other data sets."""
    lines = [f"| | | {_ARM_NAMES}", "|---|---|---|---|---|---|"]
    for name in ("mnist", "cifar100"):
        found = _results(f"analytic-partitions-{name}")["partitions"]
        lines += [f"| {name} | {row}" for row in _by_partition(found)]
        if even := sorted({row["balanced"] for row in found if "balanced" in row}):
            lines.append(f"| {name}, `--balanced` | any | {_mean_and_range(even)} | | | |")
    return lines


def _by_partition(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for scheme in dict.fromkeys(row["partition"] for row in found):
        rows = [row for row in found if row["partition"] == scheme]
        cells = " | ".join(_mean_and_range([row[arm] for row in rows]) for arm in _ARMS)
        yield f"{scheme} | {cells} |"


_SCHEMES = ("iid", "shards:2", "dirichlet:0.1")
_Measured = dict[tuple[str, str], list[float]]


def beside(_words: Mapping[str, str]) -> list[str]:
    """Sums beside what else a federation can do, by data set and partition."""
    rows: dict[str, tuple[_Measured, tuple[str, ...]]] = {
        "FedAvg of a small network from scratch, 20 rounds": _studied("fedavg"),
        "the same, 50 rounds": _studied("fedavg", files=("theft-fedavg-50",)),
        "FedAvg of the head on the map": _on_maps("fedavg_of_the_head"),
        **_fine_tuned(),
        "`noise-delta`, a small network": _studied("noise-delta"),
        "`protected`, a small network": _studied("protected"),
        "server alone, a small network": _studied("server alone"),
        "server alone, on the map": _on_maps("server_alone"),
        "one client alone, on the map": _on_maps("one_client_alone"),
        "**sums**, dictionary": _by_dictionary(),
        "**sums**, backbone": _of_cifar10(_on_maps("analytic")),
    }
    columns = [(data, scheme) for data in ("cifar10", "mnist") for scheme in _SCHEMES]
    heads = " | ".join(f"{data}, {scheme}" for data, scheme in columns)
    lines = [f"| | {heads} | measured |", f"|---|{'---|' * len(columns)}---|"]
    for name, (found, files) in rows.items():
        cells = (f"{sum(found[c]) / len(found[c]):.1%}" if c in found else "" for c in columns)
        dates = sorted({_results(file)["date"] for file in files})
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(dates)} |")
    return lines


_STUDIES = ("theft-cifar10", "theft-study", "analytic-beside")


def _studied(arm: str, files: tuple[str, ...] = _STUDIES) -> tuple[_Measured, tuple[str, ...]]:
    """Return what a small network comes to by an arm of the study of theft."""
    found: _Measured = {}
    used = []
    for file in files:
        for row in _results(file)["rows"]:
            if row["arm"] == arm:
                found[row["dataset"].partition("@")[0], row["partition"]] = row["final"]
                used.append(file)
    if arm == "server alone":  # whatever clients have
        for data in ("cifar10", "mnist"):
            found |= {(data, scheme): found[data, "iid"] for scheme in _SCHEMES}
    return found, tuple(used)


def _on_maps(arm: str) -> tuple[_Measured, tuple[str, ...]]:
    """Return what an arm comes to on the backbone of CIFAR-10, or the dictionary of MNIST."""
    found: _Measured = {}
    files = {"cifar10": "analytic-partitions", "mnist": "analytic-partitions-mnist"}
    for data, file in files.items():
        for row in _results(file)["partitions"]:
            found.setdefault((data, row["partition"]), []).append(row[arm])
    return found, tuple(files.values())


def _of_cifar10(of_both: tuple[_Measured, tuple[str, ...]]) -> tuple[_Measured, tuple[str, ...]]:
    found, files = of_both
    return {key: values for key, values in found.items() if key[0] == "cifar10"}, files[:1]


def _by_dictionary() -> tuple[_Measured, tuple[str, ...]]:
    """Return what sums of a dictionary's features come to: the same, however images are shared."""
    found, files = _on_maps("analytic")
    runs = [row for row in _results("analytic-runs")["rows"] if row["dataset"] == "cifar10"]
    of_runs = {key: [row["accuracy"] for row in runs] for key in _SCHEMES}
    found |= {("cifar10", scheme): values for scheme, values in of_runs.items()}
    return found, ("analytic-runs", *files[1:])


def _fine_tuned() -> dict[str, tuple[_Measured, tuple[str, ...]]]:
    """Return what the whole backbone comes to after the rounds that were run, if any were."""
    file = "analytic-finetuning"
    last = {row["partition"]: row for row in _results(file)["rows"]}
    if not last:
        return {}
    rounds = max(row["round"] for row in last.values())
    side = _results(file)["options"]["resolution"]
    found = {("cifar10", scheme): [row["accuracy"]] for scheme, row in last.items()}
    return {f"FedAvg of the whole backbone, {rounds} rounds at {side} px": (found, (file,))}


def fine_tuning(_words: Mapping[str, str]) -> list[str]:
    """What a client spends on a round of fine-tuning, on sums, and all clients together."""
    found = _results("analytic-finetuning")
    one, clients, few = found["a_client"], found["clients"], found["a_round"]
    side = found["options"]["resolution"]
    lines = [
        "| | seconds of a client | MB of a client | seconds of all |",
        "|---|---|---|---|",
    ]
    seconds, size = one["fine_tuning_seconds"], one["fine_tuning_bytes"] / 1e6
    for rounds in (1, 50):
        name = f"fine-tuning at {side} px, {rounds} round{'s' if rounds > 1 else ''} of {few}"
        lines.append(f"| {name} | {seconds:.1f} | {size:.0f} | {rounds * few * seconds:,.0f} |")
    for pixels, spent in one["sums_seconds"].items():
        name = f"sums at {pixels} px, one view, once"
        size = one["sums_bytes"] / 1e6
        lines.append(f"| {name} | {spent:.1f} | {size:.0f} | {clients * spent:,.0f} |")
    return lines


def released(_words: Mapping[str, str]) -> list[str]:
    """Who is told in sums and in w at low false-positive rates, by noise and the best attack."""
    lines = [
        f"| ε | seen | attack | of | {AUC.heading} | {FOUND.heading} | {FOUND_SURELY.heading} |",
        "|---|---|---|---|---|---|---|",
    ]
    best: dict[tuple[Any, str], dict[str, Any]] = {}
    for row in sorted(_results("analytic-released")["rows"], key=lambda row: row["tpr_at_01"][0]):
        best[row["epsilon"], row["seen"]] = row
    for row in sorted(best.values(), key=lambda row: (-(row["epsilon"] or 1e9), row["seen"])):
        each = {name: [one[name] for one in row["each"]] for name in _TOLD_OF_RELEASES}
        area = sum(each["auc"]) / len(row["each"])
        rates = (
            f"{sum(some) / len(some):.2%} [{100 * min(some):.2f}, {100 * max(some):.2f}]"
            for some in (each["tpr_at_1"], each["tpr_at_01"])
        )
        name = f"{row['epsilon']:g}" if row["epsilon"] else "none"
        lines.append(
            f"| {name} | {row['seen']} | {row['attack']} | {len(row['each'])} | {area:.3f} "
            f"| {' | '.join(rates)} |"
        )
    return lines


_TOLD_OF_RELEASES = ("auc", "tpr_at_1", "tpr_at_01")


def rebuilt(_words: Mapping[str, str]) -> list[str]:
    """What is rebuilt of a sum by how many images it is of, beside pictures of strangers."""
    rows = _results("analytic-rebuilt")["rows"]
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    heads = " | ".join(f"{n}, D = {_of(rows, n)[0]['dimension']}: column | span" for n in names)
    lines = [f"| images in the sum | {heads} |", f"|---|{'---|---|' * len(names)}"]
    for count in sorted({row["images"] for row in rows}):
        cells = []
        for name, attack in ((name, attack) for name in names for attack in ("column", "span")):
            some = [
                row for row in _of(rows, name) if (row["images"], row["attack"]) == (count, attack)
            ]
            cells += [_over(row) for row in some] or [""]
        lines.append(f"| {count:,} | {' | '.join(cells)} |")
    return lines


def _over(row: Mapping[str, Any]) -> str:
    middle, low, high = row["over"]
    return f"{row['correlation']:.2f}, {middle:+.2f} [{low:+.2f}, {high:+.2f}]"


def analytic_epsilon(_words: Mapping[str, str]) -> list[str]:
    """What w is worth under noise, and who is traced in it."""
    found = _results("analytic-epsilon")["rows"]
    lines = [
        "| ε | components | w | traced at 1 %, at 0.1 % | any attack at 1 %, at most |",
        "|---|---|---|---|---|",
    ]
    for epsilon in dict.fromkeys(row["epsilon"] for row in found):
        rows = [row for row in found if row["epsilon"] == epsilon]
        accuracy = _mean_and_range([row["accuracy"] for row in rows])
        rates = (
            sum(row["tracing"][rate] for row in rows) / len(rows)
            for rate in ("tpr_at_1", "tpr_at_01")
        )
        traced = ", ".join(f"{rate:.1%}" for rate in rates)
        most = f"{rows[0]['allowed'][1]:.1%}" if epsilon else ""
        name = f"{epsilon:g}" if epsilon else "none"
        lines.append(f"| {name} | {rows[0]['components']:,} | {accuracy} | {traced} | {most} |")
    return lines


def analytic_prior(_words: Mapping[str, str]) -> list[str]:
    """What was tried to make more of noisy sums, on training images."""
    found = _results("analytic-prior")["rows"]
    tried = (
        ("the server's images alone", 1_000, 0.3, "own", None),
        ("noisy G, as it was", 200, 0.0, "noisy G", 1.0),
        ("noisy G, more components, whitened a little", 400, 0.3, "noisy G", 1.0),
        ("the same and the server's images", 400, 0.3, "both", 1.0),
        ("that and the server's labels", 400, 0.3, "both, and labels", 1.0),
        ("that, more components", 1_000, 0.3, "both, and labels", 1.0),
        ("without labels, more noise on H than on G", 400, 0.3, "both", 0.5),
        ("without labels, less noise on H than on G", 400, 0.3, "both", 2.0),
        ("noise on H alone, the server's G", 400, 0.3, "own G", None),
        ("noise on H alone, the true G", 400, 0.3, "true G", None),
        ("noise on H alone, the true G", 1_000, 0.3, "true G", None),
    )
    lines = ["| | components | ε = 0.5 | ε = 2 | ε = 8 |", "|---|---|---|---|---|"]
    for told, components, whitening, variant, proportion in tried:
        some = [
            row
            for row in found
            if (row["components"], row["whitening"], row["variant"], row.get("proportion"))
            == (components, whitening, variant, proportion)
        ]
        # What no epsilon is asked of is the same for all.
        cells = [f"{row['accuracy']:.1%}" for row in some] * (3 // len(some))
        lines.append(f"| {told} | {components:,} | {' | '.join(cells)} |")
    return lines


def analytic_imbalance(_words: Mapping[str, str]) -> list[str]:
    """What equally likely classes are worth."""
    found = _results("analytic-imbalance")["rows"]
    arms = ("plain", "balanced", "plain_of_the_rarer_half", "balanced_of_the_rarer_half")
    lines = [
        "| rarest to commonest class | w | `--balanced` | w, rarer half | `--balanced` |",
        "|---|---|---|---|---|",
    ]
    for ratio in dict.fromkeys(row["ratio"] for row in found):
        rows = [row for row in found if row["ratio"] == ratio]
        cells = " | ".join(_mean_and_range([row[arm] for row in rows]) for arm in arms)
        lines.append(f"| 1 to {1 / ratio:g} | {cells} |")
    return lines


def analytic_distilled(_words: Mapping[str, str]) -> list[str]:
    """What the user's network scores that w was taught to."""
    found = _results("analytic-distilled")["rows"]
    lines = ["| | images it was taught by | w | `cnn` |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["dataset"] for row in found):
        rows = [row for row in found if row["dataset"] == name]
        arms = ([row[arm] for row in rows] for arm in ("accuracy", "distilled"))
        cells = " | ".join(map(_mean_and_range, arms))
        lines.append(f"| {name} | {rows[0]['images']} | {cells} |")
    return lines


def analytic_heads(_words: Mapping[str, str]) -> list[str]:
    """What heads of the closed-form family are worth from the same sums."""
    rows = _results("analytic-heads")["rows"]
    cells = (f"| {row['head']} | {_mean_and_range(row['accuracy'])} |" for row in rows)
    return ["| head | w |", "|---|---|", *cells]


def analytic_membership(_words: Mapping[str, str]) -> list[str]:
    """Who is told in sums of so many images, by leverage, by tracing, and under noise."""
    rows = _results("analytic-membership")["rows"]
    lines = [
        f"| images a feature | leverage: {AUC.heading}, {FOUND.heading} "
        f"| tracing: {AUC.heading}, {FOUND.heading}, at 0.1 % "
        f"| expected at 1 % | tracing at ε = 8: {AUC.heading}, {FOUND.heading} |",
        "|---|---|---|---|---|",
    ]
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        some = [row for row in rows if row["ratio"] == ratio]
        leverage, tracing = (
            [row for row in some if row["attack"] == attack and row["epsilon"] is None]
            for attack in ("leverage", "tracing")
        )
        noisy = [row for row in some if row["attack"] == "tracing" and row["epsilon"] == 8]
        lines.append(
            f"| {ratio:g} | {_mean(leverage, 'auc'):.2f}, {_mean(leverage, 'tpr_at_1'):.1%} "
            f"| {_mean(tracing, 'auc'):.2f}, {_mean(tracing, 'tpr_at_1'):.1%}, "
            f"{_mean(tracing, 'tpr_at_01'):.1%} | {_mean(tracing, 'expected_tpr_at_1'):.1%} "
            f"| {_mean(noisy, 'auc'):.2f}, {_mean(noisy, 'tpr_at_1'):.1%} |"
        )
    return lines


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] or 0.0 for row in rows) / len(rows)


def analytic_columns(_words: Mapping[str, str]) -> list[str]:
    """What is rebuilt of a column of H, by how many images it is of."""
    rows = [row for row in _results("analytic-attacks")["rows"] if row["attack"] == "column"]
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    heads = [f"{name}, D = {_of(rows, name)[0]['dimension']}" for name in names]
    lines = ["| images of the class | " + " | ".join(heads) + " |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for place, first in enumerate(_of(rows, names[0])):
        cells = [
            f"{_of(rows, name)[place]['correlation']:.2f} (floor "
            f"{_of(rows, name)[place]['floor']:.2f})"
            for name in names
        ]
        lines.append(f"| {first['images_of_the_class']} | {' | '.join(cells)} |")
    return lines


def _of(rows: list[dict[str, Any]], dataset: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["dataset"] == dataset]


def analytic_bounds(_words: Mapping[str, str]) -> list[str]:
    """Which epsilon releases are shown to spend, with all of the noise and with half."""
    lines = ["| ε promised | at least, by an attack | with half of the noise |", "|---|---|---|"]
    for row in _results("analytic-attacks")["rows"]:
        if row["attack"] == "epsilon":
            half = row["at_least_with_half_the_noise"]
            lines.append(f"| {row['epsilon']:g} | {row['at_least']:.2f} | {half:.2f} |")
    return lines


def analytic_secure(_words: Mapping[str, str]) -> list[str]:
    """What secure aggregation adds to a round of sums."""
    lines = [
        "| D | clients, away | MB an answer | processor seconds, without and with | times |",
        "|---|---|---|---|---|",
    ]
    for row in _results("analytic-secure")["rows"]:
        plain, secure = row["plain"]["cpu_seconds"], row["secure"]["cpu_seconds"]
        lines.append(
            f"| {row['features']:,} | {row['clients']}, {row['away']} | {row['answer_mb']:.1f} "
            f"| {plain:.0f}, {secure:.0f} | {row['times']:.1f} |"
        )
    return lines


def _mean_and_range(values: list[float]) -> str:
    return f"{sum(values) / len(values):.1%} [{min(values):.1%}, {max(values):.1%}]"


_OUTCOMES = {"trained": "trains", "attacked": "attacked", "refused": "said"}


def scores(_words: Mapping[str, str]) -> list[str]:
    """What the figures of a leakage audit are called, and mean."""
    return [
        "| heading | key in JSON | meaning |",
        "|---|---|---|",
        *(f"| {score.heading} | `{score.key}` | {score.meaning} |" for score in SCORES),
    ]


TABLES: Mapping[str, Callable[[Mapping[str, str]], list[str]]] = {
    "theft": theft,
    "theft-of-sums": theft_of_sums,
    "theft-of-sums-of-photographs": theft_of_sums_of_photographs,
    "answer-shadows": answer_shadows,
    "paired-logits": paired_logits,
    "leakage": leakage,
    "noise": noise,
    "architectures": architectures,
    "analytic": analytic,
    "attackers": attackers,
    "batches": batches,
    "sums": sums,
    "separation": separation,
    "cocktail": cocktail,
    "active-servers": active_servers,
    "fedavg": fedavg,
    "scores": scores,
    "noise-patterns": noise_patterns,
    "many-rounds": many_rounds,
    "batch-statistics": batch_statistics,
    "batch-statistics-prior": batch_statistics_prior,
    "suite": suite,
    "recovery": recovery,
    "patterns": patterns,
    "prices": prices,
    "transformed": transformed,
    "defended-round": defended_round,
    "deploy": deploy,
    "frontier-worst": frontier_worst,
    "sizes": sizes,
    "examples": examples,
    "analytic-partitions": analytic_partitions,
    "analytic-other-partitions": analytic_other_partitions,
    "beside": beside,
    "fine-tuning": fine_tuning,
    "released": released,
    "rebuilt": rebuilt,
    "analytic-epsilon": analytic_epsilon,
    "analytic-prior": analytic_prior,
    "analytic-imbalance": analytic_imbalance,
    "analytic-distilled": analytic_distilled,
    "analytic-heads": analytic_heads,
    "analytic-columns": analytic_columns,
    "analytic-membership": analytic_membership,
    "analytic-bounds": analytic_bounds,
    "analytic-secure": analytic_secure,
}
WORDS: Mapping[str, Mapping[str, str]] = {
    "README.md": {
        "strategy": "strategy",
        "accuracy": "accuracy of the owner's model",
        "owner": "owner's model",
        "shards": "two classes a client",
        "longer": "50 rounds",
        "alike": "trained alike",
        "alone": "server alone",
        "nobody": "no client",
        "single": ", one run",
        "gain": "a thief with 10 labels gains, points",
        "itself": "the model itself",
        "transformation": "transformation",
        "exact": f"{EXACT.heading}, of what was trained on",
        "decibels": "and so the original to",
        "none": "none",
        "partition": "partition",
        "copy": "best copy",
        "over": "rounds over the cap",
        "of": r"\1 of \2",
    },
    "README.ko.md": {
        "strategy": "전략",
        "accuracy": "소유자 모델의 정확도",
        "owner": "소유자 모델",
        "shards": "클라이언트마다 두 클래스",
        "longer": "50라운드",
        "alike": "같은 방식의 학습",
        "alone": "서버 혼자",
        "nobody": "클라이언트 없음",
        "single": ", 실행 한 번",
        "gain": "레이블 10개를 가진 도용자의 이득(퍼센트 포인트)",
        "itself": "모델 자체를 받음",
        "transformation": "변환",
        "exact": "학습에 쓰인 이미지를 정확히 복원",
        "decibels": "그 결과 원본에 대한 PSNR",
        "none": "없음",
        "partition": "분할",
        "copy": "가장 좋은 사본",
        "over": "상한을 넘은 라운드",
        "of": r"\2라운드 중 \1라운드",
    },
}


_LANGUAGE = {name: name for name in READMES} | dict(zip(GUIDES, READMES, strict=True))
_LANGUAGE |= dict.fromkeys(PAGES, "README.md")


def rendered(name: str, text: str) -> str:
    """Return a README with its tables as docs/results has them.

    Args:
        name: Of the file, in ``READMES``, ``GUIDES`` or ``PAGES``.
        text: What it holds.
    """

    def table(found: re.Match[str]) -> str:
        lines = TABLES[found["name"]](WORDS[_LANGUAGE[name]])
        return found[1] + "\n".join(lines) + "\n" + found[3]

    return _BLOCK.sub(table, text)


if __name__ == "__main__":
    for readme in (*READMES, *GUIDES, *PAGES):
        path = ROOT / readme
        path.write_text(rendered(readme, path.read_text(encoding="utf-8")), encoding="utf-8")
