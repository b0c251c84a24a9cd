// SPDX-License-Identifier: Apache-2.0
// Copyright the farpage authors

// Command gopeer is the real Go family behind one command line, for farpage to be tried against: r3map's Backend service
// on grpc-go, go-nbd and userfaultfd-go. What stands here is only what joins them to a test.
//
//	gopeer grpc-serve FILE|SIZE [DELAY]      serve over gRPC; prints its address; ends with its standard input
//	gopeer grpc-client ADDR                  does what it is told on standard input, a line each (client.go)
//	gopeer grpc-bench ADDR SIZE BLOCK DEPTH MILLISECONDS read|write
//	gopeer nbd-serve SOCKET FILE|SIZE [NAME] serve a file or memory with go-nbd
//	gopeer nbd-list SOCKET                   what go-nbd's client sees
//	gopeer nbd-go SOCKET NAME                negotiate as go-nbd's client does, and say what the kernel was told
//	gopeer uffd-send SOCKET FILE             hand memory over, compare it with FILE; -listen before SOCKET: wait there
//	gopeer uffd-recv SOCKET FILE             serve the faults of memory that is handed over; -connect before SOCKET
//	gopeer uffd-bench SIZE                   first touch of memory in order, handler in this process
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"
)

var errUsage = errors.New("usage: see the head of tests/interop/go/main.go")

// word is the pattern of `farpage bench`.
func word(off int64) uint64 { return (uint64(off)/8 + 1) * 0x9e3779b97f4a7c15 }

func pattern(size int64) []byte {
	p := make([]byte, size)
	for off := int64(0); off+8 <= size; off += 8 {
		binary.LittleEndian.PutUint64(p[off:], word(off))
	}
	return p
}

// untilInputEnds serves until whoever started us closes our standard input.
func untilInputEnds(serve func() error) error {
	ended := make(chan error, 1)
	go func() { ended <- serve() }()
	go func() {
		io.Copy(io.Discard, os.Stdin)
		ended <- nil
	}()
	return <-ended
}

func number(text string) int64 {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		fmt.Fprintln(os.Stderr, "gopeer:", err)
		os.Exit(2)
	}
	return n
}

func run(verb string, a []string) error {
	switch {
	case verb == "grpc-serve" && len(a) == 1:
		return grpcServe(a[0], 0)
	case verb == "grpc-serve" && len(a) == 2:
		delay, err := time.ParseDuration(a[1])
		if err != nil {
			return err
		}
		return grpcServe(a[0], delay)
	case verb == "grpc-client" && len(a) == 1:
		return grpcClient(a[0])
	case verb == "grpc-bench" && len(a) == 6:
		return grpcBench(a[0], number(a[1]), number(a[2]), number(a[3]), number(a[4]), a[5] == "write")
	case verb == "nbd-serve" && len(a) == 2:
		return nbdServe(a[0], a[1], "default")
	case verb == "nbd-serve" && len(a) == 3:
		return nbdServe(a[0], a[1], a[2])
	case verb == "nbd-list" && len(a) == 1:
		return nbdList(a[0])
	case verb == "nbd-go" && len(a) == 2:
		return nbdGo(a[0], a[1])
	case verb == "uffd-send" && len(a) == 2:
		return uffdSend(a[0], false, a[1])
	case verb == "uffd-send" && len(a) == 3 && a[0] == "-listen":
		return uffdSend(a[1], true, a[2])
	case verb == "uffd-recv" && len(a) == 2:
		return uffdRecv(a[0], true, a[1])
	case verb == "uffd-recv" && len(a) == 3 && a[0] == "-connect":
		return uffdRecv(a[1], false, a[2])
	case verb == "uffd-bench" && len(a) == 1:
		return uffdBench(number(a[0]))
	}
	return errUsage
}

func main() {
	err := errUsage
	if len(os.Args) > 1 {
		err = run(os.Args[1], os.Args[2:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gopeer:", err)
		os.Exit(1)
	}
}
