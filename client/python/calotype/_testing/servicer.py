"""The gRPC methods of a fake server, for `calotype.testing`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from .._errors import CalotypeError, Unauthenticated, Unavailable
from .._request import fill
from ..v1 import calotype_pb2 as v1
from ..v1.calotype_pb2_grpc import GenerationServiceServicer
from .state import ConnectionCut
from .wire import abort, model_fields

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .generation import FakeGeneration
    from .state import FakeState

__all__ = ["KeyCheckInterceptor", "LoadingInterceptor", "Servicer"]

_PAGE_SIZE = 50
_SERVICE = v1.DESCRIPTOR.services_by_name["GenerationService"].full_name


class KeyCheckInterceptor(grpc.ServerInterceptor):
    """Rejects calls without the API key, with the real server's reasons."""

    def __init__(self, api_key: str) -> None:
        self._expected = f"Bearer {api_key}"

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        given = dict(handler_call_details.invocation_metadata).get("authorization")
        if given == self._expected:
            return continuation(handler_call_details)
        error = Unauthenticated("The API key is not valid.", reason="KEY_INVALID")
        if given is None:
            error = Unauthenticated("This server requires an API key.", reason="KEY_REQUIRED")
        return grpc.unary_stream_rpc_method_handler(lambda _, context: abort(context, error))


class LoadingInterceptor(grpc.ServerInterceptor):
    """Answers calls like a server that loads its model.

    Args:
        count: Number of calls to answer like this. Later calls are answered by the servicer.
    """

    def __init__(self, count: int) -> None:
        self._answers = iter(range(count))

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        # gRPC's own health checks are no calls of the client.
        if _SERVICE not in handler_call_details.method or next(self._answers, None) is None:
            return continuation(handler_call_details)
        error = Unavailable("The model is still loading.", reason="NOT_READY", retry_after=0.0)
        return grpc.unary_stream_rpc_method_handler(lambda _, context: abort(context, error))


class Servicer(GenerationServiceServicer):
    """Serves the generations of a `FakeState`."""

    def __init__(self, state: FakeState) -> None:
        self._state = state

    def GetModel(self, request: v1.GetModelRequest, context: Any) -> v1.Model:  # noqa: N802
        fields = model_fields(self._state.script.model)
        previews = fields.pop("previews")
        answer = v1.Model(**fields)
        fill(answer, {"previews": previews})
        return answer

    def Cancel(self, request: v1.CancelRequest, context: Any) -> v1.CancelResponse:  # noqa: N802
        try:
            if request.group:
                return v1.CancelResponse(cancelled_count=self._state.cancel_group(request.group))
            phase, cancelled = self._state.cancel(request.generation_id)
            return v1.CancelResponse(phase=phase, cancelled_count=int(cancelled))
        except CalotypeError as error:
            abort(context, error)

    def Finish(self, request: v1.FinishRequest, context: Any) -> v1.FinishResponse:  # noqa: N802
        try:
            return v1.FinishResponse(phase=self._state.finish(request.generation_id))
        except CalotypeError as error:
            abort(context, error)

    def ListGenerations(  # noqa: N802
        self, request: v1.ListGenerationsRequest, context: Any
    ) -> v1.ListGenerationsResponse:
        newest = self._state.summaries()
        start = int(request.page_token or 0)
        end = start + (request.page_size or _PAGE_SIZE)
        token = str(end) if end < len(newest) else ""
        return v1.ListGenerationsResponse(generations=newest[start:end], next_page_token=token)

    def Generate(self, request: v1.GenerateRequest, context: Any) -> Iterator[v1.Progress]:  # noqa: N802
        try:
            generation, start = self._state.generate(request)
        except CalotypeError as error:
            abort(context, error)
        yield from self._follow(generation, start, v1.PreviewOptions(), context)

    def Watch(self, request: v1.WatchRequest, context: Any) -> Iterator[v1.Progress]:  # noqa: N802
        try:
            generation, start = self._state.watch(request)
        except CalotypeError as error:
            abort(context, error)
        yield from self._follow(generation, start, request.preview, context)

    def _follow(
        self, generation: FakeGeneration, index: int, preview: v1.PreviewOptions, context: Any
    ) -> Iterator[v1.Progress]:
        state = self._state
        cuts = state.add_reader(generation)
        if not context.add_callback(lambda: state.remove_reader(generation)):
            state.remove_reader(generation)
            return
        try:
            while (message := state.next_event(generation, index, cuts, context.is_active)) is not None:
                if preview.method == v1.PREVIEW_METHOD_NONE and message.image_kind == v1.IMAGE_KIND_PREDICTED:
                    message.ClearField("image")
                yield message
                state.sent(message)
                index += 1
        except ConnectionCut:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Connection lost.")
        if generation.error is not None:
            abort(context, generation.error)
