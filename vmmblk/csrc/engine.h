/*
 * The native engine: serves queues whose disk is memory, a file or nothing, from the ring to the interrupt, in threads
 * of its own.
 *
 * It serves what is plainly good: reads, writes, discards and zeroes of whole sectors inside the disk, and flushes.
 * Everything else is handed over: other requests, bad ones, and what failed.  So there is one place that knows what
 * answer they get, and it is not here.
 *
 * A lane is what serves one queue.  Chains that are handed over wait in the lane until vmm_lane_take(), which looks to
 * its caller like vmm_queue_pop(); ready_fd, an eventfd, tells of them.  Whoever takes one completes it.
 */
#ifndef VMMBLK_ENGINE_H
#define VMMBLK_ENGINE_H

#include "core.h"

enum vmm_target_kind {
	VMM_TARGET_NULL,	/* reads give zeroes, writes vanish */
	VMM_TARGET_MEMORY,
	VMM_TARGET_FILE,
};

enum vmm_flush {
	VMM_FLUSH_HAND_OVER,
	VMM_FLUSH_NEEDLESS,	/* what was written is as durable as it gets */
	VMM_FLUSH_SYNC,		/* FILE: fdatasync */
};

struct vmm_target {
	uint32_t kind;
	uint32_t sector_size;	/* a power of two */
	uint64_t memory;	/* MEMORY: its address */
	int32_t fd;		/* FILE */
	uint32_t alignment;	/* FILE: what addresses and lengths in memory must be multiples of, a power of two */
	bool writable;
	bool direct;		/* FILE: opened with O_DIRECT */
	bool in_memory;		/* FILE: on a file system that never waits (tmpfs) */
	bool bounce;		/* FILE: the kernel is given private memory instead of guest memory */
	bool discards, zeroes;	/* MEMORY is zeroed, and its pages given back; of a FILE there is fallocate */
	uint32_t flush;
	uint64_t lost;		/* the address of an atomic bool, or 0: something written was lost, so no flush succeeds */
};

#define VMM_POLL_ALWAYS UINT64_MAX

struct vmm_engine_options {
	uint64_t poll_ns;	/* how long to look for more before sleeping, at most; or VMM_POLL_ALWAYS */
	bool poll_adaptive;	/* whether to look for less long when that was in vain */
	bool uring;		/* whether to use io_uring where it is there */
	uint32_t threads;
	uint32_t queue_size_max;
};

struct vmm_lane;
struct vmm_engine;

struct vmm_engine *vmm_engine_new(const struct vmm_target *target, const struct vmm_engine_options *options,
				  struct vmm_queue **queues, const int *ready_fds, uint32_t count);
int vmm_engine_start(struct vmm_engine *e, const int32_t *cpus, uint32_t nr_cpus);
void vmm_engine_stop(struct vmm_engine *e);
bool vmm_engine_join(struct vmm_engine *e, uint32_t milliseconds);
void vmm_engine_free(struct vmm_engine *e);
void vmm_engine_resize(struct vmm_engine *e, uint64_t size);
void vmm_engine_set_write_cache(struct vmm_engine *e, bool on);
void vmm_engine_limit(struct vmm_engine *e, uint32_t discard_sectors, uint32_t discard_segments, uint32_t zeroes_sectors,
		      uint32_t zeroes_segments);
void vmm_engine_enable(struct vmm_engine *e, bool on);
int vmm_engine_uring_error(const struct vmm_engine *e);
struct vmm_lane *vmm_engine_lane(struct vmm_engine *e, uint32_t index);
void vmm_lane_set_bell(struct vmm_lane *l, int bell_fd);
int vmm_lane_take(struct vmm_lane *l, struct vmm_chain *out, int max);

#endif
