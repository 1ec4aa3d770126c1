/*
 * What the engine does with the disk: a chain becomes a transfer, done at once or by the kernel; and what the engine's
 * threads and lanes are made of.  engine.c says when; transfer.c says how, and touches only what is its thread's own.
 */
#ifndef VMMBLK_TRANSFER_H
#define VMMBLK_TRANSFER_H

#include "engine.h"

#include <liburing.h>

#define BATCH 64

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
	int ready_fd, bell_fd;
	struct op *ops;				/* queue_size_max of them */
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

enum fate { DONE, UNDER_WAY, HANDED_OVER };

void transfer_expect(const struct vmm_engine *e, const struct vmm_chain *c);
enum fate transfer_serve(struct io_thread *t, struct vmm_lane *l, const struct vmm_chain *c,
			 struct vmm_completion *done);
int transfer_make_ring(struct io_thread *t);
void transfer_close_ring(struct io_thread *t);
bool transfer_unsubmitted(const struct io_thread *t);
void transfer_submit_all(struct io_thread *t);
int transfer_reap(struct io_thread *t);

/* In engine.c: have the worker answer it. */
void lane_hand_over(struct vmm_lane *l, const struct vmm_chain *chain, uint32_t error);

#endif
