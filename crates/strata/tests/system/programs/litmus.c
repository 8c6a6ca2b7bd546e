// Memory order, instruction by instruction: the litmus tests of x86-TSO (Owens, Sarkar and
// Sewell 2009), each with the outcomes that it forbids. Prints how often those were seen;
// with an argument also how often the allowed ones were that show a processor's store buffer.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { BATCH = 256, THREADS = 4 };

// One instance of a test: variables apart from each other, and what the threads read.
struct instance {
    _Alignas(64) volatile int x;
    _Alignas(64) volatile int y;
    _Alignas(64) int r[THREADS][2];
};

static struct instance instances[BATCH];
static long batches;
static _Alignas(64) volatile unsigned arrived;

#define FENCE __asm__ volatile("mfence" ::: "memory")
static inline void set(volatile int *p, int v) { __asm__ volatile("movl %1, %0" : "=m"(*p) : "r"(v) : "memory"); }
static inline int get(volatile int *p) { int v; __asm__ volatile("movl %1, %0" : "=r"(v) : "m"(*p) : "memory"); return v; }
static inline void swap(volatile int *p, int v) { __asm__ volatile("xchgl %1, %0" : "+m"(*p), "+r"(v) :: "memory"); }
static inline void locked(void) { __asm__ volatile("lock addl $0, (%%rsp)" ::: "memory", "cc"); }

// All threads are here at once, or nearly.
static void meet(unsigned round, unsigned threads) {
    __sync_fetch_and_add(&arrived, 1);
    for (unsigned spins = 0; (int)(arrived - round * threads) < 0; spins++)
        if (spins > 2000) sched_yield();
}

typedef void step(struct instance *i, int thread);
struct test {
    const char *name;
    int threads;
    step *run;
    // 0: neither forbidden nor worth counting; 1: forbidden; 2: shows the store buffer.
    int (*judge)(struct instance *i);
};

#define R(t, n) (i->r[t][n])
#define OTHER(t) ((t) ? &i->x : &i->y)
#define OWN(t) ((t) ? &i->y : &i->x)

static void sb(struct instance *i, int t) { set(OWN(t), 1); R(t, 0) = get(OTHER(t)); }
static void sb_fence(struct instance *i, int t) { set(OWN(t), 1); FENCE; R(t, 0) = get(OTHER(t)); }
static void sb_locked(struct instance *i, int t) { set(OWN(t), 1); locked(); R(t, 0) = get(OTHER(t)); }
static void sb_swap(struct instance *i, int t) { swap(OWN(t), 1); R(t, 0) = get(OTHER(t)); }
static int both_zero(struct instance *i) { return R(0, 0) == 0 && R(1, 0) == 0; }
static int both_zero_allowed(struct instance *i) { return both_zero(i) ? 2 : 0; }

static void sb_cpuid(struct instance *i, int t) {
    set(OWN(t), 1);
    unsigned a = 0, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) :: "memory");
    R(t, 0) = get(OTHER(t));
}

// Each sees its own store first, through its store buffer.
static void sb_own(struct instance *i, int t) { set(OWN(t), 1); R(t, 1) = get(OWN(t)); R(t, 0) = get(OTHER(t)); }
static int own_lost(struct instance *i) { return R(0, 1) != 1 || R(1, 1) != 1 ? 1 : both_zero_allowed(i); }

static void mp(struct instance *i, int t) {
    if (t) { R(1, 0) = get(&i->y); R(1, 1) = get(&i->x); }
    else { set(&i->x, 1); set(&i->y, 1); }
}
static int mp_bad(struct instance *i) { return R(1, 0) == 1 && R(1, 1) == 0; }

static void lb(struct instance *i, int t) { R(t, 0) = get(OTHER(t)); set(OWN(t), 1); }
static int lb_bad(struct instance *i) { return R(0, 0) == 1 && R(1, 0) == 1; }

static void r(struct instance *i, int t) {
    if (t) { set(&i->y, 2); R(1, 0) = get(&i->x); }
    else { set(&i->x, 1); set(&i->y, 1); }
}
static void r_fence(struct instance *i, int t) {
    if (t) { set(&i->y, 2); FENCE; R(1, 0) = get(&i->x); }
    else { set(&i->x, 1); FENCE; set(&i->y, 1); }
}
static int r_seen(struct instance *i) { return i->y == 2 && R(1, 0) == 0; }
static int r_allowed(struct instance *i) { return r_seen(i) ? 2 : 0; }

static void two_plus_two(struct instance *i, int t) { set(OWN(t), 1); set(OTHER(t), 2); }
static int two_bad(struct instance *i) { return i->x == 1 && i->y == 1; }

static void s(struct instance *i, int t) {
    if (t) { R(1, 0) = get(&i->y); set(&i->x, 1); }
    else { set(&i->x, 2); set(&i->y, 1); }
}
static int s_bad(struct instance *i) { return R(1, 0) == 1 && i->x == 2; }

static void iriw(struct instance *i, int t) {
    switch (t) {
    case 0: set(&i->x, 1); break;
    case 1: set(&i->y, 1); break;
    case 2: R(2, 0) = get(&i->x); R(2, 1) = get(&i->y); break;
    default: R(3, 0) = get(&i->y); R(3, 1) = get(&i->x);
    }
}
static int iriw_bad(struct instance *i) { return R(2, 0) && !R(2, 1) && R(3, 0) && !R(3, 1); }

static void wrc(struct instance *i, int t) {
    switch (t) {
    case 0: set(&i->x, 1); break;
    case 1: R(1, 0) = get(&i->x); set(&i->y, 1); break;
    default: R(2, 0) = get(&i->y); R(2, 1) = get(&i->x);
    }
}
static int wrc_bad(struct instance *i) { return R(1, 0) && R(2, 0) && !R(2, 1); }

static const struct test tests[] = {
    {"SB", 2, sb, both_zero_allowed},
    {"SB with a read of the own store", 2, sb_own, own_lost},
    {"SB with MFENCE", 2, sb_fence, both_zero},
    {"SB with LOCK ADD", 2, sb_locked, both_zero},
    {"SB with XCHG", 2, sb_swap, both_zero},
    {"SB with CPUID", 2, sb_cpuid, both_zero},
    {"MP", 2, mp, mp_bad},
    {"LB", 2, lb, lb_bad},
    {"R", 2, r, r_allowed},
    {"R with MFENCE", 2, r_fence, r_seen},
    {"2+2W", 2, two_plus_two, two_bad},
    {"S", 2, s, s_bad},
    {"WRC", 3, wrc, wrc_bad},
    {"IRIW", 4, iriw, iriw_bad},
};

static const struct test *current;
static long counts[3];

static void *thread(void *argument) {
    int me = (int)(intptr_t)argument;
    const struct test *test = current;
    unsigned round = 0, random = 2463534242u + me * 977;
    for (long b = 0; b < batches; b++) {
        for (int n = 0; n < BATCH; n++) {
            meet(++round, test->threads);
            random ^= random << 13, random ^= random >> 17, random ^= random << 5;
            for (volatile unsigned wait = random & 15; wait; wait--);
            test->run(&instances[n], me);
        }
        meet(++round, test->threads);
        if (me == 0) {
            for (int n = 0; n < BATCH; n++) {
                counts[test->judge(&instances[n])]++;
                instances[n] = (struct instance){0};
            }
        }
        meet(++round, test->threads);
    }
    return 0;
}

int main(int argc, char **argv) {
    long total = argc > 1 ? atol(argv[1]) : 40;
    for (unsigned t = 0; t < sizeof tests / sizeof *tests; t++) {
        current = &tests[t];
        batches = current->run == sb_cpuid || current->threads > 2 ? total / 8 + 1 : total;
        arrived = 0;
        counts[0] = counts[1] = counts[2] = 0;
        pthread_t threads[THREADS];
        for (intptr_t n = 0; n < current->threads; n++) pthread_create(&threads[n], 0, thread, (void *)n);
        for (int n = 0; n < current->threads; n++) pthread_join(threads[n], 0);
        printf("%s: %ld forbidden", current->name, counts[1]);
        if (argc > 1) printf(", %ld of %ld through the store buffer", counts[2], batches * BATCH);
        puts("");
    }
    return 0;
}
