"""Plot the logs of the trainings."""

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt


def column(path: Path, name: str) -> list[float]:
    """Return one column of a training's log."""
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), dpi=80, layout="constrained")
    log = options.work / "autoencoder.csv"
    left.plot([n / 1000 for n in column(log, "samples")], column(log, "psnr"))
    left.set(title="autoencoder", xlabel="thousand crops seen", ylabel="PSNR on training crops, dB")
    log = options.work / "unet.csv"
    right.plot([n / 1000 for n in column(log, "samples")], column(log, "loss"))
    right.set(title="UNet", xlabel="thousand images seen", ylabel="mean square error of v", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(options.output)


if __name__ == "__main__":
    main()
