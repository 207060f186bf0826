"""Assemble the trained parts into a standard `StableDiffusionPipeline` folder (fp16) with model card and licences."""

import argparse
import json
import shutil
from pathlib import Path

import data
import evaluate
import text
import torch
import unet
from diffusers import AutoencoderKL, StableDiffusionPipeline

HERE = Path(__file__).parent


def assemble(work: Path) -> StableDiffusionPipeline:
    """Return the pipeline with the averaged weights of the UNet's last checkpoint."""
    vae = AutoencoderKL.from_pretrained(work / "vae")
    denoiser = unet.build(vae.config.latent_channels)
    denoiser.load_state_dict(torch.load(work / "unet.pt", weights_only=True)["ema"])
    tokenizer, encoder = text.load()
    parts = {"vae": vae.half(), "unet": denoiser.half(), "text_encoder": encoder.half()}
    return StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=unet.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def forget_origin(folder: Path) -> None:
    """Remove local paths from the configuration files."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.keys() & {"_name_or_path", "name_or_path"}:
            kept = {key: value for key, value in content.items() if key not in {"_name_or_path", "name_or_path"}}
            path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; replaced if it exists")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = assemble(options.work)
    shutil.rmtree(options.output, ignore_errors=True)
    pipeline.save_pretrained(options.output, safe_serialization=True)
    forget_origin(options.output)
    # Calotype reads the defaults for these weights from this file, because diffusers has no field for them.
    defaults = {
        "step_count": evaluate.STEPS,
        "guidance_scale": evaluate.GUIDANCE,
        "tiny_vae": "../tiny_vae",
        "sizes": [[data.SIZE, data.SIZE]],
    }
    (options.output / "calotype.json").write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")
    shutil.copy(HERE / "model_card.md", options.output / "README.md")
    shutil.copytree(HERE / "licenses", options.output / "LICENSES")
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{options.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
