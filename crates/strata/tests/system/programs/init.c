// The init of an image: says on the console what it is, and ends the machine.
#include <fcntl.h>
#include <stdio.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

int main(void) {
    int console = open("/dev/console", O_WRONLY);
    struct stat status;
    dprintf(console, "process %d, file %s, appliance %s\n", getpid(),
            stat("/etc/passwd", &status) ? "missing" : "there",
            stat("/lib/strata/main", &status) ? "gone" : "there");
    sync();
    reboot(RB_POWER_OFF);
}
