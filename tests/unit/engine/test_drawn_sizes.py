"""A full run, an early finish and the previews of any request have the requested size, for every model family."""

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype.v1 import calotype_pb2 as pb
from calotype_server.api.sizes import narrowed
from calotype_server.api.validation import validate
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.loading import LoadOptions, load_pipeline
from calotype_server.errors import InvalidRequest
from calotype_server.limits import DEFAULT_LIMITS
from calotype_server.types import Decoding, PreviewMethod, PreviewReady
from support.engine import tiny
from support.engine.families import sized
from support.runs import Run

SMALL = Defaults(step_count=2, sizes=((64, 64), (96, 32)), min_pixels=32 * 32, max_pixels=96 * 96)
"""The native size of many tiny models is that of the real ones, which would take long."""


@tiny.every_family
def test_images_have_the_requested_size(family, tmp_path):
    """A request is rejected, or the image has exactly its size, also if it is finished early."""
    check_sizes(build_engine("tiny", tiny.prompted(family), defaults=SMALL, cache_dir=tmp_path, threads=1))


@pytest.mark.parametrize("name", ["hidream", "kontext", "prx"])
def test_pipelines_that_choose_sizes(name, tmp_path):
    """The same holds for pipelines that choose sizes, also while their memory is measured and previews are fitted."""
    pipeline = sized.prompted(name)
    options = {"cache_dir": tmp_path, "threads": 1, "memory_limit": None}
    engine = build_engine("tiny", pipeline, defaults=Defaults(step_count=2, guidance_scale=1.0), **options)
    assert engine.model.memory is not None
    assert PreviewMethod.HEAD in engine.model.preview_methods
    check_sizes(engine)


def test_a_folder_of_a_model_with_bins(tmp_path):
    """A PixArt of 256 pixels supports the sizes of its bins, and draws each of them, also if it is finished early."""
    parts = tiny.build("pixart_sigma").components
    config = {**parts["transformer"].config, "sample_size": 32}
    transformer = diffusers.PixArtTransformer2DModel.from_config(config)
    diffusers.PixArtSigmaPipeline(**{**parts, "transformer": transformer}).save_pretrained(tmp_path / "model")
    folder, device = str(tmp_path / "model"), torch.device("cpu")
    loaded = load_pipeline(LoadOptions(model=folder, device=device))
    pipeline = sized.with_embeddings(loaded, "pixart_sigma")
    defaults = Defaults(step_count=2)
    engine = build_engine("tiny", pipeline, defaults=defaults, cache_dir=tmp_path, threads=1)
    assert engine.model.sizes[0] == (256, 256)
    assert (512, 128) in engine.model.sizes
    assert not engine.model.supports_size(272, 272)
    check_sizes(engine)


def check_sizes(engine):
    """Requests random sizes, and closes the engine."""
    multiple = engine.model.size_multiple
    edges = st.integers(1, 128 // multiple).map(lambda number: number * multiple) | st.integers(1, 200)

    @settings(max_examples=6, deadline=None, database=None, derandomize=True)
    @given(st.tuples(edges, edges) | st.sampled_from(engine.model.sizes))
    def check(size):
        width, height = size
        request = pb.GenerateRequest(prompt="a red apple", width_px=width, height_px=height, seed=1)
        request.preview.method = pb.PREVIEW_METHOD_HEAD
        try:
            job, _ = validate(request, engine.model, narrowed(DEFAULT_LIMITS, engine.model))
        except InvalidRequest:
            assert not engine.model.supports_size(width, height)
            return
        assert (job.width, job.height) == (width, height)
        whole, early = Run(engine), Run(engine)
        early.stop.finish()
        for run in (whole, early):
            image = run(job)
            assert (image.width, image.height) == (width, height)
            previews = [event.pixels for event in run.events if isinstance(event, PreviewReady)]
            assert all(each.width * height == each.height * width for each in previews)
            [decoding] = [event for event in run.events if isinstance(event, Decoding)]
            assert decoding.finished_early is (run is early)

    try:
        check()
    finally:
        engine.close()
