"""A pipeline with a safety checker shows nothing sharp that the checker has not seen."""

import dataclasses

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
    """A cache in which the tiny SD1.5 is calibrated once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(heads):
    """Runs a job, with time for every preview, on an engine whose checker gives these verdicts."""
    engines = []

    def run_with(*verdicts, job=HEAD):
        pipeline = guarded(*verdicts)
        engine = build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=heads, threads=1)
        engines.append(engine)
        run = Run(engine)
        run.wait_before_each_evaluation(pipeline.unet)
        run.checker = pipeline.safety_checker
        try:
            run.picture = run(job)
        except errors.GenerationError as error:
            run.error = error
        return run

    yield run_with
    for engine in engines:
        engine.close()


def sizes(run):
    """Width and height of the previews, in their order."""
    return [(event.pixels.width, event.pixels.height) for event in run.events if isinstance(event, PreviewReady)]


def test_previews_are_sharp_once_the_checker_has_passed_the_picture(run):
    """Blurred before half of the steps, sharp after; the checker is asked once on the way and once at the end."""
    told = run(False, False)
    assert sizes(told) == [BLURRED] + [SHARP] * (STEPS - 1)
    assert len(told.checker.seen) == 2
    assert told.picture.width == 64
    assert Withdrawn not in told.kinds


def test_what_is_checked_is_the_whole_picture(run):
    """The checker sees the predicted picture decoded in full, not the preview."""
    told = run(False, False)
    assert [each.shape for each in told.checker.seen] == [(1, 64 * 48 * 3)] * 2


def test_previews_stay_blurred_after_an_objection(run):
    """When the final check passes all the same, the picture is delivered."""
    told = run(True, False)
    assert sizes(told) == [BLURRED] * STEPS
    assert told.picture.width == 64
    assert Withdrawn not in told.kinds


@pytest.mark.parametrize("midway", [True, False])
def test_a_final_objection_withdraws_previews_and_withholds_the_picture(run, midway):
    """It is said after the last preview, whatever the checker had said on the way, and the end is typed."""
    told = run(midway, True)
    assert told.kinds[-1] is Withdrawn
    assert told.kinds.count(Withdrawn) == 1
    assert (told.error.reason, told.error.code) == ("CONTENT_WITHHELD", "FAILED_PRECONDITION")
    assert not hasattr(told, "picture")


def test_nothing_is_learnt_from_a_withheld_picture(run, heads):
    """What the checker blackened is not what the decoder made."""
    path = head_path(heads, guarded())
    run(False, False).engine.close()
    before = path.read_bytes()
    run(False, True).engine.close()
    assert path.read_bytes() == before
    run(False, False).engine.close()
    assert path.read_bytes() != before


def test_a_checker_that_fails_lets_nothing_pass(run, logs):
    """It costs sharp previews, and nothing else."""
    told = run(RuntimeError("the checker is ill"), False)
    assert sizes(told) == [BLURRED] * STEPS
    assert told.picture.width == 64
    assert [entry["log_level"] for entry in logs if "safety checker" in entry["event"]] == ["error"]


def test_the_full_decoder_is_held_back_too(run):
    """The rule is for what is shown, whoever drew it."""
    told = run(False, False, job=dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.FULL_VAE)))
    assert sizes(told)[0] == BLURRED
    assert sizes(told)[-1] == SHARP


def test_no_preview_is_no_check_on_the_way(run):
    """Who wants no previews pays for one check, the pipeline's own."""
    told = run(False, job=dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.NONE)))
    assert sizes(told) == []
    assert len(told.checker.seen) == 1


def test_pipelines_without_a_checker_need_no_gate(sd15):
    """They have an attribute for one, or none at all."""
    assert safety_gate(sd15, decoder=None) is None
    assert safety_gate(tiny.shared("flux"), decoder=None) is None
    assert safety_gate(guarded(), decoder=None) is not None


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 512, 512), (24, 24)), ((3, 64, 128), (12, 24)), ((3, 128, 2), (24, 1)), ((3, 8, 8), (8, 8))],
)
def test_blurred_is_small_and_smooth(shape, expected):
    """At most 24 pixels a side, in proportion, with the colours of the whole and none of its detail."""
    picture = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    small = blurred(picture)
    assert small.shape == (1, 3, *expected)
    assert float(small.mean()) == pytest.approx(float(picture.mean()), abs=0.1)
    assert float(small.std()) < 0.5 * float(picture.std())
