/* A 32-bit client without a C library: `gcc -m32 -nostdlib` needs no 32-bit packages. Connects to the port
 * of its argument on 127.0.0.1, and three times sends a request by write(2) or sendto(2) and reads the answer. */
static int call(int n, int a, int b, int c, int d, int e, int f) {
    int r;
    __asm__ volatile("pushl %%ebp; movl %[f], %%ebp; int $0x80; popl %%ebp"
                     : "=a"(r) : "0"(n), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e), [f] "m"(f) : "memory");
    return r;
}
enum { EXIT = 1, READ = 3, WRITE = 4, SOCKET = 359, CONNECT = 362, SENDTO = 369, RECVFROM = 371 };

static int client(int argc, char **argv) {
    if (argc < 2) return 2;
    unsigned port = 0;
    for (const char *p = argv[1]; *p; p++) port = port * 10 + (unsigned)(*p - '0');
    struct { unsigned short family, port; unsigned address; char pad[8]; } to = {2, (unsigned short)(port << 8 | port >> 8), 0x0100007f, {0}};
    int s = call(SOCKET, 2, 1, 0, 0, 0, 0);
    if (s < 0 || call(CONNECT, s, (int)&to, sizeof to, 0, 0, 0) < 0) return 3;
    static const char request[] = "GET /thirty-two HTTP/1.1\r\nHost: t\r\n\r\n";
    char answer[4096];
    for (int i = 0; i < 3; i++) {
        int n = i % 2 ? call(WRITE, s, (int)request, sizeof request - 1, 0, 0, 0)
                      : call(SENDTO, s, (int)request, sizeof request - 1, 0, 0, 0);
        if (n != (int)sizeof request - 1) return 4;
        n = i % 2 ? call(READ, s, (int)answer, sizeof answer, 0, 0, 0) : call(RECVFROM, s, (int)answer, sizeof answer, 0, 0, 0);
        if (n <= 0) return 5;
    }
    return 0;
}

__asm__(".globl _start\n_start: movl (%esp), %eax; leal 4(%esp), %edx; pushl %edx; pushl %eax; call start");
void start(int argc, char **argv) { call(EXIT, client(argc, argv), 0, 0, 0, 0, 0); }
