// Atomic instructions of every width under contention, within a page and across two: no
// update is lost, and nobody sees half of one.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

enum { THREADS = 4, ROUNDS = 20000, CROSSING_ROUNDS = 2000 };

static unsigned char *pages; // two
static pthread_barrier_t start;

struct job {
    void (*work)(void *at, int thread, int rounds);
    void *at;
    int rounds;
};
static struct job job;

static void *thread(void *argument) {
    pthread_barrier_wait(&start);
    job.work(job.at, (int)(intptr_t)argument, job.rounds);
    return 0;
}

static void together(struct job j) {
    job = j;
    pthread_t threads[THREADS];
    for (intptr_t t = 0; t < THREADS; t++) pthread_create(&threads[t], 0, thread, (void *)t);
    for (int t = 0; t < THREADS; t++) pthread_join(threads[t], 0);
}

#define WIDTH(type, s, letter)                                                                   \
    static void add##s(void *at, int t, int n) {                                                 \
        for (; n--; t++) __asm__ volatile("lock add" letter " %1, %0" : "+m"(*(type *)at) : "r"((type)3) : "cc", "memory"); \
    }                                                                                            \
    static void inc##s(void *at, int t, int n) {                                                 \
        for (; n--; t++) __asm__ volatile("lock inc" letter " %0" : "+m"(*(type *)at) :: "cc", "memory"); \
    }                                                                                            \
    static void xadd##s(void *at, int t, int n) {                                                \
        for (; n--; t++) {                                                                       \
            type v = 5;                                                                          \
            __asm__ volatile("lock xadd" letter " %1, %0" : "+m"(*(type *)at), "+q"(v) :: "cc", "memory"); \
        }                                                                                        \
    }                                                                                            \
    static void cmpxchg##s(void *at, int t, int n) {                                             \
        for (; n--; t++) {                                                                       \
            type old = 0;                                                                        \
            unsigned char done;                                                                  \
            do {                                                                                 \
                type new = old + 7;                                                              \
                __asm__ volatile("lock cmpxchg" letter " %3, %0; sete %2"                        \
                                 : "+m"(*(type *)at), "+a"(old), "=q"(done) : "q"(new) : "cc", "memory"); \
            } while (!done);                                                                     \
        }                                                                                        \
    }                                                                                            \
    static void not##s(void *at, int t, int n) {                                                 \
        for (n &= ~1; n--; t++) __asm__ volatile("lock not" letter " %0" : "+m"(*(type *)at) :: "memory"); \
    }                                                                                            \
    /* Whoever takes the token out puts one more back. */                                        \
    static void xchg##s(void *at, int t, int n) {                                                \
        for (; n--; t++) {                                                                       \
            type v;                                                                              \
            do {                                                                                 \
                v = 0;                                                                           \
                __asm__ volatile("xchg" letter " %1, %0" : "+m"(*(type *)at), "+q"(v) :: "memory"); \
            } while (!v);                                                                        \
            v = (type)(v + 1) ? (type)(v + 1) : 1;                                               \
            __asm__ volatile("xchg" letter " %1, %0" : "+m"(*(type *)at), "+q"(v) :: "memory");   \
        }                                                                                        \
    }                                                                                            \
    static void all##s(const char *where, unsigned char *at, int rounds) {                       \
        struct { const char *name; void (*work)(void *, int, int); type first, last; } ops[] = { \
            {"add", add##s, 1, (type)(1 + 3 * THREADS * rounds)},                                \
            {"inc", inc##s, 1, (type)(1 + THREADS * rounds)},                                    \
            {"xadd", xadd##s, 1, (type)(1 + 5 * THREADS * rounds)},                              \
            {"cmpxchg", cmpxchg##s, 1, (type)(1 + 7 * THREADS * rounds)},                        \
            {"not", not##s, 1, 1},                                                               \
            {"xchg", xchg##s, 1, sizeof(type) > 2 ? (type)(1 + THREADS * rounds) : 0},           \
        };                                                                                       \
        for (unsigned i = 0; i < sizeof ops / sizeof *ops; i++) {                                \
            memcpy(at, &ops[i].first, sizeof(type));                                             \
            together((struct job){ops[i].work, at, rounds});                                     \
            type last;                                                                           \
            memcpy(&last, at, sizeof last);                                                      \
            int right = ops[i].last ? last == ops[i].last : last != 0;                           \
            printf("%s %d %s: %s\n", where, (int)sizeof(type) * 8, ops[i].name, right ? "exact" : "WRONG"); \
        }                                                                                        \
    }

WIDTH(uint8_t, 8, "b")
WIDTH(uint16_t, 16, "w")
WIDTH(uint32_t, 32, "l")
WIDTH(uint64_t, 64, "q")

static void bits(void *at, int t, int n) {
    // a lock of one bit around a plain counter behind it
    for (; n--; t++) {
        unsigned char taken;
        do {
            __asm__ volatile("lock btsl $5, %0; setc %1" : "+m"(*(uint32_t *)at), "=q"(taken) :: "cc", "memory");
        } while (taken);
        ((volatile uint32_t *)at)[16]++;
        __asm__ volatile("lock btrl $5, %0" : "+m"(*(uint32_t *)at) :: "cc", "memory");
    }
}

static void pair8(void *at, int t, int n) {
    for (; n--; t++) {
        uint32_t a = 0, d = 0;
        unsigned char done;
        do {
            __asm__ volatile("lock cmpxchg8b %0; setz %3"
                             : "+m"(*(uint64_t *)at), "+a"(a), "+d"(d), "=q"(done) : "b"(a + 1), "c"(d - 1) : "cc", "memory");
        } while (!done);
    }
}

static void pair16(void *at, int t, int n) {
    for (; n--; t++) {
        uint64_t a = 0, d = 0;
        unsigned char done;
        do {
            __asm__ volatile("lock cmpxchg16b %0; setz %3"
                             : "+m"(*(unsigned __int128 *)at), "+a"(a), "+d"(d), "=q"(done) : "b"(a + 1), "c"(d - 1) : "cc", "memory");
        } while (!done);
    }
}

int main(void) {
    pages = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pthread_barrier_init(&start, 0, THREADS);
    all8("within a page", pages + 64, ROUNDS);
    all16("within a page", pages + 64, ROUNDS);
    all32("within a page", pages + 64, ROUNDS);
    all64("within a page", pages + 64, ROUNDS);
    all32("across lines", pages + 126, CROSSING_ROUNDS);
    all64("across lines", pages + 123, CROSSING_ROUNDS);
    all16("across pages", pages + 4095, CROSSING_ROUNDS);
    all32("across pages", pages + 4093, CROSSING_ROUNDS);
    all64("across pages", pages + 4090, CROSSING_ROUNDS);

    memset(pages, 0, 8192);
    together((struct job){bits, pages, ROUNDS});
    printf("bit lock: %s\n", *(uint32_t *)(pages + 64) == THREADS * ROUNDS ? "exact" : "WRONG");
    uint32_t halves[2];
    for (int i = 0; i < 2; i++) {
        unsigned char *at = pages + (i ? 4092 : 256);
        int rounds = i ? CROSSING_ROUNDS : ROUNDS;
        memset(pages, 0, 8192);
        together((struct job){pair8, at, rounds});
        memcpy(halves, at, sizeof halves);
        int right = halves[0] == THREADS * (uint32_t)rounds && halves[1] == -halves[0];
        printf("cmpxchg8b %s: %s\n", i ? "across pages" : "within a page", right ? "exact" : "WRONG");
    }
    uint64_t wide[2];
    memset(pages, 0, 8192);
    together((struct job){pair16, pages + 256, ROUNDS});
    memcpy(wide, pages + 256, sizeof wide);
    printf("cmpxchg16b: %s\n", wide[0] == THREADS * ROUNDS && wide[1] == -wide[0] ? "exact" : "WRONG");
    return 0;
}
