/*
 * A fuzz target: a hostile driver, a hostile VMM and a late disk against the device's side of two virtqueues.
 *
 * The input is a program.  Its first bytes choose how the queues are set up, and then each step does one thing: store
 * bytes into guest memory, pop, complete, map, unmap, orphan, pause, reset.  After every step that touches the core the
 * target checks what must always hold; the sanitizers check the rest.  Guest memory lies between guard pages.
 *
 * With a fuzzer (clang -DFUZZER -fsanitize=fuzzer) this is LLVMFuzzerTestOneInput; without one, main() replays the
 * files it is given.
 */
#include "core.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define PAGES 24u
#define SIZE (PAGE * PAGES)
#define QUEUES 2
#define QUEUE_SIZE_MAX 64
#define BATCH 8
#define HELD_MAX 256
#define ALIASES_MAX 128

#define CHECK(condition) do { if (!(condition)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); abort(); } } while (0)

struct held {
	uint32_t queue;
	struct vmm_chain chain;
};

struct fuzz {
	const uint8_t *in;
	size_t left;
	uint8_t *ram;			/* the driver's and the transport's mapping */
	struct vmm_device *device;
	struct vmm_queue *queue[QUEUES];
	struct vmm_queue_config config[QUEUES];
	struct vmm_alias alias[ALIASES_MAX];	/* every alias that was ever described and not released */
	uint32_t nr_aliases;
	struct held held[HELD_MAX];	/* popped, not completed */
	uint32_t nr_held;
	struct { uint64_t iova, size; } region[16];
	uint32_t nr_regions;
	uint64_t last_end;		/* of the last descriptor stored */
};

static uint64_t take(struct fuzz *f, size_t bytes)
{
	uint64_t value = 0;

	for (size_t i = 0; i < bytes && f->left; i++, f->left--)
		value |= (uint64_t)*f->in++ << 8 * i;
	return value;
}

static void keep_alias(struct fuzz *f, const struct vmm_alias *a)
{
	CHECK(f->nr_aliases < ALIASES_MAX);
	f->alias[f->nr_aliases++] = *a;
}

static const struct vmm_alias *find_alias(const struct fuzz *f, uint32_t id)
{
	for (uint32_t i = 0; i < f->nr_aliases; i++)
		if (f->alias[i].id == id)
			return &f->alias[i];
	return NULL;
}

static void release_aliases(struct fuzz *f)
{
	while (f->nr_aliases) {
		const struct vmm_alias *a = &f->alias[--f->nr_aliases];
		vmm_alias_release(a->map_base, a->map_len);
	}
}

/* What a disk does with a chain: every byte of every segment lies in its alias and can be touched. */
static void use_chain(const struct fuzz *f, const struct vmm_chain *c)
{
	uint64_t readable = 0, writable = 0;
	volatile uint8_t sum = 0;

	CHECK(c->header_len <= VMM_HEADER_SIZE);
	if (c->flags & VMM_CHAIN_UNREACHABLE)
		return;
	for (uint32_t i = 0; i < c->readable_segs + c->writable_segs; i++) {
		const struct vmm_seg *s = &c->segs[i];
		const struct vmm_alias *a = find_alias(f, s->alias);
		bool write = i >= c->readable_segs;
		CHECK(a && s->len && s->offset < a->size && s->len <= a->size - s->offset);
		CHECK(a->prot & (write ? PROT_WRITE : PROT_READ));
		uint8_t *p = (uint8_t *)(uintptr_t)a->addr + s->offset;
		if (write)
			p[0] = p[s->len - 1] = (uint8_t)i;
		else
			sum = (uint8_t)(sum + p[0] + p[s->len - 1]);
		*(write ? &writable : &readable) += s->len;
	}
	CHECK(readable == c->readable && writable == c->writable);
}

static uint32_t held_of(const struct fuzz *f, uint32_t queue)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < f->nr_held; i++)
		n += f->held[i].queue == queue;
	return n;
}

/* The list of orphans that ended and have not been told holds those and no others. */
static void check_untold(const struct vmm_queue *q)
{
	uint32_t n = 0, at = q->slots ? q->first_untold : UINT32_MAX;

	for (; at != UINT32_MAX; at = q->slots[at].next, n++)
		CHECK(q->slots[at].state == SLOT_UNTOLD && n < q->max_size);
	CHECK(n == q->untold && (!q->slots || *q->untold_end == UINT32_MAX));
}

/* Exactly what was popped and not completed is in flight or orphaned. */
static void check(struct fuzz *f)
{
	CHECK(vmm_device_busy(f->device) + vmm_device_orphans(f->device) == f->nr_held);
	for (uint32_t q = 0; q < QUEUES; q++)
		CHECK(vmm_queue_busy(f->queue[q]) <= held_of(f, q));
	for (uint32_t q = 0; q < QUEUES; q++)
		check_untold(f->queue[q]);
	for (uint32_t q = 0; q < QUEUES; q++)	/* a packed ring's position never leaves it */
		CHECK(!f->config[q].packed || f->queue[q]->next_avail < 2 * f->config[q].size);
}

static void pop(struct fuzz *f, uint32_t q)
{
	struct vmm_chain chain[BATCH];
	int room = (int)(HELD_MAX - f->nr_held), n;

	n = vmm_queue_pop(f->queue[q], chain, room < BATCH ? room : BATCH);
	if (vmm_device_orphans(f->device))
		CHECK(n == 0);
	for (int i = 0; i < n; i++) {
		for (uint32_t k = 0; k < f->nr_held; k++)
			CHECK(f->held[k].queue != q || f->held[k].chain.token != chain[i].token);
		use_chain(f, &chain[i]);
		f->held[f->nr_held++] = (struct held){ q, chain[i] };
	}
}

static void complete(struct fuzz *f, uint32_t n)
{
	struct vmm_completion done[QUEUES][BATCH];
	int count[QUEUES] = { 0 };

	for (uint32_t i = 0; i < n && i < BATCH && f->nr_held; i++) {
		uint32_t at = (uint32_t)take(f, 1) % f->nr_held;
		struct held *h = &f->held[at];
		use_chain(f, &h->chain);
		done[h->queue][count[h->queue]++] = (struct vmm_completion){
			.token = h->chain.token, .status = (uint32_t)take(f, 1), .written = (uint32_t)take(f, 4),
		};
		*h = f->held[--f->nr_held];
	}
	for (uint32_t q = 0; q < QUEUES; q++)
		CHECK(vmm_queue_complete(f->queue[q], done[q], count[q]) <= count[q]);
}

/* Any token at all: what is not in flight must be ignored, what is counts as completed. */
static void complete_any(struct fuzz *f, uint32_t q)
{
	struct vmm_completion done = { .token = (uint32_t)take(f, 4), .status = 0 };

	for (uint32_t i = 0; i < f->nr_held; i++) {
		if (f->held[i].queue == q && f->held[i].chain.token == done.token) {
			f->held[i] = f->held[--f->nr_held];
			break;
		}
	}
	vmm_queue_complete(f->queue[q], &done, 1);
}

static void map(struct fuzz *f)
{
	uint64_t page = take(f, 1) % PAGES, pages = take(f, 1) % PAGES + 1, where = take(f, 1);
	uint32_t prot = where & 1 ? PROT_READ : PROT_READ | PROT_WRITE;
	bool fd = where % 16 != 3;
	uint64_t iova = where & 2 ? 0 - (uint64_t)SIZE : 0;	/* at the end of the address space */
	struct vmm_alias out;

	if (pages > PAGES - page)
		pages = PAGES - page;
	if (f->nr_regions == 16 || f->nr_aliases > ALIASES_MAX - 34)
		return;
	uint64_t shift = where & 64 ? where >> 4 & 3 : 0;	/* boundaries that are no page's */
	uint64_t size = pages * PAGE - 5 * shift, vaddr = (uintptr_t)f->ram + page * PAGE;
	iova += page * PAGE + 7 * shift;
	if (vmm_device_map(f->device, iova, size, fd ? vaddr : 0, fd ? vaddr : 0, fd ? pages * PAGE : 0, PAGE, prot, &out))
		return;
	f->region[f->nr_regions].iova = iova;
	f->region[f->nr_regions++].size = size;
	if (fd)
		keep_alias(f, &out);
}

static void unmap(struct fuzz *f, uint32_t at)
{
	uint32_t alias;

	CHECK(vmm_device_unmap(f->device, f->region[at].iova, f->region[at].size, &alias) == 0);
	CHECK(!alias || find_alias(f, alias));
	f->region[at] = f->region[--f->nr_regions];
}

static void orphan(struct fuzz *f)
{
	struct vmm_alias fresh[VMM_MAX_REGIONS];
	int n;

	if (f->nr_aliases > ALIASES_MAX - 34)
		return;
	CHECK(vmm_device_orphan(f->device, fresh, &n) == 0);
	CHECK(vmm_device_busy(f->device) == 0);
	for (int i = 0; i < n; i++) {
		CHECK(find_alias(f, fresh[i].old));
		keep_alias(f, &fresh[i]);
	}
}

static void start(struct fuzz *f, uint32_t q)
{
	uint64_t how = take(f, 1), near = take(f, 1);	/* near: areas that lie over the end of a page */
	struct vmm_queue_config config = {
		.size = how & 16 ? (uint32_t)take(f, 1) : 1u << (how & 7), .vector = q,
		.event_idx = how & 32, .indirect = how & 64, .packed = how & 8, .in_order = q,
		.desc = q * 8 * PAGE, .driver = q * 8 * PAGE + 2 * PAGE, .device = q * 8 * PAGE + 4 * PAGE,
	};

	if (near) {
		config.desc += PAGE - 16 * (near & 15);
		config.driver += PAGE - 2 * (near & 15);
		config.device += PAGE - 4 * (near >> 4);
	}
	if (how & 128) {
		config.desc = take(f, 3);
		config.driver = take(f, 3);
		config.device = take(f, 8);
	}
	if (!vmm_queue_start(f->queue[q], &config))
		f->config[q] = config;
}

static void stop(struct fuzz *f, uint32_t q)
{
	if (vmm_queue_busy(f->queue[q]))
		orphan(f);
	if (!vmm_queue_busy(f->queue[q]))
		vmm_queue_stop(f->queue[q]);
}

/* A store by the driver: some bytes, or a field of a ring, which a fuzzer would rarely hit. */
static void store(struct fuzz *f)
{
	uint32_t offset = (uint32_t)take(f, 3) % SIZE, len = (uint32_t)take(f, 1) % 64;

	for (uint32_t i = 0; i < len && offset + i < SIZE; i++)
		f->ram[offset + i] = (uint8_t)take(f, 1);
}

/* Where a packed ring's descriptor goes that the device is to come to, and the flags that make it available. */
static uint64_t packed_slot(const struct fuzz *f, uint32_t q, uint64_t ahead, uint16_t *flags)
{
	uint32_t size = f->config[q].size, position = (f->queue[q]->next_avail + (uint32_t)ahead % 8) % (2 * size);

	*flags |= position < size ? 1 << 7 : 1 << 15;
	return position % size;
}

static void store_desc(struct fuzz *f, uint32_t q)
{
	bool packed = f->config[q].packed;
	uint64_t table = f->config[q].desc;
	uint64_t at = take(f, 1), addr = take(f, 3), flags = take(f, 1);
	uint64_t len = flags & 64 ? take(f, 4) : take(f, 2);
	uint8_t d[16] = { 0 };

	if (flags & 128)
		addr = 0 - addr;
	if (flags & 32)
		addr %= SIZE;
	if (flags & 8) {	/* what touches the last is joined with it */
		addr = f->last_end;
		len %= PAGE;
	}
	f->last_end = addr + len;
	memcpy(d, &addr, 8);
	memcpy(d + 8, &len, 4);
	uint16_t mark = flags & 7, link = (uint16_t)take(f, 1);
	if (flags & 16)
		table = 6 * PAGE;	/* an indirect table's place */
	else if (packed)
		at = packed_slot(f, q, at, &mark);
	memcpy(d + (packed ? 14 : 12), &mark, 2);
	memcpy(d + (packed ? 12 : 14), &link, 2);
	table += 16 * (at % 64);
	if (table <= SIZE - 16)
		memcpy(f->ram + table, d, 16);
}

static void offer(struct fuzz *f, uint32_t q)
{
	uint64_t how = take(f, f->config[q].packed ? 4 : 1), place = f->config[q].driver;
	uint8_t *avail = f->ram + place;
	uint16_t idx;

	if (place > SIZE - 4 - 2 * QUEUE_SIZE_MAX)
		return;
	if (f->config[q].packed) {	/* storing a descriptor has offered it; what is left is the wish for interrupts */
		memcpy(avail, &how, 4);
		return;
	}
	memcpy(&idx, avail + 2, 2);
	avail[4 + 2 * (idx & ((1u << (how & 7)) - 1) % 64)] = (uint8_t)take(f, 1);
	idx = how & 128 ? (uint16_t)take(f, 2) : (uint16_t)(idx + 1);
	memcpy(avail + 2, &idx, 2);
}

static void step(struct fuzz *f)
{
	uint8_t op = (uint8_t)take(f, 1);
	uint32_t q = op >> 7;

	switch (op & 15) {
	case 0: store(f); break;
	case 1: case 2: store_desc(f, q); break;
	case 3: case 4: offer(f, q); break;
	case 5: case 6: pop(f, q); break;
	case 7: complete(f, 1 + (op >> 4 & 7)); break;
	case 8: complete_any(f, q); break;
	case 9: map(f); break;
	case 10:
		if (f->nr_regions)
			unmap(f, (uint32_t)take(f, 1) % f->nr_regions);
		break;
	case 11: orphan(f); break;
	case 12: stop(f, q); start(f, q); break;
	case 13: vmm_queue_pause(f->queue[q], op >> 4 & 7); break;
	case 14: vmm_queue_resume(f->queue[q], op >> 4 & 7); break;
	default: vmm_queue_looks_unshared(f->queue[q]); break;
	}
	check(f);
}

static void sink(void *arg, uint32_t vector)
{
	(void)arg;
	(void)vector;
}

static void set_up(struct fuzz *f)
{
	int fd = memfd_create("fuzz", 0);

	CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0);
	uint8_t *guarded = mmap(NULL, SIZE + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	f->ram = mmap(guarded + PAGE, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	CHECK(f->ram != MAP_FAILED);
	close(fd);
	f->device = vmm_device_new(QUEUES, QUEUE_SIZE_MAX, eventfd(0, EFD_NONBLOCK));
	vmm_device_irq_sink(f->device, (uintptr_t)sink, 0);
	vmm_device_set_msix(f->device, take(f, 1) & 1);
	for (uint32_t q = 0; q < QUEUES; q++)
		f->queue[q] = vmm_device_queue(f->device, q, eventfd(0, EFD_NONBLOCK));
	for (uint64_t first = take(f, 1) % 5, i = 0; i <= first; i++) {	/* whole, or in so many pieces */
		uint64_t from = i * SIZE / (first + 1) / PAGE * PAGE, to = (i + 1) * SIZE / (first + 1) / PAGE * PAGE;
		struct vmm_alias out;
		uint64_t vaddr = (uintptr_t)f->ram + from;
		CHECK(!vmm_device_map(f->device, from, to - from, vaddr, vaddr, to - from, PAGE, 3, &out));
		f->region[f->nr_regions].iova = from;
		f->region[f->nr_regions++].size = to - from;
		keep_alias(f, &out);
	}
	for (uint32_t q = 0; q < QUEUES; q++)
		start(f, q);
}

static void tear_down(struct fuzz *f)
{
	while (f->nr_held)
		complete(f, BATCH);
	check(f);
	for (uint32_t q = 0; q < QUEUES; q++) {
		vmm_queue_stop(f->queue[q]);
		close(f->queue[q]->kick_fd);
	}
	while (f->nr_regions)
		unmap(f, 0);
	release_aliases(f);
	close(f->device->drained_fd);
	vmm_device_free(f->device);
	munmap(f->ram - PAGE, SIZE + 2 * PAGE);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct fuzz f;

	f = (struct fuzz){ .in = data, .left = size };
	set_up(&f);
	while (f.left)
		step(&f);
	tear_down(&f);
	return 0;
}

#ifndef FUZZER
#define INPUT_MAX 65536

static int replay(const char *path)
{
	uint8_t *data = malloc(INPUT_MAX);
	FILE *file = fopen(path, "rb");

	if (!data || !file) {
		perror(path);
		return 1;
	}
	size_t size = fread(data, 1, INPUT_MAX, file);
	fclose(file);
	uint8_t *exact = malloc(size ? size : 1);	/* so that reading past the end is seen */
	memcpy(exact, data, size);
	LLVMFuzzerTestOneInput(exact, size);
	free(exact);
	free(data);
	return 0;
}

int main(int argc, char **argv)
{
	int failed = 0;

	for (int i = 1; i < argc; i++)
		failed |= replay(argv[i]);
	printf("%d inputs\n", argc - 1);
	return failed;
}
#endif
