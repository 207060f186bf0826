"""A pipeline with a safety checker shows sharp previews only after the checker has approved the image."""

import dataclasses
from typing import Any

import pytest
import torch

from calotype_server import errors
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.preview.head_cache import head_path
from calotype_server.engine.preview.safety_gate import blurred, safety_gate
from calotype_server.types import PreviewMethod, PreviewOptions, PreviewReady, Withdrawn
from support.checker import guarded
from support.engine import tiny
from support.runs import JOB, STEPS, Run

SHARP, BLURRED = (64, 48), (24, 18)
HEAD = dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.HEAD))


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A cache folder in which the tiny SD1.5 is calibrated once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(heads):
    """Runs a job, with time for every preview, on an engine whose checker returns these verdicts."""
    engines = []

    def run_with(*verdicts, job=HEAD):
        pipeline = guarded(*verdicts)
        engine = build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=heads, threads=1)
        engines.append(engine)
        run: Any = Run(engine)
        run.checker = pipeline.safety_checker
        try:
            with run.with_every_preview():
                run.picture = run(job)
        except errors.GenerationError as error:
            run.error = error
        return run

    yield run_with
    for engine in engines:
        engine.close()


def sizes(run):
    """Returns width and height of the previews, in order."""
    return [(event.pixels.width, event.pixels.height) for event in run.events if isinstance(event, PreviewReady)]


def test_previews_are_sharp_after_the_checker_has_approved(run):
    """Previews are blurred for half of the steps, then sharp; the checker runs once midway and once at the end."""
    finished = run(False, False)
    assert sizes(finished) == [BLURRED] + [SHARP] * (STEPS - 1)
    assert len(finished.checker.seen) == 2
    assert finished.picture.width == 64
    assert Withdrawn not in finished.kinds


def test_the_full_image_is_checked(run):
    """The checker gets the fully decoded predicted image, not the preview."""
    finished = run(False, False)
    assert [each.shape for each in finished.checker.seen] == [(1, 64 * 48 * 3)] * 2


def test_previews_stay_blurred_after_a_rejection(run):
    """After a rejection midway previews stay blurred; if the final check passes, the image is delivered."""
    finished = run(True, False)
    assert sizes(finished) == [BLURRED] * STEPS
    assert finished.picture.width == 64
    assert Withdrawn not in finished.kinds


@pytest.mark.parametrize("midway", [True, False])
def test_a_final_rejection_withdraws_previews_and_withholds_the_image(run, midway):
    """`Withdrawn` follows the last preview, regardless of the verdict halfway, and the error is CONTENT_WITHHELD."""
    finished = run(midway, True)
    assert finished.kinds[-1] is Withdrawn
    assert finished.kinds.count(Withdrawn) == 1
    assert (finished.error.reason, finished.error.code) == ("CONTENT_WITHHELD", "FAILED_PRECONDITION")
    assert not hasattr(finished, "picture")


def test_the_head_does_not_learn_from_a_withheld_image(run, heads):
    """The head does not learn from images that the checker has blackened."""
    path = head_path(heads, guarded())
    run(False, False).engine.close()
    before = path.read_bytes()
    run(False, True).engine.close()
    assert path.read_bytes() == before
    run(False, False).engine.close()
    assert path.read_bytes() != before


def test_a_failing_checker_keeps_previews_blurred(run, logs):
    """If the checker raises midway, previews stay blurred, and the image is still delivered."""
    finished = run(RuntimeError("the checker failed"), False)
    assert sizes(finished) == [BLURRED] * STEPS
    assert finished.picture.width == 64
    assert [entry["log_level"] for entry in logs if "safety checker" in entry["event"]] == ["error"]


def test_previews_by_the_full_vae_are_blurred_too(run):
    """The rule holds for every preview method."""
    finished = run(False, False, job=dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.FULL_VAE)))
    assert sizes(finished)[0] == BLURRED
    assert sizes(finished)[-1] == SHARP


def test_without_previews_there_is_no_check_midway(run):
    """A generation without previews is checked once, by the pipeline itself."""
    finished = run(False, job=dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.NONE)))
    assert sizes(finished) == []
    assert len(finished.checker.seen) == 1


def test_pipelines_without_a_checker_need_no_gate(sd15):
    """A pipeline whose checker is None, or that has no such attribute, has no gate."""
    assert safety_gate(sd15, decoder=None) is None
    assert safety_gate(tiny.shared("flux"), decoder=None) is None
    assert safety_gate(guarded(), decoder=None) is not None


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 512, 512), (24, 24)), ((3, 64, 128), (12, 24)), ((3, 128, 2), (24, 1)), ((3, 8, 8), (8, 8))],
)
def test_blurred_is_small_and_smooth(shape, expected):
    """A blurred image has at most 24 pixels per side, the same mean colour, and little detail."""
    picture = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    small = blurred(picture)
    assert small.shape == (1, 3, *expected)
    assert float(small.mean()) == pytest.approx(float(picture.mean()), abs=0.1)
    assert float(small.std()) < 0.5 * float(picture.std())
