/* A 32-bit program without a C library: what compatibility mode has that 64-bit mode does
 * not. System calls by INT 0x80 and through the vDSO, thread-local storage through the GDT,
 * segments of the LDT with their limits, faults as signals, far calls into 64-bit code, and
 * instructions that only 16- and 32-bit code has. Prints one line for each. */

typedef unsigned int u32;
typedef unsigned long long u64;

enum {
    SYS_exit = 1,
    SYS_write = 4,
    SYS_getpid = 20,
    SYS_modify_ldt = 123,
    SYS_rt_sigaction = 174,
    SYS_set_thread_area = 243,
};

static u32 vsyscall;

static int call(u32 n, u32 a, u32 b, u32 c, u32 d)
{
    int result;
    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "a"(n), "b"(a), "c"(b), "d"(c), "S"(d)
                     : "memory");
    return result;
}

static int call_vdso(u32 n)
{
    int result;
    __asm__ volatile("call *%1" : "=a"(result) : "m"(vsyscall), "a"(n) : "memory");
    return result;
}

static void line(const char *name, u32 value)
{
    char text[64];
    u32 at = 0;
    while (*name)
        text[at++] = *name++;
    text[at++] = ' ';
    for (int shift = 28; shift >= 0; shift -= 4)
        text[at++] = "0123456789abcdef"[value >> shift & 15];
    text[at++] = '\n';
    call(SYS_write, 1, (u32)text, at, 0);
}

/* struct user_desc */
struct description {
    u32 number, base, limit, flags;
};
enum { BIG = 1, EXPAND_DOWN = 1 << 1, IN_PAGES = 1 << 4, USEABLE = 1 << 6 };

/* Where a signal's handler goes on, and which signal it was. */
static volatile u32 resume, seen, trap, error;

static void handler(int signal, void *info, void *context)
{
    /* struct ucontext: flags, link, stack (3 words), then the registers */
    u32 *registers = (u32 *)context + 5;
    (void)info;
    seen = signal;
    trap = registers[12];
    error = registers[13];
    registers[14] = resume;
}

__attribute__((naked)) static void restore(void)
{
    __asm__("mov $173, %eax\n int $0x80");
}

static void catch(int signal)
{
    struct {
        void *handler;
        u32 flags;
        void *restorer;
        u32 mask[2];
    } action = {(void *)handler, 0x44000004, (void *)restore, {0, 0}};
    call(SYS_rt_sigaction, signal, (u32)&action, 0, 8);
}

/* Runs instructions that fault, and goes on behind them. */
#define FAULTING(name, instructions, ...)                                                      \
    do {                                                                                       \
        seen = trap = error = 0;                                                               \
        __asm__ volatile("movl $9f, %0\n" instructions "\n9:"                                  \
                         : "=m"(resume)                                                        \
                         : __VA_ARGS__                                                         \
                         : "eax", "ecx", "edx", "esi", "memory", "cc");                        \
        line(name, seen << 24 | trap << 16 | (error & 0xffff));                                \
    } while (0)

static unsigned char window[4096] __attribute__((aligned(4096)));

static void segments(void)
{
    struct description tls = {-1u, (u32)window, 0xfffff, BIG | IN_PAGES | USEABLE};
    line("set_thread_area", call(SYS_set_thread_area, (u32)&tls, 0, 0, 0));
    window[16] = 0x5a;
    u32 value;
    __asm__ volatile("mov %1, %%gs\n movzbl %%gs:16, %0"
                     : "=r"(value)
                     : "r"(tls.number * 8 + 3));
    line("tls", value);
    /* a negative offset wraps at 4 GiB */
    __asm__ volatile("movzbl %%gs:-4080(%1), %0" : "=r"(value) : "r"(4096));
    line("tls wrapped", value);

    struct description small = {3, (u32)window, 15, BIG | USEABLE};
    line("modify_ldt", call(SYS_modify_ldt, 0x11, (u32)&small, sizeof small, 0));
    u32 selector = 3 * 8 + 7;
    window[15] = 42;
    __asm__ volatile("mov %1, %%fs\n movzbl %%fs:15, %0" : "=r"(value) : "r"(selector));
    line("last byte", value);
    FAULTING("beyond the limit", "movb $1, %%fs:16", "r"(0));
    FAULTING("across the limit", "movw %%fs:15, %%ax", "r"(0));
    FAULTING("string beyond", "mov $2, %%ecx\n mov $15, %%esi\n rep lodsb %%fs:(%%esi)", "r"(0));
    FAULTING("null segment", "xor %%eax, %%eax\n mov %%eax, %%fs\n mov %%fs:0, %%al", "r"(0));
    FAULTING("no such selector", "mov $0x1234, %%eax\n mov %%eax, %%fs", "r"(0));
    FAULTING("write to code", "movb $1, %%cs:(%1)", "r"(window));
    struct description down = {4, (u32)window, 15, BIG | EXPAND_DOWN | USEABLE};
    call(SYS_modify_ldt, 0x11, (u32)&down, sizeof down, 0);
    window[17] = 43;
    __asm__ volatile("mov %1, %%fs\n movzbl %%fs:17, %0" : "=r"(value) : "r"(4 * 8 + 7));
    line("expand down", value);
    FAULTING("below the limit", "movb %%fs:15, %%al", "r"(0));
    u32 rights = 0, limit = 0;
    __asm__ volatile("lar %1, %0" : "=r"(rights) : "r"(selector) : "cc");
    __asm__ volatile("lsl %1, %0" : "=r"(limit) : "r"(selector) : "cc");
    line("rights", rights);
    line("limit", limit);
}

static void instructions(void)
{
    u32 a, b;
    __asm__ volatile("mov $0x79, %%al\n add $0x35, %%al\n daa\n movzbl %%al, %0\n setc %%al\n movzbl %%al, %1"
                     : "=r"(a), "=r"(b)::"eax", "cc");
    line("daa", b << 8 | a);
    __asm__ volatile("mov $0x0105, %%ax\n sub $7, %%al\n aas\n movzwl %%ax, %0" : "=r"(a)::"eax", "cc");
    line("aas", a);
    __asm__ volatile("mov $0x4f, %%al\n aam\n movzwl %%ax, %0" : "=r"(a)::"eax", "cc");
    line("aam", a);
    __asm__ volatile("mov $0x0709, %%ax\n aad\n movzwl %%ax, %0" : "=r"(a)::"eax", "cc");
    line("aad", a);
    __asm__ volatile("mov $0x1111, %%eax\n mov $0x2222, %%ecx\n pusha\n xor %%eax, %%eax\n"
                     "xor %%ecx, %%ecx\n popa\n lea (%%eax, %%ecx), %0"
                     : "=r"(a)::"eax", "ecx", "memory");
    line("pusha", a);
    u32 selector = 0x20;
    __asm__ volatile("mov $3, %%ecx\n arpl %%cx, %w0\n setz %%cl\n movzbl %%cl, %1"
                     : "+r"(selector), "=r"(b)::"ecx", "cc");
    line("arpl", b << 16 | selector);
    FAULTING("into", "mov $0x7fffffff, %%eax\n inc %%eax\n into", "r"(0));
    int bounds[2] = {-4, 9};
    FAULTING("bound inside", "mov $9, %%eax\n bound %%eax, (%1)", "r"(bounds));
    FAULTING("bound outside", "mov $10, %%eax\n bound %%eax, (%1)", "r"(bounds));
    /* 16-bit addressing wraps at 64 KiB: GS:[(BX+SI) & 0xffff] */
    __asm__ volatile("push %%ebx\n push %%esi\n mov $0xfff0, %%ebx\n mov $0x20, %%esi\n"
                     ".byte 0x65, 0x67, 0x0f, 0xb6, 0x00\n"
                     "pop %%esi\n pop %%ebx\n mov %%eax, %0"
                     : "=r"(a)::"eax", "memory");
    line("16-bit address", a);
    FAULTING("privileged", "hlt", "r"(0));
    FAULTING("undefined", "ud2", "r"(0));
    FAULTING("breakpoint", "int3", "r"(0));
    FAULTING("division", "xor %%ecx, %%ecx\n xor %%edx, %%edx\n div %%ecx", "r"(0));
    FAULTING("page", "movl $1, 16", "r"(0));
    FAULTING("far jump", "ljmp $0x18, $0", "r"(0));
}

static void to_64_bits(void)
{
    u32 low, high, selector;
    /* mov rax, 0x1122334455667788; mov rdx, rax; shr rdx, 32; retf */
    __asm__ volatile("lcall $0x33, $1f\n jmp 2f\n"
                     "1: .byte 0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11\n"
                     ".byte 0x48, 0x89, 0xc2, 0x48, 0xc1, 0xea, 0x20\n"
                     "lret\n2:"
                     : "=a"(low), "=d"(high)::"memory", "cc");
    line("64-bit low", low);
    line("64-bit high", high);
    __asm__ volatile("mov %%cs, %0" : "=r"(selector));
    line("cs", selector);
}

void run(u32 *stack)
{
    u32 at = 1 + stack[0] + 1;
    while (stack[at])
        at++;
    for (at++; stack[at]; at += 2)
        if (stack[at] == 32)
            vsyscall = stack[at + 1];
    int signals[] = {4, 5, 7, 8, 11};
    for (u32 i = 0; i < sizeof signals / sizeof signals[0]; i++)
        catch(signals[i]);
    line("vdso", call_vdso(SYS_getpid) == call(SYS_getpid, 0, 0, 0, 0));
    u64 sum = 1;
    for (u32 i = 0; i < 3000000; i++)
        sum = sum * 6364136223846793005ull + (i ^ sum >> 33);
    line("sum", (u32)(sum >> 32));
    segments();
    instructions();
    to_64_bits();
    call(SYS_exit, 0, 0, 0, 0);
}

__attribute__((naked)) void _start(void)
{
    __asm__("mov %esp, %eax\n push %eax\n call run");
}
