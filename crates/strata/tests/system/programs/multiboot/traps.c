/* Sets up its own segments, interrupts and paging in 32-bit mode, and takes what a CPU can
   throw: a division by zero, a page fault, a software interrupt, and the local APIC's timer. */
#include "kernel.h"

struct frame;

#define HANDLER __attribute__((interrupt))
#define LAPIC ((volatile uint32_t *)0xfee00000)
#define TIMER_VECTOR 0x40
#define MISSING_PAGE 0x40000000

static uint64_t idt[256];
static uint64_t gdt[] = { 0, 0, 0, 0x00cf9b000000ffff, 0x00cf93000000ffff };
static uint32_t directory[1024] __attribute__((aligned(4096)));
static volatile uint32_t table[1024] __attribute__((aligned(4096)));
static volatile uint32_t ticks;

static void load_table(int interrupts, void *base, uint16_t limit)
{
	struct {
		uint16_t limit;
		uint32_t base;
	} __attribute__((packed)) pointer = { limit, (uint32_t)base };
	if (interrupts)
		asm volatile("lidt %0" : : "m"(pointer));
	else
		asm volatile("lgdt %0\n\tljmp $24, $1f\n1:\tmov %1, %%ds\n\tmov %1, %%es\n\tmov %1, %%ss"
			     : : "m"(pointer), "r"(32));
}

static void set_handler(int vector, void *handler)
{
	uint32_t address = (uint32_t)handler;
	idt[vector] = (uint64_t)(address >> 16 << 16 | 0x8e00) << 32 | 24 << 16 | (address & 0xffff);
}

/* The interrupted EIP, code segment and flags. */
struct frame {
	uint32_t ip, cs, flags;
};

static HANDLER void divide_error(struct frame *frame)
{
	say("divide error, code segment", frame->cs);
	frame->ip += 2;
}

static HANDLER void page_fault(struct frame *frame, uint32_t code)
{
	uint32_t address;
	asm volatile("mov %%cr2, %0" : "=r"(address));
	print("page fault at ");
	hex(address);
	say(" code", code);
	/* What was missing is there from now on. */
	table[address >> 12 & 0x3ff] = (uint32_t)table | 3;
	(void)frame;
}

static HANDLER void software(struct frame *frame)
{
	say("interrupt, byte before return", *(uint8_t *)(frame->ip - 1));
}

static HANDLER void timer(struct frame *frame)
{
	(void)frame;
	ticks++;
	LAPIC[0xb0 / 4] = 0;
}

void kernel(uint32_t magic, struct info *info)
{
	(void)magic;
	(void)info;
	load_table(0, gdt, sizeof gdt - 1);
	set_handler(0, divide_error);
	set_handler(14, page_fault);
	set_handler(0x80, software);
	set_handler(TIMER_VECTOR, timer);
	load_table(1, idt, sizeof idt - 1);

	/* 4 MiB pages for all but what has a table of its own. */
	for (uint32_t i = 0; i < 1024; i++)
		directory[i] = i << 22 | 0x83;
	directory[MISSING_PAGE >> 22] = (uint32_t)table | 3;
	uint32_t cr4;
	asm volatile("mov %%cr4, %0" : "=r"(cr4));
	asm volatile("mov %0, %%cr4" : : "r"(cr4 | 0x10));
	asm volatile("mov %0, %%cr3" : : "r"(directory));
	asm volatile("mov %%cr0, %0" : "=r"(cr4));
	asm volatile("mov %0, %%cr0" : : "r"(cr4 | 0x80010000));

	uint32_t high = 0, low = 7;
	/* DIV ECX, two bytes. */
	asm volatile("div %%ecx" : "+a"(low), "+d"(high) : "c"(0));
	say("eax after it", low);
	*(volatile uint32_t *)(MISSING_PAGE + 0x3004) = 0x1234;
	say("stored", table[1]);
	asm volatile("int $0x80");

	LAPIC[0xf0 / 4] = 0x1ff;
	LAPIC[0x3e0 / 4] = 0xb;
	LAPIC[0x320 / 4] = 1 << 17 | TIMER_VECTOR;
	LAPIC[0x380 / 4] = 100000;
	while (ticks < 10)
		asm volatile("sti\n\thlt\n\tcli");
	say("ten ticks", ticks >= 10);

	/* A spinning guest is interrupted too. */
	asm volatile("sti");
	while (ticks < 20)
		;
	asm volatile("cli");
	print("spun\n");
	leave(0);
}
