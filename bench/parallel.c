// A load for two CPUs: two threads take pieces of work from one queue until there are none.
// Prints the wall time in seconds.
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { PIECES = 96, ITEMS = 100000 };

static atomic_int taken;
static atomic_uint sum;

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void *work(void *unused) {
    uint32_t *items = malloc(ITEMS * sizeof *items);
    for (int piece; (piece = atomic_fetch_add(&taken, 1)) < PIECES;) {
        uint32_t seed = piece + 1;
        for (int i = 0; i < ITEMS; i++) items[i] = seed = seed * 1664525 + 1013904223;
        qsort(items, ITEMS, sizeof *items, ascending);
        uint32_t check = 0;
        for (int i = 0; i < ITEMS; i++) check = (check ^ items[i]) * 16777619;
        atomic_fetch_add(&sum, check);
    }
    free(items);
    return unused;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

int main(void) {
    double begin = now();
    pthread_t other;
    if (pthread_create(&other, 0, work, 0)) return 1;
    work(0);
    pthread_join(other, 0);
    printf("PARALLEL %.6f sum %u\n", now() - begin, sum);
    return 0;
}
