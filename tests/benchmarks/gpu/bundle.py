"""Downloads the packages that the benchmark needs on a machine without network, except torch: `make gpu-bundle`.

The packages are those that the installed `calotype[server]` depends on, in the versions that are installed here, as
wheels for the platform of the other machine. `offline.sh` installs them there, next to that machine's torch.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["closure", "main"]

TARGET = Path("build/gpu-wheels")
ROOTS = ("calotype[server]",)
OWN = ("calotype", "calotype-bundled-model")
"""Packages of this repository, which come from the working tree."""


def closure(roots: Sequence[str], *, python: str, without: Collection[str] = ()) -> dict[str, str]:
    """Returns names and installed versions of everything that the roots need on x86-64 Linux, the roots included.

    Args:
        roots: Requirements, such as `name[extra]`.
        python: Version of Python on the other machine, such as 3.12.
        without: Normalised names that the other machine has. Packages that only these need are left out, too.

    Raises:
        PackageNotFoundError: A package is not installed here.
    """
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "os_name": "posix",
    }
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = normalized(requirement.name)
        if name in without:
            continue
        found[name] = metadata.version(name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in metadata.requires(name) or ():
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({**environment, "extra": extra}):
                    waiting.append(needed)
    return found


def normalized(name: str) -> str:
    """Returns a package's name as the index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(arguments: Sequence[str] | None = None) -> int:
    """Downloads the wheels, and returns the exit code: 1 if they are larger than allowed."""
    parser = argparse.ArgumentParser(prog="make gpu-bundle", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", help="Python there")
    parser.add_argument("--have", default="torch", help="comma-separated packages that are there; default: torch")
    parser.add_argument("--max-mib", type=float, help="fail if the wheels are larger")
    parser.add_argument("--target", type=Path, default=TARGET, help=f"folder; default: {TARGET}")
    options = parser.parse_args(arguments)
    there = {normalized(name) for name in options.have.split(",")} | {"torch"}
    packages = closure(ROOTS, python=options.python, without=there)
    packages = {name: version for name, version in packages.items() if name not in OWN}
    options.target.mkdir(parents=True, exist_ok=True)
    for old in options.target.glob("*.whl"):
        old.unlink()
    download(packages, options.python, options.target)
    size = sum(file.stat().st_size for file in options.target.glob("*.whl")) / 2**20
    print(f"{len(packages)} packages, {size:.1f} MiB in {options.target}")
    if options.max_mib is not None and size > options.max_mib:
        print(f"That is more than {options.max_mib:g} MiB; name packages that the machine has with --have.")
        return 1
    return 0


def download(packages: dict[str, str], python: str, target: Path) -> None:
    """Downloads one wheel of each package.

    Raises:
        CalledProcessError: A package has no such wheel.
    """
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", "--dest", str(target)]
    for platform in platforms:
        command += ["--platform", platform]
    subprocess.run([*command, *(f"{name}=={version}" for name, version in packages.items())], check=True)


if __name__ == "__main__":
    raise SystemExit(main())
