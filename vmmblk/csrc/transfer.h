/*
 * What the engine does with the disk: a chain becomes an operation, done at once or by the kernel; and what the engine's
 * threads and lanes are made of.  engine.c says when; transfer.c says how, and touches only what is its thread's own.
 * ranges.c reads what discarding and zeroing are told, bounce.c has private memory for data.
 */
#ifndef VMMBLK_TRANSFER_H
#define VMMBLK_TRANSFER_H

#include "engine.h"

#include <liburing.h>

#define BATCH 64
#define BATCH_BYTES (16u << 20)		/* what one batch may cost, so that a drain need not wait long for its end */
#define SECTOR 512
#define RANGES_MAX 16			/* of one request; those with more are handed over */

enum request_type {
	TYPE_IN = 0,
	TYPE_OUT = 1,
	TYPE_FLUSH = 4,
	TYPE_DISCARD = 11,
	TYPE_WRITE_ZEROES = 13,
};

/* A segment of DISCARD or WRITE_ZEROES that is plainly good, in bytes. */
struct range {
	uint64_t offset, length;
	bool unmap;
};

/* What is asked of a file, until it is done; they are numbered as the slots of the queue are. */
struct op {
	struct vmm_chain chain;
	enum request_type type;
	struct iovec *iov;
	uint32_t max_iov, nr_iov, first;	/* vectors before first are done */
	uint64_t offset;
	struct range *ranges;			/* DISCARD, WRITE_ZEROES */
	uint32_t nr_ranges, range;		/* those before range are done */
	uint8_t *buffer;			/* IN, OUT: a piece of the data, if it goes through private memory */
	uint32_t piece, room, unit, units;	/* how much that is, may be, and where in the pool */
	uint64_t left;				/* bytes of the request that are in no piece yet */
	uint32_t seg, seg_done;			/* where in the chain's data the next piece begins */
	struct vmm_lane *lane;
	struct op *next;			/* of those that wait for private memory */
};

struct vmm_lane {
	struct vmm_engine *engine;
	struct vmm_queue *queue;
	int ready_fd, bell_fd;
	struct op *ops;				/* queue_size_max of them */
	pthread_mutex_t lock;			/* of what follows */
	struct vmm_chain *handed;		/* a ring of queue_size_max */
	uint32_t first, count;
	int failure;				/* what popping answered, in that life of the queue */
	uint32_t failure_epoch;
};

/* Private memory of a thread, in at most 64 units, and who waits for some. */
struct pool {
	uint8_t *memory;
	uint32_t units;
	uint64_t taken;				/* a bit for each unit */
	bool registered;			/* with the thread's ring, as its buffer 0 */
	struct op *first, **end;
};

struct io_thread {
	struct vmm_engine *engine;
	pthread_t thread;
	bool started;
	uint32_t index;
	struct io_uring ring;
	bool has_ring;
	uint32_t offered;			/* operations that the kernel has taken in this turn */
	uint32_t in_kernel;			/* operations that have not ended, those not yet submitted among them */
	uint64_t window;			/* how long to look for more before sleeping, ns */
	uint64_t slow_until;
	struct pool pool;
};

/* What one kind of request with ranges may ask for; nothing if it was not negotiated. */
struct range_limits {
	atomic_uint sectors, segments;
};

struct vmm_engine {
	struct vmm_target target;
	struct vmm_engine_options options;
	_Atomic uint64_t size;
	atomic_bool write_cache, enabled, stop;
	atomic_bool nowait_reads;
	atomic_bool *lost;			/* target.lost, or nobody else's */
	atomic_bool own_lost;
	struct range_limits discard, zeroes;
	atomic_int uring_error;
	int stop_fd;
	uint32_t nr_lanes, nr_threads;
	struct vmm_lane *lanes;
	struct io_thread *threads;
};

/* The data of a request. */
static inline const struct vmm_seg *segments(const struct vmm_chain *c, bool readable, uint32_t *n)
{
	*n = readable ? c->readable_segs : c->writable_segs;
	return readable ? c->segs : c->segs + c->readable_segs;
}

enum fate { DONE, UNDER_WAY, HANDED_OVER };

void transfer_expect(const struct vmm_engine *e, const struct vmm_chain *c);
enum fate transfer_serve(struct io_thread *t, struct vmm_lane *l, const struct vmm_chain *c,
			 struct vmm_completion *done);
int transfer_make_ring(struct io_thread *t);
void transfer_close_ring(struct io_thread *t);
bool transfer_unsubmitted(const struct io_thread *t);
void transfer_submit_all(struct io_thread *t);
int transfer_reap(struct io_thread *t);

int ranges_understand(const struct vmm_engine *e, const struct vmm_chain *c, bool discard, struct range *out);
bool ranges_in_memory(const struct vmm_engine *e, const struct range *ranges, int n, bool discard);

bool pool_make(struct pool *p, uint32_t threads);
void pool_free(struct pool *p);
size_t pool_size(const struct pool *p);
bool pool_take(struct pool *p, struct op *op);
void pool_give(struct pool *p, struct op *op);
void pool_wait(struct pool *p, struct op *op);
struct op *pool_next(struct pool *p);
void bounce_begin(struct op *op, uint64_t length);
bool bounce_next(struct op *op);

/* In engine.c: have the worker answer it. */
void lane_hand_over(struct vmm_lane *l, const struct vmm_chain *chain, uint32_t error);

#endif
