"""The engine behind its protocol: a job goes in, events and an image come out."""

import dataclasses
import functools
import threading

import diffusers
import numpy as np
import pytest
import torch

from calotype_server import errors
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.preview import pipeline_previews as previews_module
from calotype_server.engine.protocol import Stop
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.types import (
    Decoding,
    Denoising,
    EncodingPrompt,
    Pixels,
    PreviewMethod,
    PreviewOptions,
    PreviewReady,
)
from support.engine import tiny
from support.engine.device_errors import EXHAUSTED
from support.runs import JOB, STEPS, Run


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A cache in which the tiny SD1.5 is calibrated once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def pipeline():
    """A pipeline that a test may change."""
    return tiny.build("sd15")


@pytest.fixture
def engine(pipeline, heads):
    """An engine over that pipeline."""
    engine = build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=heads, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def run(engine):
    """Runs a job on that engine."""
    return Run(engine)


def bare(job=JOB, **arguments):
    """Returns the unmodified pipeline's image for a job, converted by the pipeline itself."""
    shared = tiny.shared("sd15")
    view = request_view(shared, make_scheduler(shared, job.scheduler))
    image = view(
        prompt=job.prompt,
        width=job.width,
        height=job.height,
        num_inference_steps=job.step_count,
        generator=torch.Generator().manual_seed(job.seed),
        **arguments,
    ).images[0]
    return Pixels(image.width, image.height, np.asarray(image).tobytes())


def on_evaluation(pipeline, act):
    """Calls `act` with the number of the evaluation, from 1, before each call of the denoiser."""
    numbers = iter(range(1, 1_000_000))
    return pipeline.unet.register_forward_pre_hook(lambda *_: act(next(numbers)))


def poison(module, inputs, output):
    """Replaces everything that a module returns by NaN."""
    return tuple(torch.full_like(part, float("nan")) for part in output)


class TestImage:
    """The engine generates the same image as the pipeline alone."""

    def test_the_image_is_the_pipelines_own(self, run):
        """The image equals that of the bare pipeline with the same seed, byte for byte."""
        picture = run()
        assert (picture.width, picture.height) == (64, 48)
        assert picture == bare(guidance_scale=5.0)

    def test_the_seed_determines_the_image(self, run):
        """The same job gives the same image again, and another seed gives another image."""
        first = run()
        assert run() == first
        assert run(dataclasses.replace(JOB, seed=8)) != first

    def test_negative_prompt_and_guidance_are_passed(self, run):
        """The negative prompt and the guidance scale reach the pipeline."""
        job = dataclasses.replace(JOB, negative_prompt="pears", guidance_scale=2.5)
        assert run(job) == bare(job, negative_prompt="pears", guidance_scale=2.5)
        assert run(job) != run(dataclasses.replace(JOB, guidance_scale=2.5))

    def test_absent_parameters_are_not_passed(self, pipeline, heads):
        """Parameters that the job does not set are left to the pipeline."""
        calls = []

        class Recording(diffusers.StableDiffusionPipeline):
            @functools.wraps(diffusers.StableDiffusionPipeline.__call__)
            def __call__(self, **arguments):
                calls.append(arguments)
                return super().__call__(**arguments)

        pipeline.__class__ = Recording
        engine = build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=heads, threads=1)
        calls.clear()
        Run(engine)(dataclasses.replace(JOB, negative_prompt=None, guidance_scale=None))
        Run(engine)(dataclasses.replace(JOB, negative_prompt="", guidance_scale=0.0))
        engine.close()
        assert not {"negative_prompt", "guidance_scale"} & set(calls[0])
        assert (calls[1]["negative_prompt"], calls[1]["guidance_scale"]) == ("", 0.0)

    @pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
    def test_scheduler_by_name(self, run, name):
        """A job uses the scheduler that it names, and the shared pipeline keeps its own."""
        job = dataclasses.replace(JOB, scheduler=name)
        assert run(job) == bare(job, guidance_scale=5.0)
        assert run() == bare(guidance_scale=5.0)

    def test_previews_change_no_bit_with_any_scheduler(self, engine, run):
        """With every offered scheduler the image equals that of the bare pipeline, with cheap and full previews."""
        assert len(engine.model.schedulers) >= 12
        for name in engine.model.schedulers:
            if name == "DPMSolverSDEScheduler":
                continue  # In a call of the bare pipeline, its noise does not depend on the seed.
            expected = bare(dataclasses.replace(JOB, scheduler=name), guidance_scale=5.0)
            for method in (PreviewMethod.HEAD, PreviewMethod.FULL_VAE):
                options = PreviewOptions(method=method)
                assert run(dataclasses.replace(JOB, scheduler=name, preview=options)) == expected, (name, method)

    def test_model_is_described(self, engine):
        """The engine describes the loaded model."""
        assert (engine.model.name, engine.model.pipeline) == ("tiny", "StableDiffusionPipeline")
        assert engine.model.scheduler == "DDIMScheduler"

    def test_threads_are_set_for_each_run(self, run, monkeypatch):
        """Each run sets torch's number of threads, because torch keeps it per thread."""
        asked = []
        monkeypatch.setattr(torch, "set_num_threads", asked.append)
        run()
        assert 1 in asked


class TestEvents:
    """Events are reported in order."""

    def test_each_step_has_a_preview(self, pipeline, run):
        """If the preview thread has enough time, every step has a preview, and decoding follows the last step."""
        on_evaluation(pipeline, lambda number: run.wait_for_step(number - 1))
        run(dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.HEAD)))
        previews = [event for event in run.events if isinstance(event, PreviewReady)]
        assert [(event.step, event.total_steps, event.skipped) for event in previews] == [
            (number, STEPS, 0) for number in range(1, STEPS + 1)
        ]
        assert all((event.pixels.width, event.pixels.height) == (64, 48) for event in previews)
        assert all(len(event.pixels.data) == 64 * 48 * 3 for event in previews)
        assert len({event.pixels.data for event in previews}) == STEPS
        others = [event for event in run.events if not isinstance(event, PreviewReady)]
        assert others == [EncodingPrompt(), Denoising(0, STEPS), Decoding()]
        assert run.events[:2] == others[:2]
        assert run.events.index(others[2]) >= 2 + STEPS - 1

    def test_a_busy_preview_thread_delays_no_steps(self, run):
        """Without waiting, previews come in rising order, and replaced ones are counted as skipped."""
        run()
        shown = [event for event in run.events if isinstance(event, PreviewReady)]
        assert [event.step for event in shown] == sorted({event.step for event in shown})
        assert all(event.step <= STEPS for event in shown)
        before_last = [event for event in shown if event.step < STEPS]
        assert sum(1 + event.skipped for event in before_last) <= STEPS
        assert run.kinds.count(Decoding) == 1

    def test_evaluations_are_counted(self, run):
        """With a scheduler that evaluates the model twice per step, each evaluation counts as a step."""
        run(dataclasses.replace(JOB, scheduler="HeunDiscreteScheduler"))
        assert run.events[1] == Denoising(0, 2 * STEPS - 1)
        assert run.kinds.count(Decoding) == 1

    @pytest.mark.parametrize("others", [set(), {PreviewMethod.FULL_VAE}])
    def test_without_a_head_there_is_progress(self, pipeline, tmp_path, monkeypatch, logs, others):
        """A pipeline that cannot be calibrated still generates images, with previews by the remaining methods."""

        def fail(*args):
            raise ValueError("no tail to plant in")

        monkeypatch.setattr(previews_module, "calibrate", fail)
        engine = build_engine(
            "tiny",
            pipeline,
            defaults=Defaults(),
            cache_dir=tmp_path,
            threads=1,
            preview_methods={PreviewMethod.HEAD, *others},
        )
        assert "error" in [entry["log_level"] for entry in logs]
        assert set(engine.model.preview_methods) == others
        run = Run(engine)
        assert run() == bare(guidance_scale=5.0)
        engine.close()
        drawn = {event.method for event in run.events if isinstance(event, PreviewReady)}
        assert drawn == others
        if not others:
            steps = [Denoising(number, STEPS) for number in range(STEPS + 1)]
            assert run.events == [EncodingPrompt(), *steps, Decoding()]

    def test_head_comes_from_the_cache(self, pipeline, heads, engine, monkeypatch):
        """A second start with the same decoder does not calibrate, and still has previews."""

        def fail(*args):
            raise AssertionError("calibrated again")

        monkeypatch.setattr(previews_module, "calibrate", fail)
        second = build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=heads, threads=1)
        run = Run(second)
        on_evaluation(pipeline, lambda number: run.wait_for_step(number - 1))
        run()
        second.close()
        assert PreviewReady in run.kinds

    def test_closing_ends_the_preview_thread(self, pipeline, heads):
        """A closed engine leaves no thread behind."""
        before = set(threading.enumerate())
        engine = build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=heads, threads=1)
        (thread,) = (each for each in set(threading.enumerate()) - before if each.name == "calotype-preview")
        engine.close()
        assert not thread.is_alive()


class TestPromptLength:
    """A prompt that is too long for the model is reported."""

    @pytest.mark.parametrize(("length", "truncated"), [(75, False), (76, True), (200, True)])
    def test_truncation_is_reported(self, run, length, truncated):
        """A prompt with more than 75 tokens, plus two special ones, is truncated, and the first event says so."""
        run(dataclasses.replace(JOB, prompt="x" * length))
        notices = run.events[0].notices
        assert [notice.reason for notice in notices] == ["PROMPT_TRUNCATED"] * truncated
        if truncated:
            assert str(length + 2) in notices[0].message
            assert "77" in notices[0].message


class TestStopping:
    """A stop ends the work within one step."""

    def test_stop_before_the_start(self, pipeline, run):
        """A job that is stopped before it starts encodes no prompt, takes no step and gives no image."""
        evaluations = []
        on_evaluation(pipeline, evaluations.append)
        pipeline.text_encoder.register_forward_pre_hook(lambda *_: evaluations.append("text"))
        run.stop.set()
        with pytest.raises(errors.Cancelled):
            run()
        assert evaluations == []
        assert not {PreviewReady, Decoding} & set(run.kinds)

    def test_stop_while_denoising(self, pipeline, run):
        """A stop during the second evaluation ends the job there, and the engine works for the next job."""
        evaluations = []

        def stop_at_two(number):
            evaluations.append(number)
            if number == 2:
                run.stop.set()

        hook = on_evaluation(pipeline, stop_at_two)
        with pytest.raises(errors.Cancelled):
            run(dataclasses.replace(JOB, step_count=8))
        assert evaluations == [1, 2]
        assert Decoding not in run.kinds
        hook.remove()
        assert Run(run.engine)() == bare(guidance_scale=5.0)


class TestFailure:
    """Each failure has its own error class, and the next job works."""

    def failing(self, run, error):
        """Runs a job that must fail with `error`, and returns the message for the caller."""
        with pytest.raises(error) as caught:
            run()
        return str(caught.value)

    def next_works(self, run):
        assert Run(run.engine)() == bare(guidance_scale=5.0)

    def test_nan_ends_the_job_early(self, pipeline, run):
        """The preview thread notices NaN from the denoiser, which ends the job before its last step."""
        evaluations = []

        def wait(number):
            evaluations.append(number)
            run.wait_for_step(number - 1)

        hooks = [on_evaluation(pipeline, wait), pipeline.unet.register_forward_hook(poison)]
        text = self.failing(run, errors.NumericalFailure)
        assert "invalid numbers" in text
        assert len(evaluations) < STEPS
        assert PreviewReady not in run.kinds
        for hook in hooks:
            hook.remove()
        self.next_works(run)

    def test_nan_weights(self, pipeline, run):
        """NaN in the weights gives a numerical failure, not a black image."""
        with torch.no_grad():
            bias = pipeline.unet.conv_out.bias.clone()
            pipeline.unet.conv_out.bias.fill_(float("nan"))
        self.failing(run, errors.NumericalFailure)
        with torch.no_grad():
            pipeline.unet.conv_out.bias.copy_(bias)
        self.next_works(run)

    def test_nan_from_the_decoder(self, pipeline, run):
        """NaN that only the decoder produces is noticed as well."""
        hook = pipeline.vae.decoder.register_forward_hook(lambda *args: torch.full_like(args[2], float("nan")))
        self.failing(run, errors.NumericalFailure)
        hook.remove()
        self.next_works(run)

    @pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
    def test_pipeline_raises(self, pipeline, run, logs, kind):
        """An exception of the pipeline, of any class, is logged; the caller's message does not quote it."""

        def fail(number):
            if number == 2:
                raise kind("secret: /home/someone/weights")

        hook = on_evaluation(pipeline, fail)
        text = self.failing(run, errors.GenerationFailed)
        assert "secret" not in text
        assert [entry["log_level"] for entry in logs] == ["error"]
        hook.remove()
        self.next_works(run)

    @pytest.mark.parametrize("error", EXHAUSTED[:4], ids=str)
    def test_out_of_memory(self, pipeline, run, error):
        """Exhausted device memory gives OutOfMemory, with advice and without details."""

        def fail(number):
            raise error

        hook = on_evaluation(pipeline, fail)
        text = self.failing(run, errors.OutOfMemory)
        assert "smaller image" in text
        assert "GiB" not in text
        assert "CUDA" not in text
        hook.remove()
        self.next_works(run)

    def test_dead_device(self, pipeline, run, logs):
        """A device that has failed permanently gives EngineDead, not GenerationFailed."""

        def fail(number):
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

        on_evaluation(pipeline, fail)
        text = self.failing(run, errors.EngineDead)
        assert "assert" not in text
        assert [entry["log_level"] for entry in logs] == ["error"]

    def test_failure_in_report(self, run):
        """If `report` raises, only its own job fails."""

        def report(event):
            raise KeyError("reporter")

        with pytest.raises(errors.GenerationFailed):
            run.engine.run(JOB, report, Stop())
        self.next_works(run)
