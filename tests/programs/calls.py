"""Connections through unusual system calls.

`calls.py CASE` plays one connection (or a few) between two ends, both in this process unless the case says
otherwise. It prints the server's address, then one JSON object for each exchange: what was really sent.
"""
import ctypes, fcntl, json, os, select, socket, struct, sys, threading, time

CASE = sys.argv[1]
FOLDER = sys.argv[2]
sent = []


def request(i, body=b"", method="POST"):
    return f"{method} /calls/{CASE}/{i} HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def response(body=b"ok", status=200):
    return f"HTTP/1.1 {status} Whatever\r\nServer: t\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def note(rq, rs, status=200, end="complete", side="both"):
    method, path = rq.split(b" ")[:2]
    sent.append({"method": method.decode(), "path": path.decode(), "status": status, "request_bytes": len(rq), "response_bytes": len(rs), "end": end, "side": side})


def exactly(s, n):
    got = b""
    while len(got) < n:
        part = s.recv(n - len(got))
        if not part:
            raise EOFError(f"{len(got)} of {n}")
        got += part
    return got


def exactly_read(fd, n):
    while n:
        n -= len(os.read(fd, n))


def listen(family=socket.AF_INET, address=("127.0.0.1", 0), before=lambda s: None):
    s = socket.socket(family)
    before(s)
    s.bind(address)
    s.listen(16)
    return s


def pair(family=socket.AF_INET, address=("127.0.0.1", 0)):
    s = listen(family, address)
    c = socket.socket(family)
    c.connect(s.getsockname())
    a, _ = s.accept()
    for end in (c, a):
        if family != socket.AF_UNIX:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return a, c


def say(address):
    print(address, flush=True)


def tcp(a):
    host, port = a.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def usual(server, client, i, body=b"", answer=b"ok"):
    """One exchange by plain calls: shows that the connection is still in step."""
    rq, rs = request(i, body), response(answer)
    client.sendall(rq)
    exactly(server, len(rq))
    server.sendall(rs)
    exactly(client, len(rs))
    note(rq, rs)


def peek_and_waitall():
    a, c = pair()
    say(tcp(a))
    for i in range(3):
        rq, rs = request(i, b"b" * 500), response(b"w" * 300)
        c.sendall(rq)
        for n in (1, 10, 100):
            a.recv(n, socket.MSG_PEEK)
        got = a.recv(len(rq), socket.MSG_WAITALL)
        assert got == rq
        a.sendall(rs[:50])
        t = threading.Timer(0.02, a.sendall, (rs[50:],))
        t.start()
        c.recv(10, socket.MSG_PEEK | socket.MSG_WAITALL)
        assert c.recv(len(rs), socket.MSG_WAITALL) == rs
        t.join()
        note(rq, rs)
    usual(a, c, "after")


def empty_vectors():
    a, c = pair()
    say(tcp(a))
    for i in range(3):
        rq, rs = request(i, b"b" * 40), response(b"w" * 300)
        os.writev(c.fileno(), [b"", rq[:3], b"", b"", rq[3:30], rq[30:], b""])
        got, parts = 0, [bytearray(0), bytearray(2), bytearray(0), bytearray(5), bytearray(4000)]
        while got < len(rq):
            got += os.readv(a.fileno(), parts)
        os.writev(a.fileno(), [b"", rs])
        exactly(c, len(rs))
        note(rq, rs)
    usual(a, c, "after")


def a_thousand_vectors():
    a, c = pair()
    say(tcp(a))
    rq = request(0, b"b" * 100).replace(b"Host: t", b"Host: t\r\nX-Long: " + b"l" * 1500)
    rs = response(b"w" * 2000)
    os.writev(c.fileno(), [rq[k:k + 2] for k in range(0, len(rq), 2)])
    got = 0
    while got < len(rq):
        got += os.readv(a.fileno(), [bytearray(3) for _ in range(1000)])
    os.writev(a.fileno(), [rs[k:k + 3] for k in range(0, len(rs), 3)])
    exactly(c, len(rs))
    note(rq, rs)
    usual(a, c, "after")


def discarded_with_trunc():
    """MSG_TRUNC throws received bytes away: the body never reaches the application."""
    a, c = pair()
    say(tcp(a))
    body = b"b" * 30000
    rq, rs = request(0, body), response()
    head = len(rq) - len(body)
    c.sendall(rq)
    exactly(a, head)
    left = len(body)
    libc = ctypes.CDLL(None, use_errno=True)
    while left:
        n = libc.recv(a.fileno(), None, left, socket.MSG_TRUNC)
        assert n > 0, ctypes.get_errno()
        left -= n
    a.sendall(rs)
    exactly(c, len(rs))
    note(rq, rs)
    usual(a, c, "after")


def splice_all(source, target, n):
    while n:
        n -= os.splice(source, target, n)


def spliced_bodies_both_ways():
    """Heads by plain calls, bodies through pipes, as a proxy moves them."""
    a, c = pair()
    say(tcp(a))
    for i, size in enumerate((1, 1000, 60000)):
        body = b"b" * size
        rq, rs = request(i, body), response(body)
        r, w = os.pipe()
        os.write(w, body)
        c.sendall(rq[:-size])
        splice_all(r, c.fileno(), size)
        exactly(a, len(rq) - size)
        splice_all(a.fileno(), w, size)
        a.sendall(rs[:-size])
        splice_all(r, a.fileno(), size)
        exactly(c, len(rs) - size)
        splice_all(c.fileno(), w, size)
        assert len(os.read(r, size)) == size
        note(rq, rs)
    usual(a, c, "after")


def spliced_request_then_close():
    """The last body of a connection goes to a pipe; the connection ends with the answer."""
    a, c = pair()
    say(tcp(a))
    body = b"b" * 5000
    rq, rs = request(0, body), response()
    r, w = os.pipe()
    c.sendall(rq)
    exactly(a, len(rq) - len(body))
    splice_all(a.fileno(), w, len(body))
    a.sendall(rs)
    a.close()
    exactly(c, len(rs))
    c.close()
    note(rq, rs)


def sendfile_with_offset():
    a, c = pair()
    say(tcp(a))
    path = os.path.join(FOLDER, "sent")
    with open(path, "wb") as f:
        f.write(b"f" * 70000)
    with open(path, "rb") as f:
        rq, rs = request(0), response(b"f" * 69000)
        c.sendall(rq)
        exactly(a, len(rq))
        a.sendall(rs[:-69000])
        t = threading.Thread(target=exactly, args=(c, len(rs)))
        t.start()
        at = 1000
        while at < 70000:
            at += os.sendfile(a.fileno(), f.fileno(), at, 70000 - at)
        t.join()
        note(rq, rs)
    usual(a, c, "after")


def dup_and_passed():
    """Descriptors that are duplicated, closed, and passed to another process between messages."""
    a, c = pair()
    say(tcp(a))
    usual(a, c, 0)
    d = a.dup()
    a.close()
    usual(d, c, 1)
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _, fds, _, _ = socket.recv_fds(there, 10, 1)
        s = socket.socket(fileno=fds[0])
        for _ in range(3):
            exactly(s, len(request(2)))
            s.sendall(response())
        os._exit(0)
    socket.send_fds(here, [b"x"], [d.fileno()])
    d.close()
    for i in range(2, 5):
        rq, rs = request(i), response()
        c.sendall(rq)
        exactly(c, len(rs))
        note(rq, rs)
    os.waitpid(pid, 0)


def fork_with_a_shared_socket():
    """Each answer comes from another process than the request was read by."""
    a, c = pair()
    say(tcp(a))
    for i in range(3):
        rq, rs = request(i), response(b"z" * 100)
        c.sendall(rq)
        exactly(a, len(rq))
        pid = os.fork()
        if pid == 0:
            a.sendall(rs)
            os._exit(0)
        os.waitpid(pid, 0)
        exactly(c, len(rs))
        note(rq, rs)
    usual(a, c, "after")


def unix_abstract():
    name = f"\0apiscope-{os.getpid()}"
    a, c = pair(socket.AF_UNIX, name)
    say("unix:@" + name[1:])
    for i in range(3):
        usual(a, c, i, b"u" * 100)


def ipv4_mapped():
    s = socket.socket(socket.AF_INET6)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.bind(("::", 0))
    s.listen(4)
    port = s.getsockname()[1]
    c = socket.socket(socket.AF_INET6)
    c.connect(("::ffff:127.0.0.1", port))
    a, _ = s.accept()
    say(f"127.0.0.1:{port}")
    for i in range(3):
        usual(a, c, i)


def own_network():
    """A network namespace with TCP fast open on both ends; this machine's settings stay as they are."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x40000000) == 0, "a network namespace needs root"
    with socket.socket() as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
    with open("/proc/sys/net/ipv4/tcp_fastopen", "w") as f:
        f.write("3")


def fast_opened():
    with open("/proc/net/netstat") as f:
        names, values = [line.split() for line in f if line.startswith("TcpExt:")]
    return int(dict(zip(names, values))["TCPFastOpenPassive"])


def fast_open():
    """The first request travels with the handshake (RFC 7413)."""
    own_network()
    s = listen(before=lambda s: s.setsockopt(socket.IPPROTO_TCP, 23, 16))  # TCP_FASTOPEN
    say(tcp(s))
    for i in range(3):  # the first has no cookie yet and falls back
        c = socket.socket()
        rq, rs = request(i, b"f" * 50), response(b"fast")
        assert c.sendto(rq, 0x20000000, s.getsockname()) == len(rq)  # MSG_FASTOPEN
        a, _ = s.accept()
        exactly(a, len(rq))
        a.sendall(rs)
        exactly(c, len(rs))
        note(rq, rs)
        usual(a, c, f"{i}-next")
        a.close()
        c.close()
    assert fast_opened() >= 2, "no connection was opened fast"


def fast_open_connect():
    """connect() is put off until the first write (TCP_FASTOPEN_CONNECT)."""
    own_network()
    s = listen(before=lambda s: s.setsockopt(socket.IPPROTO_TCP, 23, 16))
    say(tcp(s))
    for i in range(3):
        c = socket.socket()
        c.setsockopt(socket.IPPROTO_TCP, 30, 1)
        c.connect(s.getsockname())
        rq, rs = request(i, b"f" * 50), response(b"fast")
        c.sendall(rq)
        a, _ = s.accept()
        exactly(a, len(rq))
        a.sendall(rs)
        exactly(c, len(rs))
        note(rq, rs)
        a.close()
        c.close()
    assert fast_opened() >= 2, "no connection was opened fast"


def urgent_between():
    """An out-of-band byte between messages is no part of any."""
    a, c = pair()
    say(tcp(a))
    usual(a, c, 0)
    c.send(b"!", socket.MSG_OOB)
    time.sleep(0.05)
    assert a.recv(1, socket.MSG_OOB) == b"!"
    usual(a, c, 1)
    usual(a, c, 2)


def linger_reset():
    a, c = pair()
    say(tcp(a))
    usual(a, c, 0)
    rq, rs = request(1), response(b"r" * 5000)
    c.sendall(rq)
    exactly(a, len(rq))
    a.sendall(rs[:2000])
    exactly(c, 2000)
    c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    c.close()
    time.sleep(0.05)
    try:
        a.sendall(b"late")
    except OSError:
        pass
    a.close()
    note(rq, rs[:2000], end="reset")


def zero_copy():
    a, c = pair()
    say(tcp(a))
    for end in (a, c):
        end.setsockopt(socket.SOL_SOCKET, 60, 1)  # SO_ZEROCOPY
    for i in range(3):
        rq, rs = request(i, b"z" * 20000), response(b"z" * 20000)
        assert c.send(rq, 0x4000000) == len(rq)
        exactly(a, len(rq))
        assert a.send(rs, 0x4000000) == len(rs)
        exactly(c, len(rs))
        for end in (a, c):  # the kernel says when it needs the buffer no more
            waits = select.poll()
            waits.register(end, 0)
            assert waits.poll(5000)
            end.recvmsg(100, 1000, socket.MSG_ERRQUEUE)
        note(rq, rs)
    usual(a, c, "after")


class IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]


class MsgHdr(ctypes.Structure):
    _fields_ = [("name", ctypes.c_void_p), ("namelen", ctypes.c_uint), ("iov", ctypes.POINTER(IoVec)), ("iovlen", ctypes.c_size_t),
                ("control", ctypes.c_void_p), ("controllen", ctypes.c_size_t), ("flags", ctypes.c_int)]


class MMsgHdr(ctypes.Structure):
    _fields_ = [("hdr", MsgHdr), ("len", ctypes.c_uint)]


def mmsg(call, s, buffers):
    vectors = [IoVec(ctypes.addressof(b), len(b)) for b in buffers]
    messages = (MMsgHdr * len(buffers))()
    for m, v in zip(messages, vectors):
        m.hdr.iov, m.hdr.iovlen = ctypes.pointer(v), 1
    libc = ctypes.CDLL(None, use_errno=True)
    n = libc.sendmmsg(s.fileno(), messages, len(buffers), 0) if call == "send" else libc.recvmmsg(s.fileno(), messages, len(buffers), 0x10000, None)
    assert n == len(buffers), (n, ctypes.get_errno())
    return [m.len for m in messages]


def text(b):
    return (ctypes.c_char * len(b)).from_buffer_copy(b)


def one_message_each():
    """sendmmsg and recvmmsg with one message are read as sendmsg and recvmsg."""
    a, c = pair()
    say(tcp(a))
    for i in range(3):
        rq, rs = request(i, b"1" * 30), response()
        mmsg("send", c, [text(rq)])
        assert mmsg("recv", a, [text(bytes(4000))]) == [len(rq)]
        mmsg("send", a, [text(rs)])
        assert mmsg("recv", c, [text(bytes(4000))]) == [len(rs)]
        note(rq, rs)
    usual(a, c, "after")


def several_messages():
    """sendmmsg of several: the client's end cannot read them, and says so. The server's can."""
    a, c = pair()
    say(tcp(a))
    for k in range(3):
        rqs = [request(f"{k}-{i}", b"m" * 30) for i in range(3)]
        mmsg("send", c, [text(rq) for rq in rqs])
        for rq in rqs:
            exactly(a, len(rq))
            rs = response(b"m" * 20)
            a.sendall(rs)
            exactly(c, len(rs))
            note(rq, rs, side="server")


def receive_several():
    """recvmmsg of several on the server's end: the client's end sees all, the server's says what it cannot read."""
    a, c = pair()
    say(tcp(a))
    for k in range(3):
        rqs = [request(f"{k}-{i}", b"m" * 30) for i in range(2)]
        c.sendall(b"".join(rqs))
        time.sleep(0.02)
        got = mmsg("recv", a, [text(bytes(len(rqs[0]))), text(bytes(len(rqs[1])))])
        assert got == [len(rq) for rq in rqs], got
        for rq in rqs:
            rs = response(b"m" * 20)
            a.sendall(rs)
            exactly(c, len(rs))
            note(rq, rs, side="client")


def spliced_whole():
    """A relay that splices whole messages, heads included, between two connections: its ends are not read."""
    a, c = pair()
    b, d = pair()  # d connects to b: the relay owns a and d
    say(tcp(b))
    r, w = os.pipe()
    for i in range(3):
        rq, rs = request(i, b"s" * 100), response(b"s" * 100)
        c.sendall(rq)
        splice_all(a.fileno(), w, len(rq))
        splice_all(r, d.fileno(), len(rq))
        exactly(b, len(rq))
        b.sendall(rs)
        splice_all(d.fileno(), w, len(rs))
        splice_all(r, a.fileno(), len(rs))
        exactly(c, len(rs))
        note(rq, rs, side="server")


def several_messages_between():
    """Requests that the client's end cannot read, between others."""
    a, c = pair()
    say(tcp(a))
    for i in range(6):
        rqs = [request(f"{i}-{k}", b"m" * 30) for k in range(1 + i % 2)]
        if i % 2:
            mmsg("send", c, [text(rq) for rq in rqs])
        else:
            c.sendall(b"".join(rqs))
        for k, rq in enumerate(rqs):
            exactly(a, len(rq))
            rs = response(b"m" * (20 + 10 * i + k))
            a.sendall(rs)
            exactly(c, len(rs))
            note(rq, rs, side="server" if i % 2 else "both")


def spliced_requests_between():
    """A server that splices every other request away, unread, and answers all: what it reads keeps its answer."""
    a, c = pair()
    say(tcp(a))
    r, w = os.pipe()
    for i in range(6):
        rq, rs = request(i, b"q" * (10 + i)), response(b"a" * (20 + i), status=400 + i)
        c.sendall(rq)
        if i % 2:
            splice_all(a.fileno(), w, len(rq))
            exactly_read(r, len(rq))
        else:
            exactly(a, len(rq))
        a.sendall(rs)
        exactly(c, len(rs))
        note(rq, rs, status=400 + i, side="client" if i % 2 else "both")


def spliced_answers_between():
    """A client that splices every other answer away, unread: what it reads belongs to its request."""
    a, c = pair()
    say(tcp(a))
    r, w = os.pipe()
    for i in range(7):
        rq, rs = request(i, b"q" * (10 + i)), response(b"a" * (20 + i), status=400 + i)
        c.sendall(rq)
        exactly(a, len(rq))
        a.sendall(rs)
        if i % 2:
            splice_all(c.fileno(), w, len(rs))
            exactly_read(r, len(rs))
        else:
            exactly(c, len(rs))
        note(rq, rs, status=400 + i, side="server" if i % 2 else "both")


globals()[CASE]()
for one in sent:
    print(json.dumps(one), flush=True)
