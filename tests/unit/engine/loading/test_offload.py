"""`--offload`: weights stay in ordinary memory until the device needs them.

There is no GPU here: the device that weights move to is the CPU as well, or a stand-in that computes nothing.
"""

import dataclasses
import threading
from typing import Any

import accelerate
import pydantic
import pytest
import torch

from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.loading.offload import check_offload, place
from calotype_server.engine.loading.tiny_vae import load_tiny_vae
from calotype_server.engine.machine import device_of
from calotype_server.engine.requests.shared_components import shared_components
from calotype_server.errors import ModelUnavailable
from calotype_server.settings import Settings
from calotype_server.types import PreviewMethod, PreviewOptions, PreviewReady
from support.engine import tiny
from support.engine.tiny_unets import tiny_vae
from support.runs import JOB, PATIENCE, Run

CPU = torch.device("cpu")
ELSEWHERE = torch.device("meta")
"""A device that weights can be said to move to; nothing computes there."""


def offloaded(kind, device=CPU, family="sd15"):
    """Builds a pipeline with the hooks of a kind of offloading."""
    pipeline = tiny.build(family)
    place(pipeline, kind, device)
    return pipeline


@pytest.fixture
def open_engine(tmp_path):
    """Builds engines, and closes them at the end."""
    opened = []

    def open_one(pipeline, **options):
        engine = build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=tmp_path, threads=1, **options)
        opened.append(engine)
        return engine

    yield open_one
    for engine in opened:
        engine.close()


def watching(job=JOB):
    """A job that asks for a preview by the full VAE after each step."""
    return dataclasses.replace(job, preview=PreviewOptions(1, 0.0, 256, 80, PreviewMethod.FULL_VAE))


class TestSettings:
    """Combinations that cannot work are rejected with a remedy."""

    @pytest.mark.parametrize("device", ["cpu", "mps"])
    @pytest.mark.parametrize("offload", ["model", "group"])
    def test_devices_without_own_memory(self, offload, device):
        """On a CPU there is nothing to move; the message says so."""
        with pytest.raises(ModelUnavailable, match=f"the model is on {device}"):
            check_offload(offload, torch.device(device))

    def test_a_gpu_passes(self):
        """CUDA and XPU can be used; no setting passes everywhere."""
        check_offload("model", torch.device("cuda", 0), "nf4")
        check_offload("group", torch.device("xpu", 0))
        check_offload("", CPU)

    def test_formats_whose_weights_cannot_move(self):
        """Weights of bitsandbytes keep tables that the hooks for layers do not move."""
        check_offload("group", torch.device("cuda", 0), "int8")
        with pytest.raises(ModelUnavailable, match="cannot move weights of --quantize nf4"):
            check_offload("group", torch.device("cuda", 0), "nf4")

    def test_accelerators(self):
        """Accelerators need the weights on the device."""
        with pytest.raises(pydantic.ValidationError, match="offload cannot be combined with accelerate graphs"):
            Settings(offload="group", accelerate="graphs")
        assert Settings(offload="group", accelerate="none").offload == "group"


@pytest.mark.parametrize("kind", ["model", "group"])
def test_the_device_is_the_one_that_computes(kind, monkeypatch):
    """The model's device is not that of its resting weights, and `ModelInfo` names the kind."""
    pipeline = tiny.build("sd15")
    if kind == "model":
        for component in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
            accelerate.cpu_offload_with_hook(component, ELSEWHERE)
        pipeline._all_hooks = [object()]
    else:
        monkeypatch.setattr(torch, "meta", torch.cpu, raising=False)
        pipeline.unet.enable_group_offload(ELSEWHERE, offload_type="block_level", num_blocks_per_group=1)
    described = describe("tiny", pipeline, Defaults())
    assert {weight.device for weight in pipeline.unet.parameters()} == {CPU}
    assert (described.device, described.offload) == ("meta", kind)
    assert device_of(shared_components(pipeline).get("text_encoder", pipeline.unet)) == ELSEWHERE


def test_a_tiny_vae_is_where_the_vae_computes(tmp_path):
    """With model offload, the tiny VAE stays on the device."""
    tiny_vae().save_pretrained(tmp_path)
    pipeline = tiny.build("sd15")
    accelerate.cpu_offload_with_hook(pipeline.vae, ELSEWHERE)
    assert device_of(load_tiny_vae(str(tmp_path), like=pipeline.vae)) == ELSEWHERE


class TestGroup:
    """Layers move one after another."""

    @pytest.mark.parametrize("family", ["sd15", "sdxl"])
    def test_images_stay_the_same(self, open_engine, family):
        """Generations run at the same time, their calls are joined, and the images have the same bytes as without."""
        job = dataclasses.replace(watching(), scheduler="EulerDiscreteScheduler")
        options = {"max_active": 2, "deterministic": True}
        expected = Run(open_engine(tiny.build(family), **options))(job)
        engine = open_engine(offloaded("group", family=family), **options)
        assert (engine.model.offload, engine.model.unbatched_reason) == ("group", "")
        run = Run(engine)
        assert run(job) == expected
        assert PreviewReady in run.kinds

    def test_a_text_encoder_runs_in_one_thread_at_a_time(self):
        """Two threads would move each other's weights; also parts that pipelines call by themselves wait."""
        pipeline = offloaded("group")
        inside, together = [], []

        def watch(module, args):
            inside.append(module)
            together.append(len(inside))

        def leave(module, args, output):
            inside.pop()

        norm = pipeline.text_encoder.final_layer_norm
        norm.register_forward_pre_hook(watch)
        norm.register_forward_hook(leave)
        encoder = shared_components(pipeline)["text_encoder"]
        start = threading.Barrier(4)
        ids = torch.zeros(1, 77, dtype=torch.long)

        def run(number):
            start.wait(PATIENCE)
            for _ in range(20):
                if number % 2:
                    encoder(ids)
                else:
                    encoder.final_layer_norm(torch.zeros(1, 3, 32))

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert set(together) == {1}
        assert len(together) == 80

    def test_without_offload_text_encoders_are_not_locked(self, sd15):
        """Requests encode their prompts at the same time, as ever."""
        assert "text_encoder" not in shared_components(sd15)


class TestModel:
    """One module at a time is on the device."""

    def test_images_stay_the_same(self, open_engine):
        """Generations run one at a time, and the image has the same bytes as without."""
        expected = Run(open_engine(tiny.build("sd15")))(JOB)
        engine = open_engine(offloaded("model"), max_active=None, memory_limit=None)
        assert (engine.model.offload, engine.model.max_active, engine.model.memory) == ("model", 1, None)
        assert "Accelerate" in engine.model.unbatched_reason
        assert Run(engine)(JOB) == expected

    def test_a_preview_does_not_move_weights_that_are_in_use(self, open_engine, monkeypatch):
        """Full-VAE previews run between steps: one module at a time is on the device, and none moves while used."""
        pipeline = offloaded("model")
        present, used, faults = set[Any](), list[Any](), list[Any]()
        hook = accelerate.hooks.CpuOffload
        arrive, send_back = hook.pre_forward, hook.init_hook

        def arriving(self, module, *args, **kwargs):
            present.add(module)
            if len(present) > 1:
                faults.append(("together", {type(each).__name__ for each in present}))
            return arrive(self, module, *args, **kwargs)

        def leaving(self, module):
            if module in used:
                faults.append(("moved while used", type(module).__name__))
            present.discard(module)
            return send_back(self, module)

        monkeypatch.setattr(hook, "pre_forward", arriving)
        monkeypatch.setattr(hook, "init_hook", leaving)
        for module, name in ((pipeline.unet, "forward"), (pipeline.vae.decoder, "forward")):
            owner = pipeline.unet if module is pipeline.unet else pipeline.vae
            compute = getattr(module, name)

            def watched(*args, compute=compute, owner=owner, **kwargs):
                used.append(owner)
                try:
                    return compute(*args, **kwargs)
                finally:
                    used.remove(owner)

            monkeypatch.setattr(module, name, watched)
        engine = open_engine(pipeline)
        present.clear()
        monkeypatch.setattr(type(pipeline), "enable_model_cpu_offload", lambda *_, **__: faults.append("hooks again"))
        run = Run(engine)
        run(watching())
        run = Run(engine)
        run.stop.finish()
        run(watching())
        assert faults == []


@pytest.mark.parametrize("kind", ["model", "group"])
def test_a_pipeline_without_support(kind, monkeypatch):
    """The message names the pipeline."""
    pipeline = tiny.build("sd15")
    monkeypatch.setattr(type(pipeline), "model_cpu_offload_seq", None)
    monkeypatch.setattr(type(pipeline.unet), "_supports_group_offloading", False)
    with pytest.raises(ModelUnavailable, match="A StableDiffusionPipeline does not support --offload"):
        place(pipeline, kind, CPU)
