// Calls of every kind by grpc-go, without generated code: messages are bytes.
//
//	serve PORT [CERTIFICATE KEY]   answers until it is killed; prints ready
//	call  PORT [CERTIFICATE]       makes the calls, prints one line of JSON for each with what it sent and got
//	load  PORT SECONDS             unary calls at full speed, 8 at a time on each of 4 connections; prints how many were
//	                               answered, how many failed, and the median and 99th percentile of their time
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// raw hands bytes through. It is called proto, as the usual one is, so that the media type is the usual one.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (raw) Unmarshal(data []byte, v any) error { *v.(*[]byte) = append([]byte(nil), data...); return nil }
func (raw) Name() string                       { return "proto" }

func serve(_ any, stream grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(stream)
	var last []byte
	count := 0
	for {
		var message []byte
		err := stream.RecvMsg(&message)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		last = message
		count++
		if strings.HasSuffix(method, "/Chat") {
			if err := stream.SendMsg(&message); err != nil {
				return err
			}
		}
	}
	switch method[strings.LastIndex(method, "/")+1:] {
	case "Unary":
		return stream.SendMsg(&last)
	case "Fail":
		return status.Error(codes.Code(len(last)), "as asked for")
	case "Many", "Late":
		for i := range len(last) {
			message := make([]byte, i)
			if err := stream.SendMsg(&message); err != nil {
				return err
			}
		}
		if strings.HasSuffix(method, "/Late") {
			return status.Error(codes.Aborted, "after its messages")
		}
	case "Collect":
		answer := make([]byte, count)
		return stream.SendMsg(&answer)
	case "Wait":
		<-stream.Context().Done()
		return stream.Context().Err()
	case "Chat":
	default:
		return status.Error(codes.Unimplemented, method)
	}
	return nil
}

type result struct {
	Path    string `json:"path"`
	Status  uint32 `json:"status"`
	Sent    int    `json:"sent"`
	Got     int    `json:"got"`
	Request int    `json:"request"`
	Answer  int    `json:"answer"`
}

// call sends messages of these sizes, reads what comes, and says what went over the connection.
func call(connection *grpc.ClientConn, method string, limit time.Duration, sizes ...int) (r result) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	r.Path = "/go.Echo/" + method
	both := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	stream, err := connection.NewStream(ctx, both, r.Path)
	if err != nil {
		log.Fatal(err)
	}
	for _, size := range sizes {
		message := make([]byte, size)
		if err := stream.SendMsg(&message); err != nil {
			break
		}
		r.Sent++
		r.Request += 5 + size
	}
	stream.CloseSend()
	for {
		var message []byte
		err = stream.RecvMsg(&message)
		if err != nil {
			break
		}
		r.Got++
		r.Answer += 5 + len(message)
	}
	if !errors.Is(err, io.EOF) {
		r.Status = uint32(status.Code(err))
	}
	return r
}

func calls(port string, transport credentials.TransportCredentials) {
	connection, err := grpc.NewClient("127.0.0.1:"+port, grpc.WithTransportCredentials(transport),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{})))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	out := json.NewEncoder(os.Stdout)
	var mutex sync.Mutex
	note := func(r result) {
		mutex.Lock()
		defer mutex.Unlock()
		out.Encode(r)
	}
	const limit = 20 * time.Second
	note(call(connection, "Unary", limit, 1))
	var wait sync.WaitGroup
	for worker := range 8 {
		wait.Go(func() {
			for i := range 25 {
				note(call(connection, "Unary", limit, worker*1000+i))
			}
			note(call(connection, "Fail", limit, 1+worker))
			note(call(connection, "Many", limit, 10*worker))
			note(call(connection, "Late", limit, worker))
			note(call(connection, "Collect", limit, make([]int, 3*worker)...))
			note(call(connection, "Chat", limit, 0, 700, worker))
			note(call(connection, "Nowhere", limit, 3))
		})
	}
	wait.Wait()
	// Alone: messages over several frames are followed on three streams of a direction at once.
	note(call(connection, "Chat", limit, 0, 70000, 1))
	note(call(connection, "Wait", 300*time.Millisecond, 9))
}

func load(port string, last time.Duration) {
	const connections, atOnce = 4, 8
	type part struct {
		times  []time.Duration
		failed int
	}
	parts := make(chan part, connections*atOnce)
	end := time.Now().Add(last)
	started := time.Now()
	for range connections {
		connection, err := grpc.NewClient("127.0.0.1:"+port, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{})))
		if err != nil {
			log.Fatal(err)
		}
		defer connection.Close()
		for range atOnce {
			go func() {
				var p part
				request, answer := make([]byte, 32), []byte(nil)
				for begun := time.Now(); begun.Before(end); {
					if err := connection.Invoke(context.Background(), "/go.Echo/Unary", &request, &answer); err != nil {
						p.failed++
					}
					now := time.Now()
					p.times = append(p.times, now.Sub(begun))
					begun = now
				}
				parts <- p
			}()
		}
	}
	var times []time.Duration
	failed := 0
	for range connections * atOnce {
		p := <-parts
		times, failed = append(times, p.times...), failed+p.failed
	}
	seconds := time.Since(started).Seconds()
	slices.Sort(times)
	at := func(share float64) float64 { return float64(times[int(share*float64(len(times)-1))].Nanoseconds()) / 1e3 }
	json.NewEncoder(os.Stdout).Encode(map[string]any{"calls": len(times), "failed": failed,
		"rate": float64(len(times)) / seconds, "p50_us": at(0.5), "p99_us": at(0.99)})
}

func main() {
	port, files := os.Args[2], os.Args[3:]
	switch os.Args[1] {
	case "serve":
		options := []grpc.ServerOption{grpc.UnknownServiceHandler(serve), grpc.ForceServerCodec(raw{})}
		if len(files) == 2 {
			transport, err := credentials.NewServerTLSFromFile(files[0], files[1])
			if err != nil {
				log.Fatal(err)
			}
			options = append(options, grpc.Creds(transport))
		}
		listener, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println("ready")
		log.Fatal(grpc.NewServer(options...).Serve(listener))
	case "call":
		transport := insecure.NewCredentials()
		if len(files) == 1 {
			var err error
			if transport, err = credentials.NewClientTLSFromFile(files[0], "localhost"); err != nil {
				log.Fatal(err)
			}
		}
		calls(port, transport)
	case "load":
		seconds, err := strconv.Atoi(files[0])
		if err != nil {
			log.Fatal(err)
		}
		load(port, time.Duration(seconds)*time.Second)
	}
}
