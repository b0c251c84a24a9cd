// SPDX-License-Identifier: Apache-2.0
// Copyright the farpage authors

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// grpcBench keeps depth calls going at random blocks and prints calls a second, p50 and p99 in microseconds. The region
// holds the pattern. Every byte that is read is compared; what was written (the same bytes inverted) is read back and
// compared when the clock has stopped, and put back. bench/backend.c is the same job on libfarpage.
func grpcBench(addr string, size, block, depth, ms int64, write bool) error {
	remote, closeConn, err := dial(addr)
	if err != nil {
		return err
	}
	defer closeConn()
	image := pattern(size)
	if write {
		for i := range image {
			image[i] ^= 0xff
		}
	}
	ctx := context.Background()
	read := func(at int64) error {
		r, err := remote.ReadAt(ctx, int(block), at)
		if err == nil && !bytes.Equal(r.P, image[at:at+block]) {
			err = errors.New("wrong data")
		}
		return err
	}
	put := func(at int64) error {
		n, err := remote.WriteAt(ctx, image[at:at+block], at)
		if err == nil && int64(n) != block {
			err = errors.New("short write")
		}
		return err
	}
	call := read
	if write {
		call = put
	}
	if err := call(0); err != nil { // the connection is there
		return err
	}
	written := make([]atomic.Bool, size/block)
	times := make([][]time.Duration, depth)
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	begin := time.Now()
	until := begin.Add(time.Duration(ms) * time.Millisecond)
	for i := int64(0); i < depth; i++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rnd := rand.New(rand.NewSource(i))
			for now := time.Now(); now.Before(until); {
				at := rnd.Int63n(size / block)
				if err := call(at * block); err != nil {
					failed.Store(&err)
					return
				}
				then := now
				now = time.Now()
				times[i] = append(times[i], now.Sub(then))
				written[at].Store(true)
			}
		}()
	}
	wg.Wait()
	took := time.Since(begin)
	if err := failed.Load(); err != nil {
		return *err
	}
	if write {
		written[0].Store(true)
		for i := range written {
			at := int64(i) * block
			if !written[i].Load() {
				continue
			}
			if err := read(at); err != nil {
				return err
			}
			for k := at; k < at+block; k++ {
				image[k] ^= 0xff
			}
			if err := put(at); err != nil {
				return err
			}
		}
	}
	all := slices.Concat(times...)
	slices.Sort(all)
	at := func(q float64) float64 { return float64(all[int(q*float64(len(all)-1))].Nanoseconds()) / 1e3 }
	fmt.Printf("%.1f %.1f %.1f\n", float64(len(all))/took.Seconds(), at(0.5), at(0.99))
	return nil
}
