/* Multiboot header and entry. With LONG_MODE the rest of the kernel is 64-bit code: the entry
   turns on PAE paging, 2 MiB pages for the low 4 GiB, and goes there. With ADDRESSES the
   header tells where the kernel goes, as a file that is not ELF needs it. */
#define MAGIC 0x1badb002
#ifdef ADDRESSES
#define FLAGS 0x10003
#else
#define FLAGS 0x3
#endif
#define STACK 0x4000

	.section .multiboot, "a"
	.balign 4
header:
	.long MAGIC, FLAGS, -(MAGIC + FLAGS)
#ifdef ADDRESSES
	.long header, header, edata, end, start
#endif

	.text
	.code32
	.globl start
start:
	mov $stack_top, %esp
#ifndef LONG_MODE
	push %ebx
	push %eax
	call kernel
#else
	mov %eax, %esi
	mov $pml4, %edi
	lea 0x1000(%edi), %eax
	or $3, %eax
	mov %eax, (%edi)
	mov $4, %ecx
	lea 0x1000(%edi), %edx
	lea 0x2000(%edi), %eax
	or $3, %eax
1:	mov %eax, (%edx)
	add $8, %edx
	add $0x1000, %eax
	loop 1b
	mov $0x83, %eax
	lea 0x2000(%edi), %edx
	mov $2048, %ecx
2:	mov %eax, (%edx)
	add $8, %edx
	add $0x200000, %eax
	loop 2b
	mov %cr4, %eax
	or $0x20, %eax
	mov %eax, %cr4
	mov %edi, %cr3
	mov $0xc0000080, %ecx
	rdmsr
	or $0x100, %eax
	wrmsr
	mov %cr0, %eax
	or $0x80000000, %eax
	mov %eax, %cr0
	lgdt gdt_pointer
	ljmp $8, $long_mode
	.code64
long_mode:
	mov $16, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov %esi, %edi
	mov %ebx, %esi
	call kernel
#endif
	ud2

#ifdef LONG_MODE
	.data
	.balign 8
gdt:
	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
	.short gdt_pointer - gdt - 1
	.long gdt
	.bss
	.balign 0x1000
pml4:
	.skip 6 * 0x1000
#endif
	.bss
	.balign 16
	.skip STACK
stack_top:
