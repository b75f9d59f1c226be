"""The READMEs' tables, from docs/results: ``python benchmarks/readme_tables.py`` writes them."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.ko.md")
GUIDES = ("docs/guide.md", "docs/guide.ko.md")
PAGES = ("docs/models.md", "docs/both-ways.md", "docs/inversion-suite.md")
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


_VIEW = "best by the owner's view"


def _results(name: str) -> Any:
    return json.loads((ROOT / "docs/results" / f"{name}.json").read_text(encoding="utf-8"))


def theft(words: Mapping[str, str]) -> list[str]:
    """Accuracy of w, and the most that one thief with 10 labels gains on training alone."""
    rows = [
        row
        for row in _results("theft-study")["rows"]
        if (row["dataset"].partition("@")[0], row["partition"]) == ("mnist", "iid")
    ]
    lines = [f"| {words['strategy']} | {words['accuracy']} | {words['gain']} |", "|---|---|---|"]
    for arm in ("fedavg", "noise-delta", "protected"):
        row = next(row for row in rows if row["arm"] == arm)
        best = [
            one
            for one in row["theft"]
            if (one["attack"], one["labels"], one["colluders"]) == (_VIEW, 10, 1)
        ]
        gain = _range(best[0]) if best else words["itself"]
        lines.append(f"| `{arm}` | {row['final_mean']:.1%} | {gain} |")
    return lines


def _range(row: Mapping[str, Any]) -> str:
    middle, low, high = (
        round(100 * row[name]) for name in ("advantage", "advantage_low", "advantage_high")
    )
    return f"{middle:+d} [{low:+d}, {high:+d}]"


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
        *map(_batch_line, ((16, True), (64, False), (128, False))),
        *_membership_lines(),
        *_copies_lines(),
    ]


def batches(_words: Mapping[str, str]) -> list[str]:
    """What is read off a first linear layer, attack by attack."""
    lines = [
        "| images | units, layers | inputs | updates | attack | exact | identified (floor) | dB "
        "| cannot tell | processor seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in _results("batches")["rows"]:
        low, high = (100 * row[name] for name in ("exact_low", "exact_high"))
        interval = f" [{low:.1f}, {high:.1f}]" if row["updates"] > 1 else ""
        lines.append(
            f"| {row['images']} | {row['hidden']:,} × {row['layers']} "
            f"| {'centred' if row['centred'] else 'in [0, 1]'} | {row['updates']} "
            f"| `{row['attack']}` | {row['exact']:.1%}{interval} "
            f"| {row['identified']:.0%} ({row['identified_floor']:.0%}) | {row['psnr']:.0f} "
            f"| {row['untold']} | {row['cpu_seconds_an_update']:.1f} |"
        )
    return lines


def many_rounds(_words: Mapping[str, str]) -> list[str]:
    """What membership attacks tell by the number of rounds."""
    lines = [
        "| attack | rounds | scores | AUC | found at FPR 1 % | at FPR 0.1 % |",
        "|---|---|---|---|---|---|",
    ]
    for row in _results("membership-many-rounds")["rows"]:
        cells = [f"{row['auc']:.3f} [{row['auc_low']:.3f}, {row['auc_high']:.3f}]"]
        for name in ("tpr_at_1", "tpr_at_01"):
            low, high = (100 * row[f"{name}_{end}"] for end in ("low", "high"))
            cells.append(f"{row[name]:.1%} [{low:.1f}, {high:.1f}]")
        lines.append(
            f"| `{row['attack']}` | {row['rounds']} | {row['scores']} | {' | '.join(cells)} |"
        )
    return lines


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
        for row in _results("batches")["rows"]
        if (row["images"], row["centred"], row["layers"]) == (images, centred, 1)
    }
    hidden = rows["ica"]["hidden"]
    what = f"CIFAR-100, {hidden:,} ReLU units{', centred inputs' if centred else ''}"
    before = f"`fc` {rows['fc']['exact']:.0%}"
    if "peel" in rows:
        before += f", `peel` {rows['peel']['exact']:.0%}"
    return (
        f"| `ica`, images exact | {what}, a batch of {images} | {before} "
        f"| {rows['ica']['exact']:.0%} of {rows['ica']['updates']} updates | {_PUBLISHED[images]} |"
    )


_PUBLISHED = {
    16: "up to some 25 images exact (SPEAR, on a GPU)",
    64: "up to 1,024 images, not exactly (Cocktail Party)",
    128: "the same",
}


def _membership_lines() -> list[str]:
    def share(name: str, clients: int, attack: str | None) -> float:
        return next(
            float(row["recognised"])
            for row in _results(name)["rows"]
            if (row["images"], row["clients"], row["defense"]) == (16, clients, "none")
            and row.get("attack") == attack
        )

    rounds = {
        row["rounds"]: row["auc"]
        for row in _results("membership-many-rounds")["rows"]
        if (row["attack"], row["scores"]) == ("gradient", "against others")
    }
    returned = {row["attack"]: row for row in _results("membership-returned")["rows"]}
    before, now = (
        share(name, 10, attack)
        for name, attack in (("membership", None), ("membership-span", "span"))
    )
    return [
        "| `span`, picked out of 100 | CIFAR-10, trained `cnn`, a sum of ten clients of 16 images "
        f"| `gradient` {before:.0%} | {now:.0%} | none known to us |",
        "| `gradient` over ten rounds, area under the curve | CIFAR-10, `cnn`, one of ten clients, "
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
    rows = [r for r in _results("trace-disguised")["rows"] if r["treatment"] == "permuted"]
    guilty = sum(len(row["z_aligned"]) for row in rows)
    innocents = sum(row["innocents"] for row in _results("trace-disguised")["rows"])
    wrong = sum(row["innocents_naming"] for row in _results("trace-disguised")["rows"])
    return [
        "| `cluster`, accuracy | MNIST, copies of `noise-delta`, two clients, no label "
        f"| `direct` {theft[2, 'direct']:.0%} | {theft[2, 'colluding + cluster']:.1%} "
        "| none known to us |",
        "| tracing, clients named | MNIST, copies with permuted units "
        f"| {sum(row['named_before'] for row in rows)} of {guilty} "
        f"| {sum(row['named_aligned'] for row in rows)} of {guilty}; {wrong} of {innocents:,} "
        "innocents | none known to us |",
    ]


def analytic_partitions(_words: Mapping[str, str]) -> list[str]:
    """A public backbone's features in closed form beside FedAvg of the same head, by partition."""
    found = _results("analytic-partitions")["partitions"]
    arms = ("analytic", "fedavg_of_the_head", "server_alone", "one_client_alone")
    lines = ["| | sums | FedAvg of the head | server alone | one client alone |"]
    lines.append("|---|---|---|---|---|")
    for scheme in dict.fromkeys(row["partition"] for row in found):
        rows = [row for row in found if row["partition"] == scheme]
        cells = " | ".join(_mean_and_range([row[arm] for row in rows]) for arm in arms)
        lines.append(f"| {scheme} | {cells} |")
    return lines


def analytic_epsilon(_words: Mapping[str, str]) -> list[str]:
    """What w is worth under noise."""
    found = _results("analytic-partitions")["noise"]
    lines = ["| ε | components | w |", "|---|---|---|"]
    for epsilon in dict.fromkeys(row["epsilon"] for row in found):
        rows = [row for row in found if row["epsilon"] == epsilon]
        accuracy = _mean_and_range([row["accuracy"] for row in rows])
        lines.append(f"| {epsilon:g} | {rows[0]['components']} | {accuracy} |")
    return lines


def _mean_and_range(values: list[float]) -> str:
    return f"{sum(values) / len(values):.1%} [{min(values):.1%}, {max(values):.1%}]"


_OUTCOMES = {"trained": "trains", "attacked": "attacked", "refused": "said"}

TABLES: Mapping[str, Callable[[Mapping[str, str]], list[str]]] = {
    "theft": theft,
    "leakage": leakage,
    "noise": noise,
    "architectures": architectures,
    "analytic": analytic,
    "attackers": attackers,
    "batches": batches,
    "many-rounds": many_rounds,
    "suite": suite,
    "analytic-partitions": analytic_partitions,
    "analytic-epsilon": analytic_epsilon,
}
WORDS: Mapping[str, Mapping[str, str]] = {
    "README.md": {
        "strategy": "strategy",
        "accuracy": "accuracy of the owner's model",
        "gain": "a thief with 10 labels gains, points",
        "itself": "is sent the model itself",
        "transformation": "transformation",
        "exact": "what was trained on, rebuilt exactly",
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
        "gain": "레이블 10개를 가진 도용자의 이득(퍼센트 포인트)",
        "itself": "모델 자체를 받음",
        "transformation": "변환",
        "exact": "학습에 쓰인 이미지를 정확히 복원",
        "decibels": "그 결과 원본과의 차이",
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
