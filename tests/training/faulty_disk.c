// A disk that fails when told to: preloaded, it stands between a process and the C library.
//
// Operations that change what lies under one folder are counted. `disk_arm` says at which of them
// the disk begins to fail, and how; `disk_count` how many there were since.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, ERROR_ONCE, FULL, DEAD, KILL };

static char folder[PATH_MAX];
static atomic_long count, counted, failed, at = -1;
static atomic_int mode = COUNT;

void disk_arm(const char *path, long first, int how) {
    strncpy(folder, path, sizeof folder - 1);
    counted = count;
    count = failed = 0;
    at = first;
    mode = how;
}
long disk_count(void) { return count; }
long disk_counted(void) { return counted; }  // before it was armed the last time
long disk_failed(void) { return failed; }

static int inside(const char *path) {
    return folder[0] && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int inside_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return inside(path);
}

static int inside_at(int fd, const char *path) {
    return path && (path[0] == '/' ? inside(path) : fd == AT_FDCWD ? 0 : inside_fd(fd));
}

// 0, or the error that this operation ends with. A full disk still renames and deletes.
static int fault(int takes_room) {
    long number = atomic_fetch_add(&count, 1);
    int error = 0;
    if (at < 0 || mode == COUNT) return 0;
    if (mode == KILL && number == at) kill(getpid(), SIGKILL);
    if (mode == ERROR_ONCE && number == at) error = EIO;
    if (mode == DEAD && number >= at) error = EIO;
    if (mode == FULL && number >= at && takes_room) error = ENOSPC;
    if (error) failed++;
    return error;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(kind, name, parameters, arguments, here, takes_room)      \
    kind name parameters {                                             \
        static __typeof__(&name) real;                                 \
        if (!real) real = REAL(name);                                  \
        int error = (here) ? fault(takes_room) : 0;                    \
        if (error) { errno = error; return -1; }                       \
        return real arguments;                                         \
    }

#define OPEN(name, before, names, here)                                \
    int name(before int flags, ...) {                                  \
        static int (*real)(before int, ...);                           \
        va_list rest;                                                  \
        va_start(rest, flags);                                         \
        mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                  \
        if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, #name);   \
        int error = (flags & (O_CREAT | O_WRONLY | O_RDWR)) && (here)  \
            ? fault((flags & O_CREAT) != 0) : 0;                       \
        if (error) { errno = error; return -1; }                       \
        return real(names flags, bits);                                \
    }
#define COMMA ,

OPEN(open, const char *path COMMA, path COMMA, inside(path))
OPEN(open64, const char *path COMMA, path COMMA, inside(path))
OPEN(openat, int fd COMMA const char *path COMMA, fd COMMA path COMMA, inside_at(fd, path))
OPEN(openat64, int fd COMMA const char *path COMMA, fd COMMA path COMMA, inside_at(fd, path))

WRAP(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n), inside_fd(fd), 1)
WRAP(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), inside_fd(fd), 1)
WRAP(ssize_t, pwrite, (int fd, const void *d, size_t n, off_t o), (fd, d, n, o), inside_fd(fd), 1)
WRAP(ssize_t, pwrite64, (int fd, const void *d, size_t n, off64_t o), (fd, d, n, o), inside_fd(fd), 1)
WRAP(ssize_t, pwritev, (int fd, const struct iovec *v, int n, off_t o), (fd, v, n, o), inside_fd(fd), 1)
WRAP(int, fsync, (int fd), (fd), inside_fd(fd), 0)
WRAP(int, fdatasync, (int fd), (fd), inside_fd(fd), 0)
WRAP(int, ftruncate, (int fd, off_t n), (fd, n), inside_fd(fd), 1)
WRAP(int, ftruncate64, (int fd, off64_t n), (fd, n), inside_fd(fd), 1)
WRAP(int, mkdir, (const char *path, mode_t bits), (path, bits), inside(path), 1)
WRAP(int, mkdirat, (int fd, const char *path, mode_t bits), (fd, path, bits), inside_at(fd, path), 1)
WRAP(int, rename, (const char *old, const char *new), (old, new), inside(new), 0)
WRAP(int, renameat, (int a, const char *old, int b, const char *new), (a, old, b, new),
     inside_at(b, new), 0)
WRAP(int, renameat2, (int a, const char *old, int b, const char *new, unsigned f),
     (a, old, b, new, f), inside_at(b, new), 0)
WRAP(int, link, (const char *old, const char *new), (old, new), inside(new), 1)
WRAP(int, linkat, (int a, const char *old, int b, const char *new, int f), (a, old, b, new, f),
     inside_at(b, new), 1)
WRAP(int, unlink, (const char *path), (path), inside(path), 0)
WRAP(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags), inside_at(fd, path), 0)
WRAP(int, rmdir, (const char *path), (path), inside(path), 0)
