/*
 * The loop of an engine thread by itself, in this thread: engine.c and the ring's files are compiled here with a clock and
 * a poll() of our own and a hook before each access to the ring's indices and flags, where the driver may do something.
 * Nothing is left to luck: whenever the loop would sleep, what it must not sleep over is looked for.
 *
 *     test_polling
 */
#include <stdint.h>
#include <time.h>

static uint64_t clock_now = 1000000000;

static int fake_clock(clockid_t id, struct timespec *t)
{
	(void)id;
	clock_now += 25;
	*t = (struct timespec){ (time_t)(clock_now / 1000000000), (long)(clock_now % 1000000000) };
	return 0;
}

#define clock_gettime fake_clock
#include "core.h"
#include "driver.h"
#include "transfer.h"

#include <poll.h>
#include <stdio.h>
#include <sys/timerfd.h>
#include <unistd.h>

static void race(void);
static void go_on(void);
static int sleep_or_not(struct pollfd *fds, nfds_t n, int milliseconds);

#ifdef __clang__
#define LOAD __c11_atomic_load
#define STORE __c11_atomic_store
#else
#define LOAD __atomic_load_n
#define STORE __atomic_store_n
#endif
#undef atomic_load_explicit
#undef atomic_store_explicit
#define atomic_load_explicit(p, order) (race(), LOAD(p, order))
#define atomic_store_explicit(p, value, order) (race(), STORE(p, value, order))
#include "queue.c"
#include "split.c"
#include "packed.c"
#define poll sleep_or_not
#include "engine.c"
#undef poll

#define PAGE 4096u
#define RAM (64u * PAGE)
#define RING_SIZE 64
#define AVAIL (4u * PAGE)
#define USED (8u * PAGE)
#define DATA (16u * PAGE)	/* a page for each chain: header, data, status */
#define HOLD_NS 500u
#define GET_ID 8

#define CHECK(condition) do { if (!(condition)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); abort(); } } while (0)

static struct bench {
	uint8_t *ram;
	struct vmm_device *device;
	struct vmm_queue *queue;
	struct vmm_engine *engine;
	struct vmm_alias alias;
	bool packed;
	vdrv_split *split;		/* the driver's side, one of the two */
	vdrv_packed *packed_ring;
	int ready_fd;
	uint32_t offered, used, interrupts, sleeps;
	uint32_t point, moments[2];	/* at which accesses chains are offered */
	uint64_t gap, cost, next;	/* of a driver that lives by the clock: ns; the next chain comes then */
	uint32_t last;			/* chains it offers */
	bool hands_over, slept, over;
} b;

#define DRIVER(op, ...) (b.packed ? vdrv_packed_##op(b.packed_ring, ##__VA_ARGS__) : vdrv_split_##op(b.split, ##__VA_ARGS__))

/* A read; or, as the first of all, what the engine hands over, and nobody answers. */
static void offer(void)
{
	uint64_t page = DATA + (b.offered % 16) * PAGE;

	b.ram[page] = b.hands_over && !b.offered ? GET_ID : 0;
	struct vdrv_segment parts[3] = { { page, 16, 0 }, { page + 512, 512, VDRV_WRITE }, { page + 2048, 1, VDRV_WRITE } };

	CHECK(DRIVER(add, parts, 3, 0, NULL) >= 0);
	b.offered++;
	DRIVER(publish);
	if (DRIVER(need_kick))
		eventfd_write(b.queue->kick_fd, 1ull << 32);
}

/* The driver's own accesses are no moments; they are compiled elsewhere. */
static void race(void)
{
	uint32_t point = b.point++;

	if (b.over)
		return;
	if (b.gap)
		go_on();
	if (b.gap && b.offered < b.last && clock_now >= b.next) {
		b.next = UINT64_MAX;
		offer();
	} else if (!b.gap && (point == b.moments[0] || point == b.moments[1])) {
		offer();
	}
}

static void on_irq(void *arg, uint32_t vector)
{
	(void)arg;
	(void)vector;
	b.interrupts++;
}

static void look_at_used(void)
{
	struct vdrv_used out[RING_SIZE];
	int n = DRIVER(get_used, out, RING_SIZE);

	CHECK(n >= 0);
	b.used += (uint32_t)n;
}

/* Serving took its time; the next chain comes a while after that. */
static void go_on(void)
{
	uint32_t before = b.used;

	look_at_used();
	if (b.used == before)
		return;
	clock_now += b.cost;
	b.next = clock_now + b.gap;
}

/*
 * In place of poll().  Whoever would sleep has served all there is, or sleeps no longer than it takes to be told of it:
 * a doorbell, or the timer of an interrupt.
 */
static int sleep_or_not(struct pollfd *fds, nfds_t n, int milliseconds)
{
	struct itimerspec timer = { 0 };
	int ready = poll(fds, n, 0);

	if (ready || !milliseconds)
		return ready;
	b.sleeps++;
	if (b.gap) {
		go_on();
		CHECK(b.used == b.offered);
		if (b.offered < b.last) {
			clock_now = clock_now > b.next ? clock_now : b.next;
			b.next = UINT64_MAX;
			offer();
			return poll(fds, n, 0);
		}
	}
	look_at_used();
	CHECK(b.used == b.offered - b.hands_over);
	if (!b.slept) {		/* now it is asleep: the next one wakes it */
		b.slept = true;
		offer();
		CHECK(poll(fds, n, 0));
		return poll(fds, n, 0);
	}
	if (b.queue->timer_fd >= 0)
		CHECK(timerfd_gettime(b.queue->timer_fd, &timer) == 0);
	CHECK(!vmm_queue_holds(b.queue) || timer.it_value.tv_sec || timer.it_value.tv_nsec);
	b.over = true;
	atomic_store(&b.engine->stop, true);
	return 0;
}

static void set_up(bool packed, bool event_idx, uint64_t poll_ns, bool adaptive, bool hold)
{
	int fd = memfd_create("polling", 0), drained = eventfd(0, EFD_NONBLOCK), kick = eventfd(0, EFD_NONBLOCK);
	struct vmm_target target = { .kind = VMM_TARGET_NULL, .sector_size = 512, .alignment = 1, .writable = true };
	struct vmm_engine_options options = {
		.poll_ns = poll_ns, .poll_adaptive = adaptive, .threads = 1, .queue_size_max = RING_SIZE,
	};
	struct vmm_queue_config config = {
		.size = RING_SIZE, .vector = 1, .desc = 0, .driver = AVAIL, .device = USED, .event_idx = event_idx, .packed = packed,
	};

	b = (struct bench){ .packed = packed, .ready_fd = eventfd(0, EFD_NONBLOCK), .moments = { UINT32_MAX, UINT32_MAX } };
	CHECK(fd >= 0 && ftruncate(fd, RAM) == 0);
	b.ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(b.ram != MAP_FAILED);
	close(fd);
	b.device = vmm_device_new(1, RING_SIZE, drained);
	b.queue = vmm_device_queue(b.device, 0, kick);
	vmm_device_irq_sink(b.device, (uintptr_t)on_irq, 0);
	vmm_device_set_msix(b.device, true);
	CHECK(!hold || vmm_device_coalesce(b.device, 3, HOLD_NS) == 0);
	uint64_t at = (uintptr_t)b.ram;
	CHECK(vmm_device_map(b.device, 0, RAM, at, at, RAM, PAGE, PROT_READ | PROT_WRITE, &b.alias) == 0);
	if (packed)
		b.packed_ring = vdrv_packed_new(b.ram, b.ram + AVAIL, b.ram + USED, RING_SIZE, event_idx);
	else
		b.split = vdrv_split_new(b.ram, b.ram + AVAIL, b.ram + USED, RING_SIZE, event_idx);
	CHECK(vmm_queue_start(b.queue, &config) == 0);
	b.engine = vmm_engine_new(&target, &options, &b.queue, &b.ready_fd, 1);
	CHECK(b.engine);
	vmm_engine_resize(b.engine, 1 << 20);
	b.point = 0;
}

static void tear_down(void)
{
	uint32_t alias;

	CHECK(vmm_device_busy(b.device) == 0);
	vmm_queue_stop(b.queue);
	vmm_engine_free(b.engine);
	vdrv_split_free(b.split);
	vdrv_packed_free(b.packed_ring);
	CHECK(vmm_device_unmap(b.device, 0, RAM, &alias) == 0);
	vmm_alias_release(b.alias.map_base, b.alias.map_len);
	close(b.device->drained_fd);
	close(b.queue->kick_fd);
	close(b.ready_fd);
	vmm_device_free(b.device);
	munmap(b.ram, RAM);
}

/* How many accesses there are until the loop sleeps; chains come at two of them. */
static uint32_t run_with(uint32_t kind, uint32_t first, uint32_t second)
{
	struct vmm_chain kept;

	set_up(kind & 1, kind & 2, kind & 8 ? 30 : 0, false, kind & 4);
	b.moments[0] = first;
	b.moments[1] = second;
	b.hands_over = kind & 16;
	if (b.hands_over)
		offer();
	run(&b.engine->threads[0]);
	uint32_t points = b.point;
	if (b.hands_over) {
		CHECK(vmm_lane_take(vmm_engine_lane(b.engine, 0), &kept, 1) == 1);
		vmm_queue_complete(b.queue, &(struct vmm_completion){ .token = kept.token }, 1);
	}
	CHECK(b.interrupts);
	tear_down();
	return points;
}

/* Two chains come at any two of the loop's accesses to the ring: it never sleeps while one waits and no doorbell rang. */
static void test_no_moment_is_slept_over(void)
{
	for (uint32_t kind = 0; kind < 32; kind++) {
		uint32_t points = run_with(kind, UINT32_MAX, UINT32_MAX);
		uint32_t step = kind & 8 ? 1 + points / 16 : 1;	/* of many accesses in a row that are alike, some */
		for (uint32_t i = 0; i < points; i += step)
			for (uint32_t k = i + 1; k < i + 60 * step; k += step)
				run_with(kind, i, k);
	}
}

static uint32_t sleeps_of(uint64_t poll_ns, uint64_t gap, uint64_t cost, uint32_t chains)
{
	set_up(false, true, poll_ns, true, false);
	b.gap = gap;
	b.cost = cost;
	b.last = chains;
	b.slept = true;
	b.next = 0;
	run(&b.engine->threads[0]);
	CHECK(b.used == chains);
	uint32_t sleeps = b.sleeps;
	tear_down();
	return sleeps;
}

/* Of a driver that asks again after a gap; serving it takes a while. */
static void test_patience_grows_while_it_pays(void)
{
	CHECK(sleeps_of(50000, 10000, 0, 200) < 10);
	CHECK(sleeps_of(50000, 10000, 400000, 200) < 10);	/* only how long it was quiet counts */
	CHECK(sleeps_of(50000, 1000000, 0, 200) == 200);
}

int main(void)
{
	test_no_moment_is_slept_over();
	test_patience_grows_while_it_pays();
	puts("ok");
	return 0;
}
