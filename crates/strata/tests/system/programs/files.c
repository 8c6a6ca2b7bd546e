// Does to the files of the working directory what programs do; says where it went wrong.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#define CHECK(what) do { if (!(what)) { printf("%s: %s\n", #what, strerror(errno)); return 1; } } while (0)
int main(void) {
    char text[8192];
    struct stat s;
    int f = open("mapped", O_RDWR);
    CHECK(f >= 0 && !fstat(f, &s) && s.st_size == 10000);
    char *map = mmap(0, 10000, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0);
    CHECK(map != MAP_FAILED && map[0] == 'h' && map[9999] == 'h');
    memcpy(map + 5000, "guest", 5);
    CHECK(!msync(map, 10000, MS_SYNC) && !fsync(f) && !fdatasync(f));
    CHECK(!munmap(map, 10000) && !close(f));

    CHECK((f = open("made", O_RDWR | O_CREAT | O_EXCL, 0640)) >= 0);
    CHECK(open("made", O_RDWR | O_CREAT | O_EXCL, 0640) < 0 && errno == EEXIST);
    CHECK(write(f, "one two", 7) == 7 && !ftruncate(f, 3) && !fallocate(f, 0, 0, 4096));
    CHECK(!fstat(f, &s) && s.st_size == 4096 && (s.st_mode & 07777) == 0640);
    CHECK(!ftruncate(f, 3) && pread(f, text, 10, 0) == 3 && !memcmp(text, "one", 3));
    CHECK(!fchmod(f, 0601) && !fstat(f, &s) && (s.st_mode & 07777) == 0601);
    struct timespec then[2] = {{1000, 1}, {2000, 2}};
    CHECK(!futimens(f, then) && !fstat(f, &s) && s.st_mtim.tv_sec == 2000 && s.st_mtim.tv_nsec == 2);
    int more = open("made", O_WRONLY | O_APPEND);
    CHECK(more >= 0 && write(more, " more", 5) == 5 && !close(more));
    CHECK(pread(f, text, 10, 0) == 8);

    CHECK(!link("made", "linked") && !fstat(f, &s) && s.st_nlink == 2);
    CHECK(!rename("made", "over") && access("made", F_OK) && errno == ENOENT);
    CHECK(!renameat2(AT_FDCWD, "over", AT_FDCWD, "mapped", RENAME_EXCHANGE));
    CHECK(!renameat2(AT_FDCWD, "over", AT_FDCWD, "mapped", RENAME_EXCHANGE));
    CHECK(renameat2(AT_FDCWD, "over", AT_FDCWD, "mapped", RENAME_NOREPLACE) && errno == EEXIST);
    CHECK(!unlink("linked") && !unlink("over") && access("over", F_OK));
    CHECK(pread(f, text, 10, 0) == 8 && !fstat(f, &s) && s.st_nlink == 0 && !close(f));

    CHECK(!mkdir("d", 0755) && rmdir("../none") && !chdir("d") && !symlink("../kept", "l"));
    CHECK(readlink("l", text, 99) == 7 && unlinkat(AT_FDCWD, "../d", 0) && errno == EISDIR);
    CHECK(!chdir("..") && rmdir("d") && errno == ENOTEMPTY && !unlink("d/l") && !rmdir("d"));
    int d = open(".", O_RDONLY | O_DIRECTORY);
    CHECK(d >= 0 && !fsync(d));
    CHECK(mknod("device", S_IFCHR | 0666, 0x103) && errno == EPERM);
    CHECK((f = open("kept", O_WRONLY | O_CREAT, 04755)) >= 0 && write(f, "kept", 4) == 4 && !close(f));
    puts("all well");
    return 0;
}
