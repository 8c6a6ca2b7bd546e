// A server on three vsock ports, a process for each connection: on 1000 it echoes, on 1001 it reads
// to the end and then tells how many bytes there were and their sum, on 1002 it sends as many
// patterned bytes as it is asked for in one line. Says "ready" when it listens.
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ECHO = 1000, SUM = 1001, SOURCE = 1002, PORTS = 3 };

static char buffer[1 << 16];

static void check(long result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static void send_all(int to, const char *bytes, size_t length) {
    while (length > 0) {
        ssize_t done = write(to, bytes, length);
        check(done, "write");
        bytes += done;
        length -= (size_t)done;
    }
}

static void echo(int stream) {
    ssize_t length;
    while ((length = read(stream, buffer, sizeof buffer)) > 0) send_all(stream, buffer, (size_t)length);
    check(length, "read");
}

static void sum(int stream) {
    uint64_t count = 0, sum = 0;
    ssize_t length;
    while ((length = read(stream, buffer, sizeof buffer)) > 0) {
        for (ssize_t i = 0; i < length; i++) sum = sum * 31 + (unsigned char)buffer[i];
        count += (uint64_t)length;
    }
    check(length, "read");
    char line[64];
    int printed = snprintf(line, sizeof line, "%llu %llu\n", (unsigned long long)count,
                           (unsigned long long)sum);
    send_all(stream, line, (size_t)printed);
}

static void source(int stream) {
    char line[32] = {0};
    for (size_t at = 0; at < sizeof line - 1 && (at == 0 || line[at - 1] != '\n'); at++)
        check(read(stream, line + at, 1), "read");
    uint64_t left = strtoull(line, 0, 10), at = 0;
    while (left > 0) {
        size_t part = left < sizeof buffer ? (size_t)left : sizeof buffer;
        for (size_t i = 0; i < part; i++, at++) buffer[i] = (char)(at * 7 + at / 251);
        send_all(stream, buffer, part);
        left -= part;
    }
}

int main(void) {
    struct pollfd listeners[PORTS];
    signal(SIGCHLD, SIG_IGN);
    for (int i = 0; i < PORTS; i++) {
        struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = ECHO + (unsigned)i};
        address.svm_cid = VMADDR_CID_ANY;
        int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
        check(listener, "socket");
        check(bind(listener, (struct sockaddr *)&address, sizeof address), "bind");
        check(listen(listener, 64), "listen");
        listeners[i] = (struct pollfd){.fd = listener, .events = POLLIN};
    }
    puts("ready");
    fflush(stdout);
    for (;;) {
        check(poll(listeners, PORTS, -1), "poll");
        for (int i = 0; i < PORTS; i++) {
            if (!(listeners[i].revents & POLLIN)) continue;
            int stream = accept(listeners[i].fd, 0, 0);
            check(stream, "accept");
            pid_t child = fork();
            check(child, "fork");
            if (child == 0) {
                (i == 0 ? echo : i == 1 ? sum : source)(stream);
                // The ends of both directions one by one.
                shutdown(stream, SHUT_WR);
                _exit(0);
            }
            close(stream);
        }
    }
}
