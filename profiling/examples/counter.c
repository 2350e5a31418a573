/* Counts the heap from outside of the program: live bytes and their peak, as the C library hands them out.
 * Compiled to a shared object and preloaded (profiling/agreement.sh); the program asks through counter_*. */
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *block, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *block);

static _Atomic size_t live, peak;

size_t counter_live(void) { return live; }
size_t counter_peak(void) { return peak; }
void counter_reset_peak(void) { peak = live; }

static void add(size_t bytes) {
    size_t now = atomic_fetch_add(&live, bytes) + bytes;
    size_t highest = peak;
    while (now > highest && !atomic_compare_exchange_weak(&peak, &highest, now)) {
    }
}

static void *born(void *block) {
    if (block != NULL)
        add(malloc_usable_size(block));
    return block;
}

void *malloc(size_t size) { return born(__libc_malloc(size)); }
void *calloc(size_t count, size_t size) { return born(__libc_calloc(count, size)); }
void *memalign(size_t alignment, size_t size) { return born(__libc_memalign(alignment, size)); }
void *aligned_alloc(size_t alignment, size_t size) { return born(__libc_memalign(alignment, size)); }

int posix_memalign(void **block, size_t alignment, size_t size) {
    void *made = born(__libc_memalign(alignment, size));
    if (made == NULL)
        return ENOMEM;
    *block = made;
    return 0;
}

void *realloc(void *block, size_t size) {
    size_t before = block == NULL ? 0 : malloc_usable_size(block);
    void *moved = __libc_realloc(block, size);
    if (moved == NULL) {
        if (size == 0)
            live -= before;
        return NULL;
    }
    size_t after = malloc_usable_size(moved);
    if (after > before)
        add(after - before);
    else
        live -= before - after;
    return moved;
}

void free(void *block) {
    if (block != NULL)
        live -= malloc_usable_size(block);
    __libc_free(block);
}
