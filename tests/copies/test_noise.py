import math
import stat

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedveil.copies.noise import NoiseKey, add_noise, noise_target
from fedveil.errors import FedveilError
from fedveil.models import MODELS, build_model, first_layer

KEY = NoiseKey(bytes(range(32)))


def draw(key=KEY, *, run="r", round_number=1, group="0", count=100_000):
    return key.gaussians(run=run, round_number=round_number, group=group, count=count)


def test_values_are_independent_standard_normals():
    values = draw(count=400_000).numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(stats.pearsonr(values[:-1], values[1:]).statistic) < 4 / math.sqrt(len(values))


def test_values_are_the_inverse_normal_of_the_cipher_stream():
    info = b"fedveil noise v1\0r\x001\x000"
    derived = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(KEY.secret)
    stream = Cipher(ChaCha20(derived, bytes(16)), mode=None).encryptor().update(bytes(400))
    signed = [int.from_bytes(stream[4 * i : 4 * i + 4], "little", signed=True) for i in range(100)]
    expected = stats.norm.ppf([(word + 2**31 + 0.5) / 2**32 for word in signed])
    assert torch.allclose(draw(count=100), torch.tensor(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "other",
    [
        {"run": "s"},
        {"round_number": 2},
        {"group": "1"},
        {"key": NoiseKey(bytes(32))},
        {"run": "r\0001", "group": "0"},
    ],
)
def test_every_part_of_the_derivation_changes_the_noise(other):
    assert abs(float(torch.corrcoef(torch.stack([draw(), draw(**other)]))[0, 1])) < 0.02
    assert torch.equal(draw(), draw())


def test_a_generated_key_is_secret_and_survives_a_file(tmp_path):
    key = NoiseKey.generate()
    key.save(tmp_path / "noise.key")
    assert NoiseKey.load(tmp_path / "noise.key") == key
    assert NoiseKey.generate() != key
    assert stat.S_IMODE((tmp_path / "noise.key").stat().st_mode) == 0o600
    assert key.secret.hex() not in repr(key)


@pytest.mark.parametrize("content", ["", "00", "zz" * 32, "00" * 33])
def test_a_file_that_is_no_key_is_refused_without_showing_it(tmp_path, content):
    (tmp_path / "k").write_text(content)
    with pytest.raises(FedveilError) as error:
        NoiseKey.load(tmp_path / "k")
    assert not content or content not in str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_first_conv_is_the_layer_the_pixels_reach(name):
    shape = (3, 32, 32)
    model = build_model(name, shape, 10, seed=0)
    target = noise_target(model, shape, "first-conv")
    weight = model.get_parameter(target.names[0])
    # Pixels reach a convolution or patch embedding by channel, a linear layer one by one.
    assert weight.shape[1] in (shape[0], math.prod(shape))
    assert {n.rpartition(".")[0] for n in target.names} == {first_layer(model, shape)}


def test_all_reaches_every_parameter_and_a_pattern_its_own():
    model = build_model("cnn", (1, 28, 28), 10, seed=0)
    assert noise_target(model, (1, 28, 28), "all").names == tuple(
        name for name, _ in model.named_parameters()
    )
    assert noise_target(model, (1, 28, 28), "hidden.*, output.bias").names == (
        "hidden.weight",
        "hidden.bias",
        "output.bias",
    )
    with pytest.raises(FedveilError, match=r"'nope\*'.*output\.bias"):
        noise_target(model, (1, 28, 28), "nope*")


def test_relative_noise_has_the_layers_root_mean_square_even_on_a_zero_bias():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(400, 300))
    torch.nn.init.zeros_(model[1].bias)
    weights = model.state_dict()
    noise = noise_target(model, (1, 20, 20), "all").draw(
        weights, KEY, run="r", round_number=3, group="0"
    )
    rms = math.sqrt(float(weights["1.weight"].square().sum()) / (400 * 300 + 300))
    for name in ("1.weight", "1.bias"):
        assert float(noise[name].std()) == pytest.approx(rms, rel=0.1)
    absolute = noise_target(model, (1, 20, 20), "all", relative=False).draw(
        weights, KEY, run="r", round_number=3, group="0"
    )
    assert float(absolute["1.weight"].std()) == pytest.approx(1, rel=0.02)


@given(sigma=st.floats(-100, 100, allow_nan=False), seed=st.integers(0, 2**16))
def test_adding_leaves_the_original_and_unnamed_tensors_alone(sigma, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randn(7, generator=generator), "b": torch.randn(3, generator=generator)}
    before = {name: value.clone() for name, value in weights.items()}
    noise = {"a": torch.randn(7, generator=generator)}
    noised = add_noise(weights, noise, sigma)
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert torch.equal(noised["b"], before["b"])
    assert torch.allclose(noised["a"], before["a"] + sigma * noise["a"], rtol=1e-5, atol=1e-5)
