"""Loading LoRAs of any format into any family, and refusing those whose images would be wrong."""

import concurrent.futures
import json
import pickle
import shutil
import threading
import unittest.mock

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import RepositoryNotFoundError

from calotype_server.engine.adapters.load import load_loras
from calotype_server.engine.adapters.loras import Loras
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.errors import ModelUnavailable
from calotype_server.types import Lora
from support.engine import tiny
from support.engine.files.loras import kohya_lora, lora_weights, save_lora
from support.engine.tiny_inputs import arguments
from support.runs import PATIENCE


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files for the tiny SD1.5: "unet" and "both", which also changes the text encoder."""
    folder = tmp_path_factory.mktemp("loras")
    pipeline = tiny.shared("sd15")
    both = save_lora(folder / "both.safetensors", pipeline, components=("unet", "text_encoder"), seed=2, rank=3)
    return {"unet": save_lora(folder / "unet.safetensors", pipeline), "both": both}


def sources(files):
    """Returns the files as the settings name them."""
    return {name: str(path) for name, path in files.items()}


def image(pipeline, family, loras=None, chosen=()):
    """Returns the latents of a call of the pipeline with LoRAs."""
    with torch.no_grad():
        if loras is None:
            return pipeline(**arguments(family))[0]
        with loras.in_encoders(chosen), loras.in_whole_denoiser(chosen):
            return pipeline(**arguments(family))[0]


def refusal(pipeline, source, name="style"):
    """Returns the message for an operator whose LoRA is refused."""
    with pytest.raises(ModelUnavailable) as caught:
        load_loras(pipeline, {name: str(source)})
    text = str(caught.value)
    assert f"--lora {name}={source}" in text
    assert "\n" not in text
    return text


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # of diffusers, with two LoRAs
@pytest.mark.parametrize(
    "family",
    ["sd15", "sdxl", "flux", "sd3", "qwen_image", "z_image", pytest.param("flux2_klein", marks=pytest.mark.slow)],
)
def test_images_equal_those_of_diffusers(family, tmp_path):
    """LoRAs have the effect that diffusers gives them, alone and together; without them, no bit of an image changes."""
    pipeline = tiny.build(family)
    before = image(pipeline, family)
    components = [denoiser_name(pipeline)]
    components += [name for name in ("text_encoder", "text_encoder_2") if pipeline.components.get(name) is not None]
    first = save_lora(tmp_path / "first.safetensors", pipeline, components=tuple(components), size=0.2)
    second = save_lora(tmp_path / "second.safetensors", pipeline, seed=1, rank=2, size=0.2)

    bare = tiny.build(family)
    bare.load_lora_weights(str(tmp_path), weight_name=first.name, adapter_name="first")
    bare.load_lora_weights(str(tmp_path), weight_name=second.name, adapter_name="second")
    bare.set_adapters(["first"], [0.7])
    one = image(bare, family)
    bare.set_adapters(["first", "second"], [1.0, -0.5])
    two = image(bare, family)

    loras = load_loras(pipeline, {"first": str(first), "second": str(second)})
    assert loras.names == ("first", "second")
    assert torch.equal(image(pipeline, family, loras), before)
    for chosen, expected in (([Lora("first", 0.7)], one), ([Lora("first"), Lora("second", -0.5)], two)):
        made = image(pipeline, family, loras, tuple(chosen))
        assert (made - before).abs().max() > 1e-3
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(image(pipeline, family, loras), before)


def test_kohya_files(tmp_path):
    """A file with kohya's names, alphas and convolutions has the effect that diffusers gives it."""
    pipeline, bare = tiny.build("sd15"), tiny.build("sd15")
    file = kohya_lora(tmp_path / "kohya.safetensors", pipeline, alpha=2.0, rank=4, size=0.2)
    weights = safetensors.torch.load_file(file)
    convolution = {
        f"lora_unet_down_blocks_0_resnets_0_conv1.{name}": tensor
        for name, tensor in (
            ("lora_down.weight", torch.randn(4, 32, 3, 3) * 0.2),
            ("lora_up.weight", torch.randn(32, 4, 1, 1) * 0.2),
            ("alpha", torch.tensor(2.0)),
        )
    }
    safetensors.torch.save_file({**weights, **convolution}, file)
    bare.load_lora_weights(str(tmp_path), weight_name=file.name)
    loras = load_loras(pipeline, {"kohya": str(file)})
    torch.testing.assert_close(
        image(pipeline, "sd15", loras, (Lora("kohya"),)), image(bare, "sd15"), atol=1e-4, rtol=1e-4
    )


def test_files_of_peft(tmp_path):
    """The strength of a file of peft is in its `adapter_config.json`, which diffusers does not read."""
    pipeline = tiny.build("flux")
    plain = save_lora(tmp_path / "plain.safetensors", pipeline)
    file = save_lora(tmp_path / "folder" / "adapter_model.safetensors", pipeline)
    config = {"lora_alpha": 8, "r": 4}
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    loras = load_loras(pipeline, {"plain": str(plain), "peft": str(file.parent)})
    made = image(pipeline, "flux", loras, (Lora("peft", 0.5),))
    torch.testing.assert_close(made, image(pipeline, "flux", loras, (Lora("plain"),)))
    for other in ({"use_dora": True}, {"alpha_pattern": {"x": 1}}, {"r": None}):
        (file.parent / "adapter_config.json").write_text(json.dumps({**config, **other}))
        refusal(pipeline, file)


def test_the_pipeline_stays_as_it_was(files):
    """After loading, the modules have the same classes, weights and attributes as before."""
    pipeline, before = tiny.build("sd15"), tiny.build("sd15")
    load_loras(pipeline, sources(files))
    for name in ("unet", "text_encoder"):
        module, other = getattr(pipeline, name), getattr(before, name)
        assert str(module) == str(other)
        assert module.state_dict().keys() == other.state_dict().keys()
        assert not getattr(module, "peft_config", None)


def test_a_pipeline_without_a_loader(files):
    """A family that diffusers has no LoRAs for is named."""
    with pytest.raises(ModelUnavailable, match="PixArtSigmaPipeline"):
        load_loras(tiny.shared("pixart_sigma"), sources(files))


def test_no_loras():
    """Without the option, nothing happens to any pipeline."""
    assert load_loras(None, {}) is None


class TestEncoders:
    """LoRAs of text encoders, which all requests use at the same time."""

    def test_each_thread_has_its_own_choice(self, files):
        """Two prompts that are encoded at the same time get their own LoRAs; the layers of both interleave."""
        pipeline = tiny.build("sd15")
        loras = load_loras(pipeline, sources(files))
        both = threading.Barrier(2, timeout=PATIENCE)
        tokens = torch.tensor([[512, 3, 4, 513]])
        meeting = threading.local()
        layer = next(part for name, part in pipeline.text_encoder.named_modules() if name.endswith("layers.1"))

        def meet(*_):
            if hasattr(meeting, "on"):
                both.wait()

        layer.register_forward_pre_hook(meet)

        def encode(chosen):
            with torch.no_grad(), loras.in_encoders(chosen):
                return pipeline.text_encoder(tokens)[0]

        def encode_and_meet(chosen):
            meeting.on = True
            return encode(chosen)

        alone = [encode(()), encode((Lora("both", 2.0),))]
        assert (alone[0] - alone[1]).abs().max() > 1e-3
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            found = [threads.submit(encode_and_meet, chosen) for chosen in ((), (Lora("both", 2.0),))]
        for run, expected in zip(found, alone, strict=True):
            assert torch.equal(run.result(PATIENCE), expected)


class TestRefusal:
    """Operators learn why a LoRA cannot be used, when the server starts."""

    def test_wrong_family(self, tmp_path):
        """A LoRA for another architecture fits no layer; the message quotes its metadata."""
        metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
        weights = {
            f"unet.elsewhere.{number}.lora_{part}.weight": torch.ones(4, 4) for number in (0, 1) for part in "AB"
        }
        safetensors.torch.save_file(weights, tmp_path / "other.safetensors", metadata)
        text = refusal(tiny.build("sd15"), tmp_path / "other.safetensors")
        assert "sdxl_base_v1-0" in text
        assert "StableDiffusionPipeline" in text

    def test_wrong_shapes(self, tmp_path, files):
        """A LoRA for wider layers of the same names is refused because of its shapes."""
        weights = safetensors.torch.load_file(files["unet"])
        weights = {name: torch.cat([tensor, tensor], 1 if "lora_A" in name else 0) for name, tensor in weights.items()}
        safetensors.torch.save_file(
            weights, tmp_path / "wide.safetensors", {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
        )
        text = refusal(tiny.build("sd15"), tmp_path / "wide.safetensors")
        assert "other shapes" in text
        assert "stable-diffusion-xl-v1-base/lora" in text

    def test_a_lora_of_a_transformer_for_a_unet(self, tmp_path):
        """A FLUX LoRA is refused by SD1.5."""
        file = save_lora(tmp_path / "flux.safetensors", tiny.shared("flux"))
        assert "None of its tensors fits" in refusal(tiny.build("sd15"), file)

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("lora_unet_x.dora_scale", "DoRA"),
            ("unet.x.lora_magnitude_vector", "DoRA"),
            ("lora_unet_x.hada_w1_a", "LoHa"),
            ("lora_unet_x.lokr_w1", "LoKr"),
        ],
    )
    def test_other_kinds_of_adapters(self, tmp_path, files, name, kind):
        """Files of other kinds lack something: diffusers drops what such files need, so they are refused by name."""
        weights = safetensors.torch.load_file(files["unet"])
        safetensors.torch.save_file({**weights, name: torch.ones(1)}, tmp_path / "other.safetensors")
        assert kind in refusal(tiny.build("sd15"), tmp_path / "other.safetensors")

    def test_not_a_lora(self, tmp_path):
        """A file with other weights, such as a checkpoint, is no LoRA."""
        safetensors.torch.save_file({"unet.conv_in.weight": torch.ones(1)}, tmp_path / "model.safetensors")
        assert "not a LoRA" in refusal(tiny.build("sd15"), tmp_path / "model.safetensors")

    def test_damaged(self, tmp_path, files):
        """A file that ends too early is damaged."""
        (tmp_path / "half.safetensors").write_bytes(files["unet"].read_bytes()[:100])
        assert "damaged" in refusal(tiny.build("sd15"), tmp_path / "half.safetensors")

    def test_incomplete(self, tmp_path, files):
        """A layer with one of its two matrices is incomplete."""
        weights = safetensors.torch.load_file(files["unet"])
        del weights[next(name for name in weights if "lora_B" in name)]
        safetensors.torch.save_file(weights, tmp_path / "part.safetensors")
        assert "incomplete" in refusal(tiny.build("sd15"), tmp_path / "part.safetensors")

    def test_pickles(self, tmp_path):
        """A pickle is never opened."""
        (tmp_path / "style.bin").write_bytes(pickle.dumps({"weight": 0}))
        assert "can run code" in refusal(tiny.build("sd15"), tmp_path / "style.bin")
        assert "can run code" in refusal(tiny.build("sd15"), "org/name:style.pt")

    def test_a_control_lora_replaces_layers(self, tmp_path):
        """A LoRA that widens the first layer of FLUX would change all images."""
        weights = lora_weights(tiny.shared("flux"), "transformer")
        wide = {"x_embedder.lora_A.weight": torch.ones(4, 32), "x_embedder.lora_B.weight": torch.ones(32, 4)}
        names = {f"transformer.{name}": tensor for name, tensor in {**weights, **wide}.items()}
        safetensors.torch.save_file(names, tmp_path / "control.safetensors")
        assert "control LoRA" in refusal(tiny.build("flux"), tmp_path / "control.safetensors")

    def test_all_problems_are_named(self, tmp_path, files):
        """One message names every LoRA that cannot be used, and one of them does not affect the next."""
        weights = {name: tensor.repeat(2, 2) for name, tensor in safetensors.torch.load_file(files["unet"]).items()}
        wide = str(tmp_path / "wide.safetensors")
        safetensors.torch.save_file(weights, wide)
        with pytest.raises(ModelUnavailable) as caught:
            load_loras(
                tiny.build("sd15"), {"wide": wide, "a": str(tmp_path / "no"), **sources(files), "b": "o/n:x.bin"}
            )
        assert "--lora wide=" in str(caught.value)
        assert "--lora a=" in str(caught.value)
        assert "--lora b=" in str(caught.value)
        assert "--lora unet=" not in str(caught.value)

    def test_a_partial_match_is_a_warning(self, tmp_path, files, logs):
        """Tensors without a layer are counted in the log, and the rest is used."""
        weights = safetensors.torch.load_file(files["unet"])
        extra = {f"unet.elsewhere.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
        safetensors.torch.save_file({**weights, **extra}, tmp_path / "more.safetensors")
        loras = load_loras(tiny.build("sd15"), {"more": str(tmp_path / "more.safetensors")})
        assert isinstance(loras, Loras)
        entry = next(each for each in logs if each["log_level"] == "warning")
        assert (entry["unused"], entry["used"]) == (2, len(weights))


class TestSources:
    """Where the operator's setting may point."""

    def test_folder_and_file(self, tmp_path, files):
        """A folder needs a file name only if it has several files."""
        pipeline = tiny.build("sd15")
        shutil.copy(files["unet"], tmp_path / "one.safetensors")
        assert load_loras(pipeline, {"x": str(tmp_path)})
        shutil.copy(files["unet"], tmp_path / "two.safetensors")
        assert "one.safetensors, two.safetensors" in refusal(pipeline, tmp_path)
        assert load_loras(pipeline, {"x": f"{tmp_path}:two.safetensors"})
        assert "no file" in refusal(pipeline, f"{tmp_path}:three.safetensors")
        assert "no file or folder" in refusal(pipeline, tmp_path / "nothing")

    def test_a_relative_path_without_a_file(self):
        """A name that ends in .safetensors is a missing file and not a hub id, which would wait for the network."""
        assert "There is no file 'loras/style.safetensors'." in refusal(tiny.build("sd15"), "loras/style.safetensors")
        assert "'notes.txt' is not a .safetensors file" in refusal(tiny.build("sd15"), "notes.txt")

    def test_hub_without_network(self, offline):
        """The message for an unreachable hub id names it."""
        assert "hub cannot be reached" in refusal(tiny.build("sd15"), "org/style")
        assert "hub cannot be reached" in refusal(tiny.build("sd15"), "org/style:file.safetensors")

    def test_a_repository_with_several_files(self, monkeypatch):
        """The operator must name one of the files of a repository, or the only one is taken."""
        monkeypatch.setattr(
            huggingface_hub, "list_repo_files", lambda _: ["README.md", "b.safetensors", "a.safetensors"]
        )
        assert "name one of them after a colon: a.safetensors, b.safetensors" in refusal(
            tiny.build("sd15"), "org/style"
        )

    def test_an_unknown_repository(self, monkeypatch):
        """A hub that answers is not taken for one that cannot be reached."""

        def answer(_):
            raise RepositoryNotFoundError("none", response=unittest.mock.Mock())

        monkeypatch.setattr(huggingface_hub, "list_repo_files", answer)
        assert "hub has no repository 'org/style'" in refusal(tiny.build("sd15"), "org/style")
