// Frames on eth0 as they are, and datagrams. `send` sends those on its input, in hexadecimal, one a
// line. `hear` says in the background which marks come in: what is between "mark:" and ";" in
// a frame, one a line, up to "end". `echo PORT` answers each datagram in the background with what is
// in it.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netpacket/packet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char buffer[1 << 16];

static int check(long result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return (int)result;
}

// The caller goes on when the socket is ready.
static void go_on_in_background(void) {
    if (check(fork(), "fork") > 0) exit(0);
}

static int frames(void) {
    int card = check(socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL)), "socket");
    struct sockaddr_ll place = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL)};
    place.sll_ifindex = (int)if_nametoindex("eth0");
    check(bind(card, (struct sockaddr *)&place, sizeof place), "bind");
    return card;
}

static void hear(void) {
    int card = frames();
    go_on_in_background();
    for (;;) {
        struct sockaddr_ll from;
        socklen_t size = sizeof from;
        int length = check(
            recvfrom(card, buffer, sizeof buffer - 1, 0, (struct sockaddr *)&from, &size), "recvfrom");
        if (from.sll_pkttype == PACKET_OUTGOING) continue;
        buffer[length] = 0;
        char *mark = memmem(buffer, (size_t)length, "mark:", 5);
        char *end = mark ? strchr(mark, ';') : 0;
        if (!end) continue;
        *end = 0;
        printf("%s\n", mark + 5);
        fflush(stdout);
        if (strcmp(mark + 5, "end") == 0) return;
    }
}

static void send_all(void) {
    int card = frames();
    char line[4096];
    while (fgets(line, sizeof line, stdin)) {
        size_t length = strcspn(line, "\n") / 2;
        for (size_t i = 0; i < length; i++)
            sscanf(line + 2 * i, "%2hhx", (unsigned char *)buffer + i);
        check(send(card, buffer, length, 0), "send");
    }
}

static void echo(int port) {
    int server = check(socket(AF_INET6, SOCK_DGRAM, 0), "socket");
    struct sockaddr_in6 here = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
    check(bind(server, (struct sockaddr *)&here, sizeof here), "bind");
    go_on_in_background();
    for (;;) {
        struct sockaddr_in6 from;
        socklen_t size = sizeof from;
        int length = check(
            recvfrom(server, buffer, sizeof buffer, 0, (struct sockaddr *)&from, &size), "recvfrom");
        check(sendto(server, buffer, (size_t)length, 0, (struct sockaddr *)&from, size), "sendto");
    }
}

int main(int count, char **words) {
    if (count == 2 && strcmp(words[1], "hear") == 0) {
        hear();
    } else if (count == 3 && strcmp(words[1], "echo") == 0) {
        echo(atoi(words[2]));
    } else if (count == 2 && strcmp(words[1], "send") == 0) {
        send_all();
    } else {
        return 2;
    }
    return 0;
}
