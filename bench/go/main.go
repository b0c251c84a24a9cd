// SPDX-License-Identifier: Apache-2.0
// Copyright the farpage authors

// Command gopair is the Go family's gRPC Backend service, both ends, with the
// least around it: what farpage's wire is held against.
//
//	gopair serve SIZE                               prints its address, serves until killed
//	gopair read ADDR SIZE BLOCK DEPTH MILLISECONDS  prints reads a second
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	mount "github.com/pojntfx/r3map/pkg/api/proto/mount/v1"
	"github.com/pojntfx/r3map/pkg/services"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// word is the pattern of `farpage bench`.
func word(off int64) uint64 { return (uint64(off)/8 + 1) * 0x9e3779b97f4a7c15 }

// memory is a go-nbd backend over a slice.
type memory struct{ b []byte }

func (m memory) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > int64(len(m.b)) {
		return 0, io.EOF
	}
	return copy(p, m.b[off:]), nil
}

func (m memory) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > int64(len(m.b)) {
		return 0, io.ErrShortWrite
	}
	return copy(m.b[off:], p), nil
}

func (m memory) Size() (int64, error) { return int64(len(m.b)), nil }
func (m memory) Sync() error          { return nil }

func serve(size int64) error {
	m := memory{make([]byte, size)}
	for off := int64(0); off < size; off += 8 {
		binary.LittleEndian.PutUint64(m.b[off:], word(off))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	mount.RegisterBackendServer(s, services.NewBackendServiceGrpc(services.NewBackend(m, false, services.MaxChunkSize)))
	fmt.Println(l.Addr())
	return s.Serve(l)
}

func read(addr string, size, block, depth, ms int64) error {
	options := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	conn, err := grpc.NewClient("passthrough:///"+addr, options...)
	if err != nil {
		return err
	}
	remote := services.NewBackendRemoteGrpc(mount.NewBackendClient(conn))
	var calls atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	begin := time.Now()
	until := begin.Add(time.Duration(ms) * time.Millisecond)
	for i := int64(0); i < depth; i++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rnd := rand.New(rand.NewSource(i))
			for time.Now().Before(until) {
				off := rnd.Int63n(size/block) * block
				r, err := remote.ReadAt(context.Background(), int(block), off)
				for at := int64(0); err == nil && at < block; at += 4096 {
					if int64(len(r.P)) < block || binary.LittleEndian.Uint64(r.P[at:]) != word(off+at) {
						err = errors.New("wrong data")
					}
				}
				if err != nil {
					failed.Store(&err)
					return
				}
				calls.Add(1)
			}
		}()
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	fmt.Printf("%.1f\n", float64(calls.Load())/time.Since(begin).Seconds())
	return nil
}

func main() {
	var n [4]int64
	first := 2
	if len(os.Args) > 1 && os.Args[1] == "read" {
		first = 3
	}
	for i := first; i < len(os.Args) && i-first < len(n); i++ {
		n[i-first], _ = strconv.ParseInt(os.Args[i], 10, 64)
	}
	err := errors.New("usage: gopair serve SIZE | read ADDR SIZE BLOCK DEPTH MILLISECONDS")
	switch {
	case len(os.Args) == 3 && os.Args[1] == "serve":
		err = serve(n[0])
	case len(os.Args) == 7 && os.Args[1] == "read":
		err = read(os.Args[2], n[0], n[1], n[2], n[3])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gopair:", err)
		os.Exit(1)
	}
}
