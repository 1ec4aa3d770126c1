/* One queue driven as hard as it goes, with no guest: the loop of ``vmmblk bench``. */
#ifndef VMMBLK_BENCH_H
#define VMMBLK_BENCH_H

#include "driver.h"

#include <stdbool.h>
#include <stdint.h>

/* Latencies are counted in buckets: 64 for each power of two of nanoseconds, so none is off by more than 1.6 %. */
#define VDRV_BUCKETS (64 * 40)

/* What *stop says: go on, begin no more requests, or wait no longer for those that were begun. */
enum { VDRV_GO_ON, VDRV_STOP, VDRV_GIVE_UP };

struct vdrv_job {
    /* Exactly one ring. */
    vdrv_split *split;
    vdrv_packed *packed;

    /* Memory for depth requests: each has a page (header, status, indirect table) and then block_size bytes rounded up to pages,
     * at `memory` here and at `iova` for the device. */
    uint8_t *memory;
    uint64_t iova;
    uint32_t depth;
    uint32_t block_size;
    bool indirect; /* one descriptor in the ring for each request, instead of three */

    /* Blocks [first, first + blocks) of block_size bytes are used; of a hundred requests read_percent are reads. */
    uint64_t first, blocks;
    uint32_t read_percent;
    bool random;
    uint64_t seed;

    /* Until so many nanoseconds have passed, or so many requests were made (0: no limit). */
    uint64_t runtime_ns;
    uint64_t requests;

    /* How the device is notified: by this message on this socket, by a store to this doorbell, by this eventfd, or (those
     * unset, the eventfd -1) not. */
    int socket;
    const uint8_t *message;
    uint32_t message_len;
    volatile uint16_t *doorbell;
    uint16_t queue;
    int kick_fd;

    /* An eventfd to sleep on until something is used, or -1 to look all the time. */
    int interrupt_fd;

    /* With this table, a number per block, what is written is different each time and reads are held against it. */
    uint32_t *generations;

    /* How long to wait for any one completion before giving up, nanoseconds. */
    uint64_t timeout_ns;
};

struct vdrv_direction {
    uint64_t requests, bytes, errors;
    uint64_t min_ns, max_ns, sum_ns;
    uint64_t buckets[VDRV_BUCKETS];
};

struct vdrv_outcome {
    uint64_t elapsed_ns;
    uint64_t kicks, interrupts;
    uint64_t corrupt; /* blocks that read otherwise than they were written */
    struct vdrv_direction read, write;
};

/* Run until done, or until *stop says so; *progress counts requests as they end.  0, or -ETIMEDOUT (the device does not
 * complete), -ECANCELED (VDRV_GIVE_UP), -EPROTO (it returned what it was not given), -ENOSPC (the ring is too small for
 * the depth), or what sending said. */
int vdrv_bench(const struct vdrv_job *job, struct vdrv_outcome *outcome, const int *stop, uint64_t *progress);

/* Read and check every block that was ever written, by generations; depth, ring and memory as in vdrv_bench(). */
int vdrv_verify(const struct vdrv_job *job, struct vdrv_outcome *outcome, const int *stop, uint64_t *progress);

/* Copies of block_size bytes between a disk of disk_size bytes and a buffer, at random, one thread: per second. */
double vdrv_memcpy_rate(uint64_t disk_size, uint32_t block_size, bool write, uint64_t runtime_ns);

#endif
