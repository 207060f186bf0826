"""The example clients in other languages: their requirements, and how to build and run them."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["EXAMPLES", "Example"]

CLIENT = Path(__file__).parents[2] / "client"
BUILD = CLIENT.parent / "build" / "clients"

REQUIRED = os.environ.get("CALOTYPE_TOOLCHAINS") == "required"
"""Whether a missing toolchain is a failure, as in `make test-clients`."""


@dataclass(frozen=True)
class Example:
    """One folder of `client/`.

    Attributes:
        name: Name of the folder.
        tools: Required commands.
        files: Required files.
        program: The command that runs the client, without its arguments.
    """

    name: str
    tools: tuple[str, ...]
    program: tuple[str, ...]
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def build(self) -> None:
        """Generates code from the proto and compiles it if necessary. Skips the test without a toolchain."""
        missing = [tool for tool in self.tools if shutil.which(tool) is None]
        missing += [file for file in self.files if not Path(file).exists()]
        if missing:
            message = f"{self.name} needs {', '.join(missing)}; on Debian, `make test-clients` installs all but Node 20"
            pytest.fail(message) if REQUIRED else pytest.skip(message)
        made = subprocess.run(["make", "-C", str(CLIENT / self.name)], capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stdout + made.stderr

    def start(self, folder: Path, *arguments: str) -> subprocess.Popen[str]:
        """Starts the client in `folder`, where it saves its images."""
        command = [part.format(client=CLIENT / self.name, build=BUILD / self.name) for part in self.program]
        return subprocess.Popen(
            [*command, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


_GOCODE = "/usr/share/gocode/src"
EXAMPLES = {
    example.name: example
    for example in (
        Example("node", ("node", "npm"), ("node", "{client}/generate.js")),
        Example("connect", ("node", "npm"), ("node", "{client}/dist/generate.js")),
        Example(
            "go",
            ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc"),
            ("{build}/generate",),
            (f"{_GOCODE}/google.golang.org/grpc", f"{_GOCODE}/github.com/golang/protobuf/proto/registry.go"),
        ),
        Example(
            "cpp", ("g++", "pkg-config", "protoc", "grpc_cpp_plugin"), ("{build}/generate",), ("/usr/include/grpcpp",)
        ),
        Example("ruby", ("ruby", "grpc_tools_ruby_protoc"), ("ruby", "-I", "{build}", "{client}/generate.rb")),
        Example(
            "java",
            ("java", "javac", "protoc", "grpc_java_plugin"),
            ("{build}/generate",),
            tuple(
                f"/usr/share/java/{jar}.jar"
                for jar in ("grpc-netty", "netty-codec-http2", "perfmark-api", "geronimo-annotation-1.3-spec")
            ),
        ),
    )
}
