"""The data that the client returns."""

import base64
import dataclasses
import io
import subprocess
import sys
from typing import Any

import PIL.ExifTags
import PIL.Image
import PIL.PngImagePlugin
import pytest
from google.protobuf.duration_pb2 import Duration

from calotype import Image, Phase, PreviewMethod, Timings
from calotype._convert import model_from_proto, phase_from_proto, progress_from_proto
from calotype._testing.images import make_image, make_png, sample_jpeg
from calotype.v1 import calotype_pb2 as v1


@pytest.mark.parametrize(
    "image",
    [
        sample_jpeg(),
        *(make_image(kind, *size) for kind in ("jpeg", "png", "webp") for size in ((1, 1), (5, 3), (99, 64))),
    ],
    ids=repr,
)
def test_samples_are_valid_images(image):
    """The images of the fake server decode to their stated size."""
    picture = image.to_pil()
    assert picture.size == (image.width, image.height)
    assert picture.format.lower() == image.format


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("png", "apple.png"),
        ("png", "apple.PNG"),
        ("png", "apple"),
        ("jpeg", "apple.jpg"),
        ("jpeg", "apple.jpeg"),
        ("webp", "apple.webp"),
        ("unknown", "apple"),
    ],
)
def test_matching_suffix_writes_the_data_unchanged(tmp_path, kind, name):
    """An image saved with the suffix of its format is not encoded again."""
    image = Image(b"as it is", kind, 4, 4)
    image.save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"as it is"


@pytest.mark.parametrize(("kind", "suffix"), [("png", ".png"), ("jpeg", ".jpg"), ("webp", ".webp"), ("unknown", "")])
def test_default_suffix(kind, suffix):
    """Each format has its default suffix."""
    assert Image(b"", kind, 1, 1).suffix == suffix


def test_other_suffix_converts(tmp_path):
    """A PNG can be saved as a JPEG."""
    make_png(4, 4).save(str(tmp_path / "apple.jpg"))
    with PIL.Image.open(tmp_path / "apple.jpg") as picture:
        assert picture.format == "JPEG"


def test_unknown_suffix_raises(tmp_path):
    """A suffix of no image format raises ValueError."""
    with pytest.raises(ValueError, match="unknown file extension"):
        make_png(4, 4).save(tmp_path / "apple.xyz")


def test_conversion_without_pillow_names_the_package(tmp_path, monkeypatch):
    """Without Pillow, the error names the package and the suffix that needs no conversion."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install pillow, or save with the suffix '\.png'"):
        make_png(4, 4).save(tmp_path / "apple.jpg")
    make_png(4, 4).save(tmp_path / "apple.png")


def test_images_print_compactly():
    """repr() of an image or of progress contains no image data."""
    assert repr(make_png(4, 4)).startswith("<Image png 4x4, ")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_notebooks_show_images(kind):
    """IPython displays images of every format."""
    from IPython.core.interactiveshell import InteractiveShell

    image = make_image(kind, 4, 4)
    bundle, _ = InteractiveShell().display_formatter.format(image)
    assert base64.b64decode(bundle[f"image/{kind}"]) == image.data
    assert bundle["text/plain"] == repr(image)


def test_notebooks_show_the_repr_of_unknown_formats():
    """IPython shows the repr of an image of unknown format."""
    assert Image(b"", "unknown", 0, 0)._repr_mimebundle_() == {}


def written(kind, parameters):
    """Makes an image file with parameters in the fields that servers use."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {}
    if kind == "png":
        options["pnginfo"] = PIL.PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("parameters", parameters)
    else:
        exif = PIL.Image.Exif()
        comment = b"UNICODE\0" + parameters.encode("utf-16-be")
        exif.get_ifd(PIL.ExifTags.IFD.Exif)[PIL.ExifTags.Base.UserComment] = comment
        options["exif"] = exif
    PIL.Image.new("RGB", (4, 4)).save(buffer, kind, **options)
    return Image(buffer.getvalue(), kind, 4, 4)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_parameters_are_read_back(kind):
    """Parameters in a file are read unchanged, in any script."""
    text = "ein rötlicher 🍎\nSteps: 20, Seed: 5"
    assert written(kind, text).parameters() == text
    assert make_image(kind, 4, 4).parameters() is None


def test_comment_of_another_program_is_ignored():
    """A UserComment in another encoding is ignored."""
    exif = PIL.Image.Exif()
    exif.get_ifd(PIL.ExifTags.IFD.Exif)[PIL.ExifTags.Base.UserComment] = b"ASCII\0\0\0holiday"
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(buffer, "jpeg", exif=exif)
    assert Image(buffer.getvalue(), "jpeg", 4, 4).parameters() is None


@pytest.mark.parametrize(
    ("method", "expected"),
    [(v1.PREVIEW_METHOD_HEAD, PreviewMethod.HEAD), (v1.PREVIEW_METHOD_UNSPECIFIED, None), (99, PreviewMethod.UNKNOWN)],
)
def test_preview_has_its_method(method, expected):
    """An unknown preview method becomes UNKNOWN; a missing one becomes None."""
    message = v1.Progress(image=b"x", image_kind=v1.IMAGE_KIND_PREDICTED, image_format=99, preview_method=method)  # type: ignore[arg-type]
    progress = progress_from_proto(message)
    assert progress.preview_method is expected
    assert progress.preview.format == "unknown"
    message.ClearField("image")
    assert progress_from_proto(message).preview_method is None


def test_model_of_another_version_is_read():
    """Models from newer and from older servers can be read."""
    newer = v1.Model(preview_methods=[v1.PREVIEW_METHOD_HEAD, 99], preview=v1.PreviewOptions(method=98))  # type: ignore[arg-type, list-item]
    assert model_from_proto(newer).preview_methods == (PreviewMethod.HEAD, PreviewMethod.UNKNOWN)
    assert model_from_proto(newer).previews.method is PreviewMethod.UNKNOWN
    older = model_from_proto(v1.Model())
    assert older.preview_methods == ()
    assert older.previews.every_steps is None
    assert older.previews.method is None


def test_every_timing_is_converted():
    """Durations become seconds, or None if the server omits them. The number of computed steps is a number."""
    timings = v1.Timings(denoising=Duration(seconds=1, nanos=500_000_000), computed_steps=14)
    assert progress_from_proto(v1.Progress(timings=timings)).timings == Timings(denoising=1.5, computed_steps=14)
    assert [field.name for field in dataclasses.fields(Timings)] == [
        field.name for field in v1.Timings.DESCRIPTOR.fields
    ]


def test_the_model_names_its_accelerator_and_its_fast_schedulers():
    """`Model` has the accelerator, the reason why it is not the chosen one, and the schedulers for the speed "fast"."""
    message = v1.Model(accelerator="none", accelerator_fallback="It failed.", fast_schedulers=["DDIMScheduler"])
    model = model_from_proto(message)
    assert (model.accelerator, model.accelerator_fallback) == ("none", "It failed.")
    assert model.fast_schedulers == ("DDIMScheduler",)


def test_every_phase_of_the_proto_has_a_name():
    """Phases are converted by name; an unknown phase becomes UNKNOWN."""
    for name, value in v1.Phase.items():
        if value:
            assert phase_from_proto(value).name == f"PHASE_{name}".removeprefix("PHASE_PHASE_")
    assert phase_from_proto(99) is Phase.UNKNOWN
    assert not Phase.UNKNOWN.ended
    assert [phase.value for phase in Phase if phase.ended] == ["succeeded", "failed", "cancelled"]


def test_pillow_is_not_needed_to_import():
    """The package can be imported without Pillow."""
    code = "import sys; sys.modules['PIL'] = None; import calotype, calotype.testing"
    subprocess.run([sys.executable, "-c", code], check=True)
