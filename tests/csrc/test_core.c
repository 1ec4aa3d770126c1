/*
 * The core under sanitizers, with threads: doorbells are never lost, the memory map may change and memory may be taken
 * back while queues are served, and a driver that races loses no chain.  Each test is bounded; a doorbell that does not
 * come within TIMEOUT_MS fails it.
 *
 * Races are not left to luck alone: the ring's files are compiled here with a hook before each access to its indices and
 * flags, where a test can let the driver do something.
 *
 *     test_core ROUNDS
 */
#include "core.h"
#include "driver.h"

enum access { ACCESS_LOAD, ACCESS_STORE, ACCESS_FENCE };
static void race(enum access access);

#ifdef __clang__
#define LOAD __c11_atomic_load
#define STORE __c11_atomic_store
#else
#define LOAD __atomic_load_n
#define STORE __atomic_store_n
#endif
#undef atomic_load_explicit
#undef atomic_store_explicit
#undef atomic_thread_fence
#define atomic_load_explicit(p, order) (race(ACCESS_LOAD), LOAD(p, order))
#define atomic_store_explicit(p, value, order) (race(ACCESS_STORE), STORE(p, value, order))
#define atomic_thread_fence(order) (race(ACCESS_FENCE), __atomic_thread_fence(order))
#include "queue.c"
#include "split.c"
#include "packed.c"

#include <poll.h>
#include <stdio.h>
#include <unistd.h>

#define PAGE 4096u
#define SIZE (64u * PAGE)
#define RING_SIZE 64
#define BATCH 16
#define TIMEOUT_MS 10000
#define DESC 0u
#define AVAIL (4u * PAGE)
#define USED (8u * PAGE)
#define DATA (16u * PAGE)	/* a page for each chain: header, data, status */

#define CHECK(condition) do { if (!(condition)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); abort(); } } while (0)

/* How a queue is laid out: both formats, both ways to suppress notifications. */
struct kind {
	bool packed, event_idx;
};

static const struct kind kinds[] = { { false, false }, { false, true }, { true, false }, { true, true } };
#define KINDS 4

/* One queue over one memfd, mapped by the driver and by the core. */
struct bench {
	uint8_t *ram;
	struct vmm_device *device;
	struct vmm_queue *queue;
	struct kind kind;
	vdrv_split *split;		/* the driver's side, one of the two */
	vdrv_packed *packed;
	int kick_fd, irq_fd;
	struct vmm_alias alias;
	uint64_t rounds, offered;
	atomic_bool stop;
};

/* What the driver does, in either format. */
#define DRIVER(b, op, ...) \
	((b)->kind.packed ? vdrv_packed_##op((b)->packed, ##__VA_ARGS__) : vdrv_split_##op((b)->split, ##__VA_ARGS__))

static struct {
	void (*act)(struct bench *b, uint32_t point);	/* NULL: nothing happens */
	struct bench *bench;
	uint32_t point;
	bool unfenced;			/* something was stored since the last fence */
	bool looked_unfenced;		/* ... when something was last loaded */
} racer;

static void race(enum access access)
{
	if (!racer.act)
		return;
	racer.unfenced = access == ACCESS_STORE || (access == ACCESS_LOAD && racer.unfenced);
	if (access == ACCESS_LOAD)
		racer.looked_unfenced = racer.unfenced;
	if (access != ACCESS_FENCE)
		racer.act(racer.bench, racer.point++);
}

static void on_irq(void *arg, uint32_t vector)
{
	struct bench *b = arg;

	CHECK(vector == 3);
	CHECK(eventfd_write(b->irq_fd, 1) == 0);
}

static void wait_for(int fd, const char *what)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	eventfd_t value;

	if (poll(&p, 1, TIMEOUT_MS) != 1) {
		fprintf(stderr, "no %s within %d ms\n", what, TIMEOUT_MS);
		abort();
	}
	eventfd_read(fd, &value);
}

static void map(struct bench *b, struct vmm_alias *out)
{
	uint64_t at = (uintptr_t)b->ram;

	CHECK(vmm_device_map(b->device, 0, SIZE, at, at, SIZE, PAGE, PROT_READ | PROT_WRITE, out) == 0);
}

static void start(struct bench *b)
{
	uint8_t *desc = b->ram + DESC, *driver = b->ram + AVAIL, *device = b->ram + USED;
	struct vmm_queue_config config = {
		.size = b->kind.packed ? RING_SIZE - 1 : RING_SIZE, .vector = 3, .desc = DESC, .driver = AVAIL, .device = USED,
		.event_idx = b->kind.event_idx, .packed = b->kind.packed,
	};

	if (b->kind.packed)
		b->packed = vdrv_packed_new(desc, driver, device, config.size, config.event_idx);
	else
		b->split = vdrv_split_new(desc, driver, device, config.size, config.event_idx);
	CHECK((b->packed || b->split) && vmm_queue_start(b->queue, &config) == 0);
}

static void set_up(struct bench *b, struct kind kind)
{
	int fd = memfd_create("core", 0);

	CHECK(fd >= 0 && ftruncate(fd, SIZE) == 0);
	b->ram = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(b->ram != MAP_FAILED);
	close(fd);
	b->kick_fd = eventfd(0, EFD_NONBLOCK);
	b->irq_fd = eventfd(0, EFD_NONBLOCK);
	b->device = vmm_device_new(1, RING_SIZE, eventfd(0, EFD_NONBLOCK));
	b->queue = vmm_device_queue(b->device, 0, b->kick_fd);
	vmm_device_irq_sink(b->device, (uintptr_t)on_irq, (uintptr_t)b);
	vmm_device_set_msix(b->device, true);
	map(b, &b->alias);
	b->kind = kind;
	start(b);
}

static void tear_down(struct bench *b)
{
	uint32_t alias;

	CHECK(vmm_device_busy(b->device) == 0 && vmm_device_orphans(b->device) == 0);
	vmm_queue_stop(b->queue);
	vdrv_split_free(b->split);
	vdrv_packed_free(b->packed);
	CHECK(vmm_device_unmap(b->device, 0, SIZE, &alias) == 0 && alias == b->alias.id);
	vmm_alias_release(b->alias.map_base, b->alias.map_len);
	close(b->device->drained_fd);
	vmm_device_free(b->device);
	munmap(b->ram, SIZE);
	close(b->kick_fd);
	close(b->irq_fd);
}

/* ---- the driver's thread ----------------------------------------------------------------------------------------- */

static int offer_one(struct bench *b, uint32_t n)
{
	uint64_t page = DATA + (n % 16) * PAGE;
	struct vdrv_segment parts[3] = { { page, 16, 0 }, { page + 512, 512, 0 }, { page + 2048, 1, VDRV_WRITE } };

	int name = DRIVER(b, add, parts, 3, 0, NULL);
	CHECK(name >= 0);
	b->offered++;
	return name;
}

/* Offers chains in bursts of changing length and sleeps until they are used: a lost doorbell or interrupt hangs it. */
static void *drive(void *arg)
{
	struct bench *b = arg;
	uint64_t used = 0;
	struct vdrv_used out[RING_SIZE];

	while (used < b->rounds) {
		uint64_t burst = 1 + b->offered * 2654435761u % 5;
		for (; burst && b->offered < b->rounds && DRIVER(b, room) >= 3; burst--)
			offer_one(b, (uint32_t)b->offered);
		DRIVER(b, publish);
		if (DRIVER(b, need_kick))
			eventfd_write(b->kick_fd, 1);
		int n = DRIVER(b, get_used, out, RING_SIZE);
		CHECK(n >= 0);
		used += (uint64_t)n;
		if (n || used == b->rounds)
			continue;
		if (DRIVER(b, arm, 1) == 0)
			wait_for(b->irq_fd, "interrupt");
		DRIVER(b, disarm);
	}
	atomic_store(&b->stop, true);
	eventfd_write(b->kick_fd, 1);
	return NULL;
}

/* ---- the device's thread ----------------------------------------------------------------------------------------- */

static void *serve(void *arg)
{
	struct bench *b = arg;
	struct vmm_chain chain[BATCH];
	struct vmm_completion done[BATCH];

	while (!atomic_load(&b->stop)) {
		int n = vmm_queue_pop(b->queue, chain, BATCH);
		CHECK(n >= 0);
		for (int i = 0; i < n; i++) {
			CHECK(chain[i].readable == 512 && chain[i].readable_segs == 1 && !chain[i].flags);
			done[i] = (struct vmm_completion){ .token = chain[i].token };
		}
		CHECK(vmm_queue_complete(b->queue, done, n) <= n);
		if (n < BATCH)
			wait_for(b->kick_fd, "doorbell");
	}
	return NULL;
}

/* Sleep until a doorbell or the timer of the queue; true if it was the timer. */
static bool wait_for_either(struct bench *b)
{
	struct pollfd p[2] = { { b->kick_fd, POLLIN, 0 }, { vmm_queue_timer(b->queue), POLLIN, 0 } };
	eventfd_t value;

	vmm_queue_tell(b->queue, true);
	CHECK(poll(p, 2, TIMEOUT_MS) > 0);
	if (p[0].revents)
		eventfd_read(b->kick_fd, &value);
	return p[1].revents;
}

/* One that holds interrupts back: while it does, a chain stays in flight, until the timer has rung. */
static void *serve_and_hold(void *arg)
{
	struct bench *b = arg;
	struct vmm_chain chain[BATCH];
	struct vmm_completion done[BATCH + 1];
	uint64_t served = 0;
	int kept = 0;

	while (!atomic_load(&b->stop)) {
		int n = vmm_queue_pop(b->queue, chain, BATCH);
		CHECK(n >= 0);
		for (int i = 0; i < n; i++)
			done[kept + i] = (struct vmm_completion){ .token = chain[i].token };
		int all = kept + n;
		kept = all > 1 && served++ % 4;
		vmm_queue_complete(b->queue, done + kept, all - kept);	/* the oldest is the one that stays */
		bool rang = n < BATCH && (!kept || vmm_queue_holds(b->queue)) && wait_for_either(b);
		if (kept && (rang || !vmm_queue_holds(b->queue))) {
			vmm_queue_complete(b->queue, done, 1);
			kept = 0;
		}
	}
	return NULL;
}

static void run_pair(struct bench *b, void *(*third)(void *))
{
	pthread_t driver, device, other;

	pthread_create(&device, NULL, b->queue->timer_fd < 0 ? serve : serve_and_hold, b);
	pthread_create(&driver, NULL, drive, b);
	if (third)
		pthread_create(&other, NULL, third, b);
	pthread_join(driver, NULL);
	pthread_join(device, NULL);
	if (third)
		pthread_join(other, NULL);
}

/* Two threads that both sleep whenever they can: no doorbell and no interrupt is lost. */
static void test_no_doorbell_is_lost(uint64_t rounds)
{
	for (int k = 0; k < KINDS; k++) {
		struct bench b = { .rounds = rounds };
		set_up(&b, kinds[k]);
		run_pair(&b, NULL);
		tear_down(&b);
	}
}

/* ---- the transport's thread -------------------------------------------------------------------------------------- */

static void drain(struct bench *b, uint32_t reason)
{
	uint32_t busy = vmm_device_pause(b->device, reason);

	while (busy) {
		wait_for(b->device->drained_fd, "end of a drain");
		busy = vmm_device_busy(b->device);
	}
}

/* Quiesce, unmap, map, resume, as firmware has it done. */
static void *remap(void *arg)
{
	struct bench *b = arg;

	while (!atomic_load(&b->stop)) {
		uint32_t old;
		struct vmm_alias alias;
		drain(b, VMM_PAUSE_QUIESCE);
		CHECK(vmm_device_unmap(b->device, 0, SIZE, &old) == 0 && old == b->alias.id);
		vmm_device_resume(b->device, VMM_PAUSE_QUIESCE);	/* as between two messages: it finds itself parked */
		drain(b, VMM_PAUSE_QUIESCE);
		map(b, &alias);
		vmm_alias_release(b->alias.map_base, b->alias.map_len);
		b->alias = alias;
		vmm_device_resume(b->device, VMM_PAUSE_QUIESCE);
		usleep(50);	/* mutexes are not fair: the queue's own thread must get its turn */
	}
	return NULL;
}

static void test_memory_is_remapped_while_a_queue_is_served(uint64_t rounds)
{
	for (int k = 0; k < KINDS; k++) {
		struct bench b = { .rounds = rounds };
		set_up(&b, kinds[k]);
		run_pair(&b, remap);
		tear_down(&b);
	}
}

/* Take memory back at any moment; what was in flight ends with an error, and everything goes on. */
static void *take_back(void *arg)
{
	struct bench *b = arg;
	struct vmm_alias fresh[VMM_MAX_REGIONS], old[64];
	uint32_t kept = 0;

	while (!atomic_load(&b->stop)) {
		int n;
		vmm_device_pause(b->device, VMM_PAUSE_QUIESCE);
		CHECK(vmm_device_orphan(b->device, fresh, &n) == 0 && n <= 1);
		if (n == 1) {
			CHECK(fresh[0].old == b->alias.id);
			old[kept++] = b->alias;
			b->alias = fresh[0];
		}
		vmm_device_resume(b->device, VMM_PAUSE_QUIESCE);
		if (kept == 64 || !vmm_device_orphans(b->device))
			while (kept) {
				kept--;
				vmm_alias_release(old[kept].map_base, old[kept].map_len);
			}
	}
	while (kept) {
		kept--;
		vmm_alias_release(old[kept].map_base, old[kept].map_len);
	}
	return NULL;
}

static void test_memory_is_taken_back_while_a_queue_is_served(uint64_t rounds)
{
	for (int k = 1; k < KINDS; k += 2) {
		struct bench b = { .rounds = rounds };
		set_up(&b, kinds[k]);
		run_pair(&b, take_back);
		tear_down(&b);
	}
}

/* ---- pause, stop and start --------------------------------------------------------------------------------------- */

/* Pause and resume as fast as can be: a resume brings the doorbells that were not answered. */
static void *pause_often(void *arg)
{
	struct bench *b = arg;

	while (!atomic_load(&b->stop)) {
		drain(b, VMM_PAUSE_BUS_MASTER);
		vmm_device_resume(b->device, VMM_PAUSE_BUS_MASTER);
		vmm_queue_set_vector(b->queue, 3);
		vmm_queue_looks_unshared(b->queue);
	}
	return NULL;
}

static void test_pausing_loses_nothing(uint64_t rounds)
{
	for (int k = 0; k < KINDS; k += 2) {
		struct bench b = { .rounds = rounds };
		set_up(&b, kinds[k]);
		run_pair(&b, pause_often);
		tear_down(&b);
	}
}

/* ---- interrupts that are held back ------------------------------------------------------------------------------- */

/* Three threads that sleep, pause and take back as above: no interrupt is lost, and no drain waits for one. */
static void test_held_interrupts_come(uint64_t rounds)
{
	void *(*third[])(void *) = { NULL, pause_often, remap, take_back };

	for (int k = 0; k < KINDS; k++)
		for (int i = 0; i < 4; i++) {
			struct bench b = { .rounds = rounds };
			set_up(&b, kinds[k]);
			CHECK(vmm_device_coalesce(b.device, 3, 20000) == 0);
			run_pair(&b, third[i]);
			tear_down(&b);
		}
}

/* ---- a driver that races ----------------------------------------------------------------------------------------- */

static const uint16_t *script;	/* what the index is at each look of the device */

static void follow_script(struct bench *b, uint32_t point)
{
	if (point < 8)
		*(_Atomic(uint16_t) *)(void *)(b->ram + AVAIL + 2) = script[point];
}

/* Whatever a pop answers, what it took is what it gave: nothing stays in flight that nobody can complete. */
static void try_script(struct bench *b, const uint16_t *values, bool event_idx)
{
	struct vmm_queue_config config = {
		.size = RING_SIZE, .vector = VMM_NO_VECTOR, .desc = DESC, .driver = AVAIL, .device = USED, .event_idx = event_idx,
	};
	struct vmm_chain chain[BATCH];

	CHECK(vmm_queue_start(b->queue, &config) == 0);
	script = values;
	racer.bench = b;
	racer.point = 0;
	racer.act = follow_script;
	int n = vmm_queue_pop(b->queue, chain, BATCH);
	racer.act = NULL;
	CHECK(vmm_queue_busy(b->queue) == (uint32_t)(n > 0 ? n : 0));
	for (int k = 0; k < n; k++)
		vmm_queue_complete(b->queue, &(struct vmm_completion){ .token = chain[k].token }, 1);
	CHECK(vmm_queue_busy(b->queue) == 0);
	vmm_queue_stop(b->queue);
}

/* The index takes each of a few values, right and wrong, at each of the device's looks. */
static void test_a_jumping_index_loses_no_chain(void)
{
	static const uint16_t wanted[] = { 1, 2, 4, 0x4000 };
	struct bench b = { 0 };
	uint16_t values[8];

	set_up(&b, kinds[0]);
	for (uint32_t i = 0; i < 8; i++)
		offer_one(&b, i);
	vmm_queue_stop(b.queue);
	for (uint32_t n = 0; n < 1u << 14; n++) {
		for (uint32_t i = 0; i < 8; i++)
			values[i] = wanted[i < 7 ? n >> 2 * i & 3 : 0];
		try_script(&b, values, n & 1);
		try_script(&b, values, !(n & 1));
	}
	tear_down(&b);
}

static uint32_t moments[2];

static void offer_at_moments(struct bench *b, uint32_t point)
{
	if (point != moments[0] && point != moments[1])
		return;
	offer_one(b, point);
	DRIVER(b, publish);
	if (DRIVER(b, need_kick))
		eventfd_write(b->kick_fd, 1);
}

/*
 * Serve as a thread would that sleeps without a doorbell; returns how many chains there were.  The last look at what
 * the driver wrote comes after a fence: no test can make a processor reorder, but the fence can be asked for.
 */
static uint32_t serve_until_silent(struct bench *b)
{
	struct vmm_chain chain[BATCH];
	eventfd_t value;
	uint32_t total = 0;
	int n;

	racer.unfenced = racer.looked_unfenced = false;
	do {
		n = vmm_queue_pop(b->queue, chain, 2);
		CHECK(n >= 0 && (n == 2 || !racer.looked_unfenced));
		for (int i = 0; i < n; i++) {
			vmm_queue_complete(b->queue, &(struct vmm_completion){ .token = chain[i].token }, 1);
			CHECK(!racer.looked_unfenced);
		}
		total += (uint32_t)n;
	} while (n == 2 || eventfd_read(b->kick_fd, &value) == 0);
	return total;
}

/* A driver that makes a chain available between any two accesses of the device gets it served. */
static void test_a_chain_is_served_whenever_it_comes(void)
{
	for (uint32_t n = 0; n < KINDS * 4 * 32 * 32; n++) {
		struct bench b = { 0 };
		uint32_t before = n >> 2 & 3;
		set_up(&b, kinds[n % KINDS]);
		serve_until_silent(&b);
		for (uint32_t i = 0; i < before; i++)
			offer_one(&b, i);
		DRIVER(&b, publish);
		moments[0] = n >> 4 & 31;
		moments[1] = n >> 9;
		racer.bench = &b;
		racer.point = 0;
		racer.act = offer_at_moments;
		uint32_t served = serve_until_silent(&b);
		racer.act = NULL;
		CHECK(served == b.offered);
		tear_down(&b);
	}
}

static uint32_t names[2], seen;

static void look_for_used(struct bench *b, uint32_t point)
{
	struct vdrv_used out;

	(void)point;
	if (DRIVER(b, get_used, &out, 1) == 0)
		return;
	CHECK(out.id == names[seen] && out.len == 1);
	seen++;
}

/* A driver that looks between any two accesses of the device finds what is used whole, or not at all. */
static void test_what_is_used_is_whole(void)
{
	for (int k = 0; k < KINDS; k++) {
		struct bench b = { 0 };
		struct vmm_chain chain[2];
		set_up(&b, kinds[k]);
		names[1] = (uint32_t)offer_one(&b, 0);
		names[0] = (uint32_t)offer_one(&b, 1);	/* ends first, so its name goes where the other's was */
		DRIVER(&b, publish);
		CHECK(vmm_queue_pop(b.queue, chain, 2) == 2);
		struct vmm_completion done[2] = { { .token = chain[1].token }, { .token = chain[0].token } };
		seen = 0;
		racer.bench = &b;
		racer.act = look_for_used;
		vmm_queue_complete(b.queue, done, 2);
		racer.act = NULL;
		look_for_used(&b, 0);
		CHECK(seen == 2);
		tear_down(&b);
	}
}

/* ---- a file that is truncated under the core --------------------------------------------------------------------- */

static void test_a_truncated_file_is_survived(void)
{
	struct bench b = { 0 };
	struct vmm_chain chain[BATCH];
	int fd = memfd_create("short", 0);
	struct vmm_alias alias;
	uint32_t id;

	set_up(&b, kinds[0]);
	CHECK(ftruncate(fd, 4 * PAGE) == 0);
	uint8_t *ours = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	uint64_t at = (uintptr_t)ours;
	CHECK(!vmm_device_map(b.device, 1ull << 40, 4 * PAGE, at, at, 4 * PAGE, 1u << 30, 3, &alias));
	struct vdrv_segment parts[2] = { { 1ull << 40, 4 * PAGE, 0 }, { (1ull << 40) + PAGE, 3 * PAGE, VDRV_WRITE } };
	DRIVER(&b, add, parts, 2, 0, NULL);
	DRIVER(&b, publish);
	CHECK(ftruncate(fd, PAGE) == 0);
	CHECK(vmm_queue_pop(b.queue, chain, BATCH) == 1);
	memset((uint8_t *)(uintptr_t)alias.addr, 1, 4 * PAGE);
	CHECK(vmm_queue_complete(b.queue, &(struct vmm_completion){ .token = chain[0].token }, 1) == 1);
	CHECK(!vmm_device_unmap(b.device, 1ull << 40, 4 * PAGE, &id) && id == alias.id);
	vmm_alias_release(alias.map_base, alias.map_len);
	munmap(ours, 4 * PAGE);
	close(fd);
	tear_down(&b);
}

int main(int argc, char **argv)
{
	uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000000;

	test_a_truncated_file_is_survived();
	test_a_jumping_index_loses_no_chain();
	test_a_chain_is_served_whenever_it_comes();
	test_what_is_used_is_whole();
	test_no_doorbell_is_lost(rounds);
	test_pausing_loses_nothing(rounds / 4);
	test_memory_is_remapped_while_a_queue_is_served(rounds / 4);
	test_memory_is_taken_back_while_a_queue_is_served(rounds / 4);
	test_held_interrupts_come(rounds / 32);
	puts("ok");
	return 0;
}
