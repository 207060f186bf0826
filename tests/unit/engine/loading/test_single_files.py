"""Loading a model from a single file: its images equal those of the folder, bit for bit."""

import json
import shutil
import sys

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype_server.cli import doctor
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults, read_defaults
from calotype_server.engine.loading import display_name, kinds, locate
from calotype_server.settings import Settings
from calotype_server.types import Job, PreviewMethod, PreviewOptions
from support.engine import tiny, tiny_transformers, tiny_unets
from support.engine.files import single_files
from support.engine.files.loading import load, rejection
from support.engine.files.loras import save_lora
from support.runs import Run


def sdxl():
    """Returns an SDXL whose text encoders differ in width and depth, by which diffusers distinguishes them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = tiny_unets.sdxl(
            cross_attention_dim=80,
            text_encoder_2=tiny_unets.clip_text_encoder(
                projection=True, hidden_size=48, projection_dim=48, num_hidden_layers=10
            ),
        )
    pipeline.text_encoder_2.eval()
    pipeline.text_encoder.eval()
    return pipeline


def sd3():
    """Returns an SD3 with all of its text encoders."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = tiny_transformers.sd3_with_text()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipeline


def draw(pipeline):
    """Returns the image of one fixed request."""
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            for weight in component.parameters():
                # Kernels may add in another order if a file's weights are not aligned in memory.
                weight.data = weight.data.clone()
    return pipeline(
        prompt="a red apple",
        width=64,
        height=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    )[0]


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    """A folder with the tiny SDXL."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    sdxl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory):
    """A folder with the tiny SD3."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    sd3().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd15_file(tmp_path_factory):
    """The tiny SD1.5 as one file."""
    file = tmp_path_factory.mktemp("models") / "tiny.v15.safetensors"
    return single_files.write(file, single_files.stable_diffusion(tiny.shared("sd15")))


def configs_of(folder, place):
    """Returns a copy of a folder without its weights, as an operator copies it to a machine without a network."""
    return shutil.copytree(folder, place / "configs", ignore=shutil.ignore_patterns("*.safetensors"))


class TestWholeCheckpoint:
    """Files with denoiser, decoder and text encoders."""

    def test_sd15(self, sd15_file, sd15_folder, tmp_path, offline):
        """A Stable Diffusion 1.5 in one file draws the folder's images, with configs alone and without a network."""
        pipeline = load(sd15_file, config=str(configs_of(sd15_folder, tmp_path)))
        assert type(pipeline) is diffusers.StableDiffusionPipeline
        assert pipeline.safety_checker is None
        assert torch.equal(draw(pipeline), draw(tiny.build("sd15")))

    def test_sdxl(self, sdxl_folder, tmp_path, offline):
        """So does a Stable Diffusion XL, with its two text encoders."""
        file = single_files.write(tmp_path / "xl.safetensors", single_files.stable_diffusion(sdxl()))
        pipeline = load(file, config=str(configs_of(sdxl_folder, tmp_path)))
        assert type(pipeline) is diffusers.StableDiffusionXLPipeline
        assert torch.equal(draw(pipeline), draw(load(sdxl_folder)))

    def test_dtype_is_taken(self, sd15_file, sd15_folder):
        """The weights have the requested number format."""
        pipeline = load(sd15_file, config=str(sd15_folder), dtype=torch.bfloat16)
        assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}

    def test_missing_weights_of_a_component(self, sd15_folder, tmp_path):
        """A file without a text encoder names it and the option that loads it; weights in the folder are used."""
        weights = single_files.stable_diffusion(tiny.shared("sd15"))
        weights = {name: value for name, value in weights.items() if not name.startswith("cond_stage_model.")}
        file = single_files.write(tmp_path / "no-text.safetensors", weights)
        text = rejection(file, config=str(configs_of(sd15_folder, tmp_path)))
        assert "has no weights of text_encoder" in text
        assert "--text-encoder text_encoder=PATH" in text
        assert torch.equal(draw(load(file, config=str(sd15_folder))), draw(tiny.build("sd15")))

    def test_missing_weights_of_the_denoiser(self, sd15_file, sd15_folder, tmp_path):
        """A file that lacks some weights is rejected, because these would be random."""
        weights = load_file(sd15_file)
        del weights["model.diffusion_model.time_embed.0.weight"]
        save_file(weights, tmp_path / "cut.safetensors")
        text = rejection(tmp_path / "cut.safetensors", config=str(sd15_folder))
        assert "lacks some weights of a StableDiffusionPipeline" in text

    def test_configs_of_another_family(self, sd15_file, sdxl_folder):
        """Configs of another family are rejected with both names."""
        text = rejection(sd15_file, config=str(sdxl_folder))
        assert "a StableDiffusionPipeline, but --config has the configs of a StableDiffusionXLPipeline" in text


class TestDenoiserOnly:
    """Files with only a transformer or a UNet."""

    def test_transformer(self, sd3_folder, tmp_path, offline):
        """The transformer comes from the file and everything else from the folder."""
        other = sd3()
        with torch.no_grad():
            other.transformer.proj_out.weight.mul_(2)
        weights = single_files.sd3_transformer(other.transformer)
        for prefix in ("", "model.diffusion_model."):
            named = {f"{prefix}{name}": value for name, value in weights.items()}
            file = single_files.write(tmp_path / "transformer.safetensors", named)
            image = draw(load(file, config=str(sd3_folder)))
            assert torch.equal(image, draw(other))
            assert not torch.equal(image, draw(load(sd3_folder)))

    def test_unet(self, sdxl_folder, tmp_path):
        """A file with only a UNet works the same way."""
        weights = single_files.stable_diffusion(sdxl())
        own = {name: value for name, value in weights.items() if name.startswith("model.diffusion_model.")}
        file = single_files.write(tmp_path / "unet.safetensors", own)
        assert torch.equal(draw(load(file, config=str(sdxl_folder))), draw(load(sdxl_folder)))

    def test_missing_weights(self, sd3_folder, tmp_path):
        """A file that lacks some weights of the denoiser is rejected, because these would be random."""
        weights = single_files.sd3_transformer(sd3().transformer)
        del weights["joint_blocks.0.x_block.attn.proj.bias"]
        file = single_files.write(tmp_path / "x.safetensors", weights)
        text = rejection(file, config=str(sd3_folder))
        assert text.endswith("cannot be loaded: it lacks the weights 'joint_blocks.0.x_block.attn.proj.bias'.")

    def test_other_shapes(self, sd3_folder, tmp_path):
        """If the configs say another shape than the file has, the message has both."""
        weights = single_files.sd3_transformer(sd3().transformer)
        weights["x_embedder.proj.weight"] = torch.zeros(7, 7)
        file = single_files.write(tmp_path / "x.safetensors", weights)
        text = rejection(file, config=str(sd3_folder))
        assert "pos_embed.proj.weight has the shape [7, 7], but the configs say [32, 4, 2, 2]" in text

    def test_folder_without_the_other_weights(self, sd3_folder, tmp_path):
        """If the folder has only configs, the message names the file's content and a missing component."""
        file = single_files.write(tmp_path / "x.safetensors", single_files.sd3_transformer(sd3().transformer))
        text = rejection(file, config=str(configs_of(sd3_folder, tmp_path)))
        assert "has only the transformer" in text
        assert "has no weights as .safetensors" in text


class TestGguf:
    """Transformers in GGUF files."""

    @pytest.mark.parametrize(("kind", "equal"), [("F16", False), ("F32", True), ("Q8_0", False)])
    def test_transformer(self, sd3_folder, tmp_path, kind, equal, offline):
        """The image is close to that of the exact weights, and equal if the file has them."""
        file = single_files.write_gguf(tmp_path / "tiny.gguf", single_files.sd3_transformer(sd3().transformer), kind)
        image, exact = draw(load(file, config=str(sd3_folder))), draw(load(sd3_folder))
        assert torch.equal(image, exact) is equal
        assert (image - exact).abs().max() < 0.02

    def test_engine(self, sd3_folder, tmp_path):
        """An engine batches and draws with quantised weights."""
        file = single_files.write_gguf(tmp_path / "tiny.gguf", single_files.sd3_transformer(sd3().transformer), "Q8_0")
        engine = build_engine("tiny", load(file, config=str(sd3_folder)), defaults=Defaults(), cache_dir=tmp_path)
        try:
            model = engine.model
            job = Job(
                "a",
                None,
                64,
                64,
                2,
                model.guidance_scale,
                1,
                model.scheduler,
                PreviewOptions(method=PreviewMethod.HEAD),
            )
            assert Run(engine)(job).width == 64
        finally:
            engine.close()

    def test_package_is_missing(self, tmp_path, monkeypatch, sd3_folder):
        """Without its package the message says how to install it."""
        file = single_files.write_gguf(tmp_path / "tiny.gguf", {"weight": torch.zeros(4, 32)}, "F32")
        monkeypatch.setitem(sys.modules, "gguf", None)
        assert rejection(file, config=str(sd3_folder)).endswith("pip install gguf")

    def test_unet(self, sd15_folder, tmp_path):
        """A UNet is rejected: only transformers can be read."""
        file = single_files.write_gguf(tmp_path / "tiny.gguf", {"weight": torch.zeros(4, 32)}, "F32")
        assert "not for UNets" in rejection(file, config=str(sd15_folder))


class TestFiles:
    """Files that are not loaded."""

    @pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pkl", ".pt", ".pth", ".CKPT"])
    def test_pickles(self, tmp_path, suffix):
        """A pickle is refused by its suffix with the reason, whether it exists or not."""
        file = tmp_path / f"model{suffix}"
        assert "can run code when they are read" in rejection(file)
        file.write_bytes(b"")
        assert "can run code when they are read" in rejection(file)

    @pytest.mark.parametrize("name", ["model.SAFETENSORS", "model.zip", "model"])
    def test_other_files(self, tmp_path, name):
        """Any other suffix is refused, because diffusers would unpickle the file."""
        (tmp_path / name).touch()
        assert "single files end in .safetensors or .gguf" in rejection(tmp_path / name)

    @pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
    def test_missing_or_damaged_file(self, tmp_path, name):
        """Missing and damaged files have their own messages."""
        file = tmp_path / name
        assert rejection(file) == f"There is no file {str(file)!r}."
        assert rejection(name) == f"There is no file {name!r}."
        file.write_bytes(b"damage" * 100)
        assert "is damaged" in rejection(file)

    def test_scaled_eight_bit_weights(self, tmp_path, sd15_folder):
        """Weights with separate scales are refused, because diffusers would ignore the scales."""
        file = tmp_path / "model.safetensors"
        save_file({"blocks.0.weight": torch.zeros(2), "blocks.0.scale_weight": torch.ones(1)}, file)
        assert "8-bit weights with separate scales" in rejection(file, config=str(sd15_folder))

    def test_a_lora(self, tmp_path, sd15):
        """A LoRA as the model names the option that loads it."""
        assert "with --lora NAME=FILE" in rejection(save_lora(tmp_path / "x.safetensors", sd15))

    def test_model_that_starts_from_an_image(self, tmp_path, sd15_file):
        """A file whose UNet has nine channels is an inpainting model, and is rejected by that name."""
        weights = load_file(sd15_file)
        weights["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
        save_file(weights, tmp_path / "inpaint.safetensors")
        assert "'inpainting', which does not turn text into images" in rejection(tmp_path / "inpaint.safetensors")

    def test_unknown_model(self, tmp_path):
        """A file that diffusers does not know asks for the configs."""
        save_file({"some.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
        text = rejection(tmp_path / "x.safetensors")
        assert "is not recognised" in text
        assert "--config" in text

    @pytest.mark.parametrize(
        ("name", "source"),
        [
            ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", "stabilityai/"),
            ("double_blocks.0.img_attn.norm.key_norm.scale", "black-forest-labs/FLUX.1-schnell"),
            ("cond_stage_model.transformer.x", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ],
    )
    def test_configs_without_a_network(self, tmp_path, name, source, offline):
        """Without --config and a network, the message says which configs are missing and where they belong."""
        save_file({name: torch.zeros(2)}, tmp_path / "x.safetensors")
        for options in ({}, {"download": False}):
            text = rejection(tmp_path / "x.safetensors", **options)
            assert f"the configs and tokenizers of '{source}" in text
            assert "name their folder with --config" in text

    def test_doctor(self, tmp_path, offline):
        """The doctor reports that the configs are still to be downloaded, which is no problem."""
        file = tmp_path / "x.safetensors"
        save_file({"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(2)}, file)
        finding = list(doctor.examine(Settings(model=str(file), device="cpu")))[-1]
        assert finding.ok
        assert f"the configs of {file} are not in the local cache" in finding.result

    def test_config_that_is_no_folder(self, sd15_file, tmp_path):
        """A --config without an index is rejected by that name."""
        assert "it has no model_index.json" in rejection(sd15_file, config=str(tmp_path))

    def test_every_kind_has_its_pipeline(self):
        """Every kind in the table exists in diffusers, with a class and a source of configs."""
        for kind, name in kinds.PIPELINES.items():
            assert hasattr(diffusers, name), name
            assert "/" in kinds.usual_source(kind)


class TestNames:
    """The names and defaults of single files."""

    def test_display_name(self, sd15_file):
        """Callers see the file's name without path and suffix."""
        assert display_name(str(sd15_file)) == "tiny.v15"

    def test_defaults_beside_the_file(self, tmp_path):
        """`calotype.json` beside the file holds its defaults; its paths are relative to that folder."""
        (tmp_path / "x.safetensors").touch()
        (tmp_path / "calotype.json").write_text(json.dumps({"step_count": 7, "tiny_vae": "taesd"}))
        assert read_defaults(locate(str(tmp_path / "x.safetensors"))) == Defaults(7, None, str(tmp_path / "taesd"))


class TestOverrides:
    """`--vae` and `--text-encoder`."""

    @pytest.fixture
    def others(self, tmp_path):
        """A pipeline with another VAE and another text encoder."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            other = tiny_unets.sd15()
        other.save_pretrained(tmp_path / "other")
        pipeline = tiny.build("sd15")
        pipeline.register_modules(vae=other.vae.eval(), text_encoder=other.text_encoder.eval())
        return tmp_path / "other", pipeline

    @pytest.mark.parametrize("form", ["component", "pipeline", "file"])
    @pytest.mark.parametrize("single", [False, True], ids=["folder", "single"])
    def test_replaced(self, others, sd15_folder, sd15_file, tmp_path, form, single):
        """Both components come from a component's folder, a pipeline's folder, or a file, for any kind of model."""
        folder, expected = others
        single_files.write(tmp_path / "vae.safetensors", single_files.vae(expected.vae))
        paths = {
            "component": (folder / "vae", folder / "text_encoder"),
            "pipeline": (folder, folder),
            "file": (tmp_path / "vae.safetensors", folder / "text_encoder" / "model.safetensors"),
        }
        vae, text_encoder = map(str, paths[form])
        options = {"vae": vae, "text_encoders": {"text_encoder": text_encoder}}
        pipeline = load(sd15_file, config=str(sd15_folder), **options) if single else load(sd15_folder, **options)
        assert torch.equal(draw(pipeline), draw(expected))
        assert not torch.equal(draw(pipeline), draw(tiny.build("sd15")))

    def test_another_class(self, sd15_folder, tmp_path):
        """A decoder is loaded with the class that its own config names."""
        tiny_unets.tiny_vae().save_pretrained(tmp_path)
        assert type(load(sd15_folder, vae=str(tmp_path)).vae) is diffusers.AutoencoderTiny

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"vae": "./nowhere"}, "--vae: there is no file or folder './nowhere'"),
            ({"vae": "./vae.ckpt"}, "can run code when they are read"),
            ({"text_encoders": {"text_encoder_2": "./x"}}, "the model has no component 'text_encoder_2'"),
            ({"text_encoders": {"text_encoder": "some-org/nothing"}}, "The hub cannot be reached"),
        ],
    )
    def test_rejected(self, sd15_folder, options, reason, offline):
        """The message names the option and the problem."""
        assert reason in rejection(sd15_folder, **options)

    def test_weights_of_another_component(self, sd15_folder, sd3_folder):
        """Other weights are rejected, because the component would be random."""
        file = sd15_folder / "unet" / "diffusion_pytorch_model.safetensors"
        for source in (file, sd3_folder / "text_encoder_3"):
            text = rejection(sd15_folder, text_encoders={"text_encoder": str(source)})
            assert (
                f"--text-encoder {str(source)!r} cannot be used. The weights are not those of a CLIPTextModel" in text
            )
        assert f"--vae {str(file)!r} cannot be used for the model's AutoencoderKL" in rejection(
            sd15_folder, vae=str(file)
        )
