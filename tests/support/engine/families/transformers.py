"""Tiny pipelines with a transformer that takes a grid of latents."""

from __future__ import annotations

import unittest.mock
from typing import Any

import diffusers
import torch
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

from support.engine import tiny_transformers
from support.engine.families.prompts import TOKENS, mask, pair, speaking
from support.engine.tiny_inputs import words
from support.engine.tiny_unets import clip_tokenizer, shifted_vae, vae

__all__ = ["TRANSFORMERS"]


def _masked(call: Any, channels: int, dtype: torch.dtype = torch.long) -> Any:
    """Returns embeddings and masks in the order of PixArt: prompt, its mask, negative prompt, its mask."""
    prompt, negative = pair(call, 1, TOKENS, channels)
    return prompt, mask(dtype), negative, None if negative is None else mask(dtype)


def _pixart(kind: Any, *, micro_conditions: bool = False, **others: Any) -> Any:
    parts = tiny_transformers.pixart_sigma(use_additional_conditions=micro_conditions).components
    return speaking(kind(**parts, **others), lambda call: _masked(call, 32))


def _sana_pag() -> Any:
    parts = tiny_transformers.sana().components
    pipeline = diffusers.SanaPAGPipeline(**parts, pag_applied_layers="transformer_blocks.0")
    return speaking(pipeline, lambda call: _masked(call, 8))


def _sd3_pag() -> Any:
    parts = tiny_transformers.sd3().components
    for name in ("image_encoder", "feature_extractor"):
        parts.pop(name, None)
    pipeline = diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers="blocks.1")
    return speaking(pipeline, lambda call: (*pair(call, 1, TOKENS, 32), *pair(call, 1, 64)))


def _hunyuan_dit(kind: Any = diffusers.HunyuanDiTPipeline, **others: Any) -> Any:
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        text_len=TOKENS,
        text_len_t5=TOKENS,
        use_style_cond_and_image_meta_size=False,
    )
    pipeline = kind(
        transformer=transformer,
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **others,
    )

    def encode(call: Any) -> Any:
        prompt, negative = pair(call, 1, TOKENS, 8)
        return prompt, negative, mask(), mask()

    return speaking(pipeline, encode)


def _lumina() -> Any:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=24,
    )
    pipeline = diffusers.LuminaPipeline(
        transformer=transformer,
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    return speaking(pipeline, lambda call: _masked(call, 24, torch.bool))


def _prx() -> Any:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=8, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[4, 4]
    )
    pipeline = diffusers.PRXPipeline(
        transformer=transformer,
        vae=shifted_vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        default_sample_size=64,
    )
    return speaking(pipeline, lambda call: _masked(call, 8, torch.bool))


def _cogview3() -> Any:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=32,
        sample_size=8,
    )
    pipeline = diffusers.CogView3PlusPipeline(
        transformer=transformer,
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.CogVideoXDDIMScheduler(snr_shift_scale=4.0, rescale_betas_zero_snr=True),
    )
    return speaking(pipeline, lambda call: pair(call, 1, TOKENS, 8))


def _hidream() -> Any:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=[0, 1],
    )
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    pipeline = diffusers.HiDreamImagePipeline(
        transformer=transformer,
        vae=shifted_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys((*names, *(name.replace("text_encoder", "tokenizer") for name in names))),
    )
    # The area that every image has.
    pipeline.default_sample_size = 8

    def encode(call: Any) -> Any:
        return *pair(call, 1, TOKENS, 32), *pair(call, 2, 1, TOKENS, 16), *pair(call, 1, 64)

    return speaking(pipeline, encode)


def _kandinsky5() -> Any:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=8,
        in_text_dim2=4,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
    )
    pipeline = diffusers.Kandinsky5T2IPipeline(
        transformer=transformer,
        vae=shifted_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    # Real ones have seven sizes of about a megapixel.
    pipeline.resolutions = [(64, 64), (80, 64), (64, 80)]
    return speaking(
        pipeline,
        lambda call: (words(call.prompt, 1, TOKENS, 8), words(call.prompt, 1, 4), torch.tensor([0, TOKENS])),
    )


def _omnigen() -> Any:
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        num_layers=1,
        pad_token_id=0,
        vocab_size=600,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 1]},
        max_position_embeddings=2048,
        original_max_position_embeddings=1024,
        time_step_dim=4,
    )
    parts = {
        "transformer": transformer,
        "vae": vae(),
        "tokenizer": clip_tokenizer(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
    }
    # The pipeline needs torchvision to prepare input images, even if there are none.
    kind = processor_omnigen.OmniGenMultiModalProcessor
    with (
        unittest.mock.patch.object(processor_omnigen, "transforms", unittest.mock.Mock(), create=True),
        unittest.mock.patch.object(pipeline_omnigen, "OmniGenMultiModalProcessor", kind, create=True),
    ):
        return diffusers.OmniGenPipeline(**parts)


TRANSFORMERS = {
    "cogview3": _cogview3,
    "hidream": _hidream,
    "hunyuan_dit": _hunyuan_dit,
    "hunyuan_dit_pag": lambda: _hunyuan_dit(diffusers.HunyuanDiTPAGPipeline, pag_applied_layers="blocks.1"),
    "kandinsky5": _kandinsky5,
    "lumina": _lumina,
    "omnigen": _omnigen,
    "pixart_alpha": lambda: _pixart(diffusers.PixArtAlphaPipeline),
    "pixart_sigma_pag": lambda: _pixart(diffusers.PixArtSigmaPAGPipeline, pag_applied_layers="blocks.1"),
    "prx": _prx,
    "sana_pag": _sana_pag,
    "sd3_pag": _sd3_pag,
}
