// Tells who and where it is, what it was given and what it sees; then copies its input.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
extern char **environ;
int main(int argc, char **argv) {
    char line[4096];
    printf("%d:%d in %s\n", getuid(), getgid(), getcwd(line, sizeof line));
    for (int i = 0; i < argc; i++) printf("[%s]\n", argv[i]);
    for (char **e = environ; *e; e++) if (!strncmp(*e, "MY", 2)) puts(*e);
    struct stat s;
    const char *names[] = {"/gone", "/kept", "/hidden/old", "/hidden/new", "/dev/null", "/proc/1"};
    for (int i = 0; i < 6; i++) if (!stat(names[i], &s)) printf("%s %o\n", names[i], s.st_mode);
    struct statvfs room;
    if (argc > 1 && !strcmp(argv[1], "room") && !statvfs("/", &room))
        printf("%lu MiB\n", room.f_blocks * room.f_frsize >> 20);
    const char *told[] = {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"};
    for (int i = 0; i < 3 && argc > 1 && !strcmp(argv[1], "names"); i++) {
        FILE *f = fopen(told[i], "r");
        while (f && fgets(line, sizeof line, f)) fputs(line, stdout);
    }
    if (argc > 1 && !strcmp(argv[1], "make")) {
        FILE *made = fopen("/written", "w");
        if (made) fputs("made\n", made), fclose(made);
    }
    while (argc > 1 && !strcmp(argv[1], "wait")) pause();
    FILE *f = fopen("/kept", "a");
    printf("write %s\n", f ? "yes" : "no");
    while (fgets(line, sizeof line, stdin)) fputs(line, stdout);
    return getenv("MYSTATUS") ? atoi(getenv("MYSTATUS")) : 0;
}
