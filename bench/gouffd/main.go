// SPDX-License-Identifier: Apache-2.0
// Copyright the farpage authors

// Command gouffd is the Go family's userfaultfd library with the least around
// it: memory whose faults its handler serves from a slice, touched in order.
//
//	gouffd SIZE    prints MiB a second and microseconds a page
package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/loopholelabs/userfaultfd-go/pkg/mapper"
)

// word is the pattern of `farpage bench`.
func word(off int) uint64 { return (uint64(off)/8 + 1) * 0x9e3779b97f4a7c15 }

func run(size int) error {
	page := os.Getpagesize()
	source := make([]byte, size)
	for off := 0; off < size; off += 8 {
		binary.LittleEndian.PutUint64(source[off:], word(off))
	}
	p, uffd, start, err := mapper.Register(size)
	if err != nil {
		return err
	}
	go func() { fmt.Fprintln(os.Stderr, "gouffd: the handler ended:", mapper.Handle(uffd, start, bytes.NewReader(source))) }()
	begin, sum := time.Now(), byte(0)
	for at := 0; at < size; at += page {
		sum += p[at]
	}
	took := time.Since(begin)
	if !bytes.Equal(p, source) {
		return errors.New("wrong data")
	}
	fmt.Printf("%.1f %.2f %d\n", float64(size)/(1<<20)/took.Seconds(), took.Seconds()*1e6/float64(size/page), sum)
	return nil
}

func main() {
	err := errors.New("usage: gouffd SIZE")
	if len(os.Args) == 2 {
		var size int
		if size, err = strconv.Atoi(os.Args[1]); err == nil {
			err = run(size)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gouffd:", err)
		os.Exit(1)
	}
}
