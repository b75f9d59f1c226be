"""Tracing against closed forms, innocent models of every kind, and real runs."""

import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import integrate, stats
from typer.testing import CliRunner

from fedveil.audit import trace as tracing
from fedveil.audit.hosts import Hosts
from fedveil.audit.trace import Lineups, log10_p
from fedveil.cli.main import app
from fedveil.copies.fingerprint import Fingerprint
from fedveil.copies.noise import NoiseKey
from fedveil.errors import FedveilError
from fedveil.runs.archive import Archive, Entry
from fedveil.runs.directory import RunDirectory
from fedveil.studies.study import measure
from tests.commands import forked, started

KEY = NoiseKey(b"thirty-two bytes of a secret key")
SIZES = {"a.weight": (60, 80), "a.bias": (60,), "b.weight": (50, 100), "b.bias": (50,)}
LAYERS = (("a.weight", "a.bias"), ("b.weight", "b.bias"))
VALUES = sum(math.prod(shape) for shape in SIZES.values())


def model(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(s, generator=generator) for name, s in SIZES.items()}


def archive(folder, *, rounds=4, clients=10, strength=0.05, key=KEY):
    """An archive of pairs of copies that lie far apart, each of half of the clients."""
    made = Archive.create(folder, key)
    mark = Fingerprint(key, strength, LAYERS)
    for number in range(1, rounds + 1):
        base, noise = model(number), model(1_000 + number, 3.0)
        pair = tuple({n: base[n] + s * noise[n] for n in base} for s in (1, -1))
        made.write(Entry(number, pair, {client: client % 2 for client in range(clients)}, mark))
    return made


def mean(models):
    return {name: torch.stack([m[name] for m in models]).mean(0) for name in SIZES}


def trace(leaked, kept, among=None):
    return tracing.trace(leaked, Hosts.of(kept), among or list(Lineups(kept)))


def drifting(folder, *, rounds=12, strength=0.15, drift=0.3, undone=0.0):
    """An archive of one training: each base the last one, moved by its clients.

    A part of ``undone`` of the fingerprints of a round is trained away from the next base.
    """
    made, mark = Archive.create(folder, KEY), Fingerprint(KEY, strength, LAYERS)
    base = model(1)
    for number in range(1, rounds + 1):
        noise = model(1_000 + number, 0.5)
        pair = tuple({n: base[n] + sign * noise[n] for n in base} for sign in (1, -1))
        entry = Entry(number, pair, {client: client % 2 for client in range(10)}, mark)
        made.write(entry)
        marks = mean([marked(entry, client) for client in range(10)])
        moved = model(2_000 + number, drift)
        base = {n: base[n] + moved[n] - undone * marks[n] for n in base}
    return made


def marked(entry, client):
    """The fingerprint of a client's copy: what it was sent, less the shared copy."""
    own, shared = entry.received(client).weights, entry.copies[entry.assignment[client]]
    return {name: own[name] - shared[name] for name in SIZES}


def rounded(state, bits):
    steps = {n: v.abs().max() / (2 ** (bits - 1) - 1) for n, v in state.items()}
    return {n: (v / steps[n]).round() * steps[n] for n, v in state.items()}


def thinned(state, share):
    """The smallest values of each tensor at 0."""
    return {n: torch.where(v.abs() < v.abs().quantile(share), 0, v) for n, v in state.items()}


def flat(state):
    return torch.cat([state[name].flatten() for layer in LAYERS for name in layer])


def efficiency():
    """What clipping a normal value at twice its median size keeps of its correlation."""
    bound = 2 * stats.norm.ppf(0.75)

    def moment(power):
        return integrate.quad(
            lambda x: np.clip(x, -bound, bound) ** power * x ** (2 - power) * stats.norm.pdf(x),
            -12,
            12,
        )[0]

    return moment(1) / math.sqrt(moment(2))


@pytest.mark.parametrize("colluders", [1, 3, 5])
@pytest.mark.parametrize("change", [0.02, 0.2])
def test_the_z_of_a_planted_fingerprint_is_that_of_the_closed_form(tmp_path, colluders, change):
    """ε/m of unit noise among ε/√m of fingerprints and δ of change, over √n values."""
    kept = archive(tmp_path, rounds=1)
    guilty = [1, 3, 5, 7, 9][:colluders]
    entry = kept.read(1)
    leaked = mean([entry.received(client).weights for client in guilty])
    copy, other = entry.copies[1], model(77)
    for layer in LAYERS:
        size = torch.cat([copy[n].flatten() for n in layer]).square().mean().sqrt()
        for name in layer:
            leaked[name] = leaked[name] + change * size * other[name]
    found = trace(leaked, kept)
    strength = 0.05
    share = strength / colluders / math.hypot(strength / math.sqrt(colluders), change)
    expected = share * math.sqrt(VALUES) * efficiency()
    scores = {suspect.client: suspect.scores[1] for suspect in found.suspects}
    for client in guilty:
        assert scores[client] == pytest.approx(expected, abs=4)
    assert all(abs(scores[client]) < 4.5 for client in scores if client not in guilty)
    if expected > 12:
        assert list(found.named) == guilty


@pytest.mark.parametrize(
    "kind", ["normal", "cauchy", "sparse", "rounded", "reference", "rounded reference", "tiny"]
)
def test_innocent_models_have_uniform_p_values(tmp_path, kind):
    archived = archive(tmp_path, rounds=15, clients=20)
    hosts, among = Hosts.of(archived), list(Lineups(archived))
    z = []
    for seed in range(12):
        leaked = model(5_000 + seed)
        if kind == "cauchy":
            leaked = {n: v / model(6_000 + seed)[n] for n, v in leaked.items()}
        if kind == "sparse":
            leaked = {n: torch.where(v.abs() > 1.6, v, torch.zeros(())) for n, v in leaked.items()}
        if kind == "rounded":
            leaked = rounded(leaked, 4)
        if "reference" in kind:  # on the way from one archived model to another
            leaked = mean([model(2), model(3), model(1)])
            leaked = {n: v + 1e-3 * model(5_000 + seed)[n] for n, v in leaked.items()}
        if kind == "rounded reference":
            leaked = rounded(leaked, 4)
        if kind == "tiny":
            leaked = {n: 1e-20 * v for n, v in leaked.items()}
        found = tracing.trace(leaked, hosts, among)
        assert not found.named
        z += [score for suspect in found.suspects for score in suspect.scores.values()]
        z += found.decoys
        if "reference" in kind or kind == "tiny":  # all seeds have much the same residual
            break
    p = 10 ** np.array([log10_p(score) for score in z])
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_log10_p_is_scipys():
    for z in (-3.0, 0.0, 2.5, 6.0, 30.0, 300.0):
        assert log10_p(z) == pytest.approx(stats.norm.logsf(z) / math.log(10), rel=1e-9)


def test_p_values_are_corrected_for_every_test(tmp_path):
    kept = archive(tmp_path, rounds=3, clients=4)
    found = trace(model(9), kept)
    assert found.tests == 4 * (3 + 1)
    for suspect in found.suspects:
        together = sum(suspect.scores.values()) / math.sqrt(3)
        z = max(together, *suspect.scores.values())
        assert suspect.z == pytest.approx(z)
        # Half of alpha is for the first pass.
        expected = min(0.0, stats.norm.logsf(z) / math.log(10) + math.log10(2 * 16))
        assert suspect.log10_p == pytest.approx(expected)


def test_a_client_that_averages_its_rounds_is_named_by_all_of_them_together(tmp_path):
    """Its z of single rounds are about 2.4 by design; 40 of them together are 15."""
    kept = archive(tmp_path, rounds=40, strength=0.3)
    own, damage = mean([entry.received(6).weights for entry in kept]), model(99)
    found = trace({name: own[name] + damage[name] for name in SIZES}, kept)
    (suspect,) = [s for s in found.suspects if s.client == 6]
    assert found.named == (6,)
    assert suspect.rounds == ()
    assert max(suspect.scores.values()) < 6


@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_what_cannot_be_compared_counts_for_nothing(tmp_path_factory, data):
    """Zeros, NaN, and tensors that were dropped, renamed or resized neither accuse nor excuse."""
    kept = archive(tmp_path_factory.mktemp("run"), rounds=2)
    leaked = dict(kept.read(2).received(3).weights)
    name = data.draw(st.sampled_from(sorted(SIZES)))
    harm = data.draw(st.sampled_from(["drop", "rename", "resize", "nan", "zero", "inf"]))
    value = leaked.pop(name)
    if harm == "rename":
        leaked["other." + name] = value
    if harm == "resize":
        leaked[name] = torch.ones(3)
    if harm in ("nan", "inf", "zero"):
        leaked[name] = torch.full_like(value, {"nan": math.nan, "inf": math.inf, "zero": 0}[harm])
    found = trace(leaked, kept)
    assert found.named == (3,)
    assert found.suspects[0].rounds == (2,)
    assert found.values == VALUES - value.numel()


def test_a_model_of_another_architecture_is_refused(tmp_path):
    with pytest.raises(FedveilError, match=r"no tensor of the leaked model.*rename"):
        trace({"c.weight": torch.ones(3)}, archive(tmp_path))


@pytest.mark.parametrize("treated", ["pruned", "rounded"])
def test_a_coalition_over_many_rounds_is_named_after_damage(tmp_path, treated):
    """Next to the drift between their rounds, what is left of the fingerprints is small.

    The oracle is the correlation with each client's own shared copy subtracted, the round's other
    copy projected out: it finds nobody.
    """
    kept = drifting(tmp_path, strength=0.05)
    guilty = {client: 2 * client + 1 for client in range(5)}  # and the round of its last copy
    entries = {number: kept.read(number) for number in guilty.values()}
    leaked = mean([entries[r].received(c).weights for c, r in guilty.items()])
    leaked = thinned(leaked, 0.9) if treated == "pruned" else rounded(leaked, 5)
    for client, number in guilty.items():
        copy, other = (flat(c) for c in entries[number].copies[:: 1 - 2 * (client % 2)])
        there = (flat(leaked) != 0).float()
        rest, move = (flat(leaked) - copy) * there, (other - copy) * there
        rest = rest - move * (rest @ move) / (move @ move)
        mark = flat(marked(entries[number], client)) * there
        assert (rest @ mark) / rest.norm() / mark.norm() * there.sum().sqrt() < 5
    found = trace(leaked, kept)
    assert set(found.named) == set(guilty)
    assert {s.client: s.rounds for s in found.suspects if s.rounds} == {
        client: (number,) for client, number in guilty.items()
    }


def test_an_accomplice_is_named_once_the_others_fingerprints_are_known(tmp_path):
    """One part in twenty-five of a leak: z is √n/25 beside another's fingerprint, then without."""
    kept = archive(tmp_path, rounds=1)
    entry = kept.read(1)
    own, other = (entry.received(client).weights for client in (1, 3))
    found = trace({n: 0.96 * own[n] + 0.04 * other[n] for n in own}, kept)
    assert found.named == (1, 3)
    assert math.sqrt(VALUES) / 25 < 5
    for number, client in enumerate((1, 3), start=1):
        (suspect,) = [s for s in found.suspects if s.client == client]
        assert suspect.z > 90
        limit = math.log10(2**number * found.tests) + stats.norm.logsf(suspect.z) / math.log(10)
        assert suspect.log10_p == pytest.approx(limit, abs=1e-3)


def test_clients_of_a_run_whose_training_undoes_fingerprints_are_not_accused(tmp_path):
    """Their round's next base depends on them; what others leak may lie along it."""
    kept = drifting(tmp_path, undone=0.05)
    hosts, among = Hosts.of(kept), list(Lineups(kept))
    entries = list(kept)
    z = []
    for number, entry in enumerate(entries[:-1]):
        moved = model(2_000 + entry.round, 0.3)
        for client in (number % 10, (number + 5) % 10):
            own = entry.received(client).weights
            other = model(7_000 + 100 * number + client, 0.3)
            tuned = {n: own[n] + 0.5 * moved[n] + other[n] for n in SIZES}
            found = tracing.trace(tuned, hosts, among)
            assert set(found.named) <= {client}
            z += [s.scores[entry.round] for s in found.suspects if s.client != client]
    # 0.05 of 0.15 of a fingerprint, in the mean of ten, along a move of 0.3, over √n values.
    moved = np.mean([score for lineup in among for score in lineup.moved])
    assert moved == pytest.approx(-0.05 * 0.15 / 10 / 0.3 * math.sqrt(VALUES) * 1.3, abs=0.25)
    assert np.mean(z) < 3 / math.sqrt(len(z))
    assert 0.8 < np.std(z) < 1.2


def test_means_of_shared_copies_are_explained_to_the_bit(tmp_path):
    kept = drifting(tmp_path, rounds=5)
    copies = [copy for entry in kept for copy in entry.copies]
    found = trace(mean([copies[1], copies[4], copies[8]]), kept)
    assert not found.named
    assert max(abs(z) for s in found.suspects for z in s.scores.values()) < 5


def test_copies_too_large_for_memory_are_fitted_to_some_values_and_read_again(tmp_path):
    kept = drifting(tmp_path, rounds=6)
    whole, part = Hosts.of(kept), Hosts.of(kept, floats=11 * VALUES // 8)
    assert whole.every == 1
    assert part.every > 4
    assert part.directions.numel() < 11 * VALUES / 4
    shares = torch.randn(11, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(part.combined(shares), whole.combined(shares), atol=1e-4)
    assert torch.equal(
        part.thinned(whole.combined(shares))[:5], whole.combined(shares)[:: part.every][:5]
    )
    guilty = {client: client + 1 for client in range(4)}
    leaked = mean([kept.read(r).received(c).weights for c, r in guilty.items()])
    for hosts in (whole, part):
        assert set(tracing.trace(leaked, hosts, list(Lineups(kept))).named) == set(guilty)


def test_of_too_many_copies_those_of_some_rounds_are_taken_and_all_clients_tested(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("fedveil.audit.hosts._MOST_COPIES", 8)
    kept = drifting(tmp_path, rounds=12)
    hosts = Hosts.of(kept)
    assert hosts.rounds == (3, 6, 9, 12)
    found = tracing.trace(kept.read(7).received(3).weights, hosts, list(Lineups(kept)))
    assert found.named == (3,)
    assert found.suspects[0].rounds == (7,)


# Real runs


def fedveil(*options, check=True):
    done = forked(*options)
    assert not check or done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


def federation(out, *options):
    fedveil(
        *("train", "--dataset", "digits", "--strategy", "noise-delta", "--clients", 8),
        *("--fraction", 0.5, "--rounds", 3),
        *("--learning-rate", 0.1, "--clip", 5, "--workers", 2, "--out", out, *options),
    )
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return federation(tmp_path_factory.mktemp("trace") / "run")


def last_round(run):
    kept = Archive.open(run, RunDirectory.open(run).noise_key())
    return kept.read(kept.rounds[-1])


def save(weights, path):
    save_file({name: value.clone() for name, value in weights.items()}, path)
    return path


def test_every_client_of_a_round_is_named_by_its_own_copy_and_nobody_else(run, tmp_path):
    entry = last_round(run)
    for client in entry.assignment:
        leaked = save(entry.received(client).weights, tmp_path / f"{client}.safetensors")
        done = fedveil("audit", "trace", leaked, "--run", run, "--out", tmp_path / "trace.json")
        result = json.loads((tmp_path / "trace.json").read_text())
        assert result["named"] == [client]
        (named,) = [c for c in result["clients"] if c["client"] == client]
        assert named["rounds"] == [3]
        assert named["p"] < 1e-6
        assert result["is_w"] is False
        assert "1 of " in done.stdout
    assert (tmp_path / "trace.json").stat().st_mode & 0o777 == 0o600


def test_a_coalition_is_named_from_a_pytorch_file(run, tmp_path):
    entry = last_round(run)
    models = [entry.received(client).weights for client in entry.assignment]
    names = models[0]
    torch.save({n: torch.stack([m[n] for m in models]).mean(0) for n in names}, tmp_path / "x.pt")
    fedveil("audit", "trace", tmp_path / "x.pt", "--run", run, "--out", tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["named"] == sorted(entry.assignment)


def test_w_accuses_nobody_and_is_recognised(run):
    done = fedveil("audit", "trace", run / "model.safetensors", "--run", run)
    assert "0 of " in done.stdout
    assert "The file is w itself, which no client was ever sent" in done.stdout


def test_a_copy_of_another_run_accuses_nobody(run, tmp_path):
    other = federation(tmp_path / "other", "--rounds", 2)
    entry = last_round(other)
    for client in entry.assignment:
        leaked = save(entry.received(client).weights, tmp_path / "leaked.safetensors")
        assert "0 of " in fedveil("audit", "trace", leaked, "--run", run).stdout


def test_what_the_user_can_mend_is_said_in_a_sentence(run, tmp_path):
    leaked = run / "model.safetensors"

    def told(*options):
        done = fedveil("audit", "trace", *options, check=False)
        assert done.returncode == 2
        return done.stderr

    assert "missing.pt cannot be read" in told(tmp_path / "missing.pt", "--run", run)
    (tmp_path / "text.pt").write_text("no tensors")
    assert "no file of tensors" in told(tmp_path / "text.pt", "--run", run)
    assert "no run directory" in told(leaked, "--run", tmp_path)
    assert "--alpha 2.0 is out of range" in told(leaked, "--run", run, "--alpha", 2)
    plain = federation(tmp_path / "plain", "--strategy", "fedavg", "--rounds", 2)
    assert "carry no fingerprints" in told(leaked, "--run", plain)
    bare = federation(tmp_path / "bare", "--no-archive", "--rounds", 1)
    assert "no archive" in told(leaked, "--run", bare)
    NoiseKey.generate().save(plain / "noise.key")
    assert "another key" in told(leaked, "--run", plain)
    whole = (plain / "archive/000002.enc").read_bytes()
    (plain / "archive/000002.enc").write_bytes(whole[:-1])
    NoiseKey.load(run / "noise.key").save(plain / "noise.key")
    assert "archive/000001.enc was written with another key" in told(leaked, "--run", plain)


def test_a_damaged_archive_is_named_and_nothing_is_written(run, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    path = copied / "archive/000003.enc"
    path.write_bytes(path.read_bytes()[:-7])
    done = fedveil(
        *("audit", "trace", run / "model.safetensors", "--run", copied),
        *("--out", tmp_path / "trace.json"),
        check=False,
    )
    assert done.returncode == 2
    assert f"{path} is damaged" in done.stderr
    assert not (tmp_path / "trace.json").exists()


def test_ctrl_c_writes_nothing_and_says_so(run, tmp_path):
    copied, leaked = tmp_path / "copied", run / "model.safetensors"
    shutil.copytree(run, copied)
    slow = copied / "archive/000001.enc"
    slow.unlink()
    os.mkfifo(slow)
    process = started("audit", "trace", leaked, "--run", copied, "--out", tmp_path / "o")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:  # succeeds once the other end waits for what is written
            pipe = os.open(slow, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            time.sleep(0.05)
    time.sleep(0.2)
    process.signal(signal.SIGINT)
    done = process.ended(60)
    os.close(pipe)
    assert done.returncode == 130
    assert "Interrupted; nothing was written." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_the_study_names_everybody_it_should_on_digits(tmp_path, monkeypatch):
    """A quick look at the whole command; MNIST's figures are in docs/results."""
    asked = []

    def small(study, out, **told):
        asked.append(study)
        return measure(replace(study, colluders=(2, 10)), out, **told)

    monkeypatch.setattr("fedveil.studies.study.measure", small)
    monkeypatch.setattr("fedveil.studies.trace._IMAGES", 100)  # those that thieves tune a model on
    options = ["--dataset", "digits", "--rounds", "3", "--trials", "1", "--innocents", "10"]
    command = ["reproduce", "trace", "--out", str(tmp_path / "study"), *options, "--workers", "2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert asked[0].colluders == tuple(range(1, 11))
    result = json.loads((tmp_path / "study/trace.json").read_text())
    rows = {(r["source"], r["treatment"], r["colluders"]): r for r in result["rows"]}
    assert len(rows) == 10 * 2
    for treatment in ("as it is", "8 bits", "pruned, 50 %"):
        row = rows["last copies", treatment, 2]
        assert row["named"] == row["guilty"] == 2
    assert not any(row["falsely"] for row in result["rows"])
    assert [group["models"] for group in result["innocent"]] == [4, 2, 2, 2]
    assert not any(group["accused"] for group in result["innocent"])
    assert (tmp_path / "study/trace.png").read_bytes().startswith(b"\x89PNG")
    assert "| w | 2 | 0 |" in (tmp_path / "study/trace.md").read_text()
    assert load_file(tmp_path / "study/runs/leaked/model.safetensors")
