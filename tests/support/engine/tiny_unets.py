"""Tiny pipelines with a UNet, and parts for other pipelines: tokenizer, text encoder, VAE."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

__all__ = [
    "SD_BETAS",
    "clip_text_encoder",
    "clip_tokenizer",
    "conditional_unet",
    "lcm",
    "sd15",
    "sdxl",
    "shifted_vae",
    "t5",
    "tiny_vae",
    "vae",
]

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """Returns a CLIP tokenizer with every byte and no merges: one token per character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # Byte-level BPE maps the other bytes to characters from 256 on.
    others = range(256, 256 + 256 - len(printable))
    characters = [chr(code) for code in (*printable, *others)]
    tokens = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip_text_encoder(*, projection: bool = False, **others: Any) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "projection_dim": 32,
            **others,
        },
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5(width: int = 32) -> transformers.T5EncoderModel:
    """Returns a T5 for the vocabulary of `clip_tokenizer`."""
    config = transformers.T5Config(
        vocab_size=514, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=4, pad_token_id=513
    )
    return transformers.T5EncoderModel(config)


def vae(channels: int = 4, **config: Any) -> diffusers.AutoencoderKL:
    """Returns a VAE that shrinks eight times, like the real ones."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        **config,
    )


def tiny_vae(channels: int = 4) -> diffusers.AutoencoderTiny:
    """Returns a small decoder like TAESD: it takes the denoiser's latents, and enlarges eight times."""
    return diffusers.AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )


def shifted_vae() -> diffusers.AutoencoderKL:
    """Returns a VAE as in SD3 and FLUX: no quantisation convolutions, latents scaled and shifted."""
    return vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)


def conditional_unet(cross_attention_dim: int = 32, **config: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        sample_size=8,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=8,
        norm_num_groups=8,
        **config,
    )


def sd15(scheduler: Any = None) -> diffusers.StableDiffusionPipeline:
    """Returns a Stable Diffusion 1.5, with `scheduler` instead of its DDIM."""
    return diffusers.StableDiffusionPipeline(
        unet=conditional_unet(),
        vae=vae(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        scheduler=scheduler
        or diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(cross_attention_dim: int = 64, text_encoder_2: Any = None) -> diffusers.StableDiffusionXLPipeline:
    """Returns a Stable Diffusion XL; `cross_attention_dim` is the sum of both text encoders' widths."""
    text_encoder_2 = text_encoder_2 or clip_text_encoder(projection=True)
    unet = conditional_unet(
        cross_attention_dim=cross_attention_dim,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + text_encoder_2.config.projection_dim,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=unet,
        vae=vae(),
        text_encoder=clip_text_encoder(),
        text_encoder_2=text_encoder_2,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def lcm() -> diffusers.LatentConsistencyModelPipeline:
    return diffusers.LatentConsistencyModelPipeline(
        unet=conditional_unet(time_cond_proj_dim=32),
        vae=vae(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.LCMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
