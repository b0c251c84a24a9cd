module farpage-interop

go 1.22

// As in r3map's own go.mod: a replacement does not travel with a requirement.
replace github.com/gocql/gocql => github.com/scylladb/gocql v1.14.2

require (
	github.com/loopholelabs/userfaultfd-go v0.1.2
	github.com/pojntfx/go-nbd v0.3.2
	github.com/pojntfx/r3map v0.1.1
	golang.org/x/sys v0.22.0
	google.golang.org/grpc v1.65.0
)

require (
	github.com/loopholelabs/common v0.4.9 // indirect
	github.com/loopholelabs/frisbee-go v0.8.1 // indirect
	github.com/loopholelabs/polyglot/v2 v2.0.1 // indirect
	github.com/mattn/go-colorable v0.1.13 // indirect
	github.com/mattn/go-isatty v0.0.20 // indirect
	github.com/pilebones/go-udev v0.9.0 // indirect
	github.com/rs/zerolog v1.33.0 // indirect
	go.uber.org/atomic v1.11.0 // indirect
	golang.org/x/net v0.27.0 // indirect
	golang.org/x/text v0.16.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20240725223205-93522f1f2a9f // indirect
	google.golang.org/protobuf v1.34.2 // indirect
)
