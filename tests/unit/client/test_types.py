"""What people hold."""

import subprocess
import sys

import PIL.Image
import pytest

from calotype import Image, Phase
from calotype._convert import phase_from_proto
from calotype._samples import make_png, sample_jpeg
from calotype.v1 import calotype_pb2 as v1


@pytest.mark.parametrize("image", [make_png(5, 3), sample_jpeg()], ids=["png", "jpeg"])
def test_samples_are_valid_pictures(image):
    """The pictures of the fake server decode to the size that they claim."""
    picture = image.to_pil()
    assert picture.size == (image.width, image.height)
    assert picture.format.lower() == image.format


@pytest.mark.parametrize("name", ["apple.png", "apple.PNG", "apple"])
def test_matching_suffix_writes_the_bytes_as_they_are(tmp_path, name):
    """Nothing is encoded again without need."""
    image = make_png(4, 4)
    image.save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == image.data


def test_other_suffix_converts(tmp_path):
    """A PNG can be saved as a JPEG."""
    make_png(4, 4).save(str(tmp_path / "apple.jpg"))
    with PIL.Image.open(tmp_path / "apple.jpg") as picture:
        assert picture.format == "JPEG"


def test_unknown_suffix_is_refused(tmp_path):
    """A suffix that is no image format raises ValueError."""
    with pytest.raises(ValueError, match="unknown file extension"):
        make_png(4, 4).save(tmp_path / "apple.xyz")


def test_conversion_without_pillow_says_what_to_install(tmp_path, monkeypatch):
    """Without Pillow the error names the package and the suffix that needs none."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install pillow, or save with the suffix '\.png'"):
        make_png(4, 4).save(tmp_path / "apple.jpg")
    make_png(4, 4).save(tmp_path / "apple.png")


def test_images_print_compactly():
    """Printing progress never prints a file."""
    assert repr(make_png(4, 4)).startswith("<Image png 4x4, ")


def test_notebooks_show_images():
    """Each format answers to its own display hook."""
    assert make_png(4, 4)._repr_png_()
    assert make_png(4, 4)._repr_jpeg_() is None
    assert sample_jpeg()._repr_jpeg_()
    assert Image(b"", "unknown", 0, 0)._repr_png_() is None


def test_every_phase_of_the_wire_has_a_name():
    """Phases map by name, and one from the future is known to be unknown."""
    for name, value in v1.Phase.items():
        if value:
            assert phase_from_proto(value).name == f"PHASE_{name}".removeprefix("PHASE_PHASE_")
    assert phase_from_proto(99) is Phase.UNKNOWN
    assert not Phase.UNKNOWN.ended
    assert [phase.value for phase in Phase if phase.ended] == ["succeeded", "failed", "cancelled"]


def test_pillow_is_not_needed_to_import():
    """The core works where Pillow is absent."""
    code = "import sys; sys.modules['PIL'] = None; import calotype, calotype.testing"
    subprocess.run([sys.executable, "-c", code], check=True)
