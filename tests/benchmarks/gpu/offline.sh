#!/bin/sh
# Runs the GPU benchmark on a machine without network, with the wheels of `make gpu-bundle` and the machine's own torch.
# Needs Python with pip. Example: tests/benchmarks/gpu/offline.sh --models sd15 --budget-seconds 300
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/../../.." && pwd)
python=${PYTHON:-python3}
site=$root/build/gpu-site
if [ ! -e "$site/.ready" ] || [ -n "$(find "$root/build/gpu-wheels" -newer "$site/.ready")" ]; then
    rm -rf "$site"
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" \
        "$root"/build/gpu-wheels/*.whl
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")
    # The project runs from the working tree, and asks for its own version.
    for name in calotype calotype_bundled_model; do
        mkdir -p "$site/$name-$version.dist-info"
        printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$name" "$version" >"$site/$name-$version.dist-info/METADATA"
    done
    touch "$site/.ready"
fi
cd "$root"
PYTHONPATH=$root/tests:$root/client/python:$root/service:$root/service/bundled_model:$site
export PYTHONPATH
exec "$python" -m benchmarks.gpu "$@"
