/* Prints all that the loader tells, and finds the ACPI tables as firmware's are found. */
#include "kernel.h"

static uint32_t bss_was_cleared[1000];

static void modules(const struct info *info)
{
	const struct module *module = (void *)at(info->modules);
	for (uint32_t i = 0; i < info->module_count; i++, module++) {
		print("module '");
		print(at(module->string));
		print(module->start & 0xfff ? "' unaligned: " : "': ");
		for (uint32_t byte = module->start; byte < module->end; byte++)
			put(*at(byte));
		put('\n');
	}
}

static void memory_map(const struct info *info)
{
	uint32_t next = info->map;
	while (next < info->map + info->map_length) {
		const struct map_entry *entry = (void *)at(next);
		print("map ");
		hex(entry->base);
		put(' ');
		hex(entry->base + entry->length);
		say("", entry->type);
		next += entry->size + sizeof entry->size;
	}
}

static void acpi(void)
{
	static const char signature[] = "RSD PTR ";
	for (uint32_t place = 0xe0000; place < 0x100000; place += 16) {
		int i = 0;
		while (i < 8 && at(place)[i] == signature[i])
			i++;
		uint8_t sum = 0;
		for (int byte = 0; byte < 20; byte++)
			sum += at(place)[byte];
		if (i == 8 && !sum) {
			say("acpi", place);
			return;
		}
	}
}

/* The first of the kernel's symbols that is a function named "kernel", by its sections. */
static void symbols(const struct info *info)
{
	say("sections", info->section_count);
	for (uint32_t i = 0; i < info->section_count; i++) {
		const uint32_t *header = (void *)at(info->sections + i * info->section_size);
		if (info->section_size != 40 || header[1] != 2)
			continue;
		const uint32_t *names = (void *)at(info->sections + header[6] * info->section_size);
		for (uint32_t offset = 0; offset < header[5]; offset += 16) {
			const uint32_t *symbol = (void *)at(header[3] + offset);
			const char *name = at(names[3] + symbol[0]);
			static const char wanted[] = "kernel";
			int c = 0;
			while (c < 7 && name[c] == wanted[c])
				c++;
			if (c == 7 && symbol[1] == (uintptr_t)kernel)
				print("symbol kernel\n");
		}
	}
}

void kernel(uint32_t magic, struct info *info)
{
	say("magic", magic);
	say("width", sizeof(void *));
	print("loader ");
	print(at(info->loader_name));
	print("\ncommand line '");
	print(at(info->command_line));
	print("'\n");
	say("flags", info->flags);
	say("lower", info->lower);
	say("upper", info->upper);
	modules(info);
	memory_map(info);
	acpi();
	if (info->flags & 1 << 5)
		symbols(info);
	uint32_t bss = 0;
	for (int i = 0; i < 1000; i++)
		bss |= bss_was_cleared[i];
	say("bss", bss);
	leave(0x10);
}
