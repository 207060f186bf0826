"""A local Ray cluster with Calotype, started like `make ray-up`, with two replicas and short timeouts."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {
    "CALOTYPE_DETERMINISTIC": "1",
    "CALOTYPE_HEARTBEAT_SECONDS": "0.5",
    "CALOTYPE_LOG_LEVEL": "warning",
    "CALOTYPE_MAX_ACTIVE": "4",
    "CALOTYPE_MAX_BATCH_ROWS": "8",
    "CALOTYPE_MAX_QUEUE": "64",
    "CALOTYPE_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


class RayCluster:
    """A context manager that starts and stops the cluster.

    Args:
        folder: Folder for the configuration.
        edit: Changes the configuration and its deployment before the start.
        variables: Additional environment variables for Ray.
    """

    address = "127.0.0.1:50951"

    def __init__(
        self, folder: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None] | None = None, **variables: str
    ) -> None:
        self._path = folder / "ray.yaml"
        self._variables = {**os.environ, "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2", **variables}
        self._config = yaml.safe_load((ROOT / "service" / "ray.yaml").read_text())
        self._config["grpc_options"]["port"] = int(self.address.rpartition(":")[2])
        (self.application,) = self._config["applications"]
        (self.deployment,) = self.application["deployments"]
        del self.deployment["autoscaling_config"]
        self.deployment |= {"num_replicas": 2, "health_check_period_s": 1, "health_check_timeout_s": 2}
        self.deployment["ray_actor_options"]["num_cpus"] = 0.5
        self.environment = self.deployment["ray_actor_options"]["runtime_env"]["env_vars"]
        self.environment |= ENVIRONMENT | {"CALOTYPE_CACHE_DIR": str(folder / "cache")}
        if edit is not None:
            edit(self._config, self.deployment)

    def __enter__(self) -> Self:
        self._write()
        self._run("up", "--config", str(self._path))
        return self

    def __exit__(self, *_: object) -> None:
        self._run("down")

    async def apply(self) -> None:
        """Deploys the changed configuration and waits until it is in effect."""
        self._write()
        serve = str(Path(sys.executable).with_name("serve"))
        process = await asyncio.create_subprocess_exec(
            serve, "deploy", "--address", "http://127.0.0.1:8265", str(self._path), stdout=subprocess.DEVNULL
        )
        assert await process.wait() == 0
        await self.until_running()

    async def until_running(self, unlike: dict[str, int] | None = None, stopping: int = 0) -> dict[str, int]:
        """Waits until all replicas run, and returns their process ids by name.

        Args:
            unlike: Replicas that must no longer run.
            stopping: Number of replicas that are still stopping.
        """
        while True:
            await asyncio.sleep(0.5)
            replicas = await asyncio.to_thread(self._look)
            running = {name: pid for name, (state, pid) in replicas.items() if state == "RUNNING"}
            wanted = self.deployment["num_replicas"]
            if (
                len(running) == wanted
                and len(replicas) == wanted + stopping
                and not running.keys() & (unlike or {}).keys()
            ):
                return running

    def _look(self) -> dict[str, tuple[str, int]]:
        with urllib.request.urlopen("http://127.0.0.1:8265/api/serve/applications/", timeout=10) as answer:
            (application,) = json.load(answer)["applications"].values()
        assert application["status"] != "DEPLOY_FAILED", application["message"]
        # The list is empty while Ray builds the application.
        replicas = [each for deployment in application["deployments"].values() for each in deployment["replicas"]]
        return {each["replica_id"]: (each["state"], each.get("pid", 0)) for each in replicas}

    def _write(self) -> None:
        self._path.write_text(yaml.safe_dump(self._config))

    def _run(self, *arguments: str) -> None:
        subprocess.run([sys.executable, ROOT / "service" / "ray_local.py", *arguments], check=True, env=self._variables)
