"""The denoising UNet, the noise schedule, and the loss."""

import text
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

STEPS = 1000  # of the noise schedule


def build(latent_channels: int) -> UNet2DConditionModel:
    """Return an untrained UNet for 16 x 16 latents, with cross-attention at 8 x 8 and 4 x 4.

    `addition_embed_type="text"` also adds the pooled text to the time embedding, which every block receives. The model
    learns most of a name's meaning this way, and quickly.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text.WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=16,
    )


def scheduler() -> DDIMScheduler:
    """Return the sampler: Stable Diffusion's betas rescaled to end in pure noise (arXiv:2305.08891), v-prediction."""
    return DDIMScheduler(
        num_train_timesteps=STEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def random_timesteps(count: int, source: torch.Generator) -> Tensor:
    """Draw timesteps: 65 % uniform, 35 % from the noisiest 40 %, where shape and colour are decided."""
    uniform = torch.randint(0, STEPS, (count,), generator=source)
    noisy = torch.randint(600, STEPS, (count,), generator=source)
    return torch.where(torch.rand(count, generator=source) < 0.35, noisy, uniform)


def loss(
    model: UNet2DConditionModel, x0: Tensor, embeddings: Tensor, alphas: Tensor, source: torch.Generator
) -> Tensor:
    """Return the mean squared error of the predicted v = √ᾱ ε - √(1-ᾱ) x₀ (arXiv:2202.00512) at random timesteps."""
    timesteps = random_timesteps(len(x0), source)
    signal = alphas[timesteps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
    noise = torch.randn(x0.shape, generator=source)
    with torch.autocast("cpu", torch.bfloat16):
        v = model(signal * x0 + sigma * noise, timesteps, embeddings).sample.float()
    return (v - (signal * noise - sigma * x0)).square().mean()
