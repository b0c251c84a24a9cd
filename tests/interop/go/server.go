// SPDX-License-Identifier: Apache-2.0
// Copyright the farpage authors

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/pojntfx/go-nbd/pkg/backend"
	mount "github.com/pojntfx/r3map/pkg/api/proto/mount/v1"
	"github.com/pojntfx/r3map/pkg/services"
	"google.golang.org/grpc"
)

// memory is a backend over a slice; go-nbd's own hangs after a read at the end.
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

// A counted backend is slow on demand and knows how many calls were inside at once.
type counted struct {
	backend.Backend
	delay        time.Duration
	inside, most atomic.Int64
}

func (c *counted) enter() {
	n := c.inside.Add(1)
	for most := c.most.Load(); n > most && !c.most.CompareAndSwap(most, n); most = c.most.Load() {
	}
	time.Sleep(c.delay)
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.enter()
	defer c.inside.Add(-1)
	return c.Backend.ReadAt(p, off)
}

func (c *counted) WriteAt(p []byte, off int64) (int, error) {
	c.enter()
	defer c.inside.Add(-1)
	return c.Backend.WriteAt(p, off)
}

// grpcServe says at its end how many calls were inside at once.
func grpcServe(what string, delay time.Duration) error {
	var inner backend.Backend
	if size, err := strconv.ParseInt(what, 10, 64); err == nil {
		inner = memory{pattern(size)}
	} else {
		f, err := os.OpenFile(what, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		inner = backend.NewFileBackend(f)
	}
	b := &counted{Backend: inner, delay: delay}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	mount.RegisterBackendServer(s, services.NewBackendServiceGrpc(services.NewBackend(b, false, services.MaxChunkSize)))
	fmt.Println(l.Addr())
	err = untilInputEnds(func() error { return s.Serve(l) })
	fmt.Println("at once:", b.most.Load())
	if errors.Is(err, grpc.ErrServerStopped) {
		err = nil
	}
	return err
}
