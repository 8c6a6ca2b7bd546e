/* Starts every processor that ACPI tells of, as test kernels do: code below 1 MiB, INIT, a
   startup message, and a lock that all of them want. */
#include "kernel.h"

#define LAPIC ((volatile uint32_t *)0xfee00000)
#define ICR_LOW (0x300 / 4)
#define ICR_HIGH (0x310 / 4)
#define TRAMPOLINE 0x8000
#define ROUNDS 10000

extern const char trampoline[], trampoline_end[];
static volatile uint32_t ready, lock, counter;
char stacks[16][1024] __attribute__((aligned(16)));
volatile uint32_t next_stack;

/* From 16-bit code to flat 32-bit code, and to a stack of its own. */
asm(".section .rodata\n"
    "trampoline: .code16\n"
    "	cli\n"
    "	lgdtl %cs:boot_gdt_pointer - trampoline\n"
    "	mov %cr0, %eax\n"
    "	or $1, %eax\n"
    "	mov %eax, %cr0\n"
    "	ljmpl $8, $started\n"
    "	.balign 8\n"
    "boot_gdt_pointer: .short 23\n"
    "	.long boot_gdt\n"
    "trampoline_end:\n"
    "	.balign 8\n"
    "boot_gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff\n"
    "	.text\n"
    "	.code32\n"
    "started:\n"
    "	mov $16, %eax\n"
    "	mov %eax, %ds\n"
    "	mov %eax, %es\n"
    "	mov %eax, %ss\n"
    "	mov $1, %eax\n"
    "	lock xadd %eax, next_stack\n"
    "	inc %eax\n"
    "	shl $10, %eax\n"
    "	lea stacks(%eax), %esp\n"
    "	call another\n");

static void count(void)
{
	for (int i = 0; i < ROUNDS; i++) {
		while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE))
			asm volatile("pause");
		counter++;
		__atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
	}
	__atomic_add_fetch(&ready, 1, __ATOMIC_SEQ_CST);
}

void another(void)
{
	count();
	for (;;)
		asm volatile("cli\n\thlt");
}

/* Processors in the table that tells of interrupt controllers. */
static uint32_t processors(void)
{
	for (uint32_t place = 0xe0000; place < 0x100000; place += 16) {
		const uint8_t *table = (void *)at(place);
		uint32_t found = 0;
		if (*(const uint32_t *)table != 0x43495041) /* "APIC" */
			continue;
		const uint8_t *end = table + *(const uint32_t *)(table + 4);
		for (table += 44; table < end && table[1]; table += table[1])
			found += table[0] == 0 && table[4] & 1;
		return found;
	}
	return 0;
}

static void send(uint32_t processor, uint32_t message)
{
	LAPIC[ICR_HIGH] = processor << 24;
	LAPIC[ICR_LOW] = message;
	while (LAPIC[ICR_LOW] & 1 << 12)
		asm volatile("pause");
}

void kernel(uint32_t magic, struct info *info)
{
	(void)magic;
	(void)info;
	uint32_t all = processors();
	say("processors", all);
	for (const char *byte = trampoline; byte < trampoline_end; byte++)
		at(TRAMPOLINE)[byte - trampoline] = *byte;
	for (uint32_t processor = 1; processor < all; processor++) {
		send(processor, 0x4500);
		send(processor, 0x4600 | TRAMPOLINE >> 12);
	}
	count();
	while (ready < all)
		asm volatile("pause");
	say("counted", counter);
	leave(counter == all * ROUNDS ? 0 : 1);
}
