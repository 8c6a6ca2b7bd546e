// Code that changes under its reader: through another mapping, by mprotect, in place, by
// read(2) into it, and in a page shared with data.
#define _GNU_SOURCE
#include <cpuid.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int function(void);

static void serialise(void) {
    unsigned a, b, c, d;
    __cpuid(0, a, b, c, d);
}
static void must(int condition, const char *what, int round) {
    if (condition) return;
    printf("wrong: %s in round %d\n", what, round);
    fflush(stdout);
    _exit(1);
}
// mov eax, value; ret
static void emit(unsigned char *at, int value) {
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

static void alias(void) {
    int fd = memfd_create("code", 0);
    must(ftruncate(fd, 8192) == 0, "ftruncate", 0);
    unsigned char *write = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    unsigned char *run = mmap(0, 8192, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    // the second crosses the pages
    static const int places[] = {0, 4093, 5000};
    for (int i = 0; i < 20000; i++)
        for (int p = 0; p < 3; p++) {
            emit(write + places[p], i * 3 + p);
            serialise();
            must(((function *)(run + places[p]))() == i * 3 + p, "alias", i);
        }
    // one byte at a time, in a loop that is hot
    emit(write, 0);
    for (int i = 0; i < 256; i++) {
        write[1] = i;
        serialise();
        for (int k = 0; k < 100; k++) must(((function *)run)() == i, "byte", i);
    }
    // by the kernel
    for (int i = 0; i < 2000; i++) {
        unsigned char code[6];
        emit(code, i);
        must(pwrite(fd, code, 6, 64) == 6, "pwrite", i);
        must(((function *)(run + 64))() == i, "after pwrite", i);
    }
    puts("alias");
}

static void protect(void) {
    unsigned char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 5000; i++) {
        mprotect(page, 4096, PROT_READ | PROT_WRITE);
        emit(page + (i & 7) * 100, i);
        mprotect(page, 4096, PROT_READ | PROT_EXEC);
        must(((function *)(page + (i & 7) * 100))() == i, "mprotect", i);
    }
    puts("protect");
}

static void in_place(void) {
    unsigned char *page = mmap(0, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    // a counter that lives between two functions, written by the first
    for (int i = 0; i < 50000; i++) {
        emit(page, i);
        page[20] = i;
        emit(page + 40, -i);
        must(((function *)page)() == i && ((function *)(page + 40))() == -i, "in place", i);
    }
    // inc dword [rip+1]; jmp to the next; mov eax, imm32 (incremented); ret
    static const unsigned char self[] = {
        0xff, 0x05, 0x03, 0x00, 0x00, 0x00, // inc dword [rip + 3]: the immediate below
        0xeb, 0x00,                         // jmp $+2
        0xb8, 0x00, 0x00, 0x00, 0x00,       // mov eax, imm32
        0xc3,
    };
    memcpy(page + 4096, self, sizeof self);
    for (int i = 1; i <= 50000; i++) must(((function *)(page + 4096))() == i, "its own block", i);
    // remapped: other code at the same address
    for (int i = 0; i < 500; i++) {
        unsigned char *again = mmap(page, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        emit(again, i * 7);
        must(((function *)again)() == i * 7, "remapped", i);
    }
    puts("in place");
}

int main(void) {
    alias();
    protect();
    in_place();
    return 0;
}
