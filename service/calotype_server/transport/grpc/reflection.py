"""Server reflection in both versions of its protocol.

grpcio-reflection contains only v1alpha. The messages of v1 are the same in another package, so the same servicer
answers both. Newer tools ask for v1 first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["REFLECTION_SERVICES", "add_reflection"]

_ALPHA, _STABLE = "grpc.reflection.v1alpha", "grpc.reflection.v1"
_SERVICE = "ServerReflection"

REFLECTION_SERVICES = (f"{_STABLE}.{_SERVICE}", reflection.SERVICE_NAME)
"""Names of the reflection service, newest version first."""


def add_reflection(names: Iterable[str], server: grpc.aio.Server) -> None:
    """Adds both versions of the reflection service to a server.

    Args:
        names: The services to list, in addition to those of reflection.
        server: The server.
    """
    _describe_stable()
    listed = [*names, *REFLECTION_SERVICES]
    servicer: Any = reflection.aio.ReflectionServicer(service_names=listed)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in REFLECTION_SERVICES:
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler}),)
        )


def _describe_stable() -> None:
    """Adds the proto file of v1 to the descriptors that reflection returns, unless another package has added it."""
    pool: Any = descriptor_pool.Default()
    file = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name = file.name.replace("v1alpha", "v1")
    try:
        pool.FindFileByName(file.name)
        return
    except KeyError:
        file.package = _STABLE
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = _stable(field.type_name)
    for method in file.service[0].method:
        method.input_type, method.output_type = _stable(method.input_type), _stable(method.output_type)
    pool.AddSerializedFile(file.SerializeToString())


def _stable(type_name: str) -> str:
    return type_name.replace(f".{_ALPHA}.", f".{_STABLE}.")
