"""Requests with different LoRAs on one engine."""

import concurrent.futures
import copy
import dataclasses

import pytest
import torch

from calotype_server.engine.adapters.load import load_loras
from calotype_server.engine.adapters.loras import Loras
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.batching import plan as plan_module
from calotype_server.engine.batching.measure import Knee, Threads
from calotype_server.engine.capabilities import Defaults, denoiser_name, describe
from calotype_server.engine.generation_run import to_pixels
from calotype_server.engine.requests.arguments import call_arguments
from calotype_server.engine.requests.sample_calls import sample_calls
from calotype_server.engine.runtime.check import answers, joinable
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.engine.runtime.lora import LoraRuntime
from calotype_server.errors import GenerationFailed
from calotype_server.types import EncodingPrompt, Lora, PreviewMethod, PreviewOptions, Speed
from support.engine import tiny
from support.engine.families.unets import UNETS
from support.engine.files.loras import ATTENTION, save_lora
from support.runs import JOB, PATIENCE, Run

PLAIN = dataclasses.replace(JOB, preview=PreviewOptions(method=PreviewMethod.NONE))
STYLE, SUBJECT = Lora("style"), Lora("subject", -0.7)
JOBS = [
    PLAIN,
    dataclasses.replace(PLAIN, seed=8, loras=(STYLE,)),
    dataclasses.replace(PLAIN, seed=9, loras=(Lora("style", 0.5),), prompt="a fox"),
    dataclasses.replace(PLAIN, seed=10, loras=(STYLE, SUBJECT), guidance_scale=1.0),
    dataclasses.replace(PLAIN, seed=11, loras=(SUBJECT,), step_count=6),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A LoRA for UNet and text encoder, and one for the UNet with another rank and more layers."""
    folder, pipeline = tmp_path_factory.mktemp("loras"), tiny.shared("sd15")
    style = save_lora(folder / "style.safetensors", pipeline, components=("unet", "text_encoder"), size=0.2)
    targets = (*ATTENTION, "ff.net.0.proj", "conv1")
    subject = save_lora(folder / "subject.safetensors", pipeline, seed=1, rank=2, targets=targets, size=0.1)
    return {"style": str(style), "subject": str(subject)}


@pytest.fixture
def open_engine(tmp_path, files, monkeypatch):
    """Builds engines on tiny pipelines with both LoRAs, and closes them at the end."""
    monkeypatch.setattr(plan_module, "knee", lambda *_, **__: Knee(8, Threads(1, 1, 4)))
    opened = []

    def open_one(*, with_loras=True, pipeline=None, prepare=lambda _: None, **options):
        pipeline = pipeline or tiny.build("sd15")
        loras = load_loras(pipeline, files) if with_loras else options.pop("loras", None)
        prepare(pipeline)
        batches = []
        options = {"max_active": len(JOBS), "max_rows": 10, "threads": 1, **options}
        engine = build_engine(
            "tiny", pipeline, defaults=Defaults(), cache_dir=tmp_path, loras=loras, on_batch=batches.append, **options
        )
        opened.append(engine)
        return engine, batches

    yield open_one
    for engine in opened:
        engine.close()


def together(engine, jobs):
    """Returns the images of jobs that run at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as threads:
        return [run.result(PATIENCE) for run in [threads.submit(Run(engine), job) for job in jobs]]


def difference(a, b):
    """Returns the largest difference of two images, in steps of 1/255."""
    return max(abs(x - y) for x, y in zip(a.data, b.data, strict=True))


def test_requests_with_different_loras_share_calls(open_engine):
    """Images made together equal those made alone up to rounding; those without LoRAs are bitwise as ever."""
    engine, batches = open_engine()
    assert engine.model.loras == ("style", "subject")
    assert engine.model.max_batch_rows == 10
    alone = [Run(engine)(job) for job in JOBS]
    plain_engine, _ = open_engine(with_loras=False)
    assert alone[0] == Run(plain_engine)(PLAIN)
    for job, picture in zip(JOBS[1:], alone[1:], strict=True):
        assert difference(picture, Run(plain_engine)(dataclasses.replace(job, loras=()))) > 5
    batches.clear()
    for picture, single in zip(together(engine, JOBS), alone, strict=True):
        assert difference(picture, single) <= 1
    assert max(len(batch.sessions) for batch in batches) > 2


@pytest.mark.parametrize("family", ["sd15", "flux"])
@torch.no_grad()
def test_rows_with_different_loras_match_each_alone(family, tmp_path):
    """Answers of one call with a LoRA, without, and with two differ from those of single calls by at most 1e-6."""
    pipeline = tiny.prompted(family)
    files = {
        name: str(save_lora(tmp_path / f"{name}.safetensors", pipeline, seed=seed, size=0.02))
        for seed, name in enumerate(("style", "subject"))
    }
    runtime = LoraRuntime(
        EagerRuntime(getattr(pipeline, denoiser_name(pipeline))), load_loras(pipeline, files), exact=False
    )
    model = dataclasses.replace(describe("tiny", pipeline, Defaults()), width=64, height=64)
    calls = joinable(runtime, sample_calls(pipeline, model))
    choices = ((STYLE,), (), (STYLE, SUBJECT))
    calls = [dataclasses.replace(call, loras=chosen) for call, chosen in zip(calls, choices, strict=False)]
    assert len(calls) >= 2
    for together, call in zip(answers(runtime, calls), calls, strict=True):
        (alone,) = answers(runtime, [call])
        plain = answers(runtime, [dataclasses.replace(call, loras=())])[0]
        assert (together[0] - alone[0]).abs().max() <= 1e-6
        assert torch.equal(alone[0], plain[0]) == (not call.loras)


def test_images_equal_those_of_diffusers(open_engine, files):
    """A request's image is that of the pipeline with the LoRAs loaded and set, up to rounding."""
    engine, _ = open_engine()
    job = JOBS[1]
    bare = tiny.build("sd15")
    bare.load_lora_weights(files["style"])
    picture = bare(
        job.prompt,
        width=job.width,
        height=job.height,
        num_inference_steps=job.step_count,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator().manual_seed(job.seed),
        output_type="pt",
    )[0][0]
    made = Run(engine)(job)
    expected = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).flatten().tolist()
    assert max(abs(a - b) for a, b in zip(made.data, expected, strict=True)) <= 1


def test_deterministic_images_are_bitwise_the_same(open_engine):
    """With --deterministic, other requests and their LoRAs do not change a single bit."""
    engine, _ = open_engine(deterministic=True)
    alone = [Run(engine)(job) for job in JOBS]
    assert together(engine, JOBS) == alone


@pytest.mark.parametrize("unbatchable", [False, True])
def test_one_generation_at_a_time(open_engine, unbatchable):
    """LoRAs also work where calls are not joined, and where the pipeline calls the denoiser itself."""
    engine, _ = open_engine()
    expected = Run(engine)(JOBS[3])

    def spread(pipeline):
        pipeline.unet._parallel_config = object()

    single, _ = open_engine(prepare=spread, max_active=None) if unbatchable else open_engine(max_active=1)
    assert bool(single._parts.batcher) is not unbatchable
    assert difference(Run(single)(JOBS[3]), expected) <= 1
    assert difference(Run(single)(PLAIN), Run(engine)(PLAIN)) == 0


def test_rows_that_cannot_be_told_apart(open_engine, logs):
    """If a layer gets the tokens of all rows in one dimension, only calls with equal LoRAs are joined, as logged."""
    pipeline = tiny.build("sd15")
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].ff.net[0].proj
    shapes = []

    def flatten(_, inputs):
        shapes.append(inputs[0].shape[:2])
        return inputs[0].flatten(0, 1)

    layer.register_forward_pre_hook(flatten)
    layer.register_forward_hook(lambda *arguments: arguments[2].unflatten(0, shapes.pop()))
    engine, batches = open_engine(pipeline=pipeline)
    assert "calls with different LoRAs are not joined" in [entry["event"] for entry in logs]
    jobs = [dataclasses.replace(JOBS[4], seed=seed, loras=loras) for seed in (1, 2) for loras in ((), (SUBJECT,))]
    alone = [Run(engine)(job) for job in jobs]
    batches.clear()
    for picture, single in zip(together(engine, jobs), alone, strict=True):
        assert difference(picture, single) <= 1
    assert {len(batch.sessions) for batch in batches} <= {1, 2}


def test_an_accelerator_computes_requests_without_loras(open_engine, monkeypatch):
    """Calls with LoRAs run eagerly, because an accelerator holds the plain weights."""
    from calotype_server.engine.runtime import select
    from support.engine.runtimes import AlteredRuntime

    made = []

    def accelerated(name, module, **options):
        made.append(AlteredRuntime(module, exact=options["exact"]))
        return made[0]

    monkeypatch.setattr(select, "_make", accelerated)
    engine, _ = open_engine(accelerate="graphs")
    runtime = made[0]
    before = len(runtime.rows)
    picture = Run(engine)(JOBS[1])
    assert len(runtime.rows) == before
    plain, _ = open_engine()
    assert difference(picture, Run(plain)(JOBS[1])) <= 1
    Run(engine)(PLAIN)
    assert len(runtime.rows) == before + PLAIN.step_count
    assert engine.model.accelerator == "graphs"


def test_fast_requests_and_early_finishes(open_engine):
    """SPEED_FAST and a finish at half of the steps keep the LoRAs."""
    engine, _ = open_engine(step_cache=True)
    fast = dataclasses.replace(JOBS[3], speed=Speed.FAST, step_count=20, scheduler="DDIMScheduler")
    exact = dataclasses.replace(fast, speed=Speed.EXACT)
    without = dataclasses.replace(fast, loras=())
    pictures = [Run(engine)(job) for job in (fast, exact, without)]
    assert mean(pictures[0], pictures[1]) < 0.5 * mean(pictures[0], pictures[2])
    run = Run(engine)
    run.stop.finish()
    finished = run(JOBS[3])
    other = Run(engine)
    other.stop.finish()
    assert difference(finished, other(dataclasses.replace(JOBS[3], loras=()))) > 5


def mean(a, b):
    """Returns the mean difference of two images, in steps of 1/255."""
    return sum(abs(x - y) for x, y in zip(a.data, b.data, strict=True)) / len(a.data)


def test_a_scale_of_zero_has_no_effect(open_engine):
    """A scale of 0 gives the image without the LoRA, bit for bit."""
    engine, _ = open_engine()
    assert Run(engine)(dataclasses.replace(PLAIN, loras=(Lora("style", 0.0),))) == Run(engine)(PLAIN)


def test_layers_of_requests_without_loras_are_plain(open_engine, monkeypatch):
    """A batch without LoRAs runs the layers as the model has them: loading LoRAs does not slow it down."""
    engine, _ = open_engine()
    unet, seen = engine._parts.runtime.module, []
    layers = [module for module in unet.modules() if isinstance(module, torch.nn.Linear)]
    handle = layers[0].register_forward_pre_hook(
        lambda *_: seen.append(sum("forward" in vars(each) for each in layers))
    )
    Run(engine)(PLAIN)
    assert set(seen) == {0}
    Run(engine)(JOBS[1])
    assert max(seen) > 10
    assert not any("forward" in vars(each) for each in layers)
    handle.remove()


def test_tags_in_a_prompt_are_reported(open_engine):
    """A tag of other programs stays text, and the caller learns what to do."""
    engine, _ = open_engine()
    run = Run(engine)
    tagged = run(dataclasses.replace(PLAIN, prompt="a fox <lora:style:0.8>", negative_prompt="<lora:Other>"))
    (event,) = [event for event in run.events if isinstance(event, EncodingPrompt)]
    (notice,) = [each for each in event.notices if each.reason == "LORA_TAG_IGNORED"]
    assert "style, Other" in notice.message
    assert "field loras" in notice.message
    run = Run(engine)
    assert run(dataclasses.replace(PLAIN, prompt="a fox")) != tagged
    (event,) = [event for event in run.events if isinstance(event, EncodingPrompt)]
    assert event.notices == ()


def test_names_are_sorted():
    """Clients show the names in order."""
    loras = Loras()
    loras.add_name("b")
    loras.add_name("a")
    assert loras.names == ("a", "b")


def test_pipelines_that_change_their_denoiser(open_engine, tmp_path):
    """Perturbed attention guidance and LoRAs work together, as with diffusers, and leave the denoiser as it was."""
    pipeline = UNETS["sd_pag"]()
    bare, processors = copy.deepcopy(pipeline), dict(pipeline.unet.attn_processors)
    style = save_lora(tmp_path / "style.safetensors", pipeline, size=0.2)
    loras = load_loras(pipeline, {"style": str(style)})
    engine, _ = open_engine(pipeline=pipeline, with_loras=False, loras=loras)
    assert engine.model.unbatched_reason.startswith("Its pipeline changes the denoiser")
    plain, job = Run(engine)(PLAIN), dataclasses.replace(JOBS[1], scheduler=engine.model.scheduler)
    bare.load_lora_weights(str(style))
    picture = bare(**call_arguments(bare, job))[0]
    assert difference(Run(engine)(job), to_pixels(picture)) <= 1

    def fail(*_):
        raise RuntimeError("a layer in the middle fails")

    handle = pipeline.unet.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(GenerationFailed):
        Run(engine)(job)
    handle.remove()
    assert not any("forward" in vars(each) for each in pipeline.unet.modules())
    assert pipeline.unet.attn_processors == processors
    assert Run(engine)(PLAIN) == plain


def test_memory_of_loras_is_freed(open_engine):
    """If memory runs out, weights that are stacked for mixed batches are dropped; then calls work as before."""
    engine, _ = open_engine()
    alone = [Run(engine)(job) for job in JOBS[:3]]
    together(engine, JOBS[:3])
    runtime = engine._parts.batcher._runtime
    assert runtime.free_memory()
    assert not runtime.free_memory()
    for picture, single in zip(together(engine, JOBS[:3]), alone, strict=True):
        assert difference(picture, single) <= 1
