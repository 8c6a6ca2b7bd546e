// Processes under stress: fork, exec, pipes, shared memory, threads of one address space.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static void must(int condition, const char *what, long round) {
    if (condition) return;
    printf("wrong: %s in round %ld\n", what, round);
    fflush(stdout);
    _exit(1);
}

// Each child sees the parent's memory as it was, and changes only its own copy.
static void forks(void) {
    enum { PAGES = 64 };
    unsigned char *memory = mmap(0, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 300; i++) {
        for (int p = 0; p < PAGES; p++) memory[p * 4096 + i] = i ^ p;
        pid_t child = fork();
        if (!child) {
            int wrong = 0;
            for (int p = 0; p < PAGES; p++) {
                wrong += memory[p * 4096 + i] != (unsigned char)(i ^ p);
                memory[p * 4096 + i] = 0xaa;
            }
            _exit(wrong ? 1 : i & 63);
        }
        int status;
        waitpid(child, &status, 0);
        must(WIFEXITED(status) && WEXITSTATUS(status) == (i & 63), "child", i);
        for (int p = 0; p < PAGES; p++) must(memory[p * 4096 + i] == (unsigned char)(i ^ p), "parent", i);
    }
    puts("forks");
}

// 4 MiB through three processes, each of which changes every byte.
static void pipeline(void) {
    enum { STAGES = 3, SIZE = 4 << 20 };
    int in = -1, feed[2];
    must(pipe(feed) == 0, "pipe", 0);
    if (!fork()) {
        close(feed[0]);
        static unsigned char block[65536];
        for (size_t sent = 0; sent < SIZE; sent += sizeof block) {
            for (size_t i = 0; i < sizeof block; i++) block[i] = (sent + i) * 31 >> 3;
            for (size_t at = 0; at < sizeof block;) at += write(feed[1], block + at, sizeof block - at);
        }
        _exit(0);
    }
    close(feed[1]);
    in = feed[0];
    for (int stage = 0; stage < STAGES; stage++) {
        int next[2];
        must(pipe(next) == 0, "pipe", stage);
        if (!fork()) {
            close(next[0]);
            unsigned char block[5000];
            ssize_t n;
            while ((n = read(in, block, sizeof block)) > 0) {
                for (ssize_t i = 0; i < n; i++) block[i] = block[i] * 5 + stage;
                for (ssize_t at = 0; at < n;) at += write(next[1], block + at, n - at);
            }
            _exit(0);
        }
        close(in);
        close(next[1]);
        in = next[0];
    }
    uint64_t hash = 0xcbf29ce484222325u;
    size_t size = 0;
    unsigned char block[7777];
    ssize_t n;
    while ((n = read(in, block, sizeof block)) > 0) {
        for (ssize_t i = 0; i < n; i++) hash = (hash ^ block[i]) * 0x100000001b3u;
        size += n;
    }
    while (wait(0) > 0) {}
    printf("pipeline %zu %016lx\n", size, hash);
}

static void execs(const char *self) {
    for (int i = 0; i < 100; i++) {
        pid_t child = fork();
        if (!child) {
            char number[16];
            snprintf(number, sizeof number, "%d", i);
            execl(self, self, "child", number, (char *)0);
            _exit(99);
        }
        int status;
        waitpid(child, &status, 0);
        must(WIFEXITED(status) && WEXITSTATUS(status) == i, "exec", i);
    }
    puts("execs");
}

static volatile long shared;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread long own;
static void *thread(void *argument) {
    long id = (long)argument;
    for (int i = 0; i < 20000; i++) {
        pthread_mutex_lock(&lock);
        shared++;
        pthread_mutex_unlock(&lock);
        own += id;
    }
    return (void *)own;
}
static void threads(void) {
    pthread_t all[8];
    for (long i = 0; i < 8; i++) pthread_create(&all[i], 0, thread, (void *)i);
    long sum = 0;
    for (int i = 0; i < 8; i++) {
        void *result;
        pthread_join(all[i], &result);
        sum += (long)result;
    }
    printf("threads %ld %ld\n", shared, sum);
}

int main(int count, char **arguments) {
    if (count == 3 && !strcmp(arguments[1], "child")) return atoi(arguments[2]);
    setvbuf(stdout, 0, _IOLBF, 0);
    forks();
    pipeline();
    execs("/proc/self/exe");
    threads();
    return 0;
}
