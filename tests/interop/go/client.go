// SPDX-License-Identifier: Apache-2.0
// Copyright the farpage authors

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	mount "github.com/pojntfx/r3map/pkg/api/proto/mount/v1"
	"github.com/pojntfx/r3map/pkg/services"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const callLimit = 60 * time.Second

func dial(addr string) (*services.BackendRemote, func() error, error) {
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return services.NewBackendRemoteGrpc(mount.NewBackendClient(conn)), conn.Close, nil
}

// grpcClient takes these lines and answers each with one:
//
//	read OFF LEN         the bytes in hex, or "error: TEXT"
//	write OFF HEX        "ok N"
//	get FILE CHUNK DEPTH read all, compare with FILE: "equal N at once M"
//	put FILE CHUNK DEPTH write all of FILE
//	sync
func grpcClient(addr string) error {
	remote, closeConn, err := dial(addr)
	if err != nil {
		return err
	}
	defer closeConn()
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		answer, err := command(remote, strings.Fields(in.Text()))
		if err != nil {
			answer = "error: " + strings.ReplaceAll(err.Error(), "\n", `\n`)
		}
		fmt.Println(answer)
	}
	return nil
}

func command(remote *services.BackendRemote, w []string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	switch {
	case len(w) == 3 && w[0] == "read":
		r, err := remote.ReadAt(ctx, int(number(w[2])), number(w[1]))
		if err == nil && r.N != len(r.P) {
			err = fmt.Errorf("N is %d, and %d bytes came", r.N, len(r.P))
		}
		return hex.EncodeToString(r.P), err
	case len(w) == 3 && w[0] == "write":
		p, err := hex.DecodeString(w[2])
		if err != nil {
			return "", err
		}
		n, err := remote.WriteAt(ctx, p, number(w[1]))
		return fmt.Sprint("ok ", n), err
	case len(w) == 4 && (w[0] == "get" || w[0] == "put"):
		return whole(ctx, remote, w[1], number(w[2]), number(w[3]), w[0] == "put")
	case len(w) == 1 && w[0] == "sync":
		return "ok", remote.Sync(ctx)
	}
	return "", errors.New("what?")
}

// whole moves all of a region, depth calls at once, and says how many were on their way at once.
func whole(ctx context.Context, remote *services.BackendRemote, path string, chunk, depth int64, put bool) (string, error) {
	want, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	var next, inside, most atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	one := func(at int64) error {
		p := want[at:min(at+chunk, int64(len(want)))]
		n := inside.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		defer inside.Add(-1)
		if put {
			got, err := remote.WriteAt(ctx, p, at)
			if err == nil && got != len(p) {
				err = fmt.Errorf("%d of %d bytes were written", got, len(p))
			}
			return err
		}
		r, err := remote.ReadAt(ctx, len(p), at)
		if err == nil && !bytes.Equal(r.P, p) {
			err = fmt.Errorf("other bytes at %d", at)
		}
		return err
	}
	for i := int64(0); i < depth; i++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for failed.Load() == nil {
				at := (next.Add(1) - 1) * chunk
				if at >= int64(len(want)) {
					return
				}
				if err := one(at); err != nil {
					failed.Store(&err)
				}
			}
		}()
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return "", *err
	}
	return fmt.Sprintf("equal %d at once %d", len(want), most.Load()), nil
}
