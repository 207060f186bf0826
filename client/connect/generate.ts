// Generates an image with connect-node, and saves its previews; Ctrl-C cancels. See ../README.md.
//
//     node dist/generate.js [HOST:PORT [PROMPT [STEPS]]]
import { writeFileSync } from "node:fs";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { GenerationService, ImageKind, Phase } from "./gen/calotype/v1/calotype_pb.js";
import { BadRequestSchema } from "./gen/google/rpc/error_details_pb.js";

const [address = "localhost:50051", prompt = "a red apple", steps] = process.argv.slice(2);
const client = createClient(GenerationService, createGrpcTransport({ baseUrl: `http://${address}` }));
const interrupt = new AbortController();
process.once("SIGINT", () => interrupt.abort());

const chunks: Uint8Array[] = [];
try {
  const request = { prompt, ...(steps !== undefined && { stepCount: Number(steps) }) };
  for await (const progress of client.generate(request, { signal: interrupt.signal })) {
    console.log(`PHASE_${Phase[progress.phase]} ${progress.step}/${progress.totalSteps}`);
    if (progress.imageKind === ImageKind.PREDICTED) writeFileSync(`preview-${progress.imageStep}.jpg`, progress.image);
    if (progress.imageKind !== ImageKind.FINAL) continue;
    chunks.push(progress.image); // one chunk, or several for a large file
    if (progress.chunkIndex + 1 === progress.chunkCount) writeFileSync("final.png", Buffer.concat(chunks));
  }
} catch (reason) {
  const error = ConnectError.from(reason);
  console.error(`${Code[error.code]}: ${error.rawMessage}`);
  for (const { fieldViolations } of error.findDetails(BadRequestSchema)) {
    for (const { field, description } of fieldViolations) console.error(`  ${field}: ${description}`);
  }
  process.exitCode = error.code === Code.Canceled ? 130 : 1;
}
