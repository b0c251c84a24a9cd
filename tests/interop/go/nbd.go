// SPDX-License-Identifier: Apache-2.0
// Copyright the farpage authors

package main

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"unsafe"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/pojntfx/go-nbd/pkg/client"
	nbdserver "github.com/pojntfx/go-nbd/pkg/server"
	"golang.org/x/sys/unix"
)

// nbdStore is a file, or memory if a size is given in place of its name.
func nbdStore(source string) (backend.Backend, string, error) {
	if size, err := strconv.ParseInt(source, 10, 64); err == nil {
		return backend.NewMemoryBackend(make([]byte, size)), "memory", nil
	}
	f, err := os.OpenFile(source, os.O_RDWR, 0)
	if err != nil {
		return nil, "", err
	}
	return backend.NewFileBackend(f), "a file", nil
}

func nbdServe(socket, source, name string) error {
	store, what, err := nbdStore(source)
	if err != nil {
		return err
	}
	exports := []*nbdserver.Export{{Name: name, Description: what, Backend: store}}
	options := &nbdserver.Options{
		SupportsMultiConn:  true,
		MinimumBlockSize:   1,
		PreferredBlockSize: 4096,
		MaximumBlockSize:   32 << 20,
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	return untilInputEnds(func() error {
		for {
			conn, err := l.Accept()
			if err != nil {
				return err
			}
			go func() {
				defer conn.Close()
				if err := nbdserver.Handle(conn, exports, options); err != nil {
					fmt.Fprintln(os.Stderr, "gopeer: nbd connection ended:", err)
				}
			}()
		}
	})
}

func nbdList(socket string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	names, err := client.List(conn)
	fmt.Printf("%q\n", names)
	return err
}

// nbdGo runs the client's half outside the kernel: a filter makes its ioctls succeed without a device.
func nbdGo(socket, name string) error {
	if err := pretendDevice(); err != nil {
		return err
	}
	dev, err := os.Open("/dev/null")
	if err != nil {
		return err
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := client.Connect(conn, dev, &client.Options{ExportName: name}); err != nil {
		return err
	}
	fmt.Println("negotiated")
	return nil
}

// pretendDevice installs a filter that answers every ioctl 0xab00..0xab0a with success.
func pretendDevice() error {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		least = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
		allow = 0x7fff0000
		errno = 0x00050000 // and 0 in the lower half: success
	)
	filter := []unix.SockFilter{
		{Code: load, K: 0}, // the number of the system call
		{Code: equal, K: unix.SYS_IOCTL, Jf: 4},
		{Code: load, K: 24}, // its second argument, the lower half
		{Code: least, K: 0xab00, Jf: 2},
		{Code: least, K: 0xab0b, Jt: 1},
		{Code: ret, K: errno},
		{Code: ret, K: allow},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	const setFilter, allThreads = 1, 1
	if _, _, e := unix.Syscall(unix.SYS_SECCOMP, setFilter, allThreads, uintptr(unsafe.Pointer(&prog))); e != 0 {
		return e
	}
	return nil
}
