/** When a client calls again: a table that both clients share. `tests/unit/client/resume/test_waits.py` reads it, too. */

import { readFileSync } from "node:fs";
import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { describe, expect, it } from "vitest";
import { RETRIES } from "../src/constants.js";
import { ErrorSchema, Phase, type Progress as WireProgress } from "../src/gen/calotype/v1/calotype_pb.js";
import { ErrorInfoSchema, RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import { type CallOptions, type CalotypeError, type ClientOptions, isLoading, type Reconnect } from "../src/index.js";
import type { StreamCalls } from "../src/resume/follow.js";
import type { WaitLimits } from "../src/resume/waits.js";
import { errorOf, serve } from "./helpers.js";
import { disconnected, final, type Handlers, preview, progress } from "./stub_server.js";
import { FakeClock, lost, outcome } from "./unreliable_service.js";

interface Step {
  readonly answer: string;
  readonly retryAfter?: number;
  /** Seconds; one answer for each. */
  readonly waits?: readonly number[];
  /** The answer after `waits` ends the generation with this code and reason. */
  readonly raises?: string;
}

interface History {
  readonly name: string;
  readonly limits: Partial<WaitLimits>;
  readonly calls: readonly Step[];
}

const TABLE = new URL("../../../tests/unit/client/resume/retry_cases.json", import.meta.url);
const HISTORIES = JSON.parse(readFileSync(TABLE, "utf8")) as History[];

const STATUSES: Readonly<Record<string, readonly [Code, string]>> = {
  loading: [Code.Unavailable, "NOT_READY"],
  draining: [Code.Unavailable, "DRAINING"],
  "no upstream": [Code.Unavailable, "UPSTREAM_UNAVAILABLE"],
  "no state": [Code.Unavailable, "STATE_UNAVAILABLE"],
  "queue full": [Code.ResourceExhausted, "QUEUE_FULL"],
  damaged: [Code.DataLoss, "DATA_LOSS"],
};

const ENDS: Readonly<Record<string, readonly [Phase, Code, string]>> = {
  "draining end": [Phase.FAILED, Code.Unavailable, "DRAINING"],
  "abandoned end": [Phase.CANCELLED, Code.Canceled, "ABANDONED"],
  "crashed end": [Phase.FAILED, Code.Internal, "ENGINE_CRASHED"],
  "damaged end": [Phase.FAILED, Code.DataLoss, "DATA_LOSS"],
};

function duration(seconds: number) {
  return { seconds: BigInt(Math.floor(seconds)), nanos: Math.round((seconds % 1) * 1e9) };
}

function status(answer: string, retryAfter?: number): ConnectError {
  const [code, reason] = STATUSES[answer] ?? [Code.Unknown, ""];
  return new ConnectError("", code, undefined, [
    { desc: ErrorInfoSchema, value: { reason } },
    ...(retryAfter === undefined ? [] : [{ desc: RetryInfoSchema, value: { retryDelay: duration(retryAfter) } }]),
  ]);
}

async function* answers({ answer, retryAfter }: Step, call: number): AsyncGenerator<WireProgress, void, undefined> {
  const end = ENDS[answer];
  if (answer === "image") yield final();
  else if (answer === "step") {
    yield preview(call);
    throw lost();
  } else if (end) {
    const [phase, code, reason] = end;
    const retryDelay = retryAfter === undefined ? {} : { retryDelay: duration(retryAfter) };
    yield progress({ sequence: 99n, phase, error: create(ErrorSchema, { code, reason, ...retryDelay }) });
  } else throw answer === "unreached" ? lost() : status(answer, retryAfter);
}

describe("a history of calls", () => {
  it.each(HISTORIES)("$name", async ({ limits, calls }) => {
    const script = calls.flatMap((step) => [
      ...(step.waits ?? []).map(() => step),
      ...(step.raises || step.answer === "image" ? [step] : []),
    ]);
    let count = 0;
    const next = () => {
      count += 1;
      const step = script[count - 1];
      if (!step) throw new Error("The client makes more calls than the table has.");
      return () => answers(step, count);
    };
    const streams: StreamCalls = { generate: next, watch: next };
    const { error, seen, clock } = await outcome(streams, { retries: RETRIES, ...limits });
    const waits = calls.flatMap((step) => step.waits ?? []);
    expect(clock.slept.map((wait) => wait / 1000)).toEqual(waits.map((wait) => expect.closeTo(wait, 6)));
    const raises = calls.at(-1)?.raises;
    if (raises === undefined) expect(seen.at(-1)?.phase).toBe("succeeded");
    else expect([error?.code, error?.reason].join(" ")).toContain(raises);
    // A deadline that has passed makes no call.
    expect(count).toBe(calls.at(-1)?.answer === "deadline" ? script.length - 1 : script.length);
  });
});

/** A service that answers a number of calls as while it loads its model. */
function loadingFor(count: number, handlers: Handlers, options: ClientOptions = {}) {
  let left = count;
  const loading = <T>(answer: T): T => {
    left -= 1;
    if (left >= 0) throw status("loading", 2);
    return answer;
  };
  const { generate } = handlers;
  return serve(
    {
      ...handlers,
      ...(generate && {
        async *generate(request, context) {
          loading(undefined);
          yield* generate(request, context);
        },
      }),
      getModel: () => loading({ name: "m" }),
      cancel: () => loading({ phase: Phase.QUEUED }),
      finish: () => loading({ phase: Phase.QUEUED }),
      listGenerations: () => loading({ generations: [] }),
    },
    options,
  );
}

describe("a service that is loading its model", () => {
  const generate: Handlers["generate"] = async function* () {
    yield final();
  };
  const client = async (count: number, clock = new FakeClock()) =>
    (await loadingFor(count, { generate }, { clock })).client;

  it.each(["getModel", "cancel", "finish", "generations", "generate"] as const)(
    "delays a first call of %s",
    async (name) => {
      const waits: Reconnect[] = [];
      const options: CallOptions = { onReconnect: (wait) => waits.push(wait) };
      const service = await client(12);
      if (name === "getModel") expect((await service.getModel(options)).name).toBe("m");
      else if (name === "cancel") expect(await service.cancel("g", options)).toBe("queued");
      else if (name === "finish") expect(await service.finish("g", options)).toBe("queued");
      else if (name === "generate") expect((await service.generate("x", options).result()).kind).toBe("final");
      else expect((await service.generations(options).next()).done).toBe(true);
      expect(waits.map(({ attempt }) => attempt)).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
      expect(waits.every(({ error, delay }) => isLoading(error) && delay >= 2)).toBe(true);
    },
  );

  it("fails at once with a loading timeout of 0, and at the latest after its limits", async () => {
    const forever = Number.POSITIVE_INFINITY;
    const failure = async (options: CallOptions): Promise<CalotypeError> =>
      errorOf((await client(forever)).getModel(options));
    expect(await failure({ loadingTimeout: 0 })).toMatchObject({ code: "UNAVAILABLE", reason: "NOT_READY" });
    expect(await failure({})).toMatchObject({ code: "UNAVAILABLE", reason: "NOT_READY" });
    expect(await failure({ timeout: 100 })).toMatchObject({ code: "DEADLINE_EXCEEDED" });
  });

  it("is not called again without a timeout once the caller's timeout has passed", async () => {
    // The service never answers the second call.
    let calls = 0;
    const getModel: Handlers["getModel"] = (_request, context) => {
      calls += 1;
      if (calls === 1) throw status("loading", 2);
      return disconnected(context).then(() => ({}));
    };
    const { client: service } = await serve({ getModel }, { clock: new FakeClock() });
    const error = await errorOf(service.getModel({ timeout: 0.1 }));
    expect(error).toMatchObject({ code: "DEADLINE_EXCEEDED" });
    expect(error.message).toBe("The timeout passed while waiting for the service.");
    expect(calls).toBe(1);
  });

  it("is left at once by an aborted signal", async () => {
    const leave = new AbortController();
    const options = { signal: leave.signal, onReconnect: () => leave.abort("gone") };
    expect(await errorOf((await client(1)).getModel(options))).toMatchObject({
      reason: "CANCELLED_HERE",
      cause: "gone",
    });
  });

  it("is not waited for by a cancel whose caller has left", async () => {
    let cancels = 0;
    const { client: service } = await serve(
      {
        async *generate(_request, context) {
          yield preview(1);
          await disconnected(context);
        },
        cancel: () => {
          cancels += 1;
          throw status("loading", 0);
        },
      },
      { clock: new FakeClock() },
    );
    for await (const _ of service.generate("x")) break;
    await expect.poll(() => cancels).toBe(1);
    await service.getModel().catch(() => undefined);
    expect(cancels).toBe(1);
  });
});

describe("a service that was just started", () => {
  it("is waited for if the caller wants that", async () => {
    const clock = new FakeClock();
    const { client, stub } = await serve({ getModel: () => ({ name: "m" }) }, { clock });
    await stub.stop();
    expect(await errorOf(client.getModel())).toMatchObject({ reason: "UNREACHABLE" });
    expect(clock.slept).toEqual([]);
    expect(await errorOf(client.getModel({ waitForServer: 3 }))).toMatchObject({ reason: "UNREACHABLE" });
    expect(clock.slept).toEqual([250, 500, 1000, 1250]);
  });
});
