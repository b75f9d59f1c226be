"""Training and ``fedveil transform`` read the same files to the same pixels."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin
from torch import nn

from fedveil.data import load_dataset
from fedveil.data.decode import read_image
from fedveil.defenses import BlockDCT, transform_folder
from fedveil.errors import FedveilError

# The EXIF orientations as what must be done to see the stored picture upright.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
HEIGHT, WIDTH = 11, 18


def _random(seed, *channels, dtype=np.uint8, end=256):
    return np.random.default_rng(seed).integers(0, end, (HEIGHT, WIDTH, *channels), dtype=dtype)


def _palette(seed, **options):
    image, colours = Image.fromarray(_random(seed)), np.random.default_rng(seed + 1)
    table = colours.integers(0, 256, (256, 3), dtype=np.uint8)
    image.putpalette(table.tobytes())
    return image, table[np.asarray(image)], options


def _plain(array, expected=None, **options):
    return Image.fromarray(array), array if expected is None else expected, options


def _sixteen(seed):
    wide = _random(seed, dtype=np.uint16, end=65_536)
    wide[0, 0] = 65_535
    return wide


def _float(seed):
    values = np.random.default_rng(seed).random((HEIGHT, WIDTH), dtype=np.float32)
    return _plain(values, np.rint(values.astype(np.float64) * 255).astype(np.uint8))


def _big_endian(seed):
    image = Image.frombytes("I;16B", (WIDTH, HEIGHT), _sixteen(seed).astype(">u2").tobytes())
    return image, np.rint(_sixteen(seed) / 257).astype(np.uint8), {}


def _wide(seed):
    return _plain(_sixteen(seed), np.rint(_sixteen(seed) / 257).astype(np.uint8))


def _binary(seed):
    bits = _random(seed, end=2).astype(bool)
    return _plain(bits, bits * np.uint8(255))


def _alpha(seed, grey):
    if grey:
        return _plain(array := _random(seed, 2), array[..., 0])
    return _plain(array := _random(seed, 4), array[..., :3])


# Of every kind the image, what must be read of it, and how it is stored: (format, kind).
KINDS = {
    "grey": (lambda s: _plain(_random(s)), ("PNG", "TIFF", "BMP", "PPM")),
    "colour": (lambda s: _plain(_random(s, 3)), ("PNG", "TIFF", "BMP", "PPM")),
    "grey and alpha": (lambda s: _alpha(s, True), ("PNG", "TIFF")),
    "colour and alpha": (lambda s: _alpha(s, False), ("PNG", "TIFF")),
    "palette": (lambda s: _palette(s), ("PNG", "TIFF", "BMP", "GIF")),
    "palette with a transparent colour": (lambda s: _palette(s, transparency=3), ("PNG",)),
    "palette with transparency": (lambda s: _palette(s, transparency=bytes(range(256))), ("PNG",)),
    "one bit": (_binary, ("PNG", "TIFF", "BMP", "PPM")),
    "16 bits": (_wide, ("PNG", "TIFF", "PPM")),
    "16 bits, big-endian": (_big_endian, ("TIFF", "PNG")),
    "floating point": (_float, ("TIFF", "PPM")),
}
LOSSLESS = [(kind, form) for kind, (_, forms) in KINDS.items() for form in forms]


def _stored(kind, form, seed, orientation=1):
    """Return the bytes of a file and what must be read of it."""
    image, expected, options = KINDS[kind][0](seed)
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    tagged = {"exif": exif} if form in ("PNG", "TIFF") else {}
    image.save(stream, form, **options, **tagged)
    return stream.getvalue(), UPRIGHT[orientation if tagged else 1](expected)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(LOSSLESS), st.integers(0, 2**31), st.sampled_from(sorted(UPRIGHT)))
def test_every_kind_is_read_as_it_is_seen(what, seed, orientation):
    content, expected = _stored(*what, seed, orientation)
    np.testing.assert_array_equal(read_image(content).pixels, expected)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LOSSLESS),
    st.integers(0, 2**31),
    st.sampled_from(sorted(UPRIGHT)),
    st.sampled_from(["x.png", "x", "x.txt", "X.JFIF", "x.2024-01"]),
    st.integers(1, 64),
)
def test_training_on_the_copy_sees_the_transformed_image(
    tmp_path_factory, what, seed, orientation, name, keep
):
    folder = tmp_path_factory.mktemp("site")
    (folder / "site/cat").mkdir(parents=True)
    content, _ = _stored(*what, seed, orientation)
    (folder / "site/cat" / name).write_bytes(content)
    transform = BlockDCT(keep=keep)
    assert transform_folder(folder / "site", folder / "copy", transform) == 1
    (copy,) = (folder / "copy/cat").iterdir()
    original, copied = read_image(content).pixels, read_image(copy).pixels
    assert copied.shape == original.shape
    planes = torch.from_numpy(original.reshape(*original.shape[:2], -1).copy()).permute(2, 0, 1)
    expected = transform(planes[None].float() / 255)[0].clamp(0, 1) * 255
    got = torch.from_numpy(copied.reshape(*copied.shape[:2], -1).copy()).permute(2, 0, 1)
    assert float((got - expected).abs().max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_lossy_files_are_read_and_copied_alike(tmp_path, form, mode):
    if mode == "CMYK" and form != "JPEG":
        return
    channels = {"L": (), "RGB": (3,), "CMYK": (4,)}[mode]
    file = tmp_path / "site/cat/photo"
    file.parent.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    tagged = {"exif": exif} if form != "JPEG2000" else {}
    Image.fromarray(_random(0, *channels), mode).save(file, form, **tagged)
    transform_folder(tmp_path / "site", tmp_path / "copy", nn.Identity())
    copy, original = (read_image(tmp_path / name) for name in ("copy/cat/photo.png", file))
    np.testing.assert_array_equal(copy.pixels, original.pixels)
    turned = (WIDTH, HEIGHT) if tagged else (HEIGHT, WIDTH)
    assert original.pixels.shape[:2] == turned


def test_classes_and_splits_are_those_of_the_original(tmp_path):
    for name in ("Train/cat/0", "Train/dog/1", "Test/cat/2", "Train/cat/3", "Test/dog/4"):
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_random(len(name), 3)).save(tmp_path / "site" / f"{name}.bmp")
    transform_folder(tmp_path / "site", tmp_path / "copy", nn.Identity())
    site, copy = (load_dataset(str(tmp_path / name)) for name in ("site", "copy"))
    assert copy.classes == site.classes
    for split in ("train", "test"):
        assert torch.equal(getattr(copy, split).raw, getattr(site, split).raw)
        assert torch.equal(getattr(copy, split).labels, getattr(site, split).labels)


def test_nothing_but_pixels_gets_into_the_copy(tmp_path):
    """A thumbnail in the original is the original, however well the picture is protected."""
    (tmp_path / "site/cat").mkdir(parents=True)
    image, secret = Image.fromarray(_random(0, 3)), b"who-is-in-the-picture"
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = secret.decode(), 6
    exif.get_ifd(0x8769)[0x927C] = secret
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", secret.decode())
    text.add_itxt("XML:com.adobe.xmp", secret.decode())
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + secret
    stored = {"exif": exif, "icc_profile": profile}
    image.save(tmp_path / "site/cat/0.jpg", **stored, comment=secret, xmp=secret)
    image.save(tmp_path / "site/cat/1.png", **stored, pnginfo=text)
    image.save(tmp_path / "site/cat/2.tif", **stored)
    image.save(tmp_path / "site/cat/3.webp", **stored, xmp=secret)
    with (tmp_path / "site/cat/0.jpg").open("ab") as file:
        file.write(secret)
    for number, file in enumerate(sorted((tmp_path / "site/cat").iterdir())):
        assert secret in file.read_bytes(), number
    assert transform_folder(tmp_path / "site", tmp_path / "copy", nn.Identity()) == 4
    for copy in (tmp_path / "copy/cat").iterdir():
        assert secret not in copy.read_bytes()
        with Image.open(copy) as written:
            written.load()
            assert not written.info
            assert not written.getexif()


# What is said, and what is refused


def _two_classes(folder, images, form="TIFF"):
    for number, image in enumerate(images):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        save = image if callable(image) else lambda p, i=image: i.save(p, form)
        save(folder / "ab"[number % 2] / str(number))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.arange(256, dtype=np.int32).reshape(16, 16), "whole numbers of no known range"),
        (np.full((4, 4), 2**31 - 1, np.int32), "whole numbers of no known range"),
        (np.full((4, 4), 37.5, np.float32), "do not lie between 0 and 1"),
        (np.full((4, 4), np.nan, np.float32), "do not lie between 0 and 1"),
        (np.full((4, 4), -0.1, np.float32), "do not lie between 0 and 1"),
        (np.full((4, 4), 4_095, np.uint16), "all would be black"),
        (np.full((4, 4), 255, np.uint16), "all would be black"),
        (np.full((4, 4), 0.003, np.float32), "all would be black"),
    ],
)
def test_pixels_of_no_known_range_are_refused_by_both(tmp_path, array, words):
    _two_classes(tmp_path / "site", [Image.fromarray(array)] * 4)
    with pytest.raises(FedveilError, match=words):
        load_dataset(str(tmp_path / "site"))
    with pytest.raises(FedveilError, match=words):
        transform_folder(tmp_path / "site", tmp_path / "copy", nn.Identity())
    assert not (tmp_path / "copy").exists()


def _frames(form):
    def save(path):
        first, *others = (Image.fromarray(_random(n, 3)) for n in range(3))
        first.save(path, form, save_all=True, append_images=others, lossless=True)

    return save


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (_frames("GIF"), "several frames: the first is read"),
        (_frames("TIFF"), "several frames: the first is read"),
        (_frames("WEBP"), "several frames: the first is read"),
        (_frames("PNG"), "several frames: the first is read"),
        (Image.fromarray(np.full((4, 4, 4), 9, np.uint8)), "transparent pixels"),
        (Image.fromarray(np.full((4, 4), 16_383, np.uint16)), "brightest pixel is 25% of the"),
    ],
)
def test_what_was_decided_is_said_by_both(tmp_path, image, words):
    _two_classes(tmp_path / "site", [image] * 4)
    told = []
    transform_folder(tmp_path / "site", tmp_path / "copy", nn.Identity(), tell=told.append)
    for _ in ("decoded", "from the cache"):
        (remark,) = load_dataset(str(tmp_path / "site")).remarks
        assert words in remark
        assert "4 images" in remark
        assert told == [remark]


def test_opaque_single_pictures_cause_no_words(tmp_path):
    opaque = np.full((4, 4, 4), 255, np.uint8)
    _two_classes(tmp_path, [Image.fromarray(opaque), Image.fromarray(opaque[..., 0])] * 2)
    assert load_dataset(str(tmp_path)).remarks == ()


def test_a_program_is_never_run_to_read_a_file(tmp_path, monkeypatch):
    """Pillow gives PostScript to ghostscript, whatever the file is called."""
    _two_classes(tmp_path, [Image.fromarray(_random(0, 3))] * 4)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was run"))
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was run"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "a/plain").write_bytes(script)
    assert load_dataset(str(tmp_path)).left_out == ("a/plain: no image",)
    (tmp_path / "a/named.png").write_bytes(script)
    with pytest.raises(FedveilError, match=r"named\.png: it is not an image"):
        load_dataset(str(tmp_path))


def test_truncated_images_are_named_not_filled_up(tmp_path):
    _two_classes(tmp_path, [Image.fromarray(_random(0, 3))] * 4, form="JPEG")
    whole = (tmp_path / "a/0").read_bytes()
    (tmp_path / "a/0.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FedveilError, match=r"cannot decode the image .*a/0\.jpg: .*[Tt]runcated"):
        load_dataset(str(tmp_path))


def test_a_damaged_avif_file_is_refused(tmp_path):
    _two_classes(tmp_path, [Image.fromarray(_random(0, 3))] * 4, form="AVIF")
    whole = (tmp_path / "a/0").read_bytes()
    # Its main item gets the number of none that is there.
    at = whole.index(b"pitm") + 8
    (tmp_path / "a/0.avif").write_bytes(whole[:at] + bytes([255, 255]) + whole[at + 2 :])
    with pytest.raises(FedveilError, match=r"cannot decode the image .*a/0\.avif"):
        load_dataset(str(tmp_path))
