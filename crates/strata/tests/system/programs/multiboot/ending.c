/* Ends in the way that the second word of its command line names. */
#include "kernel.h"

void kernel(uint32_t magic, struct info *info)
{
	(void)magic;
	const char *word = at(info->command_line);
	while (*word && *word != ' ')
		word++;
	switch (*word ? word[1] : 0) {
	case 'r': /* reset */
		outb(0xcf9, 6);
		break;
	case 'k': /* keyboard controller's reset */
		outb(0x64, 0xfe);
		break;
	case 'p': /* power-off */
		asm volatile("outw %0, %1" : : "a"((uint16_t)(5 << 10 | 1 << 13)), "Nd"((uint16_t)0x604));
		break;
	case 't': { /* triple fault */
		static const uint16_t none[5];
		asm volatile("lidt %0\n\tint3" : : "m"(none));
		break;
	}
	case 'b': /* a byte to the debug exit */
		outb(DEBUG_EXIT, 0x2a);
		break;
	}
	for (;;)
		asm volatile("cli\n\thlt");
}
