"""A tiny HunyuanImage with random weights, also with real text encoders, to be saved to a folder and loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers

from support.engine.tiny_unets import clip_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["hunyuan_image", "save_hunyuan_image"]


def save_hunyuan_image(folder: Path) -> Path:
    """Saves a pipeline with text encoders to a folder, and returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = hunyuan_image(
            text_encoder=_qwen(),
            tokenizer=_qwen_tokenizer(),
            text_encoder_2=transformers.T5EncoderModel(
                transformers.T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            tokenizer_2=transformers.ByT5Tokenizer(),
            guider=_guider(),
            ocr_guider=_guider(),
        )
        pipeline.save_pretrained(folder)
    return folder


def hunyuan_image(*, distilled: bool = False, **parts: Any) -> diffusers.HunyuanImagePipeline:
    """Returns a pipeline with these text encoders and guiders, which are absent otherwise."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=distilled,
        use_meanflow=distilled,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=64,
        scaling_factor=0.476986,
    )
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.HunyuanImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        **{**absent, **parts},
    )


def _guider() -> diffusers.AdaptiveProjectedMixGuidance:
    """Returns a guider with a scale at which the prompts of the tiny text encoder matter."""
    return diffusers.AdaptiveProjectedMixGuidance(
        adaptive_projected_guidance_scale=1000.0, adaptive_projected_guidance_start_step=1
    )


def _qwen() -> transformers.Qwen2_5_VLForConditionalGeneration:
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """Returns a tokenizer with every byte and no merges."""
    characters = [token for token in clip_tokenizer().get_vocab() if len(token) == 1]
    vocabulary = {token: number for number, token in enumerate([*sorted(characters), "<|endoftext|>"])}
    return transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])
