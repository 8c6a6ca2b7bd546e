// x87 arithmetic in all its modes, printed as bits: a guest must give what the host gives.
#include <fenv.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static uint64_t hash = 0xcbf29ce484222325u;

static void add(const void *data, size_t size) {
    const unsigned char *bytes = data;
    for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
}
static void add_real(long double x) { add(&x, 10); }
static void add_status(void) {
    uint16_t status;
    __asm__ volatile("fnstsw %0" : "=a"(status));
    add(&status, 2);
}
static void control(uint16_t word) { __asm__ volatile("fldcw %0" : : "m"(word)); }

static void transcendental(long double x) {
    long double r, s;
    __asm__ volatile("fsin" : "=t"(r) : "0"(x));
    add_real(r);
    __asm__ volatile("fcos" : "=t"(r) : "0"(x));
    add_real(r);
    __asm__ volatile("fsincos" : "=t"(r), "=u"(s) : "0"(x));
    add_real(r);
    add_real(s);
    __asm__ volatile("fptan" : "=t"(r), "=u"(s) : "0"(x));
    add_real(s);
    __asm__ volatile("fpatan" : "=t"(r) : "0"(x), "u"(1.25L) : "st(1)");
    add_real(r);
    __asm__ volatile("fyl2x" : "=t"(r) : "0"(x < 0 ? -x : x), "u"(3.0L) : "st(1)");
    add_real(r);
    __asm__ volatile("f2xm1" : "=t"(r) : "0"(x / 1024));
    add_real(r);
    __asm__ volatile("fprem" : "=t"(r) : "0"(x * 1000), "u"(1.7L));
    add_real(r);
    __asm__ volatile("fprem1" : "=t"(r) : "0"(x * 1000), "u"(1.7L));
    add_real(r);
    __asm__ volatile("fxtract" : "=t"(r), "=u"(s) : "0"(x));
    add_real(r);
    add_real(s);
    add_status();
}

static void conversions(long double x) {
    int64_t wide;
    int32_t narrow;
    int16_t small;
    unsigned char decimal[10];
    double d;
    float f;
    __asm__ volatile("fistpll %0" : "=m"(wide) : "t"(x) : "st");
    __asm__ volatile("fistpl %0" : "=m"(narrow) : "t"(x) : "st");
    __asm__ volatile("fistps %0" : "=m"(small) : "t"(x) : "st");
    __asm__ volatile("fbstp %0" : "=m"(decimal) : "t"(x) : "st");
    __asm__ volatile("fstpl %0" : "=m"(d) : "t"(x) : "st");
    __asm__ volatile("fstps %0" : "=m"(f) : "t"(x) : "st");
    add(&wide, 8);
    add(&narrow, 4);
    add(&small, 2);
    add(decimal, 10);
    add(&d, 8);
    add(&f, 4);
    add_status();
    __asm__ volatile("fnclex");
}

int main(void) {
    // precision control 24, 53 and 64 bits, each with the four roundings
    static const uint16_t precisions[] = {0x007f, 0x027f, 0x037f};
    for (int p = 0; p < 3; p++)
        for (int rounding = 0; rounding < 4; rounding++) {
            control(precisions[p] | rounding << 10);
            volatile long double x = 0.1L, y = 1.0L;
            for (int i = 1; i < 2000; i++) {
                y = y * (1.0L + x / i) - x / (i + 0.5L);
                add_real(y);
            }
            long double r;
            __asm__ volatile("fsqrt" : "=t"(r) : "0"(2.0L));
            add_real(r);
            __asm__ volatile("frndint" : "=t"(r) : "0"(y * 12345));
            add_real(r);
            for (int i = -40; i < 40; i++) {
                transcendental(i * 0.37L + 0.11L);
                conversions(i * 977.25L);
            }
            conversions(1e30L);
            printf("control %04x %016lx\n", precisions[p] | rounding << 10, hash);
        }
    control(0x037f);

    // the environment and the whole state, less the pointers of the last instruction
    long double a = 1.5L, b = 2.5L;
    unsigned char image[108], image2[108];
    __asm__ volatile("fldt %1\n\tfldt %2\n\tfaddp\n\tfldpi\n\tfnsave %0"
                     : "=m"(image) : "m"(a), "m"(b));
    add(image, 10);
    add(image + 28, 80);
    __asm__ volatile("frstor %1\n\tfxch\n\tfnsave %0" : "=m"(image2) : "m"(image));
    add(image2 + 28, 80);
    printf("saved %016lx\n", hash);

    // MMX shares the registers
    uint64_t m = 0x0102030405060708u, n = 0x1122334455667788u, sum;
    __asm__ volatile("movq %1, %%mm3\n\tpaddb %2, %%mm3\n\tpmaddwd %1, %%mm3\n\tmovq %%mm3, %0\n\temms"
                     : "=m"(sum) : "m"(m), "m"(n) : "mm3");
    printf("mmx %016lx\n", sum);
    printf("printed %.20Lf %La\n", 3.14159265358979323846264338327950288L, 0.1L);
    return 0;
}
