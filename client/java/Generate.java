// Generates an image and saves its previews; Ctrl-C cancels. See ../README.md.
//
//     generate [HOST:PORT [PROMPT [STEPS]]]

import static java.util.concurrent.TimeUnit.SECONDS;

import calotype.v1.GenerateRequest;
import calotype.v1.GenerationServiceGrpc;
import calotype.v1.ImageKind;
import com.google.protobuf.Any;
import com.google.rpc.BadRequest;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.io.ByteArrayOutputStream;
import java.nio.file.Files;
import java.nio.file.Path;

public class Generate {
  public static void main(String[] args) throws Exception {
    var request = GenerateRequest.newBuilder().setPrompt(args.length > 1 ? args[1] : "a red apple");
    if (args.length > 2) request.setStepCount(Integer.parseInt(args[2]));

    var address = args.length > 0 ? args[0] : "localhost:50051";
    var channel = Grpc.newChannelBuilder(address, InsecureChannelCredentials.create()).build();
    // Also runs on Ctrl-C. Closing the channel cancels its calls.
    Runtime.getRuntime().addShutdownHook(new Thread(() -> close(channel)));

    var file = new ByteArrayOutputStream();
    try {
      var stream = GenerationServiceGrpc.newBlockingStub(channel).generate(request.build());
      while (stream.hasNext()) {
        var progress = stream.next();
        System.out.printf("%s %d/%d%n", progress.getPhase(), progress.getStep(), progress.getTotalSteps());
        if (progress.getImageKind() == ImageKind.IMAGE_KIND_PREDICTED) {
          Files.write(Path.of("preview-" + progress.getImageStep() + ".jpg"), progress.getImage().toByteArray());
        } else if (progress.getImageKind() == ImageKind.IMAGE_KIND_FINAL) {
          progress.getImage().writeTo(file); // one chunk, or several for a large file
          if (progress.getChunkIndex() + 1 == progress.getChunkCount()) {
            Files.write(Path.of("final.png"), file.toByteArray());
          }
        }
      }
    } catch (StatusRuntimeException error) {
      System.err.printf("%s: %s%n", error.getStatus().getCode(), error.getStatus().getDescription());
      for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
        if (!detail.is(BadRequest.class)) continue;
        for (var violation : detail.unpack(BadRequest.class).getFieldViolationsList()) {
          System.err.printf("  %s: %s%n", violation.getField(), violation.getDescription());
        }
      }
      System.exit(1);
    }
  }

  private static void close(ManagedChannel channel) {
    try {
      channel.shutdownNow().awaitTermination(5, SECONDS);
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
    }
  }
}
