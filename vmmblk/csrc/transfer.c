/* See transfer.h.  What becomes of one chain is in transfer_serve(). */
#include "transfer.h"

#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#define SECTOR 512
#define TYPE_IN 0
#define TYPE_OUT 1
#define URING_MAX 32768
#define IDLE_IOV 16			/* an operation that is over keeps at most so many vectors allocated */
#define SLOW_NS 2000000			/* a write to the page cache that took so long was held back: */
#define SLOW_REST_NS 100000000		/* for so long no other is tried without io_uring */

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
		lane_hand_over(l, &op->chain, done < 0 && done != -EAGAIN ? (uint32_t)-done : 0);
		return HANDED_OVER;
	}
}

/* A chain that comes soon: fetch the beginning of its page of memory while others are copied; the rest comes after it. */
void transfer_expect(const struct vmm_engine *e, const struct vmm_chain *c)
{
	uint64_t sector, size = atomic_load_explicit(&e->size, memory_order_relaxed);

	if (e->target.kind != VMM_TARGET_MEMORY)
		return;
	memcpy(&sector, c->header + 8, sizeof(sector));
	sector = le64toh(sector);
	if (sector < size / SECTOR)
		__builtin_prefetch((const uint8_t *)(uintptr_t)e->target.memory + sector * SECTOR);
}

enum fate transfer_serve(struct io_thread *t, struct vmm_lane *l, const struct vmm_chain *c,
			     struct vmm_completion *done)
{
	struct vmm_engine *e = t->engine;
	uint64_t offset, length;
	bool write;
	struct op *op;

	if (!atomic_load_explicit(&e->enabled, memory_order_relaxed) || !understand(e, c, &write, &offset, &length)) {
		lane_hand_over(l, c, 0);
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
		lane_hand_over(l, c, 0);
		return HANDED_OVER;
	}
	enum fate fate = go_on(t, l, op);
	if (fate != UNDER_WAY)
		over(op);
	return fate;
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
	t->has_ring = false;
}

bool transfer_unsubmitted(const struct io_thread *t)
{
	return t->has_ring && io_uring_sq_ready(&t->ring);
}

/* The kernel takes some of them, or none while it lacks memory: what stays is offered again in the next turn. */
void transfer_submit_all(struct io_thread *t)
{
	while (transfer_unsubmitted(t) && io_uring_submit(&t->ring) > 0)
		;
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
		lane_hand_over(l, &op->chain, (uint32_t)-result);
	over(op);
	return result > 0;
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
