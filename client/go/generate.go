// Generates an image and saves its previews; Ctrl-C cancels. See ../README.md.
//
//	generate [HOST:PORT [PROMPT [STEPS]]]
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "calotype/v1"
)

func main() {
	address := "localhost:50051"
	request := &pb.GenerateRequest{Prompt: "a red apple"}
	if len(os.Args) > 1 {
		address = os.Args[1]
	}
	if len(os.Args) > 2 {
		request.Prompt = os.Args[2]
	}
	if len(os.Args) > 3 {
		steps, _ := strconv.Atoi(os.Args[3])
		request.StepCount = proto.Int32(int32(steps))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := generate(ctx, address, request)
	if err == nil {
		return
	}
	failure := status.Convert(err)
	fmt.Fprintf(os.Stderr, "%v: %s\n", failure.Code(), failure.Message())
	for _, detail := range failure.Details() {
		if invalid, ok := detail.(*errdetails.BadRequest); ok {
			for _, violation := range invalid.FieldViolations {
				fmt.Fprintf(os.Stderr, "  %s: %s\n", violation.Field, violation.Description)
			}
		}
	}
	if failure.Code() == codes.Canceled {
		os.Exit(130)
	}
	os.Exit(1)
}

// generate reads a generation to its end and saves its images.
func generate(ctx context.Context, address string, request *pb.GenerateRequest) error {
	connection, err := grpc.Dial(address, grpc.WithInsecure())
	if err != nil {
		return err
	}
	defer connection.Close()
	stream, err := pb.NewGenerationServiceClient(connection).Generate(ctx, request)
	if err != nil {
		return err
	}
	var file []byte
	for {
		progress, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Printf("%v %d/%d\n", progress.Phase, progress.Step, progress.TotalSteps)
		switch progress.ImageKind {
		case pb.ImageKind_IMAGE_KIND_PREDICTED:
			err = os.WriteFile(fmt.Sprintf("preview-%d.jpg", progress.ImageStep), progress.Image, 0o644)
		case pb.ImageKind_IMAGE_KIND_FINAL:
			file = append(file, progress.Image...) // one chunk, or several for a large file
			if progress.ChunkIndex+1 == progress.ChunkCount {
				err = os.WriteFile("final.png", file, 0o644)
			}
		}
		if err != nil {
			return err
		}
	}
}
