// SPDX-License-Identifier: Apache-2.0
// Copyright the farpage authors

package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/loopholelabs/userfaultfd-go/pkg/mapper"
	"github.com/loopholelabs/userfaultfd-go/pkg/transfer"
)

func unixConn(path string, listen bool) (*net.UnixConn, error) {
	addr := &net.UnixAddr{Name: path, Net: "unix"}
	if !listen {
		return net.DialUnix("unix", nil, addr)
	}
	l, err := net.ListenUnix("unix", addr)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	fmt.Println("listening")
	return l.AcceptUnix()
}

// uffdSend is the side that has the memory.
func uffdSend(socket string, listen bool, file string) error {
	want, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	conn, err := unixConn(socket, listen)
	if err != nil {
		return err
	}
	defer conn.Close()
	p, uffd, start, err := mapper.Register(len(want))
	if err != nil {
		return err
	}
	if err := transfer.SendUFFD(conn, uffd, start); err != nil {
		return err
	}
	// A copy first: the runtime's own comparison would sit in a fault with its thread not known to wait.
	if got := bytes.Clone(p); !bytes.Equal(got, want) {
		return errors.New("the memory differs from the file")
	}
	fmt.Println("equal", len(want))
	return nil
}

// uffdRecv serves faults until it is killed: the library does not notice the end of the other side.
func uffdRecv(socket string, listen bool, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	conn, err := unixConn(socket, listen)
	if err != nil {
		return err
	}
	uffd, start, err := transfer.ReceiveUFFD(conn)
	if err != nil {
		return err
	}
	fmt.Println("received")
	return untilInputEnds(func() error { return mapper.Handle(uffd, start, f) })
}

// uffdBench prints MiB a second and microseconds a page.
func uffdBench(size int64) error {
	page := int64(os.Getpagesize())
	source := pattern(size)
	p, uffd, start, err := mapper.Register(int(size))
	if err != nil {
		return err
	}
	go func() {
		fmt.Fprintln(os.Stderr, "gopeer: the handler ended:", mapper.Handle(uffd, start, bytes.NewReader(source)))
	}()
	begin, sum := time.Now(), byte(0)
	for at := int64(0); at < size; at += page {
		sum += p[at]
	}
	took := time.Since(begin)
	if !bytes.Equal(p, source) {
		return errors.New("wrong data")
	}
	fmt.Printf("%.1f %.2f %d\n", float64(size)/(1<<20)/took.Seconds(), took.Seconds()*1e6/float64(size/page), sum)
	return nil
}
