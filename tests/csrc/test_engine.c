/*
 * The native engine by itself: drivers in threads of their own read, write and zero through it and check the data, while
 * another thread, as the transport does, pauses the queues, takes memory back from what is in flight, and maps memory
 * anew.  A third answers what the engine hands over, as the worker does.
 *
 *     test_engine KIND ROUNDS
 *
 * KIND is memory, inline (a file that never waits), uring, bounce (the same through private memory), or threads (a file
 * without io_uring).  The file is in memory whatever the engine is told of it.  The drivers sleep until they are
 * told; with files interrupts are held back.
 */
#include "core.h"
#include "driver.h"
#include "engine.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define CHECK(condition) do { if (!(condition)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); abort(); } } while (0)

#define QUEUES 3		/* of which two share a thread; every other one is packed */
#define RING_SIZE 32		/* the largest; each request takes three descriptors or four */
#define DEPTH 8
#define BATCH 5
#define PAGE 4096u
#define PLACE (4 * PAGE)	/* of one request: header and status, then data in two parts */
#define LOW (QUEUES * 3 * PAGE)	/* rings, always mapped */
#define SIZE (LOW + QUEUES * DEPTH * PLACE)
#define LENGTH 2048u		/* of a transfer */
#define DISK (QUEUES * DEPTH * LENGTH)
#define SECTOR 512
#define UNMAP 1
#define RETIRED 4096
#define TIMEOUT_MS 10000

enum { IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, WRITE_ZEROES = 13 };
enum { UNKNOWN = 0, ZEROES = 256 };	/* what fills the disk; the rest are bytes */
enum { STATUS_OK = 0, STATUS_IOERR = 1 };

struct old {
	uint64_t base, len;
};

struct test {
	uint8_t *ram, *disk;
	int fd;				/* of the disk, or -1 */
	struct vmm_device *device;
	struct vmm_engine *engine;
	struct vmm_queue *queue[QUEUES];
	int ready[QUEUES], irq[QUEUES];
	struct vmm_alias now[VMM_MAX_REGIONS];
	uint32_t nr_now;
	struct old retired[RETIRED];
	uint32_t nr_retired;
	uint64_t rounds, failed, unmapped, orphaned;
	atomic_uint driving;
	atomic_bool ended;
	atomic_uint handed_over;
};

struct driver {
	struct test *test;
	uint32_t index;
	vdrv_split *split;
	vdrv_packed *packed;
	uint64_t failed, random;
	struct request {
		int name;		/* what the ring calls it, -1: none is under way */
		uint8_t type;
		uint16_t wrote, holds;	/* what fills the disk there */
	} requests[DEPTH];
};

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* ---- the driver ---------------------------------------------------------------------------------------------------- */

static uint64_t place_of(const struct driver *d, uint32_t slot)
{
	return LOW + (d->index * DEPTH + slot) * PLACE;
}

static void submit(struct driver *d, uint32_t slot)
{
	struct request *r = &d->requests[slot];
	uint64_t at = place_of(d, slot), x = next_random(&d->random);
	uint8_t *place = d->test->ram + at;
	uint64_t sector = (d->index * DEPTH + slot) * (LENGTH / SECTOR);
	uint32_t first = x & 1 ? 1024 : 1000;	/* the parts are no whole sectors */
	bool small = x % 31 == 0, write = !r->holds || x & 2;

	r->type = small ? x & 4 ? FLUSH : GET_ID : x % 29 == 0 ? WRITE_ZEROES : write ? OUT : IN;
	r->wrote = r->type == WRITE_ZEROES ? ZEROES : (uint16_t)(1 + x / 64 % 255);
	memset(place, 0, 16);
	place[0] = r->type;
	memcpy(place + 8, &sector, 8);
	place[16] = 0xff;
	memset(place + PAGE, write ? (uint8_t)r->wrote : 0xee, LENGTH + 1024);

	uint16_t way = r->type == IN ? VDRV_WRITE : 0;
	struct vdrv_segment parts[4] = {
		{ at, 16, 0 }, { at + PAGE, first, way }, { at + PAGE + first + 16, LENGTH - first, way },
	};
	uint32_t count = small ? 2 : 4;
	if (r->type == WRITE_ZEROES) {
		uint32_t rest[] = { LENGTH / SECTOR, x & 8 ? UNMAP : 0 };
		memcpy(place + PAGE, &sector, 8);
		memcpy(place + PAGE + 8, rest, 8);
		parts[1] = (struct vdrv_segment){ at + PAGE, 16, 0 };
		count = 3;
	}
	parts[count - 1] = (struct vdrv_segment){ at + 16, 1, VDRV_WRITE };
	r->name = d->packed ? vdrv_packed_add(d->packed, parts, count, 0, NULL) : vdrv_split_add(d->split, parts, count, 0, NULL);
	CHECK(r->name >= 0);
}

static bool is_filled(const uint8_t *p, uint32_t len, uint16_t with)
{
	while (len && *p == (uint8_t)with)
		p++, len--;
	return !len;
}

static void finish(struct driver *d, uint32_t slot, uint32_t used)
{
	struct request *r = &d->requests[slot];
	const uint8_t *place = d->test->ram + place_of(d, slot);
	uint8_t status = place[16];

	r->name = -1;
	CHECK(status == STATUS_OK || status == STATUS_IOERR);
	if (status == STATUS_IOERR) {
		d->failed++;
		r->holds = r->type == OUT || r->type == WRITE_ZEROES ? UNKNOWN : r->holds;
		return;
	}
	if (r->type == OUT || r->type == WRITE_ZEROES)
		r->holds = r->wrote;
	if (r->type == IN) {
		CHECK(used == LENGTH + 1);
		uint32_t first = is_filled(place + PAGE, 1024, r->holds) ? 1024 : 1000;
		CHECK(is_filled(place + PAGE, first, r->holds));
		CHECK(is_filled(place + PAGE + first + 16, LENGTH - first, r->holds));
	}
}

static void wait_until_told(struct driver *d)
{
	struct pollfd p = { d->test->irq[d->index], POLLIN, 0 };
	eventfd_t told;

	if (d->packed ? vdrv_packed_arm(d->packed, 1) : vdrv_split_arm(d->split, 1))
		return;
	CHECK(poll(&p, 1, TIMEOUT_MS) == 1);
	eventfd_read(p.fd, &told);
}

static void on_irq(void *arg, uint32_t vector)
{
	struct test *t = arg;

	eventfd_write(t->irq[vector], 1);
}

static void finish_used(struct driver *d)
{
	struct vdrv_used used[DEPTH];
	int n = d->packed ? vdrv_packed_get_used(d->packed, used, DEPTH) : vdrv_split_get_used(d->split, used, DEPTH);
	uint32_t slot;

	CHECK(n >= 0);
	for (int i = 0; i < n; i++) {
		for (slot = 0; slot < DEPTH && d->requests[slot].name != (int)used[i].id; slot++)
			;
		CHECK(slot < DEPTH);
		finish(d, slot, used[i].len);
	}
	if (!n)
		wait_until_told(d);
}

static bool under_way(const struct driver *d)
{
	for (uint32_t i = 0; i < DEPTH; i++)
		if (d->requests[i].name >= 0)
			return true;
	return false;
}

static void *drive(void *arg)
{
	struct driver *d = arg;
	uint64_t submitted = 0;

	while (submitted < d->test->rounds || under_way(d)) {
		for (uint32_t i = 0; i < DEPTH && submitted < d->test->rounds; i++) {
			if (d->requests[i].name >= 0)
				continue;
			submit(d, i);
			submitted++;
		}
		d->packed ? vdrv_packed_publish(d->packed) : vdrv_split_publish(d->split);
		if (d->packed ? vdrv_packed_need_kick(d->packed) : vdrv_split_need_kick(d->split))
			eventfd_write(d->test->queue[d->index]->kick_fd, 1ull << 32);
		finish_used(d);
	}
	atomic_fetch_sub(&d->test->driving, 1);
	return NULL;
}

/* ---- who answers what is handed over ---------------------------------------------------------------------------------- */

static uint32_t answer(struct test *t, const struct vmm_chain *c)
{
	static const uint8_t zeroes[LENGTH];
	struct iovec iov[8];
	uint64_t sector;
	bool write = c->header[0] == OUT;
	const struct vmm_seg *s = write ? c->segs : c->segs + c->readable_segs;
	uint32_t n = write ? c->readable_segs : c->writable_segs;

	if (c->error || c->flags)
		return STATUS_IOERR;
	if (c->header[0] == GET_ID || c->header[0] == FLUSH)
		return STATUS_OK;
	CHECK(t->fd >= 0 && n <= 8);	/* what waits, where there is no io_uring */
	if (c->header[0] == WRITE_ZEROES) {
		memcpy(&sector, c->first.host, 8);
		CHECK(pwrite(t->fd, zeroes, LENGTH, (off_t)sector * SECTOR) == (ssize_t)LENGTH);
		return STATUS_OK;
	}
	memcpy(&sector, c->header + 8, 8);
	for (uint32_t i = 0; i < n; i++)
		iov[i] = (struct iovec){ s[i].host, s[i].len };
	off_t at = (off_t)sector * SECTOR;
	CHECK((write ? pwritev(t->fd, iov, (int)n, at) : preadv(t->fd, iov, (int)n, at)) == (ssize_t)LENGTH);
	return STATUS_OK;
}

static void take_from(struct test *t, uint32_t index)
{
	struct vmm_chain chains[BATCH];
	struct vmm_completion done[BATCH];
	int n;

	while ((n = vmm_lane_take(vmm_engine_lane(t->engine, index), chains, BATCH)) > 0) {
		for (int i = 0; i < n; i++) {
			uint32_t status = answer(t, &chains[i]);
			bool read = chains[i].header[0] == IN && !status;
			done[i] = (struct vmm_completion){ chains[i].token, status, read ? (uint32_t)chains[i].writable : 0 };
		}
		vmm_queue_complete(t->queue[index], done, n);
		vmm_queue_tell(t->queue[index], true);
		atomic_fetch_add(&t->handed_over, (unsigned)n);
	}
	CHECK(n == 0);
}

static void *work(void *arg)
{
	struct test *t = arg;
	eventfd_t told;

	while (!atomic_load(&t->ended)) {
		struct pollfd fds[QUEUES];
		for (uint32_t q = 0; q < QUEUES; q++)
			fds[q] = (struct pollfd){ t->ready[q], POLLIN, 0 };
		poll(fds, QUEUES, -1);
		for (uint32_t q = 0; q < QUEUES; q++) {
			eventfd_read(t->ready[q], &told);
			take_from(t, q);
		}
	}
	return NULL;
}

/* ---- the transport ---------------------------------------------------------------------------------------------------- */

static void map(struct test *t, uint64_t from, uint64_t to)
{
	uint64_t at = (uintptr_t)t->ram + from;

	CHECK(!vmm_device_map(t->device, from, to - from, at, at, to - from, PAGE, PROT_READ | PROT_WRITE, &t->now[t->nr_now++]));
}

static void retire(struct test *t, uint32_t alias, const struct vmm_alias *successor)
{
	for (uint32_t i = 0; i < t->nr_now; i++) {
		if (t->now[i].id != alias)
			continue;
		CHECK(t->nr_retired < RETIRED);
		t->retired[t->nr_retired++] = (struct old){ t->now[i].map_base, t->now[i].map_len };
		t->now[i] = successor ? *successor : t->now[--t->nr_now];
		return;
	}
	CHECK(!"a region that we know");
}

/* As memory.py does: without orphans nobody knows them any more. */
static void forget_retired(struct test *t)
{
	while (!vmm_device_orphans(t->device) && t->nr_retired) {
		struct old *old = &t->retired[--t->nr_retired];
		vmm_alias_release(old->base, old->len);
	}
}

static void take_back(struct test *t)
{
	static struct vmm_alias fresh[VMM_MAX_REGIONS];
	int n;

	forget_retired(t);
	vmm_device_pause(t->device, VMM_PAUSE_ORPHAN);
	CHECK(vmm_device_orphan(t->device, fresh, &n) == 0);
	for (int i = 0; i < n; i++)
		retire(t, fresh[i].old, &fresh[i]);
	t->orphaned++;
	vmm_device_resume(t->device, VMM_PAUSE_ORPHAN);
}

static void remap(struct test *t)
{
	uint32_t alias;

	CHECK(vmm_device_unmap(t->device, LOW, SIZE - LOW, &alias) == 0);
	retire(t, alias, NULL);
	forget_retired(t);
	map(t, LOW, SIZE);
	t->unmapped++;
}

static void *transport(void *arg)
{
	struct test *t = arg;
	uint64_t random = 0x9e3779b97f4a7c15;
	eventfd_t told;

	while (atomic_load(&t->driving)) {
		uint64_t x = next_random(&random);
		uint32_t busy = vmm_device_pause(t->device, VMM_PAUSE_QUIESCE);
		while (busy && x % 4) {
			eventfd_read(t->device->drained_fd, &told);
			sched_yield();
			busy = vmm_device_busy(t->device);
		}
		if (busy)
			take_back(t);
		if (x & 64 || busy)
			remap(t);
		vmm_device_resume(t->device, VMM_PAUSE_QUIESCE);
		usleep(100 + x / 256 % 256);
	}
	return NULL;
}

/* ---- before and after ------------------------------------------------------------------------------------------------- */

static void set_up(struct test *t, const char *kind)
{
	bool memory = !strcmp(kind, "memory"), bounce = !strcmp(kind, "bounce"), uring = bounce || !strcmp(kind, "uring");
	int ram = memfd_create("ram", 0);

	CHECK(ram >= 0 && ftruncate(ram, SIZE) == 0);
	t->ram = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, ram, 0);
	close(ram);
	t->fd = memory ? -1 : memfd_create("disk", 0);
	CHECK(t->ram != MAP_FAILED && (memory || (t->fd >= 0 && ftruncate(t->fd, DISK) == 0)));
	t->disk = calloc(1, DISK);
	t->device = vmm_device_new(QUEUES, RING_SIZE, eventfd(0, EFD_NONBLOCK));
	vmm_device_irq_sink(t->device, (uintptr_t)on_irq, (uintptr_t)t);
	vmm_device_set_msix(t->device, true);
	CHECK(memory || vmm_device_coalesce(t->device, 4, 50000) == 0);
	map(t, 0, LOW);
	map(t, LOW, SIZE);
	for (uint32_t q = 0; q < QUEUES; q++) {
		t->queue[q] = vmm_device_queue(t->device, q, eventfd(0, EFD_NONBLOCK));
		t->ready[q] = eventfd(0, EFD_NONBLOCK);
		t->irq[q] = eventfd(0, EFD_NONBLOCK);
	}
	struct vmm_target target = {
		.kind = memory ? VMM_TARGET_MEMORY : VMM_TARGET_FILE, .sector_size = SECTOR, .alignment = 1, .writable = true,
		.memory = (uintptr_t)t->disk, .fd = t->fd, .in_memory = !strcmp(kind, "inline"),
		.bounce = bounce, .zeroes = true, .flush = memory ? VMM_FLUSH_NEEDLESS : VMM_FLUSH_SYNC,
	};
	struct vmm_engine_options options = {
		.poll_ns = 20000, .poll_adaptive = true, .uring = uring, .threads = 2, .queue_size_max = RING_SIZE,
	};
	t->engine = vmm_engine_new(&target, &options, t->queue, t->ready, QUEUES);
	CHECK(t->engine);
	vmm_engine_resize(t->engine, DISK);
	vmm_engine_limit(t->engine, 0, 0, LENGTH / SECTOR, 1);
	CHECK(!uring || vmm_engine_uring_error(t->engine) == 0);
}

static void start_queue(struct test *t, struct driver *d)
{
	uint64_t ring = (uint64_t)d->index * 3 * PAGE;
	uint8_t *at = t->ram + ring;
	bool packed = d->index % 2;
	struct vmm_queue_config config = {
		.size = RING_SIZE, .vector = d->index, .desc = ring, .driver = ring + PAGE, .device = ring + 2 * PAGE,
		.event_idx = d->index != 2, .packed = packed,
	};

	d->split = packed ? NULL : vdrv_split_new(at, at + PAGE, at + 2 * PAGE, RING_SIZE, config.event_idx);
	d->packed = packed ? vdrv_packed_new(at, at + PAGE, at + 2 * PAGE, RING_SIZE, config.event_idx) : NULL;
	CHECK((d->split || d->packed) && vmm_queue_start(t->queue[d->index], &config) == 0);
	for (uint32_t i = 0; i < DEPTH; i++)
		d->requests[i].name = -1;
}

/* What the drivers think is there, is. */
static void check_disk(struct test *t, const struct driver *d)
{
	for (uint32_t i = 0; i < DEPTH; i++) {
		uint64_t at = (d->index * DEPTH + i) * LENGTH;
		CHECK(t->fd < 0 || pread(t->fd, t->disk + at, LENGTH, (off_t)at) == (ssize_t)LENGTH);
		CHECK(!d->requests[i].holds || is_filled(t->disk + at, LENGTH, d->requests[i].holds));
	}
}

static void tear_down(struct test *t)
{
	uint32_t alias;

	CHECK(vmm_device_busy(t->device) == 0 && vmm_device_orphans(t->device) == 0);
	vmm_engine_free(t->engine);
	for (uint32_t q = 0; q < QUEUES; q++) {
		vmm_queue_stop(t->queue[q]);
		close(t->queue[q]->kick_fd);
		close(t->ready[q]);
		close(t->irq[q]);
	}
	CHECK(!vmm_device_unmap(t->device, 0, LOW, &alias));
	retire(t, alias, NULL);
	CHECK(!vmm_device_unmap(t->device, LOW, SIZE - LOW, &alias));
	retire(t, alias, NULL);
	forget_retired(t);
	close(t->device->drained_fd);
	vmm_device_free(t->device);
	munmap(t->ram, SIZE);
	free(t->disk);
	if (t->fd >= 0)
		close(t->fd);
}

int main(int argc, char **argv)
{
	static struct test t;
	static struct driver drivers[QUEUES];
	pthread_t threads[QUEUES], worker, remapper;

	CHECK(argc == 3);
	t.rounds = strtoull(argv[2], NULL, 10);
	atomic_store(&t.driving, QUEUES);
	set_up(&t, argv[1]);
	CHECK(vmm_engine_start(t.engine, NULL, 0) == 0);
	for (uint32_t q = 0; q < QUEUES; q++) {
		drivers[q] = (struct driver){ .test = &t, .index = q, .random = 88172645463325252ull + q };
		start_queue(&t, &drivers[q]);
		pthread_create(&threads[q], NULL, drive, &drivers[q]);
	}
	pthread_create(&worker, NULL, work, &t);
	pthread_create(&remapper, NULL, transport, &t);
	for (uint32_t q = 0; q < QUEUES; q++)
		pthread_join(threads[q], NULL);
	pthread_join(remapper, NULL);
	vmm_device_pause(t.device, VMM_PAUSE_STOP);
	vmm_engine_stop(t.engine);
	CHECK(vmm_engine_join(t.engine, 10000));
	atomic_store(&t.ended, true);
	eventfd_write(t.ready[0], 1);
	pthread_join(worker, NULL);
	for (uint32_t q = 0; q < QUEUES; q++) {
		check_disk(&t, &drivers[q]);
		t.failed += drivers[q].failed;
		vdrv_split_free(drivers[q].split);
		vdrv_packed_free(drivers[q].packed);
	}
	CHECK(t.unmapped && atomic_load(&t.handed_over));
	CHECK(t.failed < t.rounds * QUEUES / 2 && (!t.failed || t.orphaned));
	tear_down(&t);
	puts("ok");
	return 0;
}
