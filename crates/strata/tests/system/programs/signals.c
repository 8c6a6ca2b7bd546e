// A hundred thousand signals: faults at instructions whose registers the handler checks and
// changes, and timers that interrupt anywhere. Registers, flags and vector state must survive.
#define _GNU_SOURCE
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

enum { SEGV = 40000, FPE = 30000, ILL = 5000, TRAP = 5000, SELF = 18000, ALARMS = 2000 };

static volatile long segv, fpe, ill, traps, alarms;
static char *forbidden;
static void fail(const char *what, long a, long b) {
    printf("wrong: %s %lx %lx\n", what, a, b);
    fflush(stdout);
    _exit(1);
}
// clobbers what a handler may clobber
static void scribble(void) {
    volatile double d = 1.0;
    for (int i = 1; i < 8; i++) d = d / i + 0.5;
    volatile long double l = d;
    l = l * l;
    __asm__ volatile("pcmpeqd %%xmm0, %%xmm0\n\tmovdqa %%xmm0, %%xmm7\n\tmovdqa %%xmm0, %%xmm15"
                     : : : "xmm0", "xmm7", "xmm15");
}
static void on_fault(int signal, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    scribble();
    switch (signal) {
    case SIGSEGV:
        if (info->si_addr != forbidden + (segv & 4095)) fail("address", (long)info->si_addr, segv);
        if (r[REG_R12] != segv || r[REG_R9] != ~segv || r[REG_RSI] != segv * 3) fail("segv", r[REG_R12], segv);
        if (r[REG_TRAPNO] != 14 || (r[REG_ERR] & ~1) != (segv & 1 ? 6 : 4)) fail("code", r[REG_TRAPNO], r[REG_ERR]);
        r[REG_RAX] = segv + 7;
        r[REG_RIP] = r[REG_R13];
        segv++;
        break;
    case SIGFPE:
        if (info->si_code != FPE_INTDIV || r[REG_R12] != fpe || r[REG_RDX] != 0 || r[REG_RAX] != fpe + 100) fail("fpe", r[REG_R12], fpe);
        r[REG_RCX] = fpe + 1;
        r[REG_RIP] = r[REG_R13];
        fpe++;
        break;
    case SIGILL:
        if (r[REG_R12] != ill) fail("ill", r[REG_R12], ill);
        r[REG_RIP] += 2;
        ill++;
        break;
    case SIGTRAP:
        if (r[REG_R12] != traps) fail("trap", r[REG_R12], traps);
        traps++;
        break;
    }
}
static void on_alarm(int signal) {
    (void)signal;
    scribble();
    alarms++;
}

static void faults(void) {
    forbidden = mmap(0, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (long i = 0; i < SEGV; i++) {
        long result, address = (long)(forbidden + (i & 4095)), flags;
        __asm__ volatile(
            "mov %3, %%r12\n\tmov %3, %%r9\n\tnot %%r9\n\tlea (%3,%3,2), %%rsi\n\tlea 1f(%%rip), %%r13\n\t"
            "cmp $0, %%r12\n\tstc\n\t"
            "test $1, %%r12b\n\tjnz 2f\n\tstc\n\tmovzbl (%2), %%eax\n\tjmp 1f\n2:\n\tstc\n\tmovb $1, (%2)\n"
            "1:\n\tpushfq\n\tpop %1"
            : "=&a"(result), "=&r"(flags) : "r"(address), "r"(i) : "r12", "r13", "r9", "rsi", "memory", "cc");
        if (result != i + 7 || !(flags & 1)) fail("after segv", result, flags);
    }
    for (long i = 0; i < FPE; i++) {
        long counted;
        __asm__ volatile("mov %1, %%r12\n\tlea 1f(%%rip), %%r13\n\tlea 100(%1), %%rax\n\txor %%edx, %%edx\n\t"
                         "xor %%ecx, %%ecx\n\tdivq %%rcx\n1:\n\tmov %%rcx, %0"
                         : "=r"(counted) : "r"(i) : "rax", "rcx", "rdx", "r12", "r13", "cc");
        if (counted != i + 1) fail("after fpe", counted, i);
    }
    for (long i = 0; i < ILL; i++) __asm__ volatile("mov %0, %%r12\n\tud2" : : "r"(i) : "r12");
    for (long i = 0; i < TRAP; i++) __asm__ volatile("mov %0, %%r12\n\tint3" : : "r"(i) : "r12");
}

// Arithmetic in general, x87 and SSE registers while alarms come in.
static uint64_t work(long double *real, double *vector) {
    uint64_t a = 1, b = 2, c = 3, d = 4;
    long double x = 1.0L;
    double v = 1.0;
    for (int i = 1; i < 20000; i++) {
        a = a * 6364136223846793005u + b;
        b ^= a >> 29;
        c += b * 3 + (a < c);
        d = (d << 7 | d >> 57) ^ c;
        x = x * 1.0000001L + 1.0L / i;
        v = v * 1.0000001 + 1.0 / i;
    }
    *real = x;
    *vector = v;
    return a ^ b ^ c ^ d;
}

int main(void) {
    stack_t stack = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16};
    sigaltstack(&stack, 0);
    struct sigaction fault = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaction(SIGSEGV, &fault, 0);
    sigaction(SIGFPE, &fault, 0);
    sigaction(SIGILL, &fault, 0);
    sigaction(SIGTRAP, &fault, 0);
    signal(SIGALRM, on_alarm);

    faults();
    printf("faults %ld %ld %ld %ld\n", segv, fpe, ill, traps);

    for (int i = 0; i < SELF; i++) kill(getpid(), SIGALRM);
    printf("sent %ld\n", alarms);

    long double real, real2;
    double vector, vector2;
    uint64_t expected = work(&real, &vector);
    alarms = 0;
    struct itimerval timer = {{0, 100}, {0, 100}};
    setitimer(ITIMER_REAL, &timer, 0);
    long rounds = 0;
    while (alarms < ALARMS) {
        uint64_t result = work(&real2, &vector2);
        if (result != expected || real2 != real || vector2 != vector) fail("under alarms", result, rounds);
        rounds++;
    }
    memset(&timer, 0, sizeof timer);
    setitimer(ITIMER_REAL, &timer, 0);
    printf("alarms, %016lx %.15Lf %.15f\n", expected, real, vector);

    // a jump out of a handler
    static sigjmp_buf back;
    volatile int jumps = 0;
    if (sigsetjmp(back, 1) < 1000) {
        jumps++;
        if (jumps < 1000) siglongjmp(back, jumps);
    }
    printf("jumps %d\n", jumps);
    return 0;
}
