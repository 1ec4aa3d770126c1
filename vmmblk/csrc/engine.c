/* See engine.h.  What a thread does is in run(); what becomes of one chain is in transfer.c. */
#include "transfer.h"

#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#define POLL_STEP_NS 2000
#define LISTEN_ROUNDS 4096		/* whoever polls for ever hears the doorbells every so many rounds */
#define RETRY_MS 1			/* what the kernel would not take is offered again so much later */

/* ---- handing over ------------------------------------------------------------------------------------------------ */

void lane_hand_over(struct vmm_lane *l, const struct vmm_chain *chain, uint32_t error)
{
	uint32_t size = l->engine->options.queue_size_max;

	pthread_mutex_lock(&l->lock);
	/* there is room: whatever life of the queue it is of, a chain keeps its slot until whoever takes it completes it */
	if (l->count < size) {
		struct vmm_chain *to = &l->handed[(l->first + l->count++) % size];
		*to = *chain;
		to->error = error;
	}
	pthread_mutex_unlock(&l->lock);
	eventfd_write(l->ready_fd, 1);
}

/*
 * Popping failed with -errno in that life of the queue: whoever takes is told.  One who takes just as the queue starts
 * may not know its new life yet, so a doorbell tells again.
 */
static void hand_over_failure(struct vmm_lane *l, int failure, uint32_t epoch, bool doorbell)
{
	bool tell;

	pthread_mutex_lock(&l->lock);
	tell = doorbell || l->failure != failure || l->failure_epoch != epoch;
	l->failure = failure;
	l->failure_epoch = epoch;
	pthread_mutex_unlock(&l->lock);
	if (tell)
		eventfd_write(l->ready_fd, 1);
}

/* As vmm_queue_pop(): up to max chains, or -errno if the ring can be served no more. */
int vmm_lane_take(struct vmm_lane *l, struct vmm_chain *out, int max)
{
	uint32_t size = l->engine->options.queue_size_max, epoch = vmm_queue_epoch(l->queue);
	int n = 0;

	pthread_mutex_lock(&l->lock);
	while (n < max && l->count) {
		out[n++] = l->handed[l->first];
		l->first = (l->first + 1) % size;
		l->count--;
	}
	if (!n && l->failure && l->failure_epoch == epoch)
		n = l->failure;
	pthread_mutex_unlock(&l->lock);
	return n;
}

/* ---- a thread ------------------------------------------------------------------------------------------------------ */

/*
 * Pop; a failure is known to be of this life of the queue if it is still there after asking which life that is.  (It
 * stays until the queue stops, and a start kicks.)
 */
static int pop_or_tell(struct vmm_lane *l, struct vmm_chain *chains, bool arm)
{
	struct vmm_queue *q = l->queue;
	int n = vmm_queue_pop_some(q, chains, BATCH, BATCH_BYTES, arm);

	if (n >= 0)
		return n;
	uint32_t epoch = vmm_queue_epoch(q);
	n = vmm_queue_pop_some(q, chains, BATCH, BATCH_BYTES, false);
	if (n < 0 && vmm_queue_epoch(q) == epoch)
		hand_over_failure(l, n, epoch, arm);
	return n < 0 ? 0 : n;
}

/* Interrupts are held back no longer than they may, whatever lane the thread is busy with. */
static void tell_in_time(struct io_thread *t)
{
	struct vmm_engine *e = t->engine;

	for (uint32_t i = t->index; i < e->nr_lanes; i += e->nr_threads)
		if (vmm_queue_holds(e->lanes[i].queue))
			vmm_queue_tell(e->lanes[i].queue, false);
}

/* Serve what waits in a lane's ring; how much that was. */
static int serve_lane(struct io_thread *t, struct vmm_lane *l, bool arm)
{
	struct vmm_chain chains[BATCH];
	struct vmm_completion done[BATCH];
	int completed = 0, n = pop_or_tell(l, chains, arm);
	bool coalesces = l->queue->timer_fd >= 0;

	for (int i = 0; i < n; i++) {
		if (coalesces)
			tell_in_time(t);
		if (i + 1 < n)
			transfer_expect(t->engine, &chains[i + 1]);
		completed += transfer_serve(t, l, &chains[i], &done[completed]) == DONE;
	}
	if (completed)
		vmm_queue_complete(l->queue, done, completed);
	return n;
}

static int serve_all(struct io_thread *t, bool arm)
{
	struct vmm_engine *e = t->engine;
	int n = 0;

	for (uint32_t i = t->index; i < e->nr_lanes; i += e->nr_threads)
		n += serve_lane(t, &e->lanes[i], arm);
	n += transfer_reap(t);
	transfer_submit_all(t);
	return n;
}

/* What fd, the kick, the bell or the timer of a lane, had to say: whether it was a doorbell. */
static bool clear(const struct vmm_lane *l, int fd)
{
	struct epoll_event rung;
	eventfd_t kicks = 0;

	if (fd == l->queue->timer_fd)	/* it is set anew by who sleeps, when what it tells of has been done */
		return false;
	return fd == l->bell_fd ? epoll_wait(fd, &rung, 1, 0) > 0 : !eventfd_read(fd, &kicks) && kicks >> 32;
}

static void hear(struct io_thread *t, struct vmm_lane *l, int fd)
{
	struct vmm_queue *q = l->queue;
	uint32_t epoch = vmm_queue_epoch(q);
	bool doorbell = clear(l, fd);

	/* a doorbell came to a ring that reads as if nobody had ever written to it, and not before there was that ring */
	if (!serve_lane(t, l, true) && doorbell && vmm_queue_looks_unshared(q) && vmm_queue_epoch(q) == epoch)
		eventfd_write(l->ready_fd, 1ull << 32);
}

/*
 * Wait for doorbells, for the kernel, for when interrupts must be raised, and to be stopped, at most so long (-1: for
 * ever); serve who rang.  Returns how long it was quiet, in ns.
 */
static uint64_t listen_for(struct io_thread *t, int milliseconds)
{
	struct vmm_engine *e = t->engine;
	struct pollfd fds[3 * e->nr_lanes + 2];
	struct vmm_lane *lanes[3 * e->nr_lanes + 2];
	nfds_t n = 0;

	/* it stays readable, and would not let those sleep who then still wait for the kernel */
	if (!t->in_kernel || !atomic_load(&e->stop))
		fds[n++] = (struct pollfd){ e->stop_fd, POLLIN, 0 };
	if (t->has_ring)
		fds[n++] = (struct pollfd){ t->ring.ring_fd, POLLIN, 0 };
	nfds_t first = n;
	for (uint32_t i = t->index; i < e->nr_lanes; i += e->nr_threads) {
		struct vmm_lane *l = &e->lanes[i];
		lanes[n] = lanes[n + 1] = lanes[n + 2] = l;
		fds[n++] = (struct pollfd){ l->queue->kick_fd, POLLIN, 0 };
		fds[n++] = (struct pollfd){ l->bell_fd, POLLIN, 0 };
		fds[n++] = (struct pollfd){ l->queue->timer_fd, POLLIN, 0 };	/* none is passed over */
		vmm_queue_tell(l->queue, true);
	}
	uint64_t before = now_ns();
	poll(fds, n, milliseconds);
	uint64_t quiet = now_ns() - before;
	for (nfds_t i = first; i < n; i++)
		if (fds[i].revents & POLLIN)
			hear(t, lanes[i], fds[i].fd);
	transfer_submit_all(t);
	return quiet;
}

/* Look for more for a while; whether there was. */
static bool poll_a_while(struct io_thread *t)
{
	const struct vmm_engine_options *o = &t->engine->options;
	bool always = o->poll_ns == VMM_POLL_ALWAYS;
	uint64_t until = always ? 0 : now_ns() + t->window;

	if (!always && !t->window)
		return false;
	for (uint32_t rounds = 1; always || now_ns() < until; rounds++) {
		for (int i = 0; i < 16; i++) {
			if (serve_all(t, false))
				return true;
			__builtin_ia32_pause();
		}
		if (atomic_load_explicit(&t->engine->stop, memory_order_relaxed))
			return false;
		if (!(rounds % LISTEN_ROUNDS))
			listen_for(t, 0);
	}
	return false;
}

/* Look longer when something came soon after we had gone to sleep, and less long when looking was in vain. */
static void adapt(struct io_thread *t, uint64_t quiet)
{
	const struct vmm_engine_options *o = &t->engine->options;

	if (!o->poll_adaptive)
		return;
	if (quiet < o->poll_ns) {
		t->window = t->window ? 2 * t->window : POLL_STEP_NS;
		if (t->window > o->poll_ns)
			t->window = o->poll_ns;
	} else {
		t->window /= 2;
		if (t->window < POLL_STEP_NS)
			t->window = 0;
	}
}

static void *run(void *arg)
{
	struct io_thread *t = arg;
	struct vmm_engine *e = t->engine;

	while (!atomic_load(&e->stop) || t->in_kernel) {
		if (serve_all(t, false) || poll_a_while(t))
			continue;
		if (serve_all(t, true))
			continue;
		adapt(t, listen_for(t, transfer_unsubmitted(t) ? RETRY_MS : -1));
	}
	transfer_close_ring(t);
	return NULL;
}

/* ---- life ----------------------------------------------------------------------------------------------------------- */

static bool make_lane(struct vmm_engine *e, struct vmm_lane *l, struct vmm_queue *queue, int ready_fd)
{
	l->engine = e;
	l->queue = queue;
	l->ready_fd = ready_fd;
	l->bell_fd = -1;
	pthread_mutex_init(&l->lock, NULL);
	l->handed = calloc(e->options.queue_size_max, sizeof(*l->handed));
	if (e->target.kind == VMM_TARGET_FILE)
		l->ops = calloc(e->options.queue_size_max, sizeof(*l->ops));
	return l->handed && (l->ops || e->target.kind != VMM_TARGET_FILE);
}

/* An engine for these queues of one device; NULL without memory or descriptors.  The caller owns all it names. */
struct vmm_engine *vmm_engine_new(const struct vmm_target *target, const struct vmm_engine_options *options,
				  struct vmm_queue **queues, const int *ready_fds, uint32_t count)
{
	struct vmm_engine *e = calloc(1, sizeof(*e));

	if (!e)
		return NULL;
	e->target = *target;
	e->options = *options;
	e->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	e->nr_threads = options->threads < count ? options->threads : count;
	e->lanes = calloc(count, sizeof(*e->lanes));
	e->threads = calloc(e->nr_threads, sizeof(*e->threads));
	atomic_store(&e->nowait_reads, true);
	atomic_store(&e->enabled, true);
	e->lost = target->lost ? (atomic_bool *)(uintptr_t)target->lost : &e->own_lost;
	bool made = e->lanes && e->threads && e->stop_fd >= 0;
	for (uint32_t i = 0; made && i < count; i++, e->nr_lanes++)
		made = make_lane(e, &e->lanes[i], queues[i], ready_fds[i]);
	for (uint32_t i = 0; made && i < e->nr_threads; i++) {
		struct io_thread *t = &e->threads[i];
		*t = (struct io_thread){ .engine = e, .index = i };
		t->window = options->poll_adaptive ? 0 : options->poll_ns;
		int error = transfer_make_ring(t);
		if (error)
			atomic_store(&e->uring_error, -error);
	}
	if (made)
		return e;
	vmm_engine_free(e);
	return NULL;
}

/* Have the threads end once nothing of theirs is in the hands of the kernel.  The queues are paused for good. */
void vmm_engine_stop(struct vmm_engine *e)
{
	atomic_store(&e->stop, true);
	eventfd_write(e->stop_fd, 1);
}

/* Wait for the threads to end; false if they have not in that time. */
bool vmm_engine_join(struct vmm_engine *e, uint32_t milliseconds)
{
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += milliseconds / 1000;
	until.tv_nsec += (long)(milliseconds % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	for (uint32_t i = 0; i < e->nr_threads; i++) {
		struct io_thread *t = &e->threads[i];
		if (t->started && pthread_timedjoin_np(t->thread, NULL, &until))
			return false;
		t->started = false;
	}
	return true;
}

/* Start a thread that leaves signals to others, but for those that are about what it does itself. */
static int start_thread(struct io_thread *t, const int32_t *cpu)
{
	static const int own[] = { SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGABRT };
	sigset_t blocked, before;
	cpu_set_t set;

	sigfillset(&blocked);
	for (size_t i = 0; i < sizeof(own) / sizeof(own[0]); i++)
		sigdelset(&blocked, own[i]);
	pthread_sigmask(SIG_SETMASK, &blocked, &before);
	int error = pthread_create(&t->thread, NULL, run, t);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error)
		return -error;
	t->started = true;
	pthread_setname_np(t->thread, "vmmblk-engine");
	if (!cpu)
		return 0;
	CPU_ZERO(&set);
	CPU_SET((unsigned)*cpu, &set);
	return -pthread_setaffinity_np(t->thread, sizeof(set), &set);
}

/* Start the threads, each on its own of these processors if there are any: 0, or -errno and none runs. */
int vmm_engine_start(struct vmm_engine *e, const int32_t *cpus, uint32_t nr_cpus)
{
	int error = 0;

	for (uint32_t i = 0; !error && i < e->nr_threads; i++)
		error = start_thread(&e->threads[i], nr_cpus ? &cpus[i % nr_cpus] : NULL);
	if (error) {
		vmm_engine_stop(e);
		vmm_engine_join(e, UINT32_MAX);
	}
	return error;
}

/* The threads have ended. */
void vmm_engine_free(struct vmm_engine *e)
{
	for (uint32_t i = 0; e->threads && i < e->nr_threads; i++)
		transfer_close_ring(&e->threads[i]);
	for (uint32_t i = 0; i < e->nr_lanes; i++) {
		struct vmm_lane *l = &e->lanes[i];
		for (uint32_t s = 0; l->ops && s < e->options.queue_size_max; s++) {
			free(l->ops[s].ranges);
			free(l->ops[s].iov);
		}
		free(l->ops);
		free(l->handed);
		pthread_mutex_destroy(&l->lock);
	}
	if (e->stop_fd >= 0)
		close(e->stop_fd);
	free(e->lanes);
	free(e->threads);
	free(e);
}

/* The disk has this many bytes; at first it has none. */
void vmm_engine_resize(struct vmm_engine *e, uint64_t size)
{
	atomic_store(&e->size, size);
}

/* Whether a write may be volatile until the next flush. */
void vmm_engine_set_write_cache(struct vmm_engine *e, bool on)
{
	atomic_store(&e->write_cache, on);
}

/* What the driver may discard and zero: sectors of 512 bytes in a segment, and segments; 0 if it may not. */
void vmm_engine_limit(struct vmm_engine *e, uint32_t discard_sectors, uint32_t discard_segments, uint32_t zeroes_sectors,
		      uint32_t zeroes_segments)
{
	atomic_store(&e->discard.sectors, discard_sectors);
	atomic_store(&e->discard.segments, discard_segments);
	atomic_store(&e->zeroes.sectors, zeroes_sectors);
	atomic_store(&e->zeroes.segments, zeroes_segments);
}

/* Off, everything is handed over. */
void vmm_engine_enable(struct vmm_engine *e, bool on)
{
	atomic_store(&e->enabled, on);
}

/* Why there is no io_uring: errno, or 0. */
int vmm_engine_uring_error(const struct vmm_engine *e)
{
	return atomic_load(&e->uring_error);
}

struct vmm_lane *vmm_engine_lane(struct vmm_engine *e, uint32_t index)
{
	return &e->lanes[index];
}

/*
 * Doorbells of the lane's queue also come to bell_fd, an epoll descriptor with an edge-triggered eventfd in it that is
 * the client's as well: one that is never read, as its other owner could make that wait.  Before the threads start.
 */
void vmm_lane_set_bell(struct vmm_lane *l, int bell_fd)
{
	l->bell_fd = bell_fd;
}
