"""Tiny pipelines of many families, randomly initialised: every layer of the real thing, a few thousand weights each.

Nothing is downloaded. All weights are seeded, so two builds of a family are equal.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers
import torch
import transformers

from support.tiny_inputs import embeddings

__all__ = ["FAMILIES", "build", "clip_tokenizer", "prompted", "sd15", "shared"]

# The libraries give advice on unusually small configurations, and draw progress bars.
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """A CLIP tokenizer that knows every byte and no merges: one token a character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # Byte-level BPE shows the other bytes as characters from 256 on.
    others = range(256, 256 + 256 - len(printable))
    characters = [chr(code) for code in (*printable, *others)]
    tokens = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _clip(*, projection: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=32,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def _vae(channels: int = 4, **config: Any) -> diffusers.AutoencoderKL:
    """Shrinks eight times, as the real ones do."""
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


def _shifted_vae() -> diffusers.AutoencoderKL:
    """As in SD3 and FLUX: no quantisation convolutions, latents scaled and shifted."""
    return _vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)


def _unet(cross_attention_dim: int = 32, **config: Any) -> diffusers.UNet2DConditionModel:
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
    """Stable Diffusion 1.5, with `scheduler` in place of its DDIM."""
    return diffusers.StableDiffusionPipeline(
        unet=_unet(),
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=clip_tokenizer(),
        scheduler=scheduler
        or diffusers.DDIMScheduler(**_SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> diffusers.StableDiffusionXLPipeline:
    unet = _unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(),
        text_encoder=_clip(),
        text_encoder_2=_clip(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(**_SD_BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def _lcm() -> diffusers.LatentConsistencyModelPipeline:
    return diffusers.LatentConsistencyModelPipeline(
        unet=_unet(time_cond_proj_dim=32),
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.LCMScheduler(**_SD_BETAS, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd3() -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=96,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_shifted_vae(),
        text_encoder=None,
        text_encoder_2=None,
        text_encoder_3=None,
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux() -> diffusers.FluxPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        vae=_shifted_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        scheduler=scheduler,
    )


def _flux2() -> diffusers.Flux2KleinPipeline:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return diffusers.Flux2KleinPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _qwen_image() -> diffusers.QwenImagePipeline:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 1.5, 0.7],
    )
    return diffusers.QwenImagePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _z_image() -> diffusers.ZImagePipeline:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        transformer=_filled(transformer, "x_pad_token", "cap_pad_token"),
        vae=_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _pixart_sigma() -> diffusers.PixArtSigmaPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=24,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer,
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _sana_transformer(**config: Any) -> diffusers.SanaTransformer2DModel:
    return diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        **config,
    )


def _sana_vae() -> diffusers.AutoencoderDC:
    """Shrinks 32 times; Sana's pipelines insist on multiples of 32."""
    levels = 6
    blocks = ("ResBlock",) * (levels - 1) + ("EfficientViTBlock",)
    scales = ((),) * (levels - 1) + ((5,),)
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        encoder_layers_per_block=(1,) * levels,
        decoder_layers_per_block=(1,) * levels,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def _sana() -> diffusers.SanaPipeline:
    return diffusers.SanaPipeline(
        transformer=_sana_transformer(),
        vae=_sana_vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _sana_sprint() -> diffusers.SanaSprintPipeline:
    return diffusers.SanaSprintPipeline(
        transformer=_sana_transformer(qk_norm="rms_norm_across_heads", guidance_embeds=True),
        vae=_sana_vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.SCMScheduler(),
    )


def _lumina2() -> diffusers.Lumina2Pipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        vae=_shifted_vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _aura_flow() -> diffusers.AuraFlowPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        transformer=_filled(transformer, "pos_embed.pos_embed", "register_tokens"),
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _chroma() -> diffusers.ChromaPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return diffusers.ChromaPipeline(
        transformer=transformer,
        vae=_shifted_vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _cogview4() -> diffusers.CogView4Pipeline:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
        use_dynamic_shifting=True,
        time_shift_type="linear",
    )
    return diffusers.CogView4Pipeline(
        transformer=transformer, vae=_vae(), text_encoder=None, tokenizer=None, scheduler=scheduler
    )


def _filled(module: torch.nn.Module, *names: str) -> torch.nn.Module:
    """Fills parameters that diffusers leaves uninitialised, because only a checkpoint would set them."""
    with torch.no_grad():
        for name in names:
            torch.nn.init.normal_(module.get_parameter(name), std=0.02)
    return module


_BUILDERS = {
    "aura_flow": _aura_flow,
    "chroma": _chroma,
    "cogview4": _cogview4,
    "flux": _flux,
    "flux2_klein": _flux2,
    "lcm": _lcm,
    "lumina2": _lumina2,
    "pixart_sigma": _pixart_sigma,
    "qwen_image": _qwen_image,
    "sana": _sana,
    "sana_sprint": _sana_sprint,
    "sd15": sd15,
    "sd3": _sd3,
    "sdxl": _sdxl,
    "z_image": _z_image,
}

FAMILIES = tuple(_BUILDERS)


def build(family: str, **arguments: Any) -> Any:
    """Builds a new pipeline of a family; leaves the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = _BUILDERS[family](**arguments)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def shared(family: str) -> Any:
    """The process's one pipeline of a family, which no test may change."""
    return build(family)


def prompted(family: str) -> Any:
    """A pipeline that takes prompts: those without a text encoder answer every prompt with the same embeddings."""
    pipeline = build(family)
    if pipeline.components.get("text_encoder") is not None:
        return pipeline
    encode_prompt = pipeline.encode_prompt
    signature = inspect.signature(encode_prompt)
    known = {name: value for name, value in embeddings(family).items() if name in signature.parameters}

    def encode(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments.update(known)
        return encode_prompt(*bound.args, **bound.kwargs)

    pipeline.encode_prompt = encode
    return pipeline
