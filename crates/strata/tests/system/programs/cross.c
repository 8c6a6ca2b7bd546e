// Code that one thread changes and another runs, as the manual allows it (Intel SDM vol. 3A
// §8.1.3), and pages that one thread takes away from another.
#define _GNU_SOURCE
#include <linux/membarrier.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ROUNDS = 3000, PATCHES = 1500, SHOOTDOWNS = 1500 };

static unsigned char *code;  // two pages to run
static unsigned char *alias; // the same, to write
static volatile unsigned turn, reply;
static volatile int over;

static void serialize(void) {
    unsigned a = 0, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) :: "memory");
}

static void must(int condition, const char *what, long round) {
    if (condition) return;
    printf("wrong: %s in round %ld\n", what, round);
    fflush(stdout);
    _exit(1);
}

typedef unsigned function(void);

// mov eax, value; ret
static void assemble(unsigned char *at, unsigned value) {
    unsigned char bytes[6] = {0xb8, 0, 0, 0, 0, 0xc3};
    memcpy(bytes + 1, &value, 4);
    memcpy(at, bytes, sizeof bytes);
    __asm__ volatile("" ::: "memory");
}

// One store of four bytes, which the compiler leaves where it is.
static void store(unsigned char *at, unsigned value) {
    __asm__ volatile("movl %1, %0" : "=m"(*(unsigned *)at) : "r"(value) : "memory");
}

// --- a flag is set after the code is changed; whoever sees it serializes and runs it ---

static void *runner(void *where) {
    function *run = (function *)where;
    for (unsigned round = 1; round <= ROUNDS; round++) {
        while (turn != round) __builtin_ia32_pause();
        serialize();
        must(run() == round, "stale code after a flag", round);
        // data in the same page, stored by both
        ((volatile unsigned *)where)[64]++;
        reply = round;
    }
    return 0;
}

static void flagged(unsigned offset) {
    turn = reply = 0;
    assemble(alias + offset, 0);
    ((volatile unsigned *)(alias + offset))[64] = 0;
    pthread_t thread;
    pthread_create(&thread, 0, runner, code + offset);
    for (unsigned round = 1; round <= ROUNDS; round++) {
        unsigned char *to = round & 1 ? alias : code;
        store(to + offset + 1, round);
        turn = round;
        while (reply != round) __builtin_ia32_pause();
        must(((volatile unsigned *)(alias + offset))[64] == round, "data beside code", round);
    }
    pthread_join(thread, 0);
}

// --- the new bytes themselves are the flag ---

static void *watcher(void *where) {
    function *run = (function *)where;
    for (unsigned round = 1; round <= ROUNDS; round++) {
        while (*(volatile unsigned *)((char *)where + 1) != round) __builtin_ia32_pause();
        serialize();
        must(run() == round, "stale code after its bytes were read", round);
        reply = round;
    }
    return 0;
}

static void watched(void) {
    reply = 0;
    assemble(alias + 3, 0); // the value is aligned
    pthread_t thread;
    pthread_create(&thread, 0, watcher, code + 3);
    for (unsigned round = 1; round <= ROUNDS; round++) {
        store(alias + 4, round);
        while (reply != round) __builtin_ia32_pause();
    }
    pthread_join(thread, 0);
}

// --- code is patched by way of INT3 while another thread runs it all the time ---

static void on_trap(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info;
    // as if the patched instruction, five bytes, had not been there
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    registers[REG_RIP] += 4;
    registers[REG_RAX] = 0;
}

static void *looper(void *where) {
    function *run = (function *)where;
    unsigned long calls = 0;
    while (!over) {
        unsigned value = run();
        unsigned low = value & 0xffff;
        must(value == 0 || low == (value >> 16 ^ 0xffff), "a torn instruction", calls);
        calls++;
    }
    return 0;
}

static void sync_cores(void) {
    must(syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0) == 0, "membarrier", 0);
}

static void poked(void) {
    syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0);
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO};
    sigaction(SIGTRAP, &action, 0);
    assemble(alias + 4094, 0xffff); // across the pages
    over = 0;
    pthread_t threads[2];
    for (int t = 0; t < 2; t++) pthread_create(&threads[t], 0, looper, code + 4094);
    for (unsigned patch = 1; patch <= PATCHES; patch++) {
        unsigned value = patch << 16 | (patch ^ 0xffff);
        *(volatile unsigned char *)(alias + 4094) = 0xcc;
        sync_cores();
        store(alias + 4095, value);
        sync_cores();
        *(volatile unsigned char *)(alias + 4094) = 0xb8;
        sync_cores();
    }
    over = 1;
    for (int t = 0; t < 2; t++) pthread_join(threads[t], 0);
}

// --- new functions are published by pointer, at places that held others before ---

static function *volatile published;

static void *caller(void *unused) {
    unsigned last = 0;
    while (!over) {
        function *run = published;
        unsigned value = run();
        must(value >= last, "an older function", value);
        last = value;
    }
    return unused;
}

static void fresh(void) {
    enum { SLOTS = 64, MANY = 20000 };
    memset(alias, 0xcc, 8192);
    assemble(alias, 0);
    published = (function *)code;
    over = 0;
    pthread_t threads[2];
    for (int t = 0; t < 2; t++) pthread_create(&threads[t], 0, caller, 0);
    for (unsigned n = 1; n <= MANY; n++) {
        unsigned char *slot = alias + n % SLOTS * 128;
        if (n < SLOTS) {
            assemble(slot, n);
        } else {
            // nobody runs what is reused
            if (n % SLOTS == 0) sync_cores();
            continue;
        }
        published = (function *)(code + (slot - alias));
    }
    over = 1;
    for (int t = 0; t < 2; t++) pthread_join(threads[t], 0);
}

// --- a page is taken away: once mprotect has returned nobody can use it ---

static sigjmp_buf fault;
static void on_fault(int signal) { siglongjmp(fault, signal); }

static volatile unsigned char *target;

static void *user(void *unused) {
    for (unsigned round = 1; round <= SHOOTDOWNS; round++) {
        volatile unsigned uses = 0;
        if (sigsetjmp(fault, 1) == 0) {
            for (;;) {
                int gone = turn == round;
                if (round & 1) target[uses % 4096] = 1;
                else (void)target[uses % 4096];
                must(!gone, "a page that was taken away", round);
                uses++;
            }
        }
        while (turn != round) __builtin_ia32_pause();
        reply = round;
        while (turn == round) __builtin_ia32_pause();
    }
    return unused;
}

static void taken_away(void) {
    signal(SIGSEGV, on_fault);
    target = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    turn = reply = 0;
    pthread_t thread;
    pthread_create(&thread, 0, user, 0);
    for (unsigned round = 1; round <= SHOOTDOWNS; round++) {
        mprotect((void *)target, 4096, round & 1 ? PROT_READ : PROT_NONE);
        turn = round;
        while (reply != round) __builtin_ia32_pause();
        mprotect((void *)target, 4096, PROT_READ | PROT_WRITE);
        turn = 0;
    }
    pthread_join(thread, 0);
}

int main(void) {
    setvbuf(stdout, 0, _IOLBF, 0);
    int file = memfd_create("code", 0);
    must(ftruncate(file, 8192) == 0, "memfd", 0);
    code = mmap(0, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED, file, 0);
    alias = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    must(code != MAP_FAILED && alias != MAP_FAILED, "mmap", 0);
    flagged(0);
    puts("a flag after the change");
    flagged(4096 - 3);
    puts("a flag after the change, across pages");
    watched();
    puts("the change itself");
    poked();
    puts("INT3 and membarrier");
    fresh();
    puts("new functions");
    taken_away();
    puts("pages taken away");
    return 0;
}
