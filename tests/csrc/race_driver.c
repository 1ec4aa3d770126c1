/*
 * A driver that rewrites what it has made available while the device reads it: descriptors, indirect tables, headers,
 * available entries and indices, of split and packed rings at once, while guest memory is mapped anew.
 *
 * Whatever mixture of old and new the device finds, what it makes of it must be a chain that could have been named:
 * device-writable segments lie in the pages that writable descriptors name (the last ones of memory, so that no length
 * leads from them to others), and nothing else changes but the rings.  The sanitizers see the rest; guest memory lies
 * between guard pages.  Afterwards the same queues serve a driver that keeps to the rules.
 *
 *     race_driver CHAINS
 */
#include "core.h"
#include "driver.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(condition) do { if (!(condition)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); abort(); } } while (0)

#define QUEUES 4		/* two split, two packed, each with and without the event index */
#define RING_SIZE 16
#define BATCH 8
#define PAGE 4096u
#define PAGES 48u
#define SIZE (PAGES * PAGE)
#define RING(q) ((q) * 4 * PAGE)		/* descriptors, driver area, device area: a page each; one to spare */
#define TABLES (QUEUES * 4 * PAGE)		/* split, then packed: no table that is too long runs over a ring */
#define HEADERS (TABLES + 2 * PAGE)
#define READABLE (HEADERS + PAGE)		/* named by readable descriptors only */
#define CANARY (READABLE + 3 * PAGE)		/* named by nobody */
#define WRITABLE (SIZE - 8 * PAGE)
#define PATTERN 0xa5

enum { NEXT = 1, WRITE = 2, INDIRECT = 4, AVAIL = 1 << 7, USED = 1 << 15 };

struct race {
	uint8_t *ram;
	struct vmm_device *device;
	struct vmm_queue *queue[QUEUES];
	struct vmm_alias low, high;	/* the pages before WRITABLE, and those from there on */
	uint64_t chains;		/* that each queue is to serve, and a few that break rules */
	atomic_uint serving;		/* threads that have not ended */
};

struct server {
	struct race *race;
	uint32_t index;
};

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static bool is_packed(uint32_t q)
{
	return q >= 2;
}

static struct vmm_queue_config config_of(uint32_t q)
{
	return (struct vmm_queue_config){
		.size = RING_SIZE, .vector = VMM_NO_VECTOR, .desc = RING(q), .driver = RING(q) + PAGE, .device = RING(q) + 2 * PAGE,
		.event_idx = q & 1, .indirect = true, .packed = is_packed(q),
	};
}

/* ---- the driver --------------------------------------------------------------------------------------------------- */

/* The stores that race. */
#define STORE(bits) \
	static void store##bits(struct race *r, uint64_t at, uint64_t value) \
	{ \
		*(volatile uint##bits##_t *)(void *)(r->ram + at) = (uint##bits##_t)value; \
	}
STORE(16)
STORE(32)
STORE(64)

static uint16_t load16_of(struct race *r, uint64_t at)
{
	return *(volatile uint16_t *)(void *)(r->ram + at);
}

static uint64_t readable_address(uint64_t x)
{
	switch (x % 8) {
	case 0: return SIZE - 1 - x / 8 % 16;			/* over the end of memory */
	case 1: return 0 - (x / 8 % 64);			/* over the end of the address space */
	case 2: return 1ull << 40;				/* nowhere */
	case 3: case 4: return HEADERS + 16 * (x / 8 % 16);
	default: return READABLE + x / 8 % (2 * PAGE);
	}
}

/* A mixture of the bytes of two of these is one of them, or nowhere. */
static uint64_t writable_address(uint64_t x)
{
	static const uint64_t above[] = { 1ull << 40, 0xffffffffff000000 };	/* nowhere, over the end of the address space */

	return (x % 16 ? 0 : above[x >> 4 & 1]) | (WRITABLE + x / 32 % (8 * PAGE));
}

static uint64_t any_length(uint64_t x)
{
	static const uint32_t lengths[] = { 0, 1, 16, 512, PAGE, 3 * PAGE, 0x10000000, UINT32_MAX };

	return x & 8 ? 16 : lengths[x % 8];
}

static uint64_t table_length(uint64_t x)
{
	static const uint32_t lengths[] = { 16, 32, 48, 64, 128, 17, 0, 0xfffffff0 };

	return lengths[x & 8 ? x % 4 : x % 8];
}

/* One field of one descriptor.  A cell that is once readable stays so: no mixture makes it name what it must not. */
static void rewrite_cell(struct race *r, uint64_t cell, bool table, bool packed, uint64_t x)
{
	uint64_t at = cell % PAGE / 16;
	bool writable = at % 4 >= 2, leads = !table && at % 4 == 1;	/* two readable, of which one may lead to a table */
	uint64_t flags = (writable ? WRITE : 0) | (x >> 8 & 1 ? NEXT : 0) | (leads && x >> 9 & 1 ? INDIRECT : 0);

	if (packed && !table)
		flags |= x >> 10 & 1 ? AVAIL : USED;
	switch (x % 4) {
	case 0:
		x >>= 12;
		store64(r, cell, writable ? writable_address(x) : leads && x & 1 ? TABLES + PAGE * packed + 16 * (x / 2 % 64) : readable_address(x));
		break;
	case 1: store32(r, cell + 8, leads ? table_length(x >> 12) : any_length(x >> 12)); break;
	case 2: store16(r, cell + (packed ? 14 : 12), flags); break;
	default:		/* to one who takes a packed table for a split one the id is the flags */
		store16(r, cell + (packed ? 12 : 14), (x >> 11 & 15 ? at + 1 : x >> 12) & (packed && table ? ~WRITE : ~0));
		break;
	}
}

static void rewrite_header(struct race *r, uint64_t x)
{
	uint64_t at = HEADERS + 16 * (x % 16);

	store32(r, at, x >> 8 & 31);
	store32(r, at + 4, UINT32_MAX);		/* as a descriptor it names nothing */
	store64(r, at + 8, x >> 16);
}

static void offer(struct race *r, uint32_t q, uint64_t x)
{
	uint64_t avail = RING(q) + PAGE;
	uint16_t idx = load16_of(r, avail + 2);

	if (is_packed(q)) {
		store32(r, avail, x >> 8);	/* the wish for interrupts */
		return;
	}
	store16(r, avail + 4 + 2 * (idx % RING_SIZE), x >> 8 & 31 ? x >> 16 & (RING_SIZE - 1) : x >> 16);
	store16(r, avail, x >> 32);
	store16(r, avail + 2, x >> 40 & 127 ? idx + 1u : x >> 48);
}

/* At a reset: nothing is available. */
static void take_back(struct race *r, uint32_t q)
{
	store16(r, RING(q) + PAGE + 2, 0);
	for (uint32_t i = 0; is_packed(q) && i < RING_SIZE; i++)
		store16(r, RING(q) + 16 * i + 14, 0);
}

static void *rewrite(void *arg)
{
	struct race *r = arg;
	uint64_t state = 88172645463325252ull;

	while (atomic_load(&r->serving)) {
		uint64_t x = next_random(&state), y = next_random(&state);
		uint32_t q = x % QUEUES;
		switch (x >> 8 & 7) {
		case 0: rewrite_header(r, y); break;
		case 1: case 2: offer(r, q, y); break;
		case 3: case 4: rewrite_cell(r, TABLES + PAGE * (x >> 7 & 1) + 16 * (x >> 16 & 63), true, x >> 7 & 1, y); break;
		default: rewrite_cell(r, RING(q) + 16 * (x >> 16 & (RING_SIZE - 1)), false, is_packed(q), y); break;
		}
	}
	return NULL;
}

/* ---- the device --------------------------------------------------------------------------------------------------- */

/* As much of a segment as can be touched in little time: its ends. */
static uint8_t touch(uint8_t *p, uint32_t len, bool write)
{
	volatile uint8_t *v = p;
	uint8_t sum = 0;

	for (uint32_t i = 0; i < len; i += i < 64 || len - i <= 64 ? 1 : len - i - 64) {
		if (write)
			v[i] = 0x5a;	/* as a descriptor it names nothing */
		else
			sum = (uint8_t)(sum + v[i]);
	}
	return sum;
}

static void use_chain(struct race *r, const struct vmm_chain *c)
{
	uint64_t total[2] = { 0, 0 };

	CHECK(c->header_len <= VMM_HEADER_SIZE);
	if (c->flags & VMM_CHAIN_UNREACHABLE)
		return;
	for (uint32_t i = 0; i < c->readable_segs + c->writable_segs; i++) {
		const struct vmm_seg *s = &c->segs[i];
		bool write = i >= c->readable_segs;
		const struct vmm_alias *a = s->alias == r->high.id ? &r->high : &r->low;
		CHECK(s->alias == a->id && s->len && s->offset < a->size && s->len <= a->size - s->offset);
		CHECK(!write || a == &r->high);
		touch((uint8_t *)(uintptr_t)a->addr + s->offset, s->len, write);
		total[write] += s->len;
	}
	CHECK(total[0] == c->readable && total[1] == c->writable);
}

static void *serve(void *arg)
{
	struct server *s = arg;
	struct race *r = s->race;
	struct vmm_queue *q = r->queue[s->index];
	struct vmm_queue_config config = config_of(s->index);
	struct vmm_chain chain[BATCH];
	struct vmm_completion done[BATCH];
	uint64_t served = 0, refused = 0;

	while (served < r->chains || refused < r->chains / 64) {
		int n = vmm_queue_pop(q, chain, 1 + (int)(served % BATCH));
		if (n < 0) {
			CHECK(n == -EPROTO && vmm_queue_busy(q) == 0);
			vmm_queue_stop(q);
			take_back(r, s->index);
			CHECK(vmm_queue_start(q, &config) == 0);
			refused++;
			continue;
		}
		for (int i = 0; i < n; i++) {
			use_chain(r, &chain[i]);
			done[i] = (struct vmm_completion){ chain[i].token, i % 3, (uint32_t)chain[i].writable };
		}
		CHECK(vmm_queue_complete(q, done, n) <= n && (n == 0 || vmm_queue_busy(q) == 0));
		served += (uint64_t)n;
		if (!n)
			sched_yield();
	}
	atomic_fetch_sub(&r->serving, 1);
	return NULL;
}

static void map(struct race *r, uint64_t from, uint64_t to, struct vmm_alias *out)
{
	uint64_t at = (uintptr_t)r->ram + from;

	CHECK(vmm_device_map(r->device, from, to - from, at, at, to - from, PAGE, PROT_READ | PROT_WRITE, out) == 0);
}

/* The transport's thread: the writable pages go and come back. */
static void *remap(void *arg)
{
	struct race *r = arg;

	while (atomic_load(&r->serving)) {
		uint32_t old;
		eventfd_t value;
		uint32_t busy = vmm_device_pause(r->device, VMM_PAUSE_QUIESCE);
		while (busy) {
			eventfd_read(r->device->drained_fd, &value);
			busy = vmm_device_busy(r->device);
		}
		CHECK(vmm_device_unmap(r->device, WRITABLE, SIZE - WRITABLE, &old) == 0 && old == r->high.id);
		vmm_alias_release(r->high.map_base, r->high.map_len);
		map(r, WRITABLE, SIZE, &r->high);
		vmm_device_resume(r->device, VMM_PAUSE_QUIESCE);
		usleep(200);		/* mutexes are not fair: the queues must get their turn */
	}
	return NULL;
}

/* ---- before and after ----------------------------------------------------------------------------------------------- */

static bool is_filled(const uint8_t *p, const uint8_t *end)
{
	while (p < end && *p == PATTERN)
		p++;
	return p == end;
}

static void check_untouched(struct race *r)
{
	CHECK(is_filled(r->ram + READABLE, r->ram + WRITABLE));
	for (uint32_t q = 0; q < QUEUES; q++) {
		uint32_t driver = is_packed(q) ? 4 : 6 + 2 * RING_SIZE, device = is_packed(q) ? 4 : 6 + 8 * RING_SIZE;
		uint8_t *ring = r->ram + RING(q);
		CHECK(is_filled(ring + 16 * RING_SIZE, ring + PAGE));
		CHECK(is_filled(ring + PAGE + driver, ring + 2 * PAGE));
		CHECK(is_filled(ring + 2 * PAGE + device, ring + 4 * PAGE));
	}
	for (uint32_t i = 0; i < 16; i++)
		CHECK(load16_of(r, HEADERS + 16 * i + 6) == UINT16_MAX || is_filled(r->ram + HEADERS + 16 * i, r->ram + HEADERS + 16 * i + 16));
}

/* A driver that keeps to the rules, on the same queue after a reset: every request is whole and comes back. */
static void check_service(struct race *r, uint32_t q)
{
	uint8_t *desc = r->ram + RING(q), *driver = desc + PAGE, *device = desc + 2 * PAGE;
	struct vmm_queue_config config = config_of(q);
	vdrv_split *split = is_packed(q) ? NULL : vdrv_split_new(desc, driver, device, RING_SIZE, config.event_idx);
	vdrv_packed *packed = is_packed(q) ? vdrv_packed_new(desc, driver, device, RING_SIZE, config.event_idx) : NULL;
	struct vdrv_segment parts[3] = { { READABLE, 16, 0 }, { READABLE + 512, 512, 0 }, { WRITABLE, 1, VDRV_WRITE } };

	vmm_queue_stop(r->queue[q]);
	CHECK((split || packed) && vmm_queue_start(r->queue[q], &config) == 0);
	for (uint32_t i = 0; i < 5 * RING_SIZE; i++) {
		struct vmm_chain chain[2];
		struct vdrv_used used;
		int name = packed ? vdrv_packed_add(packed, parts, 3, 0, NULL) : vdrv_split_add(split, parts, 3, 0, NULL);
		packed ? vdrv_packed_publish(packed) : vdrv_split_publish(split);
		CHECK(name >= 0 && vmm_queue_pop(r->queue[q], chain, 2) == 1 && chain[0].readable == 512 && !chain[0].flags);
		CHECK(vmm_queue_complete(r->queue[q], &(struct vmm_completion){ .token = chain[0].token }, 1) == 1);
		int n = packed ? vdrv_packed_get_used(packed, &used, 1) : vdrv_split_get_used(split, &used, 1);
		CHECK(n == 1 && used.id == (uint32_t)name && used.len == 1 && r->ram[WRITABLE] == 0);
	}
	vdrv_split_free(split);
	vdrv_packed_free(packed);
}

static void set_up(struct race *r)
{
	int fd = memfd_create("race", 0);

	CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0);
	uint8_t *guarded = mmap(NULL, SIZE + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	r->ram = mmap(guarded + PAGE, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	CHECK(r->ram != MAP_FAILED);
	close(fd);
	memset(r->ram, PATTERN, SIZE);
	r->device = vmm_device_new(QUEUES, RING_SIZE, eventfd(0, EFD_NONBLOCK));
	map(r, 0, WRITABLE, &r->low);
	map(r, WRITABLE, SIZE, &r->high);
	for (uint32_t q = 0; q < QUEUES; q++) {
		struct vmm_queue_config config = config_of(q);
		for (uint32_t i = 0; i < RING_SIZE; i++)	/* what names nothing, and is not available */
			store32(r, RING(q) + 16 * i + 12, 0);
		memset(r->ram + RING(q) + PAGE, 0, is_packed(q) ? 4 : 6 + 2 * RING_SIZE);
		r->queue[q] = vmm_device_queue(r->device, q, eventfd(0, EFD_NONBLOCK));
		CHECK(vmm_queue_start(r->queue[q], &config) == 0);
	}
}

static void tear_down(struct race *r)
{
	uint32_t alias;

	for (uint32_t q = 0; q < QUEUES; q++) {
		vmm_queue_stop(r->queue[q]);
		close(r->queue[q]->kick_fd);
	}
	CHECK(vmm_device_busy(r->device) == 0);
	CHECK(!vmm_device_unmap(r->device, 0, WRITABLE, &alias) && !vmm_device_unmap(r->device, WRITABLE, SIZE - WRITABLE, &alias));
	vmm_alias_release(r->low.map_base, r->low.map_len);
	vmm_alias_release(r->high.map_base, r->high.map_len);
	close(r->device->drained_fd);
	vmm_device_free(r->device);
	munmap(r->ram - PAGE, SIZE + 2 * PAGE);
}

int main(int argc, char **argv)
{
	struct race r = { .chains = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000000, .serving = QUEUES };
	struct server servers[QUEUES];
	pthread_t threads[QUEUES + 2];

	set_up(&r);
	for (uint32_t q = 0; q < QUEUES; q++) {
		servers[q] = (struct server){ &r, q };
		pthread_create(&threads[q], NULL, serve, &servers[q]);
	}
	pthread_create(&threads[QUEUES], NULL, rewrite, &r);
	pthread_create(&threads[QUEUES + 1], NULL, remap, &r);
	for (uint32_t i = 0; i < QUEUES + 2; i++)
		pthread_join(threads[i], NULL);
	check_untouched(&r);
	for (uint32_t q = 0; q < QUEUES; q++)
		check_service(&r, q);
	tear_down(&r);
	puts("ok");
	return 0;
}
