/* See engine.h.  What a thread does is in run(); what becomes of one chain is in serve_chain(). */
#include "engine.h"

#include <endian.h>
#include <errno.h>
#include <liburing.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <time.h>

#define BATCH 64
#define SECTOR 512
#define TYPE_IN 0
#define TYPE_OUT 1
#define URING_MAX 32768
#define IDLE_IOV 16			/* an operation that is over keeps at most so many vectors allocated */
#define POLL_STEP_NS 2000
#define LISTEN_ROUNDS 4096		/* whoever polls for ever hears the doorbells every so many rounds */
#define RETRY_MS 1			/* what the kernel would not take is offered again so much later */
#define SLOW_NS 2000000			/* a write to the page cache that took so long was held back: */
#define SLOW_REST_NS 100000000		/* for so long no other is tried without io_uring */

/* A transfer in the hands of the kernel; they are numbered as the slots of the queue are. */
struct op {
	struct vmm_chain chain;
	struct iovec *iov;
	uint32_t max_iov, nr_iov, first;	/* vectors before first are done */
	uint64_t offset;
	bool write;
};

struct vmm_lane {
	struct vmm_engine *engine;
	struct vmm_queue *queue;
	int ready_fd;
	struct op *ops;				/* queue_size_max of them */
	struct iovec iov[BATCH];
	pthread_mutex_t lock;			/* of what follows */
	struct vmm_chain *handed;		/* a ring of queue_size_max */
	uint32_t first, count;
	int failure;				/* what popping answered, in that life of the queue */
	uint32_t failure_epoch;
};

struct io_thread {
	struct vmm_engine *engine;
	pthread_t thread;
	bool started;
	uint32_t index;
	struct io_uring ring;
	bool has_ring;
	uint32_t in_kernel;			/* operations that have not ended, those not yet submitted among them */
	uint64_t window;			/* how long to look for more before sleeping, ns */
	uint64_t slow_until;
};

struct vmm_engine {
	struct vmm_target target;
	struct vmm_engine_options options;
	_Atomic uint64_t size;
	atomic_bool write_cache, enabled, stop;
	atomic_bool nowait_reads;
	atomic_int uring_error;
	int stop_fd;
	uint32_t nr_lanes, nr_threads;
	struct vmm_lane *lanes;
	struct io_thread *threads;
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* ---- handing over ------------------------------------------------------------------------------------------------ */

static void hand_over(struct vmm_lane *l, const struct vmm_chain *chain, uint32_t error)
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

/* ---- transfers ------------------------------------------------------------------------------------------------------ */

/* A read or write that is plainly good: what there is to say about others is not said here. */
static bool understand(const struct vmm_engine *e, const struct vmm_chain *c, bool *write, uint64_t *offset,
		       uint64_t *length)
{
	uint32_t type;
	uint64_t sector, size = atomic_load_explicit(&e->size, memory_order_relaxed);

	memcpy(&type, c->header, sizeof(type));
	memcpy(&sector, c->header + 8, sizeof(sector));
	type = le32toh(type);
	sector = le64toh(sector);
	if (c->flags || c->header_len != VMM_HEADER_SIZE || type > TYPE_OUT || (type == TYPE_OUT && !e->target.writable))
		return false;
	*write = type == TYPE_OUT;
	*length = *write ? c->readable : c->writable;
	if (!*length || sector > size / SECTOR)
		return false;
	*offset = sector * SECTOR;
	return !((*offset | *length) & (e->target.sector_size - 1)) && *length <= size - *offset;
}

static const struct vmm_seg *segments(const struct vmm_chain *c, bool write, uint32_t *n)
{
	*n = write ? c->readable_segs : c->writable_segs;
	return write ? c->segs : c->segs + c->readable_segs;
}

static void copy(const struct vmm_chain *c, bool write, uint8_t *disk)
{
	uint32_t n;
	const struct vmm_seg *s = segments(c, write, &n);

	for (uint32_t i = 0; i < n; i++) {
		if (write)
			memcpy(disk, s[i].host, s[i].len);
		else
			memcpy(s[i].host, disk, s[i].len);
		disk += s[i].len;
	}
}

static void zero(const struct vmm_chain *c)
{
	uint32_t n;
	const struct vmm_seg *s = segments(c, false, &n);

	for (uint32_t i = 0; i < n; i++)
		memset(s[i].host, 0, s[i].len);
}

static bool suits(const struct vmm_engine *e, const struct vmm_seg *s, uint32_t n)
{
	uint64_t mask = e->target.alignment - 1, bits = 0;

	for (uint32_t i = 0; i < n; i++)
		bits |= (uintptr_t)s[i].host | s[i].len;
	return !(bits & mask);
}

static bool make_room(struct op *op, uint32_t n)
{
	if (n > IOV_MAX)
		return false;
	if (n > op->max_iov) {
		struct iovec *iov = realloc(op->iov, n * sizeof(*iov));
		if (!iov)
			return false;
		op->iov = iov;
		op->max_iov = n;
	}
	return true;
}

static bool prepare(struct vmm_lane *l, const struct vmm_chain *c, bool write, uint64_t offset, struct op **prepared)
{
	struct op *op = &l->ops[c->token & 0xffff];
	uint32_t n;
	const struct vmm_seg *s = segments(c, write, &n);

	if (!suits(l->engine, s, n) || !make_room(op, n))
		return false;
	for (uint32_t i = 0; i < n; i++)
		op->iov[i] = (struct iovec){ s[i].host, s[i].len };
	op->chain = *c;
	op->nr_iov = n;
	op->first = 0;
	op->offset = offset;
	op->write = write;
	*prepared = op;
	return true;
}

static void over(struct op *op)
{
	if (op->max_iov > IDLE_IOV) {
		free(op->iov);
		op->iov = NULL;
		op->max_iov = 0;
	}
}

/* So many bytes are done; true if that was all. */
static bool advance(struct op *op, uint64_t bytes)
{
	op->offset += bytes;
	while (op->first < op->nr_iov && bytes >= op->iov[op->first].iov_len)
		bytes -= op->iov[op->first++].iov_len;
	if (op->first == op->nr_iov)
		return true;
	op->iov[op->first].iov_base = (uint8_t *)op->iov[op->first].iov_base + bytes;
	op->iov[op->first].iov_len -= bytes;
	return false;
}

static int write_flags(const struct vmm_engine *e)
{
	return atomic_load_explicit(&e->write_cache, memory_order_relaxed) ? 0 : RWF_DSYNC;
}

/* Try without waiting: bytes done, -EAGAIN if the kernel should do it, another -errno. */
static ssize_t attempt(struct io_thread *t, struct op *op)
{
	struct vmm_engine *e = t->engine;
	const struct iovec *iov = op->iov + op->first;
	int n = (int)(op->nr_iov - op->first), fd = e->target.fd;
	ssize_t done;

	if (e->target.direct)
		return -EAGAIN;
	if (!op->write) {
		bool nowait = !e->target.in_memory;
		if (nowait && !atomic_load_explicit(&e->nowait_reads, memory_order_relaxed))
			return -EAGAIN;
		done = preadv2(fd, iov, n, (off_t)op->offset, nowait ? RWF_NOWAIT : 0);
		if (done < 0 && nowait && errno == EOPNOTSUPP) {
			atomic_store(&e->nowait_reads, false);
			return -EAGAIN;
		}
		return done < 0 ? -errno : done;
	}
	if (e->target.in_memory) {
		done = pwritev2(fd, iov, n, (off_t)op->offset, 0);
		return done < 0 ? -errno : done;
	}
	if (write_flags(e))
		return -EAGAIN;
	/* into the page cache, which waits only when too much of it is dirty */
	uint64_t before = now_ns();
	if (before < t->slow_until)
		return -EAGAIN;
	done = pwritev2(fd, iov, n, (off_t)op->offset, 0);
	int error = errno;
	uint64_t after = now_ns();
	if (after - before > SLOW_NS)
		t->slow_until = after + SLOW_REST_NS;
	return done < 0 ? -error : done;
}

static bool submit(struct io_thread *t, struct vmm_lane *l, struct op *op)
{
	struct vmm_engine *e = t->engine;
	const struct iovec *iov = op->iov + op->first;
	uint32_t n = op->nr_iov - op->first;
	struct io_uring_sqe *sqe;

	if (!t->has_ring || t->in_kernel >= URING_MAX || !(sqe = io_uring_get_sqe(&t->ring)))
		return false;
	if (op->write)
		io_uring_prep_writev2(sqe, 0, iov, n, op->offset, write_flags(e));
	else
		io_uring_prep_readv(sqe, 0, iov, n, op->offset);
	sqe->flags |= IOSQE_FIXED_FILE;
	uint64_t lane = (uint64_t)(l - e->lanes);
	io_uring_sqe_set_data64(sqe, lane << 32 | (op->chain.token & 0xffff));
	t->in_kernel++;
	return true;
}

enum fate { DONE, UNDER_WAY, HANDED_OVER };

static enum fate go_on(struct io_thread *t, struct vmm_lane *l, struct op *op)
{
	for (;;) {
		ssize_t done = attempt(t, op);
		if (done == -EINTR)
			continue;
		if (done > 0 && !advance(op, (uint64_t)done))
			continue;
		if (done > 0)
			return DONE;
		if (done == -EAGAIN && submit(t, l, op))
			return UNDER_WAY;
		/* at the end of a file that was cut, or with no io_uring, it is done over again by somebody who can wait */
		hand_over(l, &op->chain, done < 0 && done != -EAGAIN ? (uint32_t)-done : 0);
		return HANDED_OVER;
	}
}

static enum fate serve_chain(struct io_thread *t, struct vmm_lane *l, const struct vmm_chain *c,
			     struct vmm_completion *done)
{
	struct vmm_engine *e = t->engine;
	uint64_t offset, length;
	bool write;
	struct op *op;

	if (!atomic_load_explicit(&e->enabled, memory_order_relaxed) || !understand(e, c, &write, &offset, &length)) {
		hand_over(l, c, 0);
		return HANDED_OVER;
	}
	*done = (struct vmm_completion){ .token = c->token, .written = write ? 0 : (uint32_t)length };
	switch (e->target.kind) {
	case VMM_TARGET_NULL:
		if (!write)
			zero(c);
		return DONE;
	case VMM_TARGET_MEMORY:
		copy(c, write, (uint8_t *)(uintptr_t)e->target.memory + offset);
		return DONE;
	}
	if (!prepare(l, c, write, offset, &op)) {
		hand_over(l, c, 0);
		return HANDED_OVER;
	}
	enum fate fate = go_on(t, l, op);
	if (fate != UNDER_WAY)
		over(op);
	return fate;
}

static int make_ring(struct io_thread *t)
{
	struct vmm_engine *e = t->engine;
	uint64_t lanes = (e->nr_lanes - t->index + e->nr_threads - 1) / e->nr_threads;
	uint64_t want = lanes * e->options.queue_size_max;	/* no more are in flight: no completion finds the ring full */
	struct io_uring_params p = { .flags = IORING_SETUP_CLAMP };

	if (e->target.kind != VMM_TARGET_FILE || !e->options.uring)
		return 0;
	int error = io_uring_queue_init_params(want > URING_MAX ? URING_MAX : (unsigned)want, &t->ring, &p);
	if (error)
		return error;
	error = io_uring_register_files(&t->ring, &e->target.fd, 1);
	if (error) {
		io_uring_queue_exit(&t->ring);
		return error;
	}
	t->has_ring = true;
	return 0;
}

/*
 * The kernel takes a ring down some time after it was closed, and a file that is registered with it stays open, and
 * locked, as long; so that is undone first.
 */
static void close_ring(struct io_thread *t)
{
	if (!t->has_ring)
		return;
	io_uring_unregister_files(&t->ring);
	io_uring_queue_exit(&t->ring);
	t->has_ring = false;
}

/* ---- a thread ------------------------------------------------------------------------------------------------------ */

static bool unsubmitted(const struct io_thread *t)
{
	return t->has_ring && io_uring_sq_ready(&t->ring);
}

/* The kernel takes some of them, or none while it lacks memory: what stays is offered again in the next turn. */
static void flush_submissions(struct io_thread *t)
{
	while (unsubmitted(t) && io_uring_submit(&t->ring) > 0)
		;
}

/*
 * Pop; a failure is known to be of this life of the queue if it is still there after asking which life that is.  (It
 * stays until the queue stops, and a start kicks.)
 */
static int pop_or_tell(struct vmm_lane *l, struct vmm_chain *chains, bool arm)
{
	struct vmm_queue *q = l->queue;
	int n = arm ? vmm_queue_pop(q, chains, BATCH) : vmm_queue_poll(q, chains, BATCH);

	if (n >= 0)
		return n;
	uint32_t epoch = vmm_queue_epoch(q);
	n = vmm_queue_poll(q, chains, BATCH);
	if (n < 0 && vmm_queue_epoch(q) == epoch)
		hand_over_failure(l, n, epoch, arm);
	return n < 0 ? 0 : n;
}

/* Serve what waits in a lane's ring; how much that was. */
static int serve_lane(struct io_thread *t, struct vmm_lane *l, bool arm)
{
	struct vmm_chain chains[BATCH];
	struct vmm_completion done[BATCH];
	int completed = 0, n = pop_or_tell(l, chains, arm);

	for (int i = 0; i < n; i++)
		completed += serve_chain(t, l, &chains[i], &done[completed]) == DONE;
	if (completed)
		vmm_queue_complete(l->queue, done, completed);
	return n;
}

/* What the kernel says of an operation; true if its chain can be completed. */
static bool settle(struct io_thread *t, struct vmm_lane *l, struct op *op, int result)
{
	t->in_kernel--;
	if (result > 0 && !advance(op, (uint64_t)result)) {
		if (submit(t, l, op))
			return false;
		result = 0;
	}
	/* these are no answer of the disk's */
	if (result == -EAGAIN || result == -EINTR || result == -ECANCELED)
		result = 0;
	if (result <= 0)
		hand_over(l, &op->chain, (uint32_t)-result);
	over(op);
	return result > 0;
}

/* Take what the kernel has done; what belongs to one queue and comes in a row is completed together. */
static int reap(struct io_thread *t)
{
	struct vmm_completion done[BATCH];
	struct vmm_lane *lane = NULL;
	struct io_uring_cqe *cqe;
	int n = 0, ready = 0;

	while (t->in_kernel && !io_uring_peek_cqe(&t->ring, &cqe)) {
		struct vmm_lane *l = &t->engine->lanes[cqe->user_data >> 32];
		struct op *op = &l->ops[cqe->user_data & 0xffffffff];
		int result = cqe->res;
		io_uring_cqe_seen(&t->ring, cqe);
		if (ready && (l != lane || ready == BATCH)) {
			vmm_queue_complete(lane->queue, done, ready);
			ready = 0;
		}
		lane = l;
		done[ready] = (struct vmm_completion){
			.token = op->chain.token, .written = op->write ? 0 : (uint32_t)op->chain.writable,
		};
		ready += settle(t, l, op, result);
		n++;
	}
	if (ready)
		vmm_queue_complete(lane->queue, done, ready);
	return n;
}

static int serve_all(struct io_thread *t, bool arm)
{
	struct vmm_engine *e = t->engine;
	int n = 0;

	for (uint32_t i = t->index; i < e->nr_lanes; i += e->nr_threads)
		n += serve_lane(t, &e->lanes[i], arm);
	n += reap(t);
	flush_submissions(t);
	return n;
}

/* A doorbell came to a ring that reads as if nobody had ever written to it. */
static void hear(struct io_thread *t, struct vmm_lane *l)
{
	eventfd_t kicks = 0;
	bool doorbell = !eventfd_read(l->queue->kick_fd, &kicks) && kicks >> 32;

	if (!serve_lane(t, l, true) && doorbell && vmm_queue_looks_unshared(l->queue))
		eventfd_write(l->ready_fd, 1ull << 32);
}

/* Wait for doorbells, for the kernel and to be stopped, at most so long (-1: for ever); serve who rang. */
static void listen_for(struct io_thread *t, int milliseconds)
{
	struct vmm_engine *e = t->engine;
	struct pollfd fds[e->nr_lanes + 2];
	struct vmm_lane *lanes[e->nr_lanes + 2];
	nfds_t n = 0;

	/* it stays readable, and would not let those sleep who then still wait for the kernel */
	if (!t->in_kernel || !atomic_load(&e->stop))
		fds[n++] = (struct pollfd){ e->stop_fd, POLLIN, 0 };
	if (t->has_ring)
		fds[n++] = (struct pollfd){ t->ring.ring_fd, POLLIN, 0 };
	nfds_t first = n;
	for (uint32_t i = t->index; i < e->nr_lanes; i += e->nr_threads) {
		lanes[n] = &e->lanes[i];
		fds[n++] = (struct pollfd){ e->lanes[i].queue->kick_fd, POLLIN, 0 };
	}
	poll(fds, n, milliseconds);
	for (nfds_t i = first; i < n; i++)
		if (fds[i].revents & POLLIN)
			hear(t, lanes[i]);
	flush_submissions(t);
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
static void adapt(struct io_thread *t, uint64_t slept)
{
	const struct vmm_engine_options *o = &t->engine->options;

	if (!o->poll_adaptive)
		return;
	if (slept < o->poll_ns) {
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
		uint64_t before = now_ns();
		listen_for(t, unsubmitted(t) ? RETRY_MS : -1);
		adapt(t, now_ns() - before);
	}
	close_ring(t);
	return NULL;
}

/* ---- life ----------------------------------------------------------------------------------------------------------- */

static bool make_lane(struct vmm_engine *e, struct vmm_lane *l, struct vmm_queue *queue, int ready_fd)
{
	l->engine = e;
	l->queue = queue;
	l->ready_fd = ready_fd;
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
	bool made = e->lanes && e->threads && e->stop_fd >= 0;
	for (uint32_t i = 0; made && i < count; i++, e->nr_lanes++)
		made = make_lane(e, &e->lanes[i], queues[i], ready_fds[i]);
	for (uint32_t i = 0; made && i < e->nr_threads; i++) {
		struct io_thread *t = &e->threads[i];
		*t = (struct io_thread){ .engine = e, .index = i };
		t->window = options->poll_adaptive ? 0 : options->poll_ns;
		int error = make_ring(t);
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
		close_ring(&e->threads[i]);
	for (uint32_t i = 0; i < e->nr_lanes; i++) {
		struct vmm_lane *l = &e->lanes[i];
		for (uint32_t s = 0; l->ops && s < e->options.queue_size_max; s++)
			free(l->ops[s].iov);
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
