"""Train the UNet on cached latents. Resumes from its checkpoint, also with a different `--samples`."""

import argparse
from pathlib import Path

import muon
import text
import torch
import training
import unet
from safetensors.torch import load_file

BATCH = 32  # images per process and step
EMPTY = 0.1  # share of samples with an empty caption, for classifier-free guidance
SEED = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, required=True, help="total number of images to train on")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--warm-start", type=Path, help="folder of a UNet2DConditionModel to start from")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    latents = torch.load(options.work / "latents.pt", weights_only=True)
    captions = torch.load(options.work / "text.pt", weights_only=True)
    model = unet.build(latents.size(1))
    if options.warm_start:
        training.warm_start(model, load_file(options.warm_start / "diffusion_pytorch_model.safetensors"))
    training.start_processes(options.rank, port=29522)
    parameters = list(model.parameters())
    optimizers = muon.MuonAndAdamW(model, options.rate, ends=("conv_in", "conv_out"))
    ema = training.Ema(model, decay=0.998)
    checkpoint = training.Checkpoint(options.work / "unet.pt", model, ema, optimizers)
    samples = checkpoint.load()
    log = training.Log(options.work / "unet.csv", ["loss"]) if options.rank == 0 else None
    alphas = unet.scheduler().alphas_cumprod
    while samples < options.samples:
        rate = training.learning_rate(samples, options.samples, options.rate, warmup=3000, hold=0.3)
        source = training.generator(SEED, options.rank, samples)
        indices = training.batch_indices(samples + options.rank * BATCH, BATCH, len(latents), SEED)
        chosen = captions["captions"][indices, torch.randint(0, text.CAPTIONS, (BATCH,), generator=source)]
        chosen[torch.rand(BATCH, generator=source) < EMPTY] = captions["empty"]
        loss = unet.loss(model, latents[indices].float(), captions["embeddings"][chosen].float(), alphas, source)
        loss.backward()
        training.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers.step(rate)
        samples += BATCH * training.PROCESSES
        if log:
            ema.update(model)
            log.add(samples, rate, [loss.item()])
            if checkpoint.due() or samples >= options.samples:
                checkpoint.save(samples)


if __name__ == "__main__":
    main()
