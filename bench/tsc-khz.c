// Prints the frequency of this host's time stamp counter in kHz, measured for 0.2 s.
// QEMU's TCG shows its guests the host's counter but does not tell its frequency, and a
// guest kernel on a busy host fails to measure it.
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

static double now(unsigned long long *counter) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    *counter = __rdtsc();
    return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

int main(void) {
    unsigned long long first, last;
    double begin = now(&first), end;
    do end = now(&last); while (end - begin < 200);
    printf("%.0f\n", (last - first) / (end - begin));
    return 0;
}
