# Generates an image and saves its previews; Ctrl-C cancels. See ../README.md.
#
#     ruby -I ../../build/clients/ruby generate.rb [HOST:PORT [PROMPT [STEPS]]]
require "calotype/v1/calotype_services_pb"
require "google/protobuf/well_known_types"
require "google/rpc/error_details_pb"

address, prompt, steps = ARGV
request = Calotype::V1::GenerateRequest.new(prompt: prompt || "a red apple")
request.step_count = Integer(steps) if steps

stub = Calotype::V1::GenerationService::Stub.new(address || "localhost:50051", :this_channel_is_insecure)
call = stub.generate(request, return_op: true)
# A signal handler in Ruby must not take locks, so a thread cancels the call.
trap("INT") { Thread.new { call.cancel } }

file = "".b
begin
  call.execute.each do |progress|
    puts "#{progress.phase} #{progress.step}/#{progress.total_steps}"
    $stdout.flush
    case progress.image_kind
    when :IMAGE_KIND_PREDICTED
      File.binwrite("preview-#{progress.image_step}.jpg", progress.image)
    when :IMAGE_KIND_FINAL
      file << progress.image # one chunk, or several for a large file
      File.binwrite("final.png", file) if progress.chunk_index + 1 == progress.chunk_count
    end
  end
rescue GRPC::BadStatus => error
  warn "#{error.class.name.split("::").last}: #{error.details}"
  (error.to_rpc_status&.details || []).each do |detail|
    next unless detail.is(Google::Rpc::BadRequest)

    detail.unpack(Google::Rpc::BadRequest).field_violations.each do |violation|
      warn "  #{violation.field}: #{violation.description}"
    end
  end
  exit(error.is_a?(GRPC::Cancelled) ? 130 : 1)
end
