module farpage-bench-uffd

go 1.22

require github.com/loopholelabs/userfaultfd-go v0.1.2

require golang.org/x/sys v0.21.0 // indirect
