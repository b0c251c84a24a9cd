#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""Read and write a served region from Python: client.py HOST:PORT DIRECTORY-OF-THE-PROTO-FILES"""
import os, sys, tempfile
import grpc
from grpc_tools import protoc

target, protos = sys.argv[1:3]
with tempfile.TemporaryDirectory() as out:
    for name in "farpage", "backend":
        assert protoc.main(["protoc", f"-I{protos}", f"--python_out={out}", f"--grpc_python_out={out}",
                            f"{protos}/{name}.proto"]) == 0
    sys.path.insert(0, out)
    import backend_pb2, backend_pb2_grpc, farpage_pb2 as pb, farpage_pb2_grpc

with grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", 64 << 20)]) as channel:
    region = farpage_pb2_grpc.RegionStub(channel)
    exports = region.Exports(pb.ExportsRequest()).exports
    size = exports[0].size
    assert region.Describe(pb.DescribeRequest(export=exports[0].name)).size == size
    data = os.urandom(300001)
    region.Write(pb.WriteRequest(offset=12345, data=data, flush=True))
    assert region.Read(pb.ReadRequest(ranges=[pb.Range(offset=12345, length=len(data))])).data == data
    joined = region.Read(pb.ReadRequest(zeros=True, ranges=[pb.Range(offset=0, length=100), pb.Range(offset=12345, length=7),
                                                            pb.Range(offset=size - 9, length=9)]))
    assert list(joined.kinds) == [pb.ZERO, pb.DATA, pb.ZERO] and joined.data == data[:7]
    pieces = list(region.Pull(pb.PullRequest(ranges=[pb.Range(offset=0, length=size)], piece=65536, zeros=True)))
    whole = b"".join(p.data if p.kind == pb.DATA else bytes(p.length) for p in pieces)
    assert len(whole) == size and whole[12345:12345 + len(data)] == data and not any(whole[:12345])
    region.Zero(pb.Span(offset=12345, length=10))
    region.Discard(pb.Span(offset=200000, length=100000))
    extents = region.Extents(pb.ExtentsRequest(offset=0, length=size)).extents
    assert extents[0].offset == 0 and extents[-1].offset + extents[-1].length <= size
    region.Flush(pb.FlushRequest())
    try:
        region.Read(pb.ReadRequest(ranges=[pb.Range(offset=size, length=1)]))
        sys.exit("a read outside the region was answered")
    except grpc.RpcError as e:
        assert e.code() == grpc.StatusCode.OUT_OF_RANGE, e
    try:
        list(region.Pull(pb.PullRequest(export="nothing", ranges=[pb.Range(offset=0, length=1)])))
        sys.exit("an unknown export was served")
    except grpc.RpcError as e:
        assert e.code() == grpc.StatusCode.NOT_FOUND, e
    backend = backend_pb2_grpc.BackendStub(channel)
    assert backend.WriteAt(backend_pb2.WriteAtArgs(Off=0, P=b"plain")).Length == 5
    assert backend.ReadAt(backend_pb2.ReadAtArgs(Length=5, Off=0), metadata=[("farpage-export", "default")]).P == b"plain"
    backend.Sync(backend_pb2.SyncArgs())
    assert backend.ReadAt.with_call(backend_pb2.ReadAtArgs(Length=1))[0].N == 1
print("python client: all right")
