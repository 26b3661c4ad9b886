#pragma once

// Included in front of every file of the module, so that a compiler on a newer system builds for glibc 2.28, the oldest
// that torch's own wheels run on (manylinux_2_28): `make wheel` links the same objects.

#if defined(__x86_64__) && defined(__gnu_linux__)

// Version 2.29 of log2 differs from the first in not setting errno.
__asm__(".symver log2, log2@GLIBC_2.2.5");

// Since glibc 2.32, libstdc++'s reference counts read this flag to do without atomics on one thread. Always atomic.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}

#endif
