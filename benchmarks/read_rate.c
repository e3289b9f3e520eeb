/* How fast this core reads memory: sums `bytes` (a multiple of 512) that lie at `data`, so that no read can be left out.
   Built by limits.py with -O3 -march=native; several threads call it on their own parts. */

#include <stddef.h>
#include <stdint.h>

typedef uint64_t lanes __attribute__((vector_size(64)));

uint64_t sum_bytes(const lanes *data, size_t bytes) {
    lanes a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t at = 0; at + 8 <= bytes / sizeof(lanes); at += 8) {
        a += data[at] ^ data[at + 1];
        b += data[at + 2] ^ data[at + 3];
        c += data[at + 4] ^ data[at + 5];
        d += data[at + 6] ^ data[at + 7];
    }
    a += b + c + d;
    uint64_t sum = 0;
    for (int lane = 0; lane < 8; lane++) sum += a[lane];
    return sum;
}
