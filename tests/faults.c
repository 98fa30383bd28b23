/* Preloaded before libc: the k-th file operation below one folder fails with an errno, or the process is killed there. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READS = 1, WRITES = 2, GROWS = 4, KILL = -1 }; /* GROWS: also those that a full disk refuses */

static char folder[4096];
static long wanted;             /* which operation */
static int fault, kinds, lasts; /* errno or KILL; which operations count; do all later ones fail too? */
static atomic_long count;
static atomic_int armed;
static char hit[4200]; /* the operation that failed */
static FILE *note;     /* where it is written, for whoever survives */
static __thread int inside;

void faults_arm(const char *below, long number, int what, int which, int all_later, const char *list) {
  snprintf(folder, sizeof folder, "%s", below);
  wanted = number, fault = what, kinds = which, lasts = all_later, hit[0] = 0;
  atomic_store(&count, 0);
  note = fopen(list, "w");
  atomic_store(&armed, 1);
}
const char *faults_hit(void) { return hit; }
void faults_disarm(void) { atomic_store(&armed, 0); }

/* The operation is noted before a kill. */
static void noted(const char *name, const char *path) {
  snprintf(hit, sizeof hit, "%s %s", name, path);
  if (note) { fputs(hit, note); fflush(note); }
}
static int below(const char *path) {
  size_t n = strlen(folder);
  return !strncmp(path, folder, n) && (path[n] == '/' || !path[n]);
}
static int of_fd(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, 4095);
  if (n < 0) return 0;
  path[n] = 0;
  return below(path);
}
static int of_path(int dir, const char *name, char *path) {
  if (!name) return 0;
  if (name[0] == '/') snprintf(path, 4096, "%s", name);
  else {
    char base[2048];
    if (dir == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
    else { char found[4096]; of_fd(dir, found); snprintf(base, sizeof base, "%s", found); }
    snprintf(path, 4096, "%s/%s", base, name);
  }
  return below(path);
}
/* Does this operation fail? */
static int fails(const char *name, int kind, const char *path) {
  if (!(kinds & kind)) return 0;
  long number = atomic_fetch_add(&count, 1) + 1;
  if (lasts ? number < wanted : number != wanted) return 0;
  if (!hit[0]) noted(name, path);
  return 1;
}
static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define CHECK(found, name, kind, bad)                                  \
  if (atomic_load(&armed) && !inside) {                                \
    char path[4096];                                                   \
    inside = 1;                                                        \
    int failed = (found) && fails(name, kind, path);                   \
    inside = 0;                                                        \
    if (failed) { if (fault == KILL) die(); errno = fault; return bad; } \
  }
#define WRITING(flags) (((flags) & (O_CREAT | O_TRUNC)) ? WRITES | GROWS : READS)
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); }

int open(const char *p, int flags, ...) { MODE REAL(open); CHECK(of_path(AT_FDCWD, p, path), "open", WRITING(flags), -1); return real(p, flags, mode); }
int open64(const char *p, int flags, ...) { MODE REAL(open64); CHECK(of_path(AT_FDCWD, p, path), "open", WRITING(flags), -1); return real(p, flags, mode); }
int openat(int d, const char *p, int flags, ...) { MODE REAL(openat); CHECK(of_path(d, p, path), "open", WRITING(flags), -1); return real(d, p, flags, mode); }
int openat64(int d, const char *p, int flags, ...) { MODE REAL(openat64); CHECK(of_path(d, p, path), "open", WRITING(flags), -1); return real(d, p, flags, mode); }
FILE *fopen(const char *p, const char *m) { REAL(fopen); CHECK(of_path(AT_FDCWD, p, path), "open", m[0] == 'r' ? READS : WRITES | GROWS, NULL); return real(p, m); }
FILE *fopen64(const char *p, const char *m) { REAL(fopen64); CHECK(of_path(AT_FDCWD, p, path), "open", m[0] == 'r' ? READS : WRITES | GROWS, NULL); return real(p, m); }
DIR *opendir(const char *p) { REAL(opendir); CHECK(of_path(AT_FDCWD, p, path), "opendir", READS, NULL); return real(p); }

ssize_t read(int fd, void *b, size_t n) { REAL(read); CHECK(of_fd(fd, path), "read", READS, -1); return real(fd, b, n); }
ssize_t pread(int fd, void *b, size_t n, off_t o) { REAL(pread); CHECK(of_fd(fd, path), "read", READS, -1); return real(fd, b, n, o); }
ssize_t pread64(int fd, void *b, size_t n, off64_t o) { REAL(pread64); CHECK(of_fd(fd, path), "read", READS, -1); return real(fd, b, n, o); }
ssize_t readv(int fd, const struct iovec *v, int n) { REAL(readv); CHECK(of_fd(fd, path), "read", READS, -1); return real(fd, v, n); }
void *mmap(void *a, size_t n, int prot, int flags, int fd, off_t o) { REAL(mmap); if (fd >= 0) CHECK(of_fd(fd, path), "mmap", READS, MAP_FAILED); return real(a, n, prot, flags, fd, o); }
void *mmap64(void *a, size_t n, int prot, int flags, int fd, off64_t o) { REAL(mmap64); if (fd >= 0) CHECK(of_fd(fd, path), "mmap", READS, MAP_FAILED); return real(a, n, prot, flags, fd, o); }
/* Of names; what is open has its inode in memory. */
int stat(const char *p, struct stat *s) { REAL(stat); CHECK(of_path(AT_FDCWD, p, path), "stat", READS, -1); return real(p, s); }
int stat64(const char *p, struct stat64 *s) { REAL(stat64); CHECK(of_path(AT_FDCWD, p, path), "stat", READS, -1); return real(p, s); }
int lstat(const char *p, struct stat *s) { REAL(lstat); CHECK(of_path(AT_FDCWD, p, path), "stat", READS, -1); return real(p, s); }
int lstat64(const char *p, struct stat64 *s) { REAL(lstat64); CHECK(of_path(AT_FDCWD, p, path), "stat", READS, -1); return real(p, s); }
int fstatat(int d, const char *p, struct stat *s, int f) { REAL(fstatat); CHECK(*p && of_path(d, p, path), "stat", READS, -1); return real(d, p, s, f); }
int fstatat64(int d, const char *p, struct stat64 *s, int f) { REAL(fstatat64); CHECK(*p && of_path(d, p, path), "stat", READS, -1); return real(d, p, s, f); }
int statx(int d, const char *p, int f, unsigned m, struct statx *s) {
  REAL(statx);
  CHECK(p && *p && of_path(d, p, path), "stat", READS, -1);
  return real(d, p, f, m, s);
}

/* A write that is hit leaves half of its bytes, as a full disk or a kill does. */
#define TORN(call)                                                          \
  if (atomic_load(&armed) && !inside) {                                     \
    char path[4096];                                                        \
    inside = 1;                                                             \
    int first = !hit[0], failed = of_fd(fd, path) && fails("write", WRITES | GROWS, path); \
    inside = 0;                                                             \
    if (failed) { if (first && n > 1) { if ((call) < 0) {} } if (fault == KILL) die(); errno = fault; return -1; } \
  }
ssize_t write(int fd, const void *b, size_t n) { REAL(write); TORN(real(fd, b, n / 2)); return real(fd, b, n); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) { REAL(pwrite); TORN(real(fd, b, n / 2, o)); return real(fd, b, n, o); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) { REAL(pwrite64); TORN(real(fd, b, n / 2, o)); return real(fd, b, n, o); }
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(writev); CHECK(of_fd(fd, path), "write", WRITES | GROWS, -1); return real(fd, v, n); }
int fsync(int fd) { REAL(fsync); CHECK(of_fd(fd, path), "fsync", WRITES | GROWS, -1); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); CHECK(of_fd(fd, path), "fsync", WRITES | GROWS, -1); return real(fd); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); CHECK(of_fd(fd, path), "truncate", WRITES | GROWS, -1); return real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); CHECK(of_fd(fd, path), "truncate", WRITES | GROWS, -1); return real(fd, n); }
int truncate(const char *p, off_t n) { REAL(truncate); CHECK(of_path(AT_FDCWD, p, path), "truncate", WRITES | GROWS, -1); return real(p, n); }
int posix_fallocate(int fd, off_t o, off_t n) { REAL(posix_fallocate); CHECK(of_fd(fd, path), "truncate", WRITES | GROWS, errno); return real(fd, o, n); }
int rename(const char *a, const char *b) { REAL(rename); CHECK(of_path(AT_FDCWD, b, path), "rename", WRITES | GROWS, -1); return real(a, b); }
int renameat(int d, const char *a, int e, const char *b) { REAL(renameat); CHECK(of_path(e, b, path), "rename", WRITES | GROWS, -1); return real(d, a, e, b); }
int renameat2(int d, const char *a, int e, const char *b, unsigned f) { REAL(renameat2); CHECK(of_path(e, b, path), "rename", WRITES | GROWS, -1); return real(d, a, e, b, f); }
int link(const char *a, const char *b) { REAL(link); CHECK(of_path(AT_FDCWD, b, path), "link", WRITES | GROWS, -1); return real(a, b); }
int symlink(const char *a, const char *b) { REAL(symlink); CHECK(of_path(AT_FDCWD, b, path), "link", WRITES | GROWS, -1); return real(a, b); }
int unlink(const char *p) { REAL(unlink); CHECK(of_path(AT_FDCWD, p, path), "unlink", WRITES, -1); return real(p); }
int unlinkat(int d, const char *p, int f) { REAL(unlinkat); CHECK(of_path(d, p, path), f & AT_REMOVEDIR ? "rmdir" : "unlink", WRITES, -1); return real(d, p, f); }
int rmdir(const char *p) { REAL(rmdir); CHECK(of_path(AT_FDCWD, p, path), "rmdir", WRITES, -1); return real(p); }
int mkdir(const char *p, mode_t m) { REAL(mkdir); CHECK(of_path(AT_FDCWD, p, path), "mkdir", WRITES | GROWS, -1); return real(p, m); }
int mkdirat(int d, const char *p, mode_t m) { REAL(mkdirat); CHECK(of_path(d, p, path), "mkdir", WRITES | GROWS, -1); return real(d, p, m); }
int chmod(const char *p, mode_t m) { REAL(chmod); CHECK(of_path(AT_FDCWD, p, path), "chmod", WRITES, -1); return real(p, m); }
int fchmod(int fd, mode_t m) { REAL(fchmod); CHECK(of_fd(fd, path), "chmod", WRITES, -1); return real(fd, m); }
int fchmodat(int d, const char *p, mode_t m, int f) { REAL(fchmodat); CHECK(of_path(d, p, path), "chmod", WRITES, -1); return real(d, p, m, f); }
int flock(int fd, int o) { REAL(flock); if (!(o & LOCK_UN)) CHECK(of_fd(fd, path), "lock", WRITES, -1); return real(fd, o); }
/* Closed all the same, as Linux does. */
int close(int fd) {
  REAL(close);
  char path[4096];
  int failed = 0;
  if (atomic_load(&armed) && !inside) {
    inside = 1;
    failed = of_fd(fd, path) && fails("close", fcntl(fd, F_GETFL) & (O_WRONLY | O_RDWR) ? WRITES | GROWS : READS, path);
    inside = 0;
  }
  if (failed && fault == KILL) die();
  int done = real(fd);
  if (failed) { errno = fault; return -1; }
  return done;
}
