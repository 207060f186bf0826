"""`--quantize`: weights are quantized while they are read, and images stay close."""

import dataclasses
import importlib.util
import json
import shutil
import threading

import diffusers
import pytest
import torch

from calotype_server.engine.assembly import build_engine
from calotype_server.engine.batching.verify import verify
from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.disk_cache import weights_fingerprint
from calotype_server.engine.loading import LoadOptions, load_pipeline
from calotype_server.engine.loading.quantize import check_quantize, quantizable
from calotype_server.engine.memory_need import memory_model
from calotype_server.engine.requests.sample_calls import sample_calls
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.errors import ModelUnavailable
from support.engine import tiny
from support.engine.tiny_inputs import arguments
from support.runs import JOB, PATIENCE, Run

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def load(folder, **options):
    """Loads a folder with the defaults of a server on a CPU."""
    return load_pipeline(LoadOptions(model=str(folder), **options))


def formats(module):
    """Returns the class names of the weights of linear layers."""
    return {type(part.weight.data).__name__ for part in module.modules() if isinstance(part, torch.nn.Linear)}


@pytest.fixture(scope="module")
def int8(sd15_folder):
    """The tiny SD1.5, loaded with int8 weights."""
    return load(sd15_folder, quantize="int8")


def test_only_the_denoiser_and_large_text_encoders_are_quantized(flux_folder):
    """The linear layers of the transformer and of T5 hold integers, those of CLIP and the VAE do not."""
    pipeline = load(flux_folder, quantize="int8")
    assert formats(pipeline.transformer) == {"Int8Tensor"}
    assert formats(pipeline.text_encoder_2) == {"Int8Tensor"}
    assert formats(pipeline.text_encoder) == formats(pipeline.vae) == {"Tensor"}


@pytest.mark.parametrize(("quantize", "allowed"), [("int8", 0.02), ("fp8", 0.1)])
def test_images_stay_close(sd15_folder, quantize, allowed):
    """The latents after three steps differ by a few per cent of their size, and they do differ."""
    exact = tiny.shared("sd15")(**arguments("sd15"))[0]
    close = load(sd15_folder, quantize=quantize)(**arguments("sd15"))[0]
    error = float((close - exact).norm() / exact.norm())
    assert 0 < error < allowed


def test_the_model_says_so(int8, sd15):
    """`ModelInfo.quantization` names the format, and `dtype` the format of computations."""
    described = describe("tiny", int8, Defaults())
    assert (described.quantization, described.dtype) == ("int8", "float32")
    assert describe("tiny", sd15, Defaults()).quantization == ""


def test_calls_may_be_joined(int8):
    """`verify` finds that joined answers equal those one by one, also bit for bit."""
    runtime = EagerRuntime(int8.unet)
    calls = sample_calls(int8, describe("tiny", int8, Defaults()))
    assert verify(runtime, calls) is None
    assert verify(runtime, calls, deterministic_rows=4) is None


def test_requests_together_equal_requests_alone(int8, tmp_path):
    """A deterministic server joins the calls of three requests, and each image has the same bytes as alone."""
    rows = []
    engine = build_engine(
        "tiny",
        int8,
        defaults=Defaults(),
        cache_dir=tmp_path,
        threads=1,
        max_active=3,
        deterministic=True,
        on_batch=lambda record: rows.append(len(record.sessions)),
    )
    try:
        assert engine.model.quantization == "int8"
        assert engine.model.max_batch_rows > 2
        jobs = [dataclasses.replace(JOB, seed=seed) for seed in range(3)]
        alone = [Run(engine)(job) for job in jobs]
        together = [None] * len(jobs)
        start = threading.Barrier(len(jobs))

        def run(number):
            start.wait(PATIENCE)
            together[number] = Run(engine)(jobs[number])

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert together == alone
        assert max(rows) > 1
    finally:
        engine.close()


def test_quantized_weights_have_a_fingerprint(int8, sd15, sd15_folder):
    """Measurements of quantized weights are cached: their fingerprint is the same at each start."""
    assert weights_fingerprint(int8.unet) == weights_fingerprint(load(sd15_folder, quantize="int8").unet)
    assert weights_fingerprint(int8.unet) != weights_fingerprint(sd15.unet)


def test_the_memory_of_generations_is_limited(int8, tmp_path):
    """The memory of a generation with quantized weights is measured."""
    assert memory_model(int8, describe("tiny", int8, Defaults()), cache_dir=tmp_path).max_pixels > 0


def test_a_folder_with_quantized_weights_loads(int8, tmp_path):
    """Weights that were saved as int8 load as such without the setting, and with it."""
    int8.save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "unet" / "config.json").read_text())
    expected = int8(**arguments("sd15"))[0]
    for quantize in ("", "int8"):
        pipeline = load(tmp_path, quantize=quantize)
        assert formats(pipeline.unet) == {"Int8Tensor"}
        assert describe("tiny", pipeline, Defaults()).quantization == "int8"
        assert torch.equal(pipeline(**arguments("sd15"))[0], expected)


@pytest.mark.parametrize(
    ("quantize", "device", "words"),
    [
        ("int8", CPU, "pip install 'calotype[quantize]'"),
        ("nf4", CUDA, "pip install 'calotype[quantize]'"),
        ("nf4", CPU, "needs a CUDA or XPU device"),
        ("fp8", torch.device("mps"), "Choose int8"),
        ("fp8", CUDA, "compute capability 8.9, and cuda:0 has 8.6"),
    ],
)
def test_what_is_missing_is_said_before_loading(monkeypatch, quantize, device, words):
    """A missing package and a device without the format each have a message with a remedy."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(ModelUnavailable) as caught:
        check_quantize(quantize, device)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"--quantize {quantize} needs ")


def test_a_newer_gpu_may_use_fp8(monkeypatch):
    """Ada and newer GPUs pass the check."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    check_quantize("fp8", CUDA)


def test_a_missing_package_stops_loading(sd15_folder, monkeypatch):
    """`load_pipeline` reports it instead of an incomplete folder."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else found(name, *a))
    with pytest.raises(ModelUnavailable, match="calotype\\[quantize\\]"):
        load(sd15_folder, quantize="int8")


def test_a_single_file_cannot_be_quantized(tmp_path):
    """The message says which models can."""
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelUnavailable, match="needs a diffusers folder or a hub id"):
        load(file, quantize="int8")


def test_components_of_every_kind():
    """The denoiser, T5 and language models are chosen; VAE, CLIP, BERT, tokenizers and empty entries are not."""
    index = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "transformer_2": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "text_encoder_3": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "text_encoder_4": ["transformers", "BertModel"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    assert quantizable(index) == ("transformer", "text_encoder_2", "text_encoder_3")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_denoiser_may_be_quantized(sd15_folder, tmp_path):
    """torch.compile either computes the quantized model's answers, or plain calls are used with a reason."""
    if shutil.which("g++") is None:
        pytest.skip("needs a compiler")
    engine = build_engine(
        "tiny",
        load(sd15_folder, quantize="int8"),
        defaults=Defaults(),
        cache_dir=tmp_path,
        threads=1,
        accelerate="compile",
    )
    try:
        assert (engine.model.accelerator == "compile") != bool(engine.model.accelerator_fallback)
        assert Run(engine)(JOB).width == JOB.width
    finally:
        engine.close()


@pytest.mark.slow
def test_openvino_does_not_compute_quantized_weights_wrongly(int8, tmp_path):
    """OpenVINO either computes the quantized model's answers, or plain calls are used with a reason."""
    pytest.importorskip("openvino")
    engine = build_engine(
        "tiny", int8, defaults=Defaults(), cache_dir=tmp_path, threads=1, max_active=2, accelerate="openvino"
    )
    try:
        assert (engine.model.accelerator == "openvino") != bool(engine.model.accelerator_fallback)
    finally:
        engine.close()


def test_nf4_quantizes_on_a_gpu(sd15_folder):
    """On a GPU, bitsandbytes quantizes the denoiser."""
    pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    pipeline = load(sd15_folder, quantize="nf4", device=CUDA, dtype=torch.bfloat16)
    assert isinstance(pipeline.unet, diffusers.UNet2DConditionModel)
    assert describe("tiny", pipeline, Defaults()).quantization == "nf4"
