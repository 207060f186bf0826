# Generated from calotype/_async/client.py by `make sync-client`; do not edit.
"""The client: starts and follows generations on a server, lists and ends them, and describes the model."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Self, overload
from weakref import WeakSet

from .._backends.threads.primitives import StateLock
from .._channel import TLS, call_metadata, channel_credentials
from .._constants import RETRIES, STALL_TIMEOUT_SECONDS
from .._errors import Cancelled
from .._request import (
    build,
    build_group,
    build_request,
    resolve_retries,
    resolve_seconds,
    resolve_stall_timeout,
    resolve_timeout,
)
from .._resume.backoff import RetryPolicy
from .._resume.policy import Resumption, make_resumable
from ..targets import is_balanced, parse_address
from ..v1 import calotype_pb2 as v1
from .calls import Calls
from .generation import Generation
from .group import GenerationGroup
from .listing import summaries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Unpack

    from .._errors import CalotypeError
    from .._options import (
        DisconnectPolicy,
        DisconnectPolicyName,
        GenerateOptions,
        Lora,
        Output,
        Previews,
        Priority,
        PriorityName,
        PromptSyntax,
        PromptSyntaxName,
        Sigmas,
        SigmasName,
        SpacingName,
        Speed,
        SpeedName,
        TimestepSpacing,
    )
    from .._types import GenerationSummary, Model, Phase

__all__ = ["Client"]


class Client:
    """A connection to a Calotype server. One client serves any number of concurrent generations.

    Usage::

        with Client("localhost:50051") as client:
            generation = client.generate("a red apple", seed=1)
            image = generation.result()
        image.save("apple.png")

    The client is thread-safe.

    Reconnecting: the client connects on its first call, and reconnects when the connection is lost. The loop over a
    generation then continues where it was. If the server lost the generation in a restart, the client requests it again
    with the same seed, and the loop continues when the new generation has passed the last progress shown. Waits between
    attempts are random and grow exponentially, to at most 8 s. Reconnecting ends with `DeadlineExceeded` at the
    timeout, or with `Unavailable` after `retries` failed attempts in a row. A server that sends nothing for
    `stall_timeout` seconds counts as lost. The first attempt is different: if the server cannot be reached, or rejects
    the request, the error is raised immediately, unless `wait_for_server` is set.

    Loading: while the server loads its model, every call waits, the first one as well, until the timeout, or for
    10 minutes if there is no timeout (see `loading_timeout`).

    Several servers: a target such as `dns:///calotype:50051` or `ipv4:10.0.0.1:50051,10.0.0.2:50051` can stand for
    several servers of the same model. New generations go round-robin to the servers that are ready. Calls about one
    generation go to the server that has it. When a server is lost, another one takes over.

    Leaving: to make reconnecting possible, the server keeps a generation without a reader for `disconnect_grace`
    seconds, 10 by default. When you leave a loop early, cancel, close the client or reach the timeout, the client
    cancels the generation on the server, which frees its slot immediately. A process that is killed cannot do this; its
    generations end after the grace.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        api_key: str | None = None,
        tls: TLS | bool | None = None,
        timeout: float | None = None,
        wait_for_server: float = 0.0,
        loading_timeout: float | None = None,
        retries: int = RETRIES,
        stall_timeout: float | None = STALL_TIMEOUT_SECONDS,
        on_reconnect: Callable[[CalotypeError, float], None] | None = None,
    ) -> None:
        """Makes a client. Does no I/O.

        Args:
            address: HOST:PORT, HOST (port 50051), or a gRPC target such as unix:/run/calotype.sock or
                dns:///calotype:50051.
            api_key: The key for a server that requires one; an empty string sends none. Default: the environment
                variable CALOTYPE_API_KEY, if set. A key is a secret: send it over untrusted networks only with `tls`.
            tls: Whether and how to encrypt. True trusts the public certificate authorities. Default: unencrypted.
            timeout: Default timeout of `generate` and `watch`, in seconds. None means no limit.
            wait_for_server: Seconds to wait for a server that cannot be reached at first, for example because it was
                just started; `math.inf` means until the timeout. Default: 0, which raises `Unavailable` immediately.
            loading_timeout: Seconds to wait for a server that is loading its model, or shutting down and about to be
                replaced, before `Unavailable` is raised. 0 raises immediately. Default: until the timeout; without a
                timeout, 600.
            retries: Number of failed attempts to reconnect in a row before `Unavailable` is raised. 0 disables
                reconnecting and all waits.
            stall_timeout: Seconds without a message after which the server counts as lost. Servers send a message at
                least every 10 s. None means no limit.
            on_reconnect: Called when a connection is lost or the server is loading, with the error and the seconds
                until the next attempt. The error's `reason` is NOT_READY while the server is loading. It runs inside
                the call that waits: the loop over the generation, its `result`, or for example `model`.

        Raises:
            ValueError: The address or the key is malformed, or a number is out of range.
            InvalidRequest: The timeout is not a positive number.
        """
        self.address = address
        target = parse_address(address)
        self._timeout = resolve_timeout(timeout, None)
        policy = RetryPolicy(
            resolve_retries(retries),
            wait_for_server=resolve_seconds("wait_for_server", wait_for_server),
            loading_timeout=None if loading_timeout is None else resolve_seconds("loading_timeout", loading_timeout),
            is_balanced=is_balanced(target),
        )
        self._calls = Calls(
            target,
            credentials=channel_credentials(tls),
            metadata=call_metadata(api_key),
            policy=policy,
            stall_timeout=resolve_stall_timeout(stall_timeout),
            on_reconnect=on_reconnect,
        )
        self._on_reconnect = on_reconnect
        self._running: WeakSet[Generation] = WeakSet()
        self._state_lock = StateLock()

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        scheduler: str | None = None,
        sigmas: Sigmas | SigmasName | None = None,
        spacing: TimestepSpacing | SpacingName | None = None,
        speed: Speed | SpeedName | None = None,
        loras: Sequence[Lora] | Mapping[str, float] | None = None,
        prompt_syntax: PromptSyntax | PromptSyntaxName | None = None,
        priority: Priority | PriorityName | None = None,
        on_disconnect: DisconnectPolicy | DisconnectPolicyName | None = None,
        disconnect_grace: float | None = None,
        request_id: str | None = None,
        group: str | None = None,
        previews: Previews | None = None,
        output: Output | None = None,
        timeout: float | None = None,
    ) -> Generation:
        """Starts a generation. Omitted arguments use the server's defaults (see `Client.model`).

        Returns immediately. If the server rejects the request, the loop over the generation or its `result` raises.

        Args:
            prompt: Describes the image. 1 to `Model.max_prompt_chars` characters.
            negative_prompt: Describes what the image should not show. 0 to `Model.max_prompt_chars` characters.
            width: Width in pixels, a multiple of `Model.size_multiple`. Width times height is at most
                `Model.max_pixels`.
            height: Height in pixels, a multiple of `Model.size_multiple`.
            steps: Number of denoising steps, 1 to `Model.max_steps`.
            guidance_scale: Strength of classifier-free guidance, 0 to 100. 1 or less disables it in most models.
            seed: Seed of the initial noise, 0 to 2^53 - 1. The same request with the same seed gives the same image.
                Default, also for -1: drawn at random by the server.
            scheduler: One of `Model.schedulers`, or one of their aliases in `Model.scheduler_details`, such as
                "DPM++ 2M Karras".
            sigmas: Noise levels of the steps, one of `Scheduler.sigmas`. Default: those of the scheduler.
            spacing: Timesteps of the steps, one of `Scheduler.spacings`. Default: that of the scheduler.
            speed: "exact", or "fast" to compute only about half of the steps: the image is close to the exact one.
                "fast" needs at least 16 steps and one of `Model.fast_schedulers`. Default: "exact".
            loras: LoRAs to apply, at most 8, each one of `Model.loras`: a list of `Lora`, or a dict with the scale of
                each name.
            prompt_syntax: "plain", or "weighted" to read weights such as `(red:1.4)`; one of `Model.prompt_syntaxes`.
                Default: "plain".
            priority: Rank in the queue, "interactive" or "batch". Default: "interactive".
            on_disconnect: Effect of leaving the generation early. "cancel" ends it. "keep" lets it run to its end, and
                `watch` can follow it for a while after that. Default: "cancel".
            disconnect_grace: Seconds for which the server keeps a generation that lost its reader, 0 to 3600. Applies
                to "cancel" only. Default: 10, or 0 when the client's `retries` is 0.
            request_id: Makes the call idempotent: a second call with the same id and the same arguments follows the
                first generation, also for a while after its end. Up to 128 printable ASCII characters. Default: drawn
                at random.
            group: Makes the generation a member of this group, which `cancel` can end as a whole. Up to 128 printable
                ASCII characters. Default: no group.
            previews: Size, quality and rate of previews. Default: `Model.previews`.
            output: Format of the final image. Default: a PNG with metadata.
            timeout: Seconds until the final image, including time in the queue; `math.inf` means no limit. Default: the
                client's `timeout`.

        Raises:
            InvalidRequest: An argument has the wrong type, or no request can carry its value. Lists every violation.
            ClientClosed: The client is closed.
        """
        request = build_request(
            prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            scheduler=scheduler,
            sigmas=sigmas,
            spacing=spacing,
            speed=speed,
            loras=loras,
            prompt_syntax=prompt_syntax,
            priority=priority,
            on_disconnect=on_disconnect,
            disconnect_grace=disconnect_grace,
            request_id=request_id,
            group=group,
            previews=previews,
            output=output,
        )
        return self._follow(request, timeout)

    def generate_many(
        self,
        prompt: str,
        n: int,
        *,
        seed: int | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerationGroup:
        """Starts several generations of the same prompt, as a group that can be cancelled as a whole.

        Returns immediately. The server denoises the images together if it can.

        Args:
            prompt: Describes the images.
            n: Number of images, 1 to 64. The server rejects those that its queue cannot hold.
            seed: Seed of the first image; each further one adds 1. Default, also for -1: each is drawn at random.
            request_id: Makes the call idempotent, as for `generate`; also the id of the group. At most 125 characters.
            timeout: As for `generate`, for all images together.
            options: As for `generate`, which also describes the errors.
        """
        group = request_id or uuid.uuid4().hex
        requests = build_group(prompt, n, group, seed=seed, request_id=request_id, **options)
        return GenerationGroup(self._calls, group, [self._follow(each, timeout) for each in requests])

    def watch(
        self,
        generation_id: str,
        *,
        after_sequence: int = 0,
        previews: Previews | None = None,
        timeout: float | None = None,
    ) -> Generation:
        """Follows a generation that any client started: its newest preview, then everything until its end.

        Returns immediately, like `generate`. Leaving the loop does not affect the generation.

        Args:
            generation_id: From `Progress.generation_id` or `generations`.
            after_sequence: Skips progress up to this `Progress.sequence`. Default: 0, which skips nothing.
            previews: Previews for this reader, at most as many as the generation produces. A `method` other than "none"
                has no effect. Default: the previews that the generation was started with.
            timeout: Seconds until the final image; `math.inf` means no limit. Default: the client's `timeout`.

        Raises:
            InvalidRequest: An argument has the wrong type, or no request can carry its value. Lists every violation.
            ClientClosed: The client is closed.
        """
        values = {"generation_id": generation_id, "after_sequence": after_sequence, "previews": previews}
        return self._follow(build(v1.WatchRequest(), "generation_id", values), timeout)

    def generations(self, *, page_size: int | None = None) -> Iterator[GenerationSummary]:
        """Lists your own generations that are running or ended recently, newest first. An operator's key lists all.

        With several servers, lists those of every server that responds. Waits up to 10 s for each page.

        Args:
            page_size: Generations per page, 1 to 100. Default: 50.

        Raises:
            InvalidRequest: The page size is not an integer, or the server rejects it. The loop raises the latter.
            CalotypeError: A call failed. Raised by the loop.
            ClientClosed: The client is closed.
        """
        self._calls.require_open()
        return summaries(self._calls, build(v1.ListGenerationsRequest(), None, {"page_size": page_size}))

    def finish(self, generation_id: str) -> Phase:
        """Ends a generation early; its current estimate becomes the final image. Any client may have started it.

        After the current step, the model's estimate of the finished image becomes the final image. Every reader of the
        generation receives it. Waits up to 10 s for the answer.

        Returns:
            The phase of the generation when the request arrived. If the phase is an end, there was nothing to finish.

        Raises:
            NotFound: The server does not know the generation, or no longer knows it.
            CalotypeError: The call failed.
            ClientClosed: The client is closed.
        """
        return self._calls.finish(generation_id)

    @overload
    def cancel(self, generation_id: str) -> Phase: ...

    @overload
    def cancel(self, *, group: str) -> int: ...

    def cancel(self, generation_id: str | None = None, *, group: str | None = None) -> Phase | int:
        """Cancels a generation, which may belong to any client, or a group. Waits up to 10 s for the answer.

        Args:
            generation_id: From `Progress.generation_id` or `generations`.
            group: From the request: cancels all your own generations of this group, with several servers on each that
                responds. An operator's key cancels those of all callers. For about a minute, the servers reject new
                members with `Cancelled`.

        Returns:
            The phase of the generation when the request arrived; if it is an end, there was nothing to cancel. For a
            group, the number of generations that this call cancels.

        Raises:
            NotFound: The server does not know the generation or group, or no longer knows it.
            CalotypeError: The call failed.
            ClientClosed: The client is closed.
        """
        if (generation_id is None) == (group is None):
            raise TypeError("cancel() takes either generation_id or group")
        return self._calls.cancel_group(group) if group is not None else self._calls.cancel(generation_id or "")

    def model(self) -> Model:
        """Describes the loaded model: sizes, limits, defaults and schedulers. Waits up to 10 s for the answer.

        Raises:
            Unavailable: No server responds, or the model is still loading after `loading_timeout`.
            CalotypeError: The call failed in another way.
            ClientClosed: The client is closed.
        """
        return self._calls.model()

    def close(self) -> None:
        """Cancels the running generations of this client and closes the connection. Can be called again.

        Waits up to 1 s for the cancels to arrive. Generations started with `on_disconnect="keep"` continue.
        """
        with self._state_lock:
            running = list(self._running)
        for generation in running:
            generation._leave(Cancelled("The client was closed."))
        self._calls.close()

    def _follow(self, request: v1.GenerateRequest | v1.WatchRequest, timeout: float | None) -> Generation:
        if isinstance(request, v1.GenerateRequest) and self._calls.policy.retries:
            make_resumable(request)
        resumption = Resumption(request, self._calls.policy, resolve_timeout(timeout, self._timeout))
        generation = Generation(self._calls, resumption, self._on_reconnect)
        with self._state_lock:
            self._running.add(generation)
        return generation

    def __enter__(self) -> Self:
        self._calls.require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}{' closed' if self._calls.closed else ''}>"
