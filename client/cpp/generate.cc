// Generates an image and saves its previews; Ctrl-C cancels. See ../README.md.
//
//     generate [HOST:PORT [PROMPT [STEPS]]]
#include <csignal>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>

#include <grpcpp/grpcpp.h>

#include "calotype/v1/calotype.grpc.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

using namespace calotype::v1;

int main(int argc, char** argv) {
  GenerateRequest request;
  request.set_prompt(argc > 2 ? argv[2] : "a red apple");
  if (argc > 3) request.set_step_count(std::stoi(argv[3]));

  // A signal handler must not call gRPC, so a thread waits for the signal. Block it before gRPC starts its threads.
  grpc::ClientContext context;
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  pthread_sigmask(SIG_BLOCK, &interrupt, nullptr);
  std::thread([&] {
    int signal;
    sigwait(&interrupt, &signal);
    context.TryCancel();
  }).detach();

  auto channel = grpc::CreateChannel(argc > 1 ? argv[1] : "localhost:50051", grpc::InsecureChannelCredentials());
  auto stream = GenerationService::NewStub(channel)->Generate(&context, request);
  Progress progress;
  std::string file;
  while (stream->Read(&progress)) {
    std::cout << Phase_Name(progress.phase()) << ' ' << progress.step() << '/' << progress.total_steps() << std::endl;
    if (progress.image_kind() == IMAGE_KIND_PREDICTED)
      std::ofstream("preview-" + std::to_string(progress.image_step()) + ".jpg", std::ios::binary) << progress.image();
    if (progress.image_kind() != IMAGE_KIND_FINAL) continue;
    file += progress.image();  // one chunk, or several for a large file
    if (progress.chunk_index() + 1 == progress.chunk_count()) std::ofstream("final.png", std::ios::binary) << file;
  }

  grpc::Status status = stream->Finish();
  if (status.ok()) return 0;
  std::cerr << status.error_code() << ": " << status.error_message() << '\n';
  google::rpc::Status details;
  details.ParseFromString(status.error_details());
  for (const auto& detail : details.details()) {
    google::rpc::BadRequest invalid;
    if (!detail.UnpackTo(&invalid)) continue;
    for (const auto& violation : invalid.field_violations())
      std::cerr << "  " << violation.field() << ": " << violation.description() << '\n';
  }
  return status.error_code() == grpc::StatusCode::CANCELLED ? 130 : 1;
}
