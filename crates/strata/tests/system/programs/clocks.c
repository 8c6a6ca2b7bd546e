// Time does not go backwards between processors: whoever reads a clock after somebody else
// has, reads no earlier time. And every processor knows its number.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

enum { READS = 200000, MOST = 64 };

static uint64_t tsc(void) {
    uint32_t low, high;
    __asm__ volatile("lfence; rdtsc; lfence" : "=a"(low), "=d"(high) :: "memory");
    return (uint64_t)high << 32 | low;
}

static uint64_t clock_of(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}
static uint64_t monotonic(void) { return clock_of(CLOCK_MONOTONIC); }
static uint64_t raw(void) { return clock_of(CLOCK_MONOTONIC_RAW); }

static uint64_t (*read_clock)(void);
static volatile uint64_t latest;
static uint64_t backwards, wrong_places;
static int processors;


static void *reader(void *argument) {
    int processor = (int)(intptr_t)argument;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    sched_setaffinity(0, sizeof set, &set);
    uint32_t low, high, number;
    __asm__ volatile("rdtscp" : "=a"(low), "=d"(high), "=c"(number));
    if ((int)(number & 0xfff) != processor || sched_getcpu() != processor) __sync_fetch_and_add(&wrong_places, 1);
    for (int i = 0; i < READS; i++) {
        uint64_t before = latest;
        uint64_t now = read_clock();
        if (now < before) __sync_fetch_and_add(&backwards, 1);
        uint64_t seen = latest;
        while (seen < now && !__sync_bool_compare_and_swap(&latest, seen, now)) seen = latest;
    }
    return 0;
}

int main(void) {
    struct {
        const char *name;
        uint64_t (*read)(void);
    } clocks[] = {{"TSC", tsc}, {"monotonic", monotonic}, {"raw", raw}};
    processors = sysconf(_SC_NPROCESSORS_ONLN);
    if (processors > MOST) processors = MOST;
    for (unsigned c = 0; c < sizeof clocks / sizeof *clocks; c++) {
        read_clock = clocks[c].read;
        latest = backwards = 0;
        pthread_t threads[MOST];
        for (intptr_t t = 0; t < processors; t++) pthread_create(&threads[t], 0, reader, (void *)t);
        for (int t = 0; t < processors; t++) pthread_join(threads[t], 0);
        printf("%s: %lu times backwards\n", clocks[c].name, (unsigned long)backwards);
    }
    printf("%lu threads elsewhere than they were put\n", (unsigned long)wrong_places);
    return 0;
}
