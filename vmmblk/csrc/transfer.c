/* See transfer.h.  What becomes of one chain is in transfer_serve(). */
#include "transfer.h"

#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define URING_MAX 32768
#define OFFER 4				/* operations for which the kernel is called once */
#define IDLE_IOV 16			/* an operation that is over keeps at most so many vectors allocated */
#define SLOW_NS 2000000			/* a write to the page cache that took so long was held back: */
#define SLOW_REST_NS 100000000		/* for so long no other is tried without io_uring */

static uint64_t first_sector(const struct vmm_chain *c)
{
	uint64_t sector;

	memcpy(&sector, c->header + 8, sizeof(sector));
	return le64toh(sector);
}

/* A read or write that is plainly good: what there is to say about others is not said here. */
static bool understand(const struct vmm_engine *e, const struct vmm_chain *c, bool write, uint64_t *offset,
		       uint64_t *length)
{
	uint64_t sector = first_sector(c), size = atomic_load_explicit(&e->size, memory_order_relaxed);

	if (write && !e->target.writable)
		return false;
	*length = write ? c->readable : c->writable;
	if (!*length || sector > size / SECTOR)
		return false;
	*offset = sector * SECTOR;
	return !((*offset | *length) & (e->target.sector_size - 1)) && *length <= size - *offset;
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

static bool prepare(struct vmm_engine *e, struct op *op)
{
	uint32_t n;
	const struct vmm_seg *s = segments(&op->chain, op->type == TYPE_OUT, &n);

	if (!suits(e, s, n) || !make_room(op, n))
		return false;
	for (uint32_t i = 0; i < n; i++)
		op->iov[i] = (struct iovec){ s[i].host, s[i].len };
	op->nr_iov = n;
	op->first = 0;
	return true;
}

/* Of the slot that the chain has. */
static struct op *op_of(struct vmm_lane *l, const struct vmm_chain *c, enum request_type type)
{
	struct op *op = &l->ops[c->token & 0xffff];

	op->chain = *c;
	op->type = type;
	op->lane = l;
	return op;
}

static void over(struct io_thread *t, struct op *op)
{
	pool_give(&t->pool, op);
	free(op->ranges);
	op->ranges = NULL;
	if (op->max_iov > IDLE_IOV) {
		free(op->iov);
		op->iov = NULL;
		op->max_iov = 0;
	}
}

/* So many bytes of the vectors are done; true if that was all of them. */
static bool advance_vectors(struct op *op, uint64_t bytes)
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

static ssize_t write_vectors(const struct vmm_engine *e, const struct op *op)
{
	ssize_t done = pwritev2(e->target.fd, op->iov + op->first, (int)(op->nr_iov - op->first), (off_t)op->offset, 0);

	return done < 0 ? -errno : done;
}

/* Into the page cache, which waits only when too much of it is dirty. */
static ssize_t write_to_cache(struct io_thread *t, struct op *op)
{
	uint64_t before = now_ns();

	if (write_flags(t->engine) || before < t->slow_until)
		return -EAGAIN;
	ssize_t done = write_vectors(t->engine, op);
	uint64_t after = now_ns();
	if (after - before > SLOW_NS)
		t->slow_until = after + SLOW_REST_NS;
	return done;
}

static ssize_t read_from_cache(struct io_thread *t, struct op *op)
{
	struct vmm_engine *e = t->engine;
	bool nowait = !e->target.in_memory;

	if (nowait && !atomic_load_explicit(&e->nowait_reads, memory_order_relaxed))
		return -EAGAIN;
	ssize_t done = preadv2(e->target.fd, op->iov + op->first, (int)(op->nr_iov - op->first), (off_t)op->offset,
			       nowait ? RWF_NOWAIT : 0);
	if (done < 0 && nowait && errno == EOPNOTSUPP) {
		atomic_store(&e->nowait_reads, false);
		return -EAGAIN;
	}
	return done < 0 ? -errno : done;
}

/* Try without waiting: what the kernel would say of it, -EAGAIN if it should be asked. */
static ssize_t attempt(struct io_thread *t, struct op *op)
{
	const struct vmm_target *target = &t->engine->target;

	if (op->type == TYPE_FLUSH && target->in_memory)
		return fdatasync(target->fd) ? -errno : 0;
	if (target->direct || op->type > TYPE_OUT)
		return -EAGAIN;
	if (op->type == TYPE_IN)
		return read_from_cache(t, op);
	return target->in_memory ? write_vectors(t->engine, op) : write_to_cache(t, op);
}

static void prepare_transfer(const struct io_thread *t, const struct op *op, struct io_uring_sqe *sqe)
{
	const struct iovec *iov = op->iov + op->first;
	uint32_t n = op->nr_iov - op->first;

	if (op->buffer && t->pool.registered) {
		if (op->type == TYPE_OUT)
			io_uring_prep_write_fixed(sqe, 0, iov->iov_base, (unsigned)iov->iov_len, op->offset, 0);
		else
			io_uring_prep_read_fixed(sqe, 0, iov->iov_base, (unsigned)iov->iov_len, op->offset, 0);
	} else if (op->type == TYPE_OUT) {
		io_uring_prep_writev(sqe, 0, iov, n, op->offset);
	} else {
		io_uring_prep_readv(sqe, 0, iov, n, op->offset);
	}
	if (op->type == TYPE_OUT)
		sqe->rw_flags = write_flags(t->engine);
}

static bool syncs(const struct op *op)
{
	return op->type == TYPE_FLUSH || (op->type == TYPE_WRITE_ZEROES && op->range == op->nr_ranges);
}

static void prepare_range(const struct op *op, struct io_uring_sqe *sqe)
{
	const struct range *range = &op->ranges[op->range];
	bool punch = op->type == TYPE_DISCARD || range->unmap;
	int mode = punch ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;

	io_uring_prep_fallocate(sqe, 0, mode | FALLOC_FL_KEEP_SIZE, range->offset, range->length);
}

/* The kernel takes some of what is prepared, or none while it lacks memory: false, and it is offered again. */
static bool offer(struct io_thread *t)
{
	int taken = io_uring_submit(&t->ring);

	t->offered += taken > 0 ? (uint32_t)taken : 0;
	return taken > 0;
}

/* A device need not wait until the last of a batch is prepared: the kernel gets one, then two, then so many at a time. */
static bool offer_is_due(const struct io_thread *t)
{
	return io_uring_sq_ready(&t->ring) > (t->offered < OFFER - 1 ? t->offered : OFFER - 1);
}

static bool submit(struct io_thread *t, struct op *op)
{
	struct io_uring_sqe *sqe;

	if (!t->has_ring || t->in_kernel >= URING_MAX || !(sqe = io_uring_get_sqe(&t->ring)))
		return false;
	if (op->type <= TYPE_OUT)
		prepare_transfer(t, op, sqe);
	else if (syncs(op))
		io_uring_prep_fsync(sqe, 0, IORING_FSYNC_DATASYNC);
	else
		prepare_range(op, sqe);
	sqe->flags |= IOSQE_FIXED_FILE;
	uint64_t lane = (uint64_t)(op->lane - t->engine->lanes);
	io_uring_sqe_set_data64(sqe, lane << 32 | (op->chain.token & 0xffff));
	t->in_kernel++;
	if (offer_is_due(t))
		offer(t);
	return true;
}

/* The kernel has done that much of it; true if that was all. */
static bool advance(struct op *op, uint64_t bytes)
{
	if (op->type <= TYPE_OUT)
		return advance_vectors(op, bytes) && !(op->buffer && bounce_next(op));
	if (syncs(op))
		return true;
	op->range++;
	return op->type == TYPE_DISCARD && op->range == op->nr_ranges;
}

/* Whether that tells of data that was written before, for the only time: no later flush may say that all is well. */
static bool tells_of_loss(const struct vmm_engine *e, const struct op *op, int error)
{
	return !e->target.direct && (syncs(op) || (op->type == TYPE_OUT && error == EIO));
}

/* With 0 for an error the worker does it over again: it can wait, and knows what else may be tried. */
static void give_up(struct vmm_engine *e, struct op *op, int error)
{
	bool range = op->type > TYPE_FLUSH && !syncs(op);

	if (error == EAGAIN || error == EINTR || error == ECANCELED)	/* no answer of the disk's */
		error = 0;
	if (range && (error == EOPNOTSUPP || error == ENOSYS || error == EINVAL))	/* not like this */
		error = 0;
	if (error && tells_of_loss(e, op, error))
		atomic_store(e->lost, true);
	lane_hand_over(op->lane, &op->chain, (uint32_t)error);
}

/* A transfer of nothing is the end of a file that was cut. */
static bool went_well(const struct op *op, ssize_t result)
{
	return result > 0 || (result == 0 && op->type > TYPE_OUT);
}

static enum fate go_on(struct io_thread *t, struct op *op)
{
	for (;;) {
		ssize_t done = attempt(t, op);
		if (done == -EINTR)
			continue;
		if (went_well(op, done)) {
			if (advance(op, (uint64_t)done))
				return DONE;
			continue;
		}
		if (done == -EAGAIN && submit(t, op))
			return UNDER_WAY;
		give_up(t->engine, op, (int)-done);
		return HANDED_OVER;
	}
}

/* A chain that comes soon: fetch the beginning of its page of memory while others are copied; the rest comes after it. */
void transfer_expect(const struct vmm_engine *e, const struct vmm_chain *c)
{
	uint64_t sector = first_sector(c), size = atomic_load_explicit(&e->size, memory_order_relaxed);

	if (e->target.kind == VMM_TARGET_MEMORY && sector < size / SECTOR)
		__builtin_prefetch((const uint8_t *)(uintptr_t)e->target.memory + sector * SECTOR);
}

static enum fate begin(struct io_thread *t, struct op *op)
{
	enum fate fate = go_on(t, op);

	if (fate != UNDER_WAY)
		over(t, op);
	return fate;
}

static enum fate hand_over(struct vmm_lane *l, const struct vmm_chain *c)
{
	lane_hand_over(l, c, 0);
	return HANDED_OVER;
}

/* Through private memory, where there is any: it serves what the kernel does, and what waits for some waits for that. */
static enum fate serve_bounced(struct io_thread *t, struct op *op, uint64_t length)
{
	if (!t->has_ring || !t->pool.memory || !make_room(op, 1))
		return hand_over(op->lane, &op->chain);
	bounce_begin(op, length);
	if (t->pool.first || !pool_take(&t->pool, op)) {
		pool_wait(&t->pool, op);
		return UNDER_WAY;
	}
	bounce_next(op);
	return begin(t, op);
}

static enum fate serve_transfer(struct io_thread *t, struct vmm_lane *l, const struct vmm_chain *c,
				enum request_type type)
{
	struct vmm_engine *e = t->engine;
	bool write = type == TYPE_OUT;
	uint64_t offset, length;

	if (!understand(e, c, write, &offset, &length))
		return hand_over(l, c);
	switch (e->target.kind) {
	case VMM_TARGET_NULL:
		if (!write)
			zero(c);
		return DONE;
	case VMM_TARGET_MEMORY:
		copy(c, write, (uint8_t *)(uintptr_t)e->target.memory + offset);
		return DONE;
	}
	struct op *op = op_of(l, c, type);
	op->offset = offset;
	return !e->target.bounce && prepare(e, op) ? begin(t, op) : serve_bounced(t, op, length);
}

static enum fate serve_flush(struct io_thread *t, struct vmm_lane *l, const struct vmm_chain *c)
{
	struct vmm_engine *e = t->engine;

	if (e->target.flush == VMM_FLUSH_NEEDLESS)
		return DONE;
	if (e->target.flush != VMM_FLUSH_SYNC || e->target.kind != VMM_TARGET_FILE || atomic_load(e->lost))
		return hand_over(l, c);
	return begin(t, op_of(l, c, TYPE_FLUSH));
}

/* In the hands of the kernel, one after the other. */
static enum fate serve_ranges_of_file(struct io_thread *t, struct op *op, const struct range *ranges, int n)
{
	struct vmm_engine *e = t->engine;

	op->ranges = malloc((size_t)n * sizeof(*ranges));
	if (!op->ranges || (op->type == TYPE_WRITE_ZEROES && atomic_load(e->lost)))
		return over(t, op), hand_over(op->lane, &op->chain);
	memcpy(op->ranges, ranges, (size_t)n * sizeof(*ranges));
	op->nr_ranges = (uint32_t)n;
	op->range = 0;
	return begin(t, op);
}

static enum fate serve_ranges(struct io_thread *t, struct vmm_lane *l, const struct vmm_chain *c, enum request_type type)
{
	struct vmm_engine *e = t->engine;
	bool discard = type == TYPE_DISCARD;
	struct range ranges[RANGES_MAX];
	int n = -1;

	if (discard ? e->target.discards : e->target.zeroes)
		n = ranges_understand(e, c, discard, ranges);
	if (n < 0)
		return hand_over(l, c);
	if (!n || e->target.kind == VMM_TARGET_NULL)
		return DONE;
	if (e->target.kind == VMM_TARGET_MEMORY)
		return ranges_in_memory(e, ranges, n, discard) ? DONE : hand_over(l, c);
	return serve_ranges_of_file(t, op_of(l, c, type), ranges, n);
}

static struct vmm_completion completion(const struct vmm_chain *c, uint32_t type)
{
	return (struct vmm_completion){ .token = c->token, .written = type == TYPE_IN ? (uint32_t)c->writable : 0 };
}

/* Serve a chain that was popped just now; what there is to say if it is done is in *done. */
enum fate transfer_serve(struct io_thread *t, struct vmm_lane *l, const struct vmm_chain *c,
			 struct vmm_completion *done)
{
	uint32_t type;

	if (!atomic_load_explicit(&t->engine->enabled, memory_order_relaxed) || c->flags || c->header_len != VMM_HEADER_SIZE)
		return hand_over(l, c);
	memcpy(&type, c->header, sizeof(type));
	type = le32toh(type);
	*done = completion(c, type);
	switch (type) {
	case TYPE_IN:
	case TYPE_OUT:
		return serve_transfer(t, l, c, (enum request_type)type);
	case TYPE_FLUSH:
		return serve_flush(t, l, c);
	case TYPE_DISCARD:
	case TYPE_WRITE_ZEROES:
		return serve_ranges(t, l, c, (enum request_type)type);
	}
	return hand_over(l, c);
}

/* ---- the ring of a thread -------------------------------------------------------------------------------------------- */

/* The kernel may refuse to pin that much: then the memory serves without. */
static void make_pool(struct io_thread *t)
{
	struct vmm_engine *e = t->engine;
	struct pool *p = &t->pool;

	if (!pool_make(p, e->nr_threads) || !e->target.bounce)
		return;
	struct iovec all = { p->memory, pool_size(p) };
	p->registered = !io_uring_register_buffers(&t->ring, &all, 1);
}

int transfer_make_ring(struct io_thread *t)
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
	if (e->target.bounce || e->target.alignment > 1)
		make_pool(t);
	return 0;
}

/*
 * The kernel takes a ring down some time after it was closed, and a file that is registered with it stays open, and
 * locked, as long; so that is undone first.
 */
void transfer_close_ring(struct io_thread *t)
{
	if (!t->has_ring)
		return;
	io_uring_unregister_files(&t->ring);
	io_uring_queue_exit(&t->ring);
	pool_free(&t->pool);
	t->has_ring = false;
}

bool transfer_unsubmitted(const struct io_thread *t)
{
	return t->has_ring && io_uring_sq_ready(&t->ring);
}

void transfer_submit_all(struct io_thread *t)
{
	while (transfer_unsubmitted(t) && offer(t))
		;
	t->offered = 0;
}

/* What the kernel says of an operation; true if its chain can be completed. */
static bool settle(struct io_thread *t, struct op *op, int result)
{
	bool well = went_well(op, result);

	t->in_kernel--;
	bool done = well && advance(op, (uint64_t)result);
	if (well && !done && submit(t, op))
		return false;
	if (!done)
		give_up(t->engine, op, well ? 0 : -result);
	over(t, op);
	return done;
}

/* Whoever waits for private memory has his turn once there is some. */
static void serve_waiting(struct io_thread *t)
{
	struct op *op;

	while ((op = pool_next(&t->pool))) {
		struct vmm_lane *l = op->lane;
		struct vmm_completion done = completion(&op->chain, op->type);
		bounce_next(op);
		if (begin(t, op) == DONE)
			vmm_queue_complete(l->queue, &done, 1);
	}
}

/* Take what the kernel has done; what belongs to one queue and comes in a row is completed together. */
int transfer_reap(struct io_thread *t)
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
		done[ready] = completion(&op->chain, op->type);
		ready += settle(t, op, result);
		n++;
	}
	if (ready)
		vmm_queue_complete(lane->queue, done, ready);
	serve_waiting(t);
	return n;
}
