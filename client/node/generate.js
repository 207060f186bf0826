// Generates an image with grpc-js and proto-loader, and saves its previews; Ctrl-C cancels. See ../README.md.
//
//     node generate.js [HOST:PORT [PROMPT [STEPS]]]
import { writeFileSync } from "node:fs";
import { credentials, loadPackageDefinition, status } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import { getProtoPath } from "google-proto-files";

const [address = "localhost:50051", prompt = "a red apple", steps] = process.argv.slice(2);
const protos = ["calotype/v1/calotype.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"];
const includeDirs = [new URL("../../protos", import.meta.url).pathname, getProtoPath("..")];
const types = loadSync(protos, { includeDirs, enums: String, longs: Number, defaults: true });

/** Returns the violations of an error, from the google.rpc.BadRequest in its google.rpc.Status (in the trailers). */
function violations({ metadata }) {
  const details = metadata
    .get("grpc-status-details-bin")
    .flatMap((data) => types["google.rpc.Status"].deserialize(data).details);
  const invalid = details.filter((detail) => detail.type_url.endsWith("/google.rpc.BadRequest"));
  return invalid.flatMap(({ value }) => types["google.rpc.BadRequest"].deserialize(value).fieldViolations);
}

const { GenerationService } = loadPackageDefinition(types).calotype.v1;
const client = new GenerationService(address, credentials.createInsecure());
const call = client.generate({ prompt, ...(steps && { stepCount: Number(steps) }) });
process.once("SIGINT", () => call.cancel());

const chunks = [];
try {
  for await (const { phase, step, totalSteps, image, imageKind, imageStep, chunkIndex, chunkCount } of call) {
    console.log(phase, `${step}/${totalSteps}`);
    if (imageKind === "IMAGE_KIND_PREDICTED") writeFileSync(`preview-${imageStep}.jpg`, image);
    if (imageKind !== "IMAGE_KIND_FINAL") continue;
    chunks.push(image); // one chunk, or several for a large file
    if (chunkIndex + 1 === chunkCount) writeFileSync("final.png", Buffer.concat(chunks));
  }
} catch (error) {
  console.error(`${status[error.code]}: ${error.details}`);
  for (const { field, description } of violations(error)) console.error(`  ${field}: ${description}`);
  process.exitCode = error.code === status.CANCELLED ? 130 : 1;
}
client.close();
