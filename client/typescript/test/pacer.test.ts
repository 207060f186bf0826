import { describe, expect, it } from "vitest";
import { Pacer } from "../src/index.js";

interface Shown {
  readonly value: number;
  readonly arrived: number;
  readonly at: number;
}

/** Passes arrivals through a pacer with a timer that is exact to the millisecond. */
function play(arrivals: readonly number[], pacer = new Pacer<number>()): Shown[] {
  const shown: Shown[] = [];
  const end = (arrivals.at(-1) ?? 0) + 5_000;
  let next = 0;
  for (let now = 0; now <= end; now += 1) {
    while (next < arrivals.length && (arrivals[next] as number) <= now) {
      pacer.push(next, now);
      next += 1;
    }
    const value = pacer.take(now);
    if (value !== undefined) shown.push({ value, arrived: arrivals[value] as number, at: now });
  }
  return shown;
}

/** Returns a generator of reproducible random numbers from 0 to 1. */
function noise(seed: number) {
  let state = seed;
  return () => {
    state = (state * 1_103_515_245 + 12_345) % 2 ** 31;
    return state / 2 ** 31;
  };
}

function relativeDeviation(times: readonly number[]): number {
  const gaps = times.slice(1).map((time, at) => time - (times[at] as number));
  const mean = gaps.reduce((sum, gap) => sum + gap, 0) / gaps.length;
  return Math.sqrt(gaps.reduce((sum, gap) => sum + (gap - mean) ** 2, 0) / gaps.length) / mean;
}

describe("the pacer", () => {
  it("shows the first item and evenly spaced items at once", () => {
    expect(play([0, 100, 200, 300]).map(({ at }) => at)).toEqual([0, 100, 200, 300]);
  });

  it("spreads a burst over the usual interval", () => {
    const shown = play([0, 100, 200, 300, 301, 302, 600]);
    const times = shown.map(({ at }) => at);
    expect(shown.map(({ value }) => value)).toEqual([0, 1, 2, 3, 4, 5, 6]);
    const gaps = times.slice(4, 6).map((time, at) => time - (times[at + 3] as number));
    for (const gap of gaps) expect(gap).toBeGreaterThan(25);
  });

  it.each([1, 2, 3, 4, 5])("evens out jitter, in order and within the maximum delay (seed %i)", (seed) => {
    const random = noise(seed);
    let late = 0;
    const arrivals = Array.from({ length: 60 }, (_, at) => {
      late = Math.max(late, Math.round(at * 100 + random() * 180));
      return late;
    });
    const shown = play(arrivals);
    expect(shown.map(({ value }) => value)).toEqual([...shown.map(({ value }) => value)].sort((a, b) => a - b));
    for (const { at, arrived } of shown) expect(at - arrived).toBeLessThanOrEqual(300);
    expect(relativeDeviation(shown.map(({ at }) => at))).toBeLessThan(relativeDeviation(arrivals) * 0.75);
    expect(shown.at(-1)?.value).toBe(59);
  });

  it("keeps up when arrivals become faster", () => {
    const arrivals = [...Array(5).keys()]
      .map((at) => at * 500)
      .concat([...Array(100).keys()].map((at) => 2_000 + at * 10));
    const shown = play(arrivals);
    for (const { at, arrived } of shown) expect(at - arrived).toBeLessThanOrEqual(300);
  });

  it("returns the newest due item to a late caller", () => {
    const pacer = new Pacer<number>();
    for (const at of [0, 10, 20]) pacer.push(at, at);
    expect(pacer.take(10_000)).toBe(20);
    expect(pacer.due()).toBeUndefined();
  });

  it("drops all items on clear", () => {
    const pacer = new Pacer<number>();
    pacer.push(1, 0);
    pacer.clear();
    expect(pacer.take(1_000)).toBeUndefined();
  });
});
