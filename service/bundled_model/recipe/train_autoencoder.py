"""Train the autoencoder on random crops. Resumes from its checkpoint, also with a different `--samples`."""

import argparse
from pathlib import Path

import autoencoder
import data
import torch
import training
from safetensors.torch import load_file

CROP = 64  # pixels
BATCH = 16  # crops per process and step
KL_WEIGHT = 1e-4
SEED = 1


def crops(images: torch.Tensor, indices: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Cut one random crop out of each image, and mirror half of them."""
    cut = []
    for index in indices.tolist():
        top, left = torch.randint(0, data.SIZE - CROP + 1, (2,), generator=source).tolist()
        crop = images[index, :, top : top + CROP, left : left + CROP]
        cut.append(crop.flip(-1) if torch.rand((), generator=source) < 0.5 else crop)
    return autoencoder.to_float(torch.stack(cut))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, required=True, help="total number of crops to train on")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="peak learning rate")
    parser.add_argument("--warm-start", type=Path, help="folder of an AutoencoderKL to start from")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    images = torch.from_numpy(data.load(options.work).images).permute(0, 3, 1, 2).contiguous()
    model = autoencoder.build()
    if options.warm_start:
        training.warm_start(model, load_file(options.warm_start / "diffusion_pytorch_model.safetensors"))
    training.start_processes(options.rank, port=29521)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, betas=(0.9, 0.95), weight_decay=1e-3)
    ema = training.Ema(model, decay=0.998)
    checkpoint = training.Checkpoint(options.work / "autoencoder.pt", model, ema, optimizer)
    samples = checkpoint.load()
    log = (
        training.Log(options.work / "autoencoder.csv", ["l1", "gradient", "kl", "psnr"]) if options.rank == 0 else None
    )
    while samples < options.samples:
        rate = training.learning_rate(samples, options.samples, options.rate, warmup=3000, hold=0.3)
        for group in optimizer.param_groups:
            group["lr"] = rate
        source = training.generator(SEED, options.rank, samples)
        indices = training.batch_indices(samples + options.rank * BATCH, BATCH, len(images), SEED)
        x = crops(images, indices, source)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x).latent_dist
            z = posterior.sample(generator=source)
            y = model.decode(z).sample.float()
        kl = posterior.kl().mean() / z[0].numel()
        loss = autoencoder.reconstruction_loss(y, x) + KL_WEIGHT * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        training.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        samples += BATCH * training.PROCESSES
        if log:
            ema.update(model)
            with torch.no_grad():
                error = (y - x).square().mean().item()
                values = [(y - x).abs().mean(), autoencoder.gradient_error(y, x), kl]
            log.add(samples, rate, [*(value.item() for value in values), autoencoder.psnr(error)])
            if checkpoint.due() or samples >= options.samples:
                checkpoint.save(samples)


if __name__ == "__main__":
    main()
