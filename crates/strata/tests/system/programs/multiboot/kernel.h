/* What small kernels need: ports, words on COM1, an end, and what Multiboot tells. */
#include <stddef.h>
#include <stdint.h>

#define COM1 0x3f8
#define DEBUG_EXIT 0xf4

static inline void outb(uint16_t port, uint8_t value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t inb(uint16_t port)
{
	uint8_t value;
	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline void outl(uint16_t port, uint32_t value)
{
	asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static void put(char c)
{
	while (!(inb(COM1 + 5) & 0x20))
		;
	outb(COM1, c);
}

static void print(const char *text)
{
	while (*text)
		put(*text++);
}

static void hex(uint64_t value)
{
	int shift = 60;
	while (shift > 0 && !(value >> shift & 15))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		put("0123456789abcdef"[value >> shift & 15]);
}

static void __attribute__((noreturn)) leave(uint32_t status)
{
	outl(DEBUG_EXIT, status);
	for (;;)
		asm volatile("hlt");
}

static void say(const char *what, uint64_t value)
{
	print(what);
	put(' ');
	hex(value);
	put('\n');
}

struct info {
	uint32_t flags, lower, upper, boot_device, command_line;
	uint32_t module_count, modules;
	uint32_t section_count, section_size, sections, section_names;
	uint32_t map_length, map;
	uint32_t drives_length, drives, configuration, loader_name;
};

struct module {
	uint32_t start, end, string, reserved;
};

struct map_entry {
	uint32_t size;
	uint64_t base, length;
	uint32_t type;
} __attribute__((packed));

static inline char *at(uint32_t address)
{
	return (char *)(uintptr_t)address;
}

void kernel(uint32_t magic, struct info *info);
