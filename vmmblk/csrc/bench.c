/* See bench.h. */
#include "bench.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>

#define PAGE 4096u
#define HEADER 16u
#define STATUS_AT 64u
#define TABLE_AT 128u /* three descriptors */
#define UNSET 0xff
#define POPS 64u
#define PAUSES_PER_LOOK 16
#define SLEEP_MS 100
#define BUSY 0x80000000u /* of a block's generation: a write is under way */

struct request {
    uint64_t started;
    uint64_t block;
    uint32_t generation; /* of the block when it began */
    bool write;
};

struct bench {
    const struct vdrv_job *job;
    struct vdrv_outcome *outcome;
    struct request *requests; /* depth of them */
    uint16_t *owner;          /* by what names a chain: whose it is */
    uint64_t random, next;
    uint32_t in_flight;
    uint64_t stride, made, *progress;
    const int *stop;
    bool checking; /* reads every block once */
};

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t next_random(uint64_t *state)
{
    uint64_t x = *state;

    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

/* ---- either ring ---- */

static int ring_add(const struct vdrv_job *j, const struct vdrv_segment *segments, uint32_t n, uint64_t table_iova,
                    void *table)
{
    return j->split ? vdrv_split_add(j->split, segments, n, table_iova, table)
                    : vdrv_packed_add(j->packed, segments, n, table_iova, table);
}

static int ring_get_used(const struct vdrv_job *j, struct vdrv_used *used, uint32_t n)
{
    return j->split ? vdrv_split_get_used(j->split, used, n) : vdrv_packed_get_used(j->packed, used, n);
}

static bool ring_publish(const struct vdrv_job *j)
{
    if (j->split) {
        vdrv_split_publish(j->split);
        return vdrv_split_need_kick(j->split);
    }
    vdrv_packed_publish(j->packed);
    return vdrv_packed_need_kick(j->packed);
}

static bool ring_arm(const struct vdrv_job *j)
{
    return j->split ? vdrv_split_arm(j->split, 1) : vdrv_packed_arm(j->packed, 1);
}

static void ring_disarm(const struct vdrv_job *j)
{
    if (j->split)
        vdrv_split_disarm(j->split);
    else
        vdrv_packed_disarm(j->packed);
}

/* ---- what is written, so that it can be known again ---- */

/* It differs between blocks, generations of a block, and runs: what an earlier run left is not taken for this one's. */
static uint64_t pattern(const struct vdrv_job *j, uint64_t block, uint32_t generation)
{
    uint64_t state = ((j->first + block + 1) * 0x9e3779b97f4a7c15u ^ j->seed) * 0xbf58476d1ce4e5b9u ^
                     (uint64_t)generation << 32 ^ generation;

    return state ? state : 1;
}

static void fill(uint8_t *data, uint32_t length, uint64_t state)
{
    for (uint32_t at = 0; at + 8 <= length; at += 8) {
        uint64_t word = next_random(&state);
        memcpy(data + at, &word, 8);
    }
}

static bool matches(const uint8_t *data, uint32_t length, uint64_t state)
{
    for (uint32_t at = 0; at + 8 <= length; at += 8) {
        uint64_t word = next_random(&state);
        if (memcmp(data + at, &word, 8))
            return false;
    }
    return true;
}

/* ---- requests ---- */

static uint8_t *slot_memory(const struct bench *b, uint32_t slot)
{
    return b->job->memory + slot * b->stride;
}

static uint64_t choose_block(struct bench *b)
{
    const struct vdrv_job *j = b->job;

    if (!j->random || b->checking)
        return b->next++ % j->blocks;
    /* the high half of a product is as evenly spread as a remainder, and needs no division */
    return (uint64_t)(((unsigned __int128)next_random(&b->random) * j->blocks) >> 64);
}

/* The next block, and what to do with it; false if there is none to be had just now. */
static bool choose(struct bench *b, struct request *r)
{
    const struct vdrv_job *j = b->job;

    r->write = !b->checking && j->read_percent < 100 &&
               (j->read_percent == 0 || next_random(&b->random) % 100 >= j->read_percent);
    for (int tries = 0; tries < 1000; tries++) {
        if (b->checking && b->next >= j->blocks)
            return false;
        r->block = choose_block(b);
        uint32_t generation = j->generations ? j->generations[r->block] : 0;
        if (b->checking && !generation)
            tries--; /* the end of the disk ends this */
        else if (!(generation & BUSY))
            return true;
    }
    return false;
}

/* Fill a slot's memory and put its chain into the ring: 0 or -errno. */
static int start(struct bench *b, uint32_t slot, uint64_t now)
{
    const struct vdrv_job *j = b->job;
    struct request *r = &b->requests[slot];
    uint8_t *memory = slot_memory(b, slot);
    uint64_t iova = j->iova + slot * b->stride;
    uint64_t sector = (j->first + r->block) * (j->block_size / 512);
    uint32_t type = r->write;

    memcpy(memory, &type, 4);
    memset(memory + 4, 0, 4);
    memcpy(memory + 8, &sector, 8);
    memory[STATUS_AT] = UNSET;
    r->generation = j->generations ? j->generations[r->block] : 0;
    if (j->generations && r->write) {
        fill(memory + PAGE, j->block_size, pattern(j, r->block, r->generation + 1));
        j->generations[r->block] |= BUSY;
    }
    struct vdrv_segment segments[] = {
        { iova, HEADER, 0 },
        { iova + PAGE, j->block_size, r->write ? 0 : VDRV_WRITE },
        { iova + STATUS_AT, 1, VDRV_WRITE },
    };
    int name = ring_add(j, segments, 3, iova + TABLE_AT, j->indirect ? memory + TABLE_AT : NULL);
    if (name < 0)
        return name;
    b->owner[name] = (uint16_t)slot;
    r->started = now;
    b->in_flight++;
    b->made++;
    return 0;
}

static uint32_t bucket_of(uint64_t ns)
{
    if (ns < 64)
        return (uint32_t)ns;
    uint32_t shift = (uint32_t)(63 - __builtin_clzll(ns)) - 6;
    uint32_t bucket = 64 * (shift + 1) + (uint32_t)((ns >> shift) & 63);
    return bucket < VDRV_BUCKETS ? bucket : VDRV_BUCKETS - 1;
}

static void account(struct vdrv_direction *d, uint64_t ns, uint32_t bytes, uint8_t status)
{
    d->requests++;
    d->sum_ns += ns;
    d->buckets[bucket_of(ns)]++;
    if (ns > d->max_ns)
        d->max_ns = ns;
    if (ns < d->min_ns || d->requests == 1)
        d->min_ns = ns;
    if (status)
        d->errors++;
    else
        d->bytes += bytes;
}

static void finish(struct bench *b, uint32_t slot, uint64_t now)
{
    const struct vdrv_job *j = b->job;
    struct request *r = &b->requests[slot];
    const uint8_t *memory = slot_memory(b, slot);
    uint8_t status = memory[STATUS_AT];

    b->in_flight--;
    account(r->write ? &b->outcome->write : &b->outcome->read, now - r->started, j->block_size, status);
    if (!j->generations)
        return;
    uint32_t *generation = &j->generations[r->block];
    if (r->write)
        *generation = status ? 0 : r->generation + 1; /* after a failed write anything may be there */
    else if (!status && r->generation && *generation == r->generation && /* no write has begun since */
             !matches(memory + PAGE, j->block_size, pattern(j, r->block, r->generation)))
        b->outcome->corrupt++;
}

static int stopped(const struct bench *b)
{
    return __atomic_load_n(b->stop, __ATOMIC_RELAXED);
}

/* What there is to say while waiting until then: 0 or -errno. */
static int patience(const struct bench *b, uint64_t until)
{
    if (stopped(b) >= VDRV_GIVE_UP)
        return -ECANCELED;
    return now_ns() > until ? -ETIMEDOUT : 0;
}

/* The socket may be in either mode, and its other end may have stopped reading. */
static int send_message(const struct bench *b)
{
    const struct vdrv_job *j = b->job;
    uint64_t until = now_ns() + j->timeout_ns;

    for (;;) {
        ssize_t sent = send(j->socket, j->message, j->message_len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent == (ssize_t)j->message_len)
            return 0;
        if (sent >= 0)
            return -EPIPE; /* so short a message is taken whole */
        if (errno != EAGAIN && errno != EINTR)
            return -errno;
        int error = patience(b, until);
        if (error)
            return error;
        struct pollfd fd = { j->socket, POLLOUT, 0 };
        poll(&fd, 1, SLEEP_MS);
    }
}

static int kick(struct bench *b)
{
    const struct vdrv_job *j = b->job;

    if (!j->doorbell && !j->message && j->kick_fd < 0)
        return 0;
    b->outcome->kicks++;
    if (j->kick_fd >= 0)
        return eventfd_write(j->kick_fd, 1) ? -errno : 0;
    if (!j->doorbell)
        return send_message(b);
    *j->doorbell = j->queue;
    return 0;
}

/* Until something is used or the time is up. */
static int wait_for_used(struct bench *b, uint64_t until)
{
    const struct vdrv_job *j = b->job;
    eventfd_t count;

    if (j->interrupt_fd < 0) {
        for (int i = 0; i < PAUSES_PER_LOOK; i++)
            __builtin_ia32_pause();
        return patience(b, until);
    }
    if (ring_arm(j))
        return 0;
    struct pollfd fd = { j->interrupt_fd, POLLIN, 0 };
    if (poll(&fd, 1, SLEEP_MS) > 0 && !eventfd_read(j->interrupt_fd, &count))
        b->outcome->interrupts += count;
    ring_disarm(j);
    return patience(b, until);
}

static bool may_start(const struct bench *b, uint64_t now, uint64_t end)
{
    const struct vdrv_job *j = b->job;

    return now < end && !stopped(b) && (b->checking || !j->requests || b->made < j->requests);
}

static int start_if_due(struct bench *b, uint32_t slot, uint64_t now, uint64_t end)
{
    if (!may_start(b, now, end) || !choose(b, &b->requests[slot]))
        return 0;
    return start(b, slot, now);
}

static int run(struct bench *b)
{
    const struct vdrv_job *j = b->job;
    struct vdrv_used used[POPS];
    uint64_t began = now_ns(), now = began, heard = began;
    uint64_t end = j->runtime_ns && !b->checking ? began + j->runtime_ns : UINT64_MAX;
    int error = 0;

    if (j->interrupt_fd < 0)
        ring_disarm(j);
    for (uint32_t slot = 0; slot < j->depth && !error; slot++)
        error = start_if_due(b, slot, now, end);
    if (!error && ring_publish(j))
        error = kick(b);
    while (!error && b->in_flight) {
        int n = ring_get_used(j, used, POPS);
        if (n <= 0) {
            error = n < 0 ? n : wait_for_used(b, heard + j->timeout_ns);
            continue;
        }
        heard = now = now_ns();
        uint16_t slots[POPS]; /* known before anything is started: that takes the same names anew */
        for (int i = 0; i < n; i++)
            slots[i] = b->owner[used[i].id & 0xffff];
        for (int i = 0; i < n && !error; i++) {
            finish(b, slots[i], now);
            error = start_if_due(b, slots[i], now, end);
        }
        __atomic_store_n(b->progress, *b->progress + (uint64_t)n, __ATOMIC_RELAXED);
        if (!error && ring_publish(j))
            error = kick(b);
    }
    b->outcome->elapsed_ns = now_ns() - began;
    return error;
}

static int bench(const struct vdrv_job *job, struct vdrv_outcome *outcome, const int *stop, uint64_t *progress,
                 bool checking)
{
    struct bench b = {
        .job = job, .outcome = outcome, .stop = stop, .progress = progress, .checking = checking,
        .random = (job->seed * 2 + 1) * 0x9e3779b97f4a7c15u, /* never 0, and not alike for seeds that are */
        .stride = PAGE + (job->block_size + PAGE - 1) / PAGE * PAGE,
        .requests = calloc(job->depth, sizeof(struct request)),
        .owner = calloc(65536, sizeof(uint16_t)),
    };
    int error = b.requests && b.owner ? run(&b) : -ENOMEM;

    free(b.requests);
    free(b.owner);
    return error;
}

int vdrv_bench(const struct vdrv_job *job, struct vdrv_outcome *outcome, const int *stop, uint64_t *progress)
{
    return bench(job, outcome, stop, progress, false);
}

int vdrv_verify(const struct vdrv_job *job, struct vdrv_outcome *outcome, const int *stop, uint64_t *progress)
{
    return bench(job, outcome, stop, progress, true);
}

double vdrv_memcpy_rate(uint64_t disk_size, uint32_t block_size, bool write, uint64_t runtime_ns)
{
    uint8_t *disk = mmap(NULL, disk_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    uint8_t *buffers = mmap(NULL, 32ull * block_size, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    uint64_t blocks = disk_size / block_size, random = 88172645463325252u, copies = 0;

    if (disk == MAP_FAILED || buffers == MAP_FAILED || !blocks)
        return 0;
    uint64_t began = now_ns(), elapsed;
    do {
        for (int i = 0; i < 256; i++, copies++) {
            uint64_t block = (uint64_t)(((unsigned __int128)next_random(&random) * blocks) >> 64);
            uint8_t *at = disk + block * block_size, *buffer = buffers + copies % 32 * block_size;
            memcpy(write ? at : buffer, write ? buffer : at, block_size);
            atomic_signal_fence(memory_order_seq_cst);
        }
        elapsed = now_ns() - began;
    } while (elapsed < runtime_ns);
    munmap(disk, disk_size);
    munmap(buffers, 32ull * block_size);
    return (double)copies * 1e9 / (double)elapsed;
}
