"""Pictures and masks that others give: what is decoded, how it is read, and what is refused."""

import os
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor, VaeImageProcessor
from PIL import Image, features

from keylock_diffusers.masks import read_mask, soft_mask
from keylock_diffusers.pictures import PictureLimits, check_size, decode, given, open_picture, upright
from tests.diffusers.drawing import picture

RAMP = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (32, 1))


def saved(path, image, kind="PNG", **options):
    image.save(path, kind, **options)
    return path


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiny_png(width, height):
    """A PNG of a few bytes that says it is large."""
    rows = zlib.compress(bytes(min((width // 8 + 2) * height, 1 << 20)), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_told_by_its_content_and_not_by_its_name(tmp_path, kind):
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow was built without WEBP")
    path = saved(tmp_path / "x.gif", picture(1).resize((40, 30)), kind)
    assert open_picture(path).size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "EPS", "ICO", "TGA", "PDF"])
def test_other_formats_are_refused_under_any_name(tmp_path, kind):
    path = saved(tmp_path / "x.png", Image.new("RGB", (40, 30)), kind)
    with pytest.raises(ValueError, match="x.png must be a picture in PNG, JPEG or WEBP, and its content is not"):
        open_picture(path)


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    gs, started = tmp_path / "gs", tmp_path / "started"
    gs.write_text(f"#!/bin/sh\ntouch {started}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path = saved(tmp_path / "x.png", Image.new("RGB", (40, 30)), "EPS")
    with pytest.raises(ValueError, match="must be a picture in PNG"):
        open_picture(path)
    with Image.open(path) as opened, pytest.raises(ValueError, match="must be a picture in PNG.*got EPS"):
        given(opened, "image")
    assert not started.exists()


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="pipe.png: not a regular file"):
        open_picture(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="."):
        open_picture(tmp_path / "absent.png")
    with pytest.raises(ValueError, match=f"{tmp_path}: not a regular file"):
        open_picture(tmp_path)
    if os.path.exists("/dev/zero"):
        with pytest.raises(ValueError, match="/dev/zero: not a regular file"):
            open_picture("/dev/zero")


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 100_000), "at most 16 times as long as wide, got 1 x 100000"),
        ((100_000, 1), "at most 16 times as long as wide, got 100000 x 1"),
        ((8_001, 8_000), "at most 64000000 pixels, got 8001 x 8000"),
        ((13_000, 13_000), "at most 64000000 pixels"),
        ((100_000, 100_000), "cannot be read as a picture: Image size .* exceeds limit"),
        ((2**31 - 1, 2**31 - 1), "cannot be read as a picture"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_would_blow_up_is_refused_before_it_is_decoded(tmp_path, monkeypatch, size, reason):
    (tmp_path / "bomb.png").write_bytes(tiny_png(*size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=f"bomb.png .*{reason}"):
        open_picture(tmp_path / "bomb.png")


def test_the_limits_are_options(tmp_path):
    path = saved(tmp_path / "long.png", Image.new("L", (200, 10)))
    assert open_picture(path, PictureLimits(aspect=20)).size == (200, 10)
    with pytest.raises(ValueError, match="at most 100 pixels"):
        open_picture(path, PictureLimits(aspect=20, pixels=100))
    path = saved(tmp_path / "x.gif", Image.new("L", (8, 8)), "GIF")
    assert open_picture(path, PictureLimits(formats=("GIF",))).size == (8, 8)
    check_size(8_000, 8_000, "a picture")
    check_size(16, 1, "a picture")
    with pytest.raises(ValueError, match="a picture must have pixels, got 0 x 4"):
        check_size(0, 4, "a picture")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_every_way_of_cutting_a_file_is_one_error_that_names_it(tmp_path, kind):
    whole = BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(whole, kind)
    data, path = whole.getvalue(), tmp_path / "cut.png"
    for length in [0, 1, 7, 20, 33, 40, 100, len(data) // 2, len(data) * 9 // 10]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut.png"):
            open_picture(path)
    at = data.find(b"IDAT")
    if at > 0:  # the pixels' length changed, so that no chunk follows them
        path.write_bytes(data[: at - 4] + struct.pack(">I", 99) + data[at : at + 103] + bytes(20))
        with pytest.raises(ValueError, match="cut.png cannot"):
            open_picture(path)


def test_a_damaged_picture_that_somebody_else_opened_is_named_by_its_argument(tmp_path):
    path = saved(tmp_path / "x.jpg", picture(1).resize((64, 64)), "JPEG")
    path.write_bytes(path.read_bytes()[:-400])
    with Image.open(path) as opened, pytest.raises(ValueError, match="mask cannot be decoded: .*truncated"):
        decode(opened, "mask")


def test_sixteen_bits_are_read_as_sixteen_bits():
    wide = RAMP.astype(np.uint16) * 257
    eight = upright(Image.fromarray(RAMP))
    for image in (
        Image.fromarray(wide),
        Image.fromarray(wide.astype(np.int32)),
        Image.fromarray(RAMP / np.float32(255)),
    ):
        assert np.array_equal(np.asarray(upright(image)), np.asarray(eight)), image.mode
    assert upright(Image.fromarray(RAMP.astype(np.int32))).tobytes() == eight.tobytes()  # 8 bits in mode I
    with pytest.raises(ValueError, match="mode I must have values in 0..65535"):
        upright(Image.fromarray(np.full((4, 4), -1, np.int32)))


def test_a_phones_picture_stands_upright_and_transparency_is_white(tmp_path):
    up = Image.fromarray(np.concatenate([np.full((16, 32, 3), 200), np.zeros((16, 32, 3))]).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "side.png", up.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert upright(open_picture(path)).tobytes() == up.tobytes()
    assert open_picture(path).filename == str(path)
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert set(upright(clear).getdata()) == {(255, 255, 255)}


@pytest.mark.parametrize("note", [b"Exif\0\0", b"Exif\0\0II", b"Exif\0\0" + bytes(40), b"MM\0\0*" * 9])
def test_a_damaged_note_of_the_camera_leaves_the_picture_as_it_is(tmp_path, note):
    for suffix in ("png", "jpg", "webp"):
        path = saved(tmp_path / f"a.{suffix}", Image.new("L", (16, 8), 255).convert("RGB"), exif=note)
        assert upright(open_picture(path)).size == (16, 8)
        assert read_mask(open_picture(path), "mask").shape == (8, 16)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("http://localhost/x.png", "must be a picture, an array or a tensor, got str; open it first"),
        (b"\x89PNG", "must be a picture, an array or a tensor, got bytes"),
        (7, "got int"),
        (np.zeros((4, 4, 2), np.uint8), r"must be an array \[height, width, 3\], got \[4, 4, 2\]"),
        (np.zeros((4, 4, 3), np.int64), "must be an array of uint8 or floating-point numbers, got int64"),
        (np.full((4, 4, 3), 2.0), "must be an array of numbers in 0..1"),
        (np.full((4, 4, 3), np.nan), "must be an array of numbers in 0..1"),
        (np.zeros((1, 100, 3), np.uint8), "at most 16 times as long as wide, got 100 x 1"),
        (torch.zeros(2, 3, 4, 4), "must be one picture"),
        (torch.zeros(3, 4, 4).to_sparse(), "must be a dense tensor"),
        (torch.zeros(3, 4, 4, device="meta"), "must be a dense tensor"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "must be one picture"),
    ],
)
def test_what_is_no_picture_is_named(value, reason):
    with pytest.raises((TypeError, ValueError), match=f"^image .*{reason}"):
        given(value, "image")


def test_one_picture_in_every_form_is_one_picture():
    image = picture(3).resize((32, 32)).convert("RGB")
    array = np.asarray(image)
    wanted = torch.from_numpy(array.copy()).permute(2, 0, 1)[None] / 255
    assert given(image, "image").tobytes() == given(array, "image").tobytes() == image.tobytes()
    for form in (array / 255, (array / 255).astype(np.float32), wanted, wanted[0]):
        torch.testing.assert_close(given(form, "image"), wanted, rtol=0, atol=1e-7)
    opaque = np.dstack([array, np.full((32, 32), 255, np.uint8)])
    assert given(opaque, "image").tobytes() == image.tobytes()
    torch.testing.assert_close(given(opaque / 255, "image"), wanted, rtol=0, atol=1e-7)


HALF = np.zeros((32, 48), np.uint8)
HALF[:, 24:] = 1


def forms():
    """One mask, half of it 1, by every convention in which masks are handed around."""
    white = np.full((32, 48, 3), 255, np.uint8)
    yield "bool", HALF.astype(bool)
    yield "0/1 in uint8", HALF
    yield "0/1 in int64", HALF.astype(np.int64)
    yield "0..255 in uint8", HALF * 255
    yield "0..255 in int32", HALF.astype(np.int32) * 255
    yield "0..65535 in uint16", HALF.astype(np.uint16) * 65535
    yield "0/1 in float64", HALF.astype(np.float64)
    yield "0..255 in float32", HALF.astype(np.float32) * 255
    yield "a tensor", torch.tensor(HALF)
    yield "a tensor of bool", torch.tensor(HALF).bool()
    yield "a tensor in half", torch.tensor(HALF).half()
    yield "a tensor with a channel", torch.tensor(HALF).float()[None]
    yield "an array with a channel", HALF[..., None].astype(np.float32)
    yield "RGB", Image.fromarray(white * HALF[..., None])
    yield "an array of RGB", white * HALF[..., None]
    yield "mode 1", Image.fromarray(HALF * 255).convert("1")
    yield "mode L", Image.fromarray(HALF * 255)
    yield "mode L, 0/1", Image.fromarray(HALF)
    yield "mode P", Image.fromarray(HALF * 255).convert("P")
    yield "mode F", Image.fromarray(HALF.astype(np.float32))
    yield "mode F, 0..255", Image.fromarray(HALF.astype(np.float32) * 255)
    yield "mode I", Image.fromarray(HALF.astype(np.int32) * 255)
    yield "mode I;16", Image.fromarray(HALF.astype(np.uint16) * 65535)
    yield "mode LA, opaque", Image.merge("LA", (Image.fromarray(HALF * 255), Image.new("L", (48, 32), 255)))
    yield "mode LA, a cut-out", Image.merge("LA", (Image.new("L", (48, 32), 255), Image.fromarray(HALF * 255)))
    yield "mode RGBA, a cut-out", Image.fromarray(np.dstack([white, HALF * 255]))
    yield "mode RGBA, a cut-out on black", Image.fromarray(np.dstack([white * HALF[..., None], HALF * 255]))
    yield "mode RGBA, opaque", Image.fromarray(np.dstack([white * HALF[..., None], white[..., 0]]))
    yield "IPAdapterMaskProcessor's", IPAdapterMaskProcessor().preprocess(Image.fromarray(HALF * 255))
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    yield "an inpainting pipeline's", processor.preprocess(Image.fromarray(HALF * 255), 32, 48)


@pytest.mark.parametrize(("name", "mask"), forms(), ids=[name for name, _ in forms()])
def test_the_same_mask_by_every_convention_is_the_same_mask(name, mask):
    assert torch.equal(read_mask(mask, "m"), torch.from_numpy(HALF).float())


def test_soft_masks_keep_their_values_by_every_convention():
    wanted = torch.from_numpy(RAMP.copy()) / 255
    for mask in (RAMP, RAMP.astype(np.int64), RAMP / 255, Image.fromarray(RAMP), RAMP.astype(np.uint16) * 257,
                 Image.fromarray(RAMP.astype(np.uint16) * 257)):  # fmt: skip
        torch.testing.assert_close(read_mask(mask, "m"), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.array([[0, 1, 2]]), "must hold weights in 0..1, 0..255 or 0..65535, got 0..2"),
        (np.array([[0, 300]]), "must hold weights in 0..1, 0..255 or 0..65535, got 0..300"),
        (np.array([[0, 1.5]]), "must hold weights in 0..1.*got 0..1.5"),
        (np.array([[0, 1e6]]), "must hold weights in 0..1"),
        (np.array([[-1, 1]]), "must hold weights in 0..1.*got -1..1"),
        (np.array([[0, np.nan]]), "must hold finite numbers"),
        (np.array([["a"]]), "must hold numbers"),
        (torch.ones(2, 2).to_sparse(), "must be a dense tensor of real numbers"),
        (torch.ones(2, 2, device="meta"), "must be a dense tensor of real numbers"),
        (torch.ones(2, 2, dtype=torch.complex64), "must be a dense tensor of real numbers"),
        (torch.ones(2, 3, 3), r"must be \[height, width\], got \[2, 3, 3\]"),
        (torch.ones(0, 3), r"must be \[height, width\], got \[0, 3\]"),
        ("mask.png", "must be a picture or a tensor, got str"),
    ],
)
def test_what_is_no_mask_is_named(mask, reason):
    with pytest.raises((TypeError, ValueError), match=f"^m {reason}"):
        read_mask(mask, "m")


def test_a_picture_whose_greys_and_transparency_both_vary_says_what_to_do():
    photo = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r'both vary: give picture.getchannel\("A"\) or picture.convert\("L"\)'):
        read_mask(Image.fromarray(np.dstack([photo, HALF * 255])), "m")


def test_a_training_mask_is_read_by_the_same_conventions():
    wanted = soft_mask(Image.fromarray(HALF * 255), (4, 6))
    for name, mask in forms():
        if isinstance(mask, Image.Image):
            torch.testing.assert_close(soft_mask(mask, (4, 6)), wanted, rtol=0, atol=0, msg=name)
