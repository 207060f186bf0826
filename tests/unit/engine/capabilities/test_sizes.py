"""The sizes that a model supports, found in its pipeline and its folder."""

import inspect
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest

from calotype_server.engine.capabilities import Defaults, describe, read_defaults
from calotype_server.engine.capabilities.sizes import draws_exactly, size_multiple, supported_sizes
from calotype_server.engine.requests.arguments import size_arguments
from calotype_server.engine.requests.view import request_view
from calotype_server.errors import ModelUnavailable
from calotype_server.types import OtherSizes
from support.engine import families, tiny

CHANGED = {
    "pipeline_dreamlite": "only without a size",
    "pipeline_dreamlite_mobile": "only without a size",
    "pipeline_flux_kontext": "argument",
    "pipeline_hidream_image": "own sizes",
    "pipeline_hunyuandit": "argument",
    "pipeline_kandinsky": "multiple",
    "pipeline_kandinsky2_2": "multiple",
    "pipeline_kandinsky3": "multiple",
    "pipeline_kandinsky_t2i": "own sizes",
    "pipeline_krea2": "multiple",
    "pipeline_omnigen": "only with an image",
    "pipeline_pag_hunyuandit": "argument",
    "pipeline_pag_pixart_sigma": "argument",
    "pipeline_pag_sana": "argument",
    "pipeline_pixart_alpha": "argument",
    "pipeline_pixart_sigma": "argument",
    "pipeline_prx": "argument",
    "pipeline_prx_pixel": "argument",
    "pipeline_qwenimage21": "multiple",
    "pipeline_sana": "argument",
    "pipeline_sana_sprint": "argument",
    "pipeline_stable_diffusion": "only without a size",
}
"""Why the image of each pipeline that changes widths and heights has the requested size anyway."""


def of_size(pipeline, sample_size, **config):
    """Returns a view of a pipeline whose denoiser was trained for another size, in latents."""
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    module = getattr(pipeline, name)
    kind = type(type(module).__name__, (SimpleNamespace,), {})
    denoiser = kind(
        config={**module.config, "sample_size": sample_size, **config}, device=module.device, dtype=module.dtype
    )
    return request_view(pipeline, pipeline.scheduler, **{name: denoiser}, default_sample_size=sample_size)


def pipeline_that_chooses_sizes(family):
    """Builds a pipeline whose native size is small, but not the smallest, so that it supports several sizes."""
    pipeline = families.prompted(family)
    if family == "hidream":
        pipeline.default_sample_size = 16
    return pipeline


def sizes_of(pipeline, multiple=16, defaults=None, other=OtherSizes.REJECT):
    """Returns the sizes of a pipeline whose edges are multiples of `multiple`."""
    return supported_sizes(pipeline, multiple, defaults or Defaults(), other)


class TestTables:
    """A pipeline with a table of sizes supports these sizes only."""

    @pytest.mark.parametrize(
        ("family", "sample_size", "count", "members"),
        [
            ("pixart_sigma", 128, 30, {(1024, 1024), (2048, 512), (1152, 896)}),
            ("pixart_sigma", 64, 30, {(512, 512), (1024, 256)}),
            ("sana", 32, 30, {(1024, 1024), (512, 2048)}),
            ("sana", 128, 30, {(4096, 4096)}),
            ("sana_sprint", 32, 30, {(1024, 1024)}),
        ],
    )
    def test_bins_of_the_native_size(self, family, sample_size, count, members):
        """The bins are those that the pipeline's own code chooses for the size of the transformer."""
        found = sizes_of(of_size(tiny.shared(family), sample_size))
        assert members <= set(found.sizes)
        assert len(found.sizes) >= count
        assert found.min_pixels == 0
        edge = math.isqrt(math.prod(found.sizes[0]))
        assert found.sizes[0] == (edge, edge)

    def test_the_size_of_prx_is_in_pixels(self):
        """PRX declares its size in pixels, not in latents."""
        pipeline = families.prompted("prx")
        assert sizes_of(pipeline).sizes[0] == (64, 64)
        pipeline.register_to_config(default_sample_size=512)
        assert {(512, 512), (704, 352)} <= set(sizes_of(pipeline).sizes)

    def test_hunyuan_dit(self):
        """The shapes of HunyuanDiT are for its native size of 1024 pixels; another size has a range."""
        pipeline = families.prompted("hunyuan_dit")
        assert sizes_of(pipeline).min_pixels > 0
        found = sizes_of(of_size(pipeline, 128))
        assert found.sizes[0] == (1024, 1024)
        assert set(found.sizes) == set(inspect.getmodule(diffusers.HunyuanDiTPipeline).SUPPORTED_SHAPE)

    def test_kontext(self):
        """FLUX-Kontext supports the sizes that it was trained with."""
        pipeline = families.prompted("flux_kontext")
        pipeline.default_sample_size = 128
        found = sizes_of(pipeline)
        assert set(found.sizes) == set(inspect.getmodule(diffusers.FluxKontextPipeline).PREFERRED_KONTEXT_RESOLUTIONS)
        assert (found.sizes[0], found.min_pixels) == ((1024, 1024), 0)

    @pytest.mark.parametrize("name", ["hidream", "kandinsky5"])
    def test_pipelines_that_insist(self, name):
        """No setting makes a pipeline draw a size that it changes."""
        pipeline = pipeline_that_chooses_sizes(name)
        found = sizes_of(pipeline)
        assert found.min_pixels == 0
        assert len(found.sizes) >= 3
        assert all(draws_exactly(pipeline, *size) for size in found.sizes)
        widened = sizes_of(pipeline, defaults=Defaults(min_pixels=1), other=OtherSizes.DRAW)
        assert widened == found
        with pytest.raises(ModelUnavailable, match="16x160"):
            sizes_of(pipeline, defaults=Defaults(sizes=((16, 160),)))

    def test_sizes_of_hidream(self):
        """At its native size, HiDream supports common aspect ratios."""
        pipeline = families.prompted("hidream")
        pipeline.default_sample_size = 128
        assert sizes_of(pipeline).sizes == (
            (1024, 1024), (1360, 768), (1248, 832), (1168, 880), (880, 1168), (832, 1248), (768, 1360)
        )  # fmt: skip


class TestRanges:
    """Other pipelines support a range of sizes around their native one."""

    def test_sdxl_gets_its_training_sizes(self):
        """The listed sizes of SDXL are among those that it was trained with (arXiv 2307.01952, appendix I)."""
        found = sizes_of(of_size(tiny.shared("sdxl"), 128), 8)
        assert found.sizes == (
            (1024, 1024), (1344, 768), (1216, 832), (1152, 896), (896, 1152), (832, 1216), (768, 1344)
        )  # fmt: skip
        assert (found.min_pixels, found.max_pixels, found.max_aspect_ratio) == (2**19, 2**19 * 3, 4)

    def test_a_unet_of_one_size_has_a_narrow_range(self):
        """A model that was trained at one size repeats parts of the image in larger ones."""
        found = sizes_of(of_size(tiny.shared("sd15"), 64), 8)
        assert found.sizes[0] == (512, 512)
        assert (found.min_pixels, found.max_pixels, found.max_aspect_ratio) == (196608, 393216, 2)

    def test_a_transformer_has_a_wide_range(self):
        """FLUX has a quarter to two times its native megapixel."""
        found = sizes_of(tiny.shared("flux"))
        assert (found.min_pixels, found.max_pixels, found.max_aspect_ratio) == (2**18, 2**21, 4)

    @tiny.every_family
    def test_every_listed_size_is_in_the_range(self, family):
        """The model supports the sizes that it lists, and the first one is its default."""
        model = describe("tiny", tiny.shared(family), Defaults())
        assert model.sizes[0] == (model.width, model.height)
        assert len(model.sizes) == len(set(model.sizes))
        assert all(model.min_pixels <= math.prod(size) <= model.max_pixels for size in model.sizes)
        assert all(max(size) <= model.max_aspect_ratio * min(size) for size in model.sizes)

    @pytest.mark.parametrize("family", ["aura_flow", "sd3"])
    def test_positions_bound_the_edges(self, family):
        """No supported size has an edge for which the transformer has no positions."""
        pipeline = tiny.shared(family)
        config = pipeline.transformer.config
        positions = config.pos_embed_max_size if family == "sd3" else math.isqrt(config.pos_embed_max_size)
        found = sizes_of(pipeline)
        assert math.sqrt(found.max_pixels * found.max_aspect_ratio) <= positions * 16

    def test_the_default_size_of_the_call_counts(self):
        """AuraFlow's call has a default of 1024 pixels, unless the transformer has no positions for them."""
        large = of_size(tiny.shared("aura_flow"), 64, pos_embed_max_size=96**2)
        assert sizes_of(large).sizes[0] == (1024, 1024)
        assert sizes_of(tiny.shared("aura_flow")).sizes[0] == (64, 64)

    def test_kandinsky_3_rounds_to_larger_multiples(self):
        """Kandinsky 3 would draw a larger image for sizes between multiples of 64."""
        pipeline = of_size(tiny.shared("sd15"), None)
        pipeline.__class__ = diffusers.Kandinsky3Pipeline
        assert size_multiple(pipeline, pipeline.unet) == 64
        assert sizes_of(pipeline, 64).sizes[0] == (1024, 1024)


class TestFolder:
    """`calotype.json` in the model's folder replaces sizes and range."""

    def test_sizes_alone_are_all_sizes(self):
        """With sizes and no range, the model supports nothing else, and the first one is the default."""
        model = describe("tiny", tiny.shared("sd15"), Defaults(sizes=((96, 64), (64, 64))))
        assert (model.width, model.height) == (96, 64)
        assert (model.sizes, model.min_pixels) == (((96, 64), (64, 64)), 0)
        assert not model.supports_size(72, 64)

    def test_a_range(self):
        """A range replaces that of the pipeline."""
        model = describe("tiny", tiny.shared("sd15"), Defaults(min_pixels=64, max_pixels=128 * 128))
        assert model.supports_size(8, 8)
        assert model.supports_size(128, 128)
        assert not model.supports_size(136, 128)

    def test_draw_widens_everything(self):
        """With `--other-sizes draw`, only multiples matter."""
        model = describe("tiny", tiny.shared("sd15"), Defaults(sizes=((64, 64),)), OtherSizes.DRAW)
        assert model.supports_size(8, 4096)
        assert not model.supports_size(12, 64)

    def test_a_size_that_cannot_be_drawn_is_an_error(self):
        """A size must be a multiple that the pipeline can draw."""
        with pytest.raises(ModelUnavailable, match="60x64, which StableDiffusionPipeline cannot draw"):
            describe("tiny", tiny.shared("sd15"), Defaults(sizes=((60, 64),)))

    def test_the_file_is_read(self, tmp_path):
        """The keys are sizes, min_pixels and max_pixels."""
        content = {"sizes": [[128, 64]], "min_pixels": 0, "max_pixels": 9000}
        (tmp_path / "calotype.json").write_text(json.dumps(content))
        assert read_defaults(tmp_path) == Defaults(sizes=((128, 64),), min_pixels=0, max_pixels=9000)

    @pytest.mark.parametrize(
        "content",
        ['{"sizes": []}', '{"sizes": [[1]]}', '{"sizes": [[1, 0]]}', '{"sizes": 3}', '{"min_pixels": -1}',
         '{"max_pixels": true}', '{"sizes": [[1.5, 2]]}'],
    )  # fmt: skip
    def test_a_damaged_file_is_reported(self, tmp_path, content):
        """Other values are an error with the file's name."""
        (tmp_path / "calotype.json").write_text(content)
        with pytest.raises(ModelUnavailable, match=r"calotype\.json"):
            read_defaults(tmp_path)

    def test_the_bundled_model_draws_the_size_of_its_training(self):
        """Larger images show fragments, several times."""
        folder = Path(inspect.getfile(describe)).parents[3] / "bundled_model" / "calotype_bundled_model" / "model"
        assert read_defaults(folder).sizes == ((128, 128),)


class TestDrawn:
    """The image of every supported size has exactly this size."""

    @pytest.mark.parametrize(
        "name",
        ["flux_kontext", "hidream", "hunyuan_dit", "kandinsky5", "pixart_sigma", "prx", "sana", "sana_sprint"],
    )
    def test_pipelines_that_choose_a_size_draw_the_requested_one(self, name):
        """Neither bins nor a maximum area change the size."""
        pipeline = pipeline_that_chooses_sizes(name)
        found = sizes_of(pipeline, 32 if name.startswith("sana") else 16)
        steps = 2 if name == "sana_sprint" else 1
        for width, height in (found.sizes[0], *found.sizes[1:4:2]):
            call = {"prompt": "a red apple", **size_arguments(pipeline, width, height)}
            images = pipeline(**call, num_inference_steps=steps, output_type="pt", return_dict=False)[0]
            assert tuple(images.shape) == (1, 3, height, width)

    def test_every_pipeline_that_changes_sizes_is_known(self):
        """A new pipeline of diffusers that changes the requested size fails this test until somebody classifies it."""
        assert _pipelines_that_change_sizes() == set(CHANGED)

    @pytest.mark.parametrize("name", [name for name, reason in CHANGED.items() if reason == "argument"])
    def test_every_argument_against_a_change_is_given(self, name):
        """Binning, and the resizing to a maximum area, are turned off by an argument of the call."""
        module = next(Path(diffusers.__file__).parent.rglob(f"{name}.py"))
        kinds = re.findall(r"^class (\w+Pipeline)\(", module.read_text(), re.MULTILINE)
        for kind in kinds:
            pipeline = object.__new__(getattr(diffusers, kind))
            found = size_arguments(pipeline, 96, 64)
            assert found["width"] * found["height"] == found.get("max_area", 96 * 64)
            assert found.get("use_resolution_binning") is False or "max_area" in found


_CALL = re.compile(r"\n    def __call__\((.*?)\n    \)(.*?)(?=\n    def |\nclass |\Z)", re.DOTALL)
_CHANGE = re.compile(
    r"^ +(?:height|width|height, width|width, height) (?:=|//=) "
    r"(?!height or |width or |None|self\.(?!\w+\.classify_|resolutions))",
    re.MULTILINE,
)
_TAKES_IMAGES = re.compile(
    r"control|img2img|inpaint|image2image|i2i|i2v|edit|fill|video|layered|prior|deprecated|super"
)


def _pipelines_that_change_sizes():
    """Returns the modules of text-to-image pipelines whose call assigns width or height."""
    root = Path(diffusers.__file__).parent / "pipelines"
    return {
        file.stem
        for file in root.rglob("pipeline_*.py")
        if not _TAKES_IMAGES.search(str(file.relative_to(root)))
        for signature, body in _CALL.findall(file.read_text(encoding="utf-8"))
        if "prompt" in signature and "height" in signature and "frames" not in signature
        if _CHANGE.search(re.sub(r'""".*?"""', "", body, flags=re.DOTALL))
    }
