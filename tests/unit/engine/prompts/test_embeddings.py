"""Textual inversions that the operator loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

from calotype_server.engine.prompts.embeddings import load_embeddings
from calotype_server.engine.prompts.encoding import read_weights
from calotype_server.engine.requests.shared_components import shared_components
from calotype_server.engine.requests.view import request_view
from calotype_server.errors import ModelUnavailable
from support.engine import tiny

if TYPE_CHECKING:
    from pathlib import Path


def vectors(count: int = 1, channels: int = 32, seed: int = 0) -> torch.Tensor:
    """Returns the vectors of a textual inversion."""
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, **tensors: torch.Tensor) -> dict[str, str]:
    """Saves tensors, and returns the file by the name of the embedding."""
    safetensors.torch.save_file(tensors, folder / "file.safetensors")
    return {"zorn": str(folder / "file.safetensors")}


def encoded(pipeline: Any, prompt: str, *, weighted: bool = False) -> tuple[Any, ...]:
    """Returns the embeddings of a prompt."""
    view = request_view(pipeline, pipeline.scheduler, **shared_components(pipeline))
    if weighted:
        read_weights(view)
    with torch.no_grad():
        return tuple(
            view.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
        )


@pytest.mark.parametrize("count", [1, 3])
def test_an_embedding_is_used_by_its_name(tmp_path: Path, count: int) -> None:
    """The name in a prompt stands for all vectors, in plain and in weighted prompts."""
    pipeline = tiny.build("sd15")
    plain = encoded(pipeline, "a zorn apple")[0]
    load_embeddings(pipeline, saved(tmp_path, emb_params=vectors(count)))
    weights = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(weights[-count:], vectors(count))
    read = encoded(pipeline, "a zorn apple")[0]
    assert not torch.equal(read, plain)
    assert torch.equal(encoded(pipeline, "a zorn apple", weighted=True)[0], read)
    assert not torch.equal(encoded(pipeline, "a (zorn:1.5) apple", weighted=True)[0], read)


def test_both_text_encoders_of_xl_get_their_vectors(tmp_path: Path) -> None:
    """`clip_l` is for the first encoder and `clip_g` for the second; the pooled embedding is still that of the end."""
    pipeline = tiny.build("sdxl")
    pipeline.text_encoder_2.text_model.eos_token_id = 2
    pooled = encoded(pipeline, "an apple")[2]
    load_embeddings(pipeline, saved(tmp_path, clip_l=vectors(2, seed=1), clip_g=vectors(2, seed=2)))
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[-2:], vectors(2, seed=1))
    assert torch.equal(pipeline.text_encoder_2.get_input_embeddings().weight[-2:], vectors(2, seed=2))
    assert torch.equal(encoded(pipeline, "an apple")[2], pooled)
    ids = pipeline.tokenizer_2("a zorn", padding="max_length", max_length=77, return_tensors="pt").input_ids
    end = ids[0].tolist().index(pipeline.tokenizer_2.eos_token_id)
    with torch.no_grad():
        output = pipeline.text_encoder_2(ids)
        expected = pipeline.text_encoder_2.text_projection(output.last_hidden_state[:, end])
    torch.testing.assert_close(output.text_embeds, expected)


@pytest.mark.parametrize(
    ("family", "tensors", "message"),
    [
        ("sd15", {"a": vectors(channels=16)}, "made for another model"),
        ("sd15", {"clip_l": vectors(), "clip_g": vectors()}, "made for Stable Diffusion XL"),
        ("sd15", {"a": vectors(), "b": vectors()}, "needs one tensor, but has a, b"),
        ("sdxl", {"a": vectors()}, "needs the tensors clip_l and clip_g, but has a"),
        ("sdxl", {"clip_l": vectors(), "clip_g": vectors(channels=16)}, "made for another model"),
        ("flux", {"a": vectors()}, "FluxPipeline, which has no textual inversions"),
    ],
)
def test_an_embedding_must_fit_the_model(
    tmp_path: Path, family: str, tensors: dict[str, torch.Tensor], message: str
) -> None:
    """The server does not start with an embedding of another model, and says why."""
    with pytest.raises(ModelUnavailable, match=message):
        load_embeddings(tiny.build(family), saved(tmp_path, **tensors))


def test_an_embedding_must_be_readable(tmp_path: Path) -> None:
    """A missing file, another format, a damaged file and a name that is already a token have their own messages."""
    pipeline = tiny.build("sd15")
    (tmp_path / "bad.safetensors").write_bytes(b"damaged")
    (tmp_path / "old.pt").write_bytes(b"")
    for name, source, message in (
        ("zorn", f"{tmp_path}/none.safetensors", "There is no file or folder"),
        ("zorn", f"{tmp_path}/old.pt", "can run code"),
        ("zorn", "org/name:old.bin", "can run code"),
        ("zorn", f"{tmp_path}/bad.safetensors", "cannot be read"),
        ("a", saved(tmp_path, a=vectors())["zorn"], "needs another name"),
    ):
        with pytest.raises(ModelUnavailable, match=message):
            load_embeddings(pipeline, {name: source})


def test_a_folder_with_the_usual_file(tmp_path: Path) -> None:
    """Of several files in a folder, the one with the usual name is taken; a file after a colon comes first."""
    pipeline = tiny.build("sd15")
    for name, count in (("learned_embeds", 1), ("other", 3)):
        safetensors.torch.save_file({"a": vectors(count)}, tmp_path / f"{name}.safetensors")
    before = len(pipeline.tokenizer)
    load_embeddings(pipeline, {"zorn": str(tmp_path)})
    assert len(pipeline.tokenizer) == before + 1
    load_embeddings(pipeline, {"blick": f"{tmp_path}:other.safetensors"})
    assert len(pipeline.tokenizer) == before + 4


def test_all_embeddings_with_problems_are_named(tmp_path: Path) -> None:
    """One message names the option, the source and the reason of each."""
    wide = tmp_path / "wide.safetensors"
    safetensors.torch.save_file({"a": vectors(channels=16)}, wide)
    with pytest.raises(ModelUnavailable) as caught:
        load_embeddings(tiny.build("sd15"), {"one": str(wide), "two": f"{tmp_path}/none.safetensors"})
    assert f"--embedding one={wide} cannot be used" in str(caught.value)
    assert f"--embedding two={tmp_path}/none.safetensors cannot be used" in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_an_embedding_of_the_hub_needs_the_network() -> None:
    """Without the network, the message is the same as for a model."""
    with pytest.raises(ModelUnavailable, match="The hub cannot be reached"):
        load_embeddings(tiny.build("sd15"), {"zorn": "org/name"})
