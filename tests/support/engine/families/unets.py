"""Tiny pipelines with a UNet: relatives of Stable Diffusion."""

from __future__ import annotations

from typing import Any

import diffusers

from support.engine.families.prompts import TOKENS, pair, speaking
from support.engine.tiny_unets import (
    SD_BETAS,
    clip_text_encoder,
    clip_tokenizer,
    conditional_unet,
    sd15,
    sdxl,
    t5,
    vae,
)

__all__ = ["UNETS"]


def _parts() -> dict[str, Any]:
    """Returns the components of a tiny Stable Diffusion 1.5."""
    parts = sd15().components
    del parts["image_encoder"]
    return parts


def _sd_v_prediction() -> Any:
    """Returns a Stable Diffusion 2.1, which predicts velocities."""
    return sd15(
        diffusers.EulerDiscreteScheduler(**SD_BETAS, prediction_type="v_prediction", timestep_spacing="trailing")
    )


def _sd_related(name: str, **others: Any) -> Any:
    return getattr(diffusers, name)(**_parts(), **others)


def _sdxl_pag() -> Any:
    return diffusers.StableDiffusionXLPAGPipeline(**sdxl().components, add_watermarker=False, pag_applied_layers="mid")


def _sdxl_turbo() -> Any:
    pipeline = sdxl()
    pipeline.scheduler = diffusers.EulerAncestralDiscreteScheduler(**SD_BETAS, timestep_spacing="trailing")
    return pipeline


def _sd_guidance_embedded() -> Any:
    """Returns a Stable Diffusion whose UNet was distilled to take the guidance as an input."""
    parts = _parts()
    parts["unet"] = conditional_unet(time_cond_proj_dim=32)
    return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)


def _kolors(kind: Any = diffusers.KolorsPipeline, **others: Any) -> Any:
    denoiser = conditional_unet(
        cross_attention_dim=64,
        encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    pipeline = kind(
        unet=denoiser,
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
        **others,
    )
    return speaking(pipeline, lambda call: (*pair(call, 1, TOKENS, 32), *pair(call, 1, 32)))


def _kandinsky3() -> Any:
    movq = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    unet = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=32,
    )
    return diffusers.Kandinsky3Pipeline(
        unet=unet,
        movq=movq,
        text_encoder=t5(),
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.DDPMScheduler(**SD_BETAS, clip_sample=False),
    )


def _latent_diffusion() -> Any:
    return diffusers.LDMTextToImagePipeline(
        unet=conditional_unet(),
        vqvae=vae(),
        bert=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False),
    )


UNETS = {
    "kandinsky3": _kandinsky3,
    "kolors": _kolors,
    "kolors_pag": lambda: _kolors(diffusers.KolorsPAGPipeline, pag_applied_layers="mid"),
    "latent_diffusion": _latent_diffusion,
    "sd_guidance_embedded": _sd_guidance_embedded,
    "sd_pag": lambda: _sd_related("StableDiffusionPAGPipeline", pag_applied_layers="mid"),
    "sd_panorama": lambda: _sd_related("StableDiffusionPanoramaPipeline"),
    "sd_v_prediction": _sd_v_prediction,
    "sdxl_pag": _sdxl_pag,
    "sdxl_turbo": _sdxl_turbo,
}
